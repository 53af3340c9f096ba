// The table of QMP commands and events. Inside this room only.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "base/log.h"
#include "base/unique_fd.h"
#include "control/launch_config.h"
#include "control/qmp_json.h"
#include "machine/device_table.h"
#include "machine/machine_control.h"

namespace wisp {

// QEMU's error classes that are used here.
enum class QmpErrorClass : std::uint8_t { kGeneric, kCommandNotFound, kDeviceNotActive, kDeviceNotFound };

struct QmpError {
  QmpErrorClass error_class = QmpErrorClass::kGeneric;
  std::string text;
};
using QmpReply = std::expected<Json, QmpError>;

[[nodiscard]] std::string_view error_class_name(QmpErrorClass error_class);

// Descriptors of one client: those that came with its bytes, and those that getfd gave a name.
struct QmpFds {
  static constexpr std::size_t kMaxArrived = 16;
  static constexpr std::size_t kMaxNamed = 64;
  std::vector<UniqueFd> arrived;
  std::map<std::string, UniqueFd, std::less<>> named;
};

// What a command works on.
struct QmpContext {
  MachineControl& machine;
  const DriverTables& tables;
  const std::string& uuid;
  QmpFds& fds;
  // Drives that go with the device of the same id, the StratoVirt way.
  std::set<std::string>& drives_of_devices;
  // For what the command line would log as well: options that were accepted and do nothing.
  Log& log;
  // Done once the reply is on its way.
  std::function<void()> after_reply = {};
};

enum class QmpType : std::uint8_t { kString, kInt, kBool, kObject, kAny };

struct QmpArgument {
  std::string_view name;
  QmpType type = QmpType::kString;
  bool required = false;
  std::string_view help = {};
};

using QmpHandler = QmpReply (*)(QmpContext& context, const Json& arguments);

struct QmpCommand {
  std::string_view name;
  std::string_view help;
  QmpHandler handler = nullptr;
  std::span<const QmpArgument> arguments = {};
  // Further arguments are allowed and checked against the tables of devices and back ends.
  bool open_arguments = false;
  // The "arguments" of the example in docs/qmp.md.
  std::string_view example = {};
};

struct QmpEventInfo {
  std::string_view name;
  std::string_view help;
  std::string_view data;  // as documented
};

[[nodiscard]] std::span<const QmpCommand> qmp_commands();
[[nodiscard]] std::span<const QmpEventInfo> qmp_events();

// Runs one request object: finds the command, checks its arguments, calls it. The answer has no id yet.
[[nodiscard]] QmpReply run_qmp_command(QmpContext& context, const Json& request);

[[nodiscard]] Json version_json();
[[nodiscard]] std::string_view run_state_name(RunState state);
// Where a device is in the machine, as QEMU's object model writes it.
[[nodiscard]] std::string device_path(std::string_view id);

// Handlers, by file.
// qmp_query.cpp
[[nodiscard]] QmpReply qmp_query_status(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_version(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_commands(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_events(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_target(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_kvm(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_name(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_uuid(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_machines(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_cpus(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_cpus_fast(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_hotpluggable_cpus(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_block(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_named_block_nodes(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_blockstats(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_chardev(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_iothreads(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_balloon(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_query_memory_size(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_empty_list(QmpContext&, const Json&);
// qmp_inspect.cpp
[[nodiscard]] QmpReply qmp_command_line_options(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_qom_list_types(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_device_list_properties(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_human_monitor_command(QmpContext&, const Json&);
// qmp_ringbuf.cpp
[[nodiscard]] QmpReply qmp_ringbuf_write(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_ringbuf_read(QmpContext&, const Json&);
// qmp_change.cpp
[[nodiscard]] QmpReply qmp_capabilities(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_stop(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_cont(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_system_powerdown(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_system_reset(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_quit(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_balloon(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_getfd(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_closefd(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_blockdev_add(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_blockdev_del(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_netdev_add(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_netdev_del(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_chardev_add(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_chardev_remove(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_device_add(QmpContext&, const Json&);
[[nodiscard]] QmpReply qmp_device_del(QmpContext&, const Json&);

// Replies from results.
[[nodiscard]] inline std::unexpected<QmpError> qmp_fail(std::string text) {
  return std::unexpected(QmpError{.error_class = QmpErrorClass::kGeneric, .text = std::move(text)});
}
[[nodiscard]] inline QmpReply qmp_reply(const Result<void>& result) {
  return result ? QmpReply(Json::object()) : QmpReply(qmp_fail(result.error().message));
}

}  // namespace wisp
