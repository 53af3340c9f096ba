// Words separated by zero bytes as a command line: parses or gives a one-line error, and what parses is
// sound.
#include <cstdint>
#include <string>
#include <vector>

#include "control/command_line.h"
#include "machine/device_table.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace wisp;
  std::vector<std::string> words(1);
  for (std::size_t i = 0; i < size; ++i) {
    if (data[i] == 0) {
      words.emplace_back();
    } else {
      words.back() += static_cast<char>(data[i]);
    }
  }
  const auto parsed = parse_command_line(words, driver_tables());
  if (!parsed) {
    WISP_ASSERT(!parsed.error().message.empty());
    WISP_ASSERT(!parsed.error().message.contains('\n'));
    return 0;
  }
  if (parsed->action == CommandAction::kRun) {
    const MachineConfig& machine = parsed->launch.machine;
    const CpuTopology& t = machine.cpus.topology;
    WISP_ASSERT(!machine.boot.kernel.empty());
    WISP_ASSERT(machine.cpus.count >= 1 && machine.cpus.count <= machine.cpus.max);
    WISP_ASSERT(t.sockets * t.dies * t.clusters * t.cores * t.threads == machine.cpus.max);
    WISP_ASSERT(machine.memory.size > 0 && machine.memory.size % 4096 == 0);
    for (const std::string& warning : parsed->warnings) {
      WISP_ASSERT(!warning.contains('\n'));
    }
  }
  return 0;
}
