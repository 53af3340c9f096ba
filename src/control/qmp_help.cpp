// docs/qmp.md, made from the tables.
#include "control/qmp_commands.h"
#include "control/qmp_server.h"
#include "control/qmp_session.h"

namespace wisp {
namespace {

std::string_view argument_type(QmpType type) {
  switch (type) {
    case QmpType::kString:
      return "string";
    case QmpType::kInt:
      return "integer";
    case QmpType::kBool:
      return "boolean";
    case QmpType::kObject:
      return "object";
    case QmpType::kAny:
      return "object or list";
  }
  return {};
}

}  // namespace

std::string qmp_markdown(const std::function<std::string(const std::string& request)>& run) {
  std::string out = fmt::format(
      "# QMP\n\n"
      "Made from the table in `src/control/qmp_commands.cpp`; a test runs every example and keeps this page "
      "equal "
      "to what comes out.\n\n"
      "`-qmp unix:qmp.sock,server,nowait` listens on a Unix socket (mode 0600), `-qmp "
      "tcp:127.0.0.1:4444,server,"
      "nowait` on a TCP port; both may be given several times, and each takes several clients ({} together). "
      "The "
      "wire format is QEMU's: JSON objects, one answer for each command in order, events in between.\n\n"
      "```sh\n"
      "echo '{{\"execute\": \"query-status\"}}' | socat - UNIX-CONNECT:qmp.sock\n"
      "```\n\n"
      "- The greeting comes first. `qmp_capabilities` need not be sent: any first command ends the greeting. "
      "Events "
      "go to clients that have sent a command.\n"
      "- `id`, of any type, comes back in the answer.\n"
      "- A message may be split or joined at will, holds at most {} bytes, and nests at most {} levels; it "
      "is strict "
      "JSON in UTF-8 with each key once. After bytes that are not JSON, reading goes on behind the next "
      "newline; a "
      "longer message ends the connection.\n"
      "- There is no limit on commands a second. A client that does not read is not read from once {} KiB "
      "wait for "
      "it, and is cut off at {} MiB.\n"
      "- A descriptor sent (SCM_RIGHTS) with `getfd` belongs to the client that sent it and is closed when "
      "it "
      "leaves.\n\n"
      "The answers below come from a small machine of the test.\n\n## Commands\n",
      QmpServer::kMaxClients, JsonFramer::kMaxMessage, JsonFramer::kMaxDepth, QmpSession::kOutputPause >> 10,
      QmpSession::kOutputMax >> 20);
  for (const QmpCommand& command : qmp_commands()) {
    out += fmt::format("\n### `{}`\n\n{}\n\n", command.name, command.help);
    if (!command.arguments.empty()) {
      out += "| argument | type | | meaning |\n|---|---|---|---|\n";
      for (const QmpArgument& argument : command.arguments) {
        out += fmt::format("| `{}` | {} | {} | {} |\n", argument.name, argument_type(argument.type),
                           argument.required ? "required" : "", argument.help);
      }
      out += '\n';
    }
    const std::string request =
        command.example.empty()
            ? fmt::format(R"({{"execute": "{}"}})", command.name)
            : fmt::format(R"({{"execute": "{}", "arguments": {}}})", command.name, command.example);
    std::string answer = run(request);
    while (answer.ends_with('\n') || answer.ends_with('\r')) {
      answer.pop_back();
    }
    constexpr std::size_t kShown = 600;
    if (answer.size() > kShown) {
      answer = answer.substr(0, kShown) + " ...";
    }
    out += fmt::format("```\n-> {}\n<- {}\n```\n", request, answer);
  }
  out += "\n## Events\n\n| event | when | data |\n|---|---|---|\n";
  for (const QmpEventInfo& event : qmp_events()) {
    out += fmt::format("| `{}` | {} | {} |\n", event.name, event.help,
                       event.data.empty() ? std::string() : fmt::format("`{}`", event.data));
  }
  out +=
      "\nEach has `timestamp` with `seconds` and `microseconds`. `reason` of SHUTDOWN is one of "
      "guest-shutdown, "
      "guest-reset, host-qmp-quit, host-signal, host-ui, host-error; that of RESET is guest-reset or "
      "host-qmp-system-reset.\n";
  return out;
}

}  // namespace wisp
