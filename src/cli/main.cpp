// wisp: options first start a machine; a word first is a command of its own.
#include <cstdio>
#include <string>
#include <vector>

#include "base/clock.h"
#include "cli/doctor.h"
#include "cli/run.h"
#include "control/command_line.h"
#include "machine/device_table.h"

int main(int argc, char** argv) {
  using namespace wisp;
  const std::uint64_t start_ns = SystemClock().monotonic_ns();
  const std::vector<std::string> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
  if (!arguments.empty() && arguments.front() == "doctor") {
    return run_doctor(std::span(arguments).subspan(1), real_host());
  }
  if (!arguments.empty() && arguments.front() == "help") {
    std::fputs(help_text().c_str(), stdout);
    return kExitGood;
  }
  const DriverTables tables = driver_tables();
  const auto command_line = parse_command_line(arguments, tables);
  if (!command_line) {
    (void)std::fprintf(stderr, "wisp: %s\n", command_line.error().message.c_str());
    return kExitBadInput;
  }
  if (command_line->action == CommandAction::kPrint) {
    std::fputs(command_line->text.c_str(), stdout);
    return kExitGood;
  }
  return run_machine(*command_line, tables, start_ns);
}
