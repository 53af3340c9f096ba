// The command line of a machine: StratoVirt's and QEMU's single-dash options (every option is also taken with
// two dashes) to plain configuration, checked in one step.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "control/launch_config.h"
#include "machine/device_table.h"

namespace wisp {

enum class CommandAction : std::uint8_t {
  kRun,    // start `launch`
  kPrint,  // print `text` and leave with status 0: --help, --version, -device help, ...
};

struct CommandLine {
  CommandAction action = CommandAction::kRun;
  std::string text;
  LaunchConfig launch;
  // One line each; for options that were accepted but have no effect.
  std::vector<std::string> warnings;
};

// `arguments` without the program's name. The error is one line that names the option, what was found and
// what was expected; the program exits with status 2.
[[nodiscard]] Result<CommandLine> parse_command_line(std::span<const std::string> arguments,
                                                     const DriverTables& tables);

// Texts made from the tables.
[[nodiscard]] std::string version_text();
[[nodiscard]] std::string help_text();
// The reference of all options in Markdown: docs/options.md.
[[nodiscard]] std::string options_markdown();
// The options of every driver and back end in Markdown: docs/devices.md.
[[nodiscard]] std::string drivers_markdown(const DriverTables& tables);

// The program's version, "0.1.0".
[[nodiscard]] std::string_view program_version();

}  // namespace wisp
