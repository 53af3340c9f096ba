// The table of command-line options. Inside this room only.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/property.h"
#include "control/launch_config.h"
#include "control/option_text.h"
#include "machine/device_table.h"

namespace wisp {

// A memory-backend-* object, before it is known who uses it.
struct MemoryBackend {
  std::string id;
  RamOptions ram;
  bool used = false;
};

// A -mon, resolved once all chardevs are known.
struct MonitorRequest {
  std::string chardev;
  std::string what;
};

// What the options say together, before the whole is checked.
struct CommandLineBuilder {
  explicit CommandLineBuilder(const DriverTables& all_tables) : tables(all_tables) {}

  const DriverTables& tables;
  LaunchConfig launch;
  std::vector<std::string> warnings;
  // Text to print in place of a start ("-device help").
  std::optional<std::string> print;

  std::vector<KeyValue> machine_options;  // of all -machine and -accel together
  std::optional<std::uint64_t> memory_size;
  std::string memory_path;
  bool memory_prealloc = false;
  std::string numa_memdev;
  bool numa_seen = false;
  std::vector<MemoryBackend> memory_backends;
  std::vector<MonitorRequest> monitors;

  void warn(std::string text) { warnings.push_back(std::move(text)); }
};

enum class OptionValue : std::uint8_t { kNone, kOne, kOptional, kSeveral };
enum class OptionGroup : std::uint8_t {
  kMachine,
  kBoot,
  kDisk,
  kNetwork,
  kConsole,
  kDevice,
  kControl,
  kProcess,
  kCompat,
};

struct OptionSpec;
// `value` is empty for options without one.
using OptionHandler = Result<void> (*)(CommandLineBuilder& builder, const OptionSpec& option,
                                       const std::string& value);

struct OptionSpec {
  std::string_view name;  // without the dash
  OptionValue value = OptionValue::kOne;
  bool repeatable = false;
  OptionGroup group = OptionGroup::kMachine;
  std::string_view argument = {};  // how help shows the value
  std::string_view help = {};      // one or two sentences
  std::string_view example = {};   // arguments that parse, but for what a machine needs besides
  OptionHandler handler = nullptr;
  std::string_view alias_of = {};
};

[[nodiscard]] std::span<const OptionSpec> option_table();
// By name without dashes; aliases give their own entry.
[[nodiscard]] const OptionSpec* find_option(std::string_view name);
// Why an option of other programs is not one of Wisp's; empty where there is nothing special to say.
[[nodiscard]] std::string_view foreign_option_hint(std::string_view name);

// The option and its value as messages name it: "-drive 'file=x'".
[[nodiscard]] std::string what_of(const OptionSpec& option, std::string_view value);

// Checks what only the whole can show (missing kernel, ids, references) and finishes the configuration.
[[nodiscard]] Result<void> finish_command_line(CommandLineBuilder& builder);

// Help for one option's value: its fixed options, or the drivers of a table.
[[nodiscard]] std::string properties_help(std::string_view title, std::span<const PropertySpec> properties);
[[nodiscard]] std::string drivers_help(std::string_view title, std::span<const DriverInfo> drivers);

// Handlers, one per option or kind of option.
[[nodiscard]] Result<void> take_machine(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_accel(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_enable_kvm(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_name(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_uuid(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_smp(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_cpu(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_memory(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_mem_path(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_mem_prealloc(CommandLineBuilder&, const OptionSpec&,
                                             const std::string& value);
[[nodiscard]] Result<void> take_numa(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_object(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_drive(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_netdev(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_chardev(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_serial(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_device(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_qmp(CommandLineBuilder&, const OptionSpec&, const std::string& value);
[[nodiscard]] Result<void> take_mon(CommandLineBuilder&, const OptionSpec&, const std::string& value);

// What can stand in the value of an option that has one table for it (-machine, -smp); empty for others.
[[nodiscard]] std::span<const PropertySpec> fixed_properties(std::string_view option);
[[nodiscard]] std::span<const PropertySpec> mon_properties();
[[nodiscard]] std::span<const DriverInfo> own_object_kinds();  // memory-backend-*, iothread

// Once all options are read: what -machine and -accel say together, and the memory that -m, -mem-path, -numa
// and the memory backends give.
[[nodiscard]] Result<void> finish_machine(CommandLineBuilder& builder);
[[nodiscard]] Result<void> finish_memory(CommandLineBuilder& builder);

}  // namespace wisp
