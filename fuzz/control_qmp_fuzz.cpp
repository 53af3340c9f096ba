// Bytes of a QMP client, in pieces: the same answers come however they are cut, and each is one JSON line.
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "control/fake_machine.h"
#include "control/qmp_commands.h"
#include "control/qmp_json.h"
#include "machine/device_table.h"

namespace {

using namespace wisp;

std::string answers(std::string_view bytes, std::size_t piece) {
  test::FakeMachine machine;
  const DriverTables tables = driver_tables();
  const std::string uuid;
  QmpFds fds;
  std::set<std::string> drives;
  Log log(-1);
  JsonFramer framer;
  std::string out;
  while (!bytes.empty()) {
    framer.push(bytes.substr(0, piece));
    bytes.remove_prefix(std::min(piece, bytes.size()));
    while (const auto message = framer.next()) {
      const auto request = *message ? parse_json(**message) : Result<Json>(std::unexpected(message->error()));
      if (!request) {
        out += json_line(request.error().message);
        continue;
      }
      QmpContext context{.machine = machine,
                         .tables = tables,
                         .uuid = uuid,
                         .fds = fds,
                         .drives_of_devices = drives,
                         .log = log};
      const QmpReply reply = run_qmp_command(context, *request);
      out += json_line(reply ? *reply : Json(reply.error().text));
      if (context.after_reply) {
        context.after_reply();
      }
    }
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) {
    return 0;
  }
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  WISP_ASSERT(answers(bytes, 1U + data[0]) == answers(bytes, bytes.size() + 1));
  return 0;
}
