#include "control/qmp_commands.h"

#include <algorithm>
#include <array>

#include "control/option_text.h"

namespace wisp {
namespace {

constexpr auto kCapabilitiesArgs =
    std::to_array<QmpArgument>({{.name = "enable",
                                 .type = QmpType::kAny,
                                 .help = "a list of capabilities; there are none, so it is empty"}});
constexpr auto kBalloonArgs = std::to_array<QmpArgument>(
    {{.name = "value", .type = QmpType::kInt, .required = true, .help = "bytes the guest shall have"}});
constexpr auto kGetfdArgs =
    std::to_array<QmpArgument>({{.name = "fdname",
                                 .required = true,
                                 .help = "name for the descriptor sent with the command (SCM_RIGHTS)"}});
constexpr auto kClosefdArgs =
    std::to_array<QmpArgument>({{.name = "fdname", .required = true, .help = "name that getfd gave"}});
constexpr auto kBlockdevAddArgs = std::to_array<QmpArgument>({
    {.name = "node-name", .required = true, .help = "id of the drive"},
    {.name = "driver", .help = "raw, or file and host_device with filename here"},
    {.name = "file", .type = QmpType::kAny, .help = "object with driver, filename and aio"},
    {.name = "filename", .help = "path, where driver is file or host_device"},
    {.name = "read-only", .type = QmpType::kBool, .help = "no writes"},
    {.name = "cache", .type = QmpType::kObject, .help = "object with direct and no-flush"},
    {.name = "aio", .help = "as in -drive"},
    {.name = "discard", .help = "unmap or ignore"},
    {.name = "detect-zeroes", .help = "accepted; zeroes are written as other data is"},
});
constexpr auto kNodeArgs =
    std::to_array<QmpArgument>({{.name = "node-name", .required = true, .help = "id of the drive"}});
constexpr auto kNetdevAddArgs = std::to_array<QmpArgument>({
    {.name = "id", .required = true, .help = "id of the network"},
    {.name = "type", .help = "kind, as in -netdev; tap where it is left out"},
});
constexpr auto kIdArgs = std::to_array<QmpArgument>({{.name = "id", .required = true, .help = "id"}});
constexpr auto kChardevAddArgs = std::to_array<QmpArgument>({
    {.name = "id", .required = true, .help = "id of the character device"},
    {.name = "backend", .type = QmpType::kObject, .required = true, .help = "object with type and data"},
});
constexpr auto kRingbufWriteArgs = std::to_array<QmpArgument>({
    {.name = "device", .required = true, .help = "id of a character device of kind ringbuf"},
    {.name = "data", .required = true, .help = "what goes to the ring's end"},
    {.name = "format", .help = "of data: utf8 or base64; utf8 where it is left out"},
});
constexpr auto kRingbufReadArgs = std::to_array<QmpArgument>({
    {.name = "device", .required = true, .help = "id of a character device of kind ringbuf"},
    {.name = "size", .type = QmpType::kInt, .required = true, .help = "how many bytes at most"},
    {.name = "format",
     .help = "of the answer: utf8 or base64; utf8, with bytes that are none replaced, where it is left out"},
});
constexpr auto kDeviceAddArgs = std::to_array<QmpArgument>({
    {.name = "driver", .required = true, .help = "as in -device"},
    {.name = "id", .required = true, .help = "id of the device"},
});
constexpr auto kOptionArgs =
    std::to_array<QmpArgument>({{.name = "option", .help = "this option only, without its dash"}});
constexpr auto kTypesArgs = std::to_array<QmpArgument>({
    {.name = "implements", .help = "types that are of this type: device"},
    {.name = "abstract", .type = QmpType::kBool, .help = "accepted; there are no abstract types"},
});
constexpr auto kTypenameArgs =
    std::to_array<QmpArgument>({{.name = "typename", .required = true, .help = "driver of -device"}});
constexpr auto kHumanArgs = std::to_array<QmpArgument>({
    {.name = "command-line", .required = true, .help = "help, or info with a word that help lists"},
    {.name = "cpu-index", .type = QmpType::kInt, .help = "accepted"},
});
constexpr auto kNamedNodesArgs =
    std::to_array<QmpArgument>({{.name = "flat", .type = QmpType::kBool, .help = "accepted"}});
constexpr auto kBlockstatsArgs =
    std::to_array<QmpArgument>({{.name = "query-nodes", .type = QmpType::kBool, .help = "accepted"}});

constexpr auto kCommands = std::to_array<QmpCommand>({
    {.name = "qmp_capabilities",
     .help = "Ends the greeting. It need not be sent: any first command ends it. Events come from then on.",
     .handler = qmp_capabilities,
     .arguments = kCapabilitiesArgs},
    {.name = "query-version", .help = "The program's version.", .handler = qmp_query_version},
    {.name = "query-commands", .help = "The names of all commands.", .handler = qmp_query_commands},
    {.name = "query-events", .help = "The names of all events.", .handler = qmp_query_events},
    {.name = "query-status", .help = "Whether the machine runs.", .handler = qmp_query_status},
    {.name = "query-name", .help = "The machine's name, where -name gave one.", .handler = qmp_query_name},
    {.name = "query-uuid",
     .help = "The machine's UUID (-uuid); zeros without one.",
     .handler = qmp_query_uuid},
    {.name = "query-target", .help = "The guest's architecture.", .handler = qmp_query_target},
    {.name = "query-kvm",
     .help = "Whether the machine runs on KVM, and whether the host has it.",
     .handler = qmp_query_kvm},
    {.name = "query-machines", .help = "The machine types.", .handler = qmp_query_machines},
    {.name = "query-cpus", .help = "The CPUs with their threads (the old form).", .handler = qmp_query_cpus},
    {.name = "query-cpus-fast", .help = "The CPUs with their threads.", .handler = qmp_query_cpus_fast},
    {.name = "query-hotpluggable-cpus",
     .help = "The CPUs and where they sit. None can be added yet, so these are the present ones.",
     .handler = qmp_query_hotpluggable_cpus},
    {.name = "query-memory-size-summary",
     .help = "The memory that the machine started with.",
     .handler = qmp_query_memory_size},
    {.name = "query-iothreads", .help = "The iothreads.", .handler = qmp_query_iothreads},
    {.name = "query-block", .help = "The drives and the devices that use them.", .handler = qmp_query_block},
    {.name = "query-named-block-nodes",
     .help = "The drives alone.",
     .handler = qmp_query_named_block_nodes,
     .arguments = kNamedNodesArgs},
    {.name = "query-blockstats",
     .help = "Counters of the drives that have them.",
     .handler = qmp_query_blockstats,
     .arguments = kBlockstatsArgs},
    {.name = "query-block-jobs", .help = "Always empty: there are no jobs.", .handler = qmp_empty_list},
    {.name = "query-chardev", .help = "The character devices.", .handler = qmp_query_chardev},
    {.name = "query-tpm-models", .help = "Always empty: there is no TPM.", .handler = qmp_empty_list},
    {.name = "query-tpm-types", .help = "Always empty: there is no TPM.", .handler = qmp_empty_list},
    {.name = "query-migrate-capabilities",
     .help = "Always empty: there is no migration yet.",
     .handler = qmp_empty_list},
    {.name = "query-gic-capabilities",
     .help = "Always empty: only ARM machines have a GIC.",
     .handler = qmp_empty_list},
    {.name = "query-command-line-options",
     .help = "The options of the command line.",
     .handler = qmp_command_line_options,
     .arguments = kOptionArgs,
     .example = R"({"option": "accel"})"},
    {.name = "qom-list-types",
     .help = "The drivers of -device.",
     .handler = qmp_qom_list_types,
     .arguments = kTypesArgs},
    {.name = "device-list-properties",
     .help = "The options of a driver.",
     .handler = qmp_device_list_properties,
     .arguments = kTypenameArgs,
     .example = R"({"typename": "virtio-net-device"})"},
    {.name = "stop",
     .help = "Pauses the machine; one that has not started yet starts paused.",
     .handler = qmp_stop},
    {.name = "cont",
     .help = "Lets a paused machine go on, or starts one that -S or stop held.",
     .handler = qmp_cont},
    {.name = "system_powerdown", .help = "Presses the power button.", .handler = qmp_system_powerdown},
    {.name = "system_reset", .help = "Resets the machine at once.", .handler = qmp_system_reset},
    {.name = "quit", .help = "Ends the machine and the process at once.", .handler = qmp_quit},
    {.name = "query-balloon",
     .help = "How much memory the guest has, and its statistics where it gives them: those of the last "
             "query, or of the "
             "last guest-stats-polling-interval of -device virtio-balloon-device.",
     .handler = qmp_query_balloon},
    {.name = "balloon",
     .help = "Asks the guest to have this much memory.",
     .handler = qmp_balloon,
     .arguments = kBalloonArgs,
     .example = R"({"value": 134217728})"},
    {.name = "getfd",
     .help = "Keeps the descriptor that came with the command, for this client, under a name.",
     .handler = qmp_getfd,
     .arguments = kGetfdArgs,
     .example = R"({"fdname": "tap0"})"},
    {.name = "closefd",
     .help = "Closes a descriptor that getfd kept.",
     .handler = qmp_closefd,
     .arguments = kClosefdArgs,
     .example = R"({"fdname": "tap0"})"},
    {.name = "blockdev-add",
     .help = "Adds a drive, for device_add.",
     .handler = qmp_blockdev_add,
     .arguments = kBlockdevAddArgs,
     .open_arguments = true,
     .example =
         R"({"node-name": "data", "file": {"driver": "file", "filename": "/srv/data.img"}, "read-only": true})"},
    {.name = "device_add",
     .help =
         "Plugs a device in. Its options are those of -device; numbers and switches may be JSON numbers and "
         "booleans. StratoVirt's form is taken too: virtio-blk-mmio and virtio-net-mmio with addr, where the "
         "drive or network has the device's id if none is named; such a drive goes with its device.",
     .handler = qmp_device_add,
     .arguments = kDeviceAddArgs,
     .open_arguments = true,
     .example = R"({"driver": "virtio-blk-device", "id": "disk1", "drive": "data"})"},
    {.name = "device_del",
     .help = "Takes a device away at once; the guest is told of it then, and DEVICE_DELETED comes behind the "
             "reply.",
     .handler = qmp_device_del,
     .arguments = kIdArgs,
     .example = R"({"id": "disk1"})"},
    {.name = "blockdev-del",
     .help = "Removes a drive that no device uses.",
     .handler = qmp_blockdev_del,
     .arguments = kNodeArgs,
     .example = R"({"node-name": "data"})"},
    {.name = "netdev_add",
     .help =
         "Adds a network, for device_add. Its options are those of -netdev; fd= and its kin take names that "
         "getfd gave.",
     .handler = qmp_netdev_add,
     .arguments = kNetdevAddArgs,
     .open_arguments = true,
     .example = R"({"type": "tap", "id": "net1", "ifname": "tap1"})"},
    {.name = "netdev_del",
     .help = "Removes a network that no device uses.",
     .handler = qmp_netdev_del,
     .arguments = kIdArgs,
     .example = R"({"id": "net1"})"},
    {.name = "chardev-add",
     .help = "Adds a character device.",
     .handler = qmp_chardev_add,
     .arguments = kChardevAddArgs,
     .example = R"({"id": "con1", "backend": {"type": "pty", "data": {}}})"},
    {.name = "chardev-remove",
     .help = "Removes a character device that no device uses.",
     .handler = qmp_chardev_remove,
     .arguments = kIdArgs,
     .example = R"({"id": "con1"})"},
    {.name = "ringbuf-write",
     .help = "Puts bytes into the ring of a ringbuf character device; the guest does not get them.",
     .handler = qmp_ringbuf_write,
     .arguments = kRingbufWriteArgs,
     .example = R"({"device": "log0", "data": "hello"})"},
    {.name = "ringbuf-read",
     .help = "Takes the oldest bytes out of the ring of a ringbuf character device.",
     .handler = qmp_ringbuf_read,
     .arguments = kRingbufReadArgs,
     .example = R"({"device": "log0", "size": 1000})"},
    {.name = "human-monitor-command",
     .help = "A few forms of QEMU's monitor, for people and old scripts.",
     .handler = qmp_human_monitor_command,
     .arguments = kHumanArgs,
     .example = R"({"command-line": "info status"})"},
});

constexpr auto kEvents = std::to_array<QmpEventInfo>({
    {"SHUTDOWN", "The machine ends.", R"({"guest": true, "reason": "guest-shutdown"})"},
    {"RESET", "The machine was reset.", R"({"guest": true, "reason": "guest-reset"})"},
    {"STOP", "The machine was paused.", ""},
    {"RESUME", "The machine runs on.", ""},
    {"POWERDOWN", "The power button was pressed.", ""},
    {"BALLOON_CHANGE", "The guest's memory changed; at most one a second.", R"({"actual": 134217728})"},
    {"DEVICE_DELETED", "A device is gone.", R"({"device": "disk1", "path": "/machine/peripheral/disk1"})"},
});

bool has_type(const Json& value, QmpType type) {
  switch (type) {
    case QmpType::kString:
      return value.is_string();
    case QmpType::kInt:
      return value.is_number_integer();
    case QmpType::kBool:
      return value.is_boolean();
    case QmpType::kObject:
      return value.is_object();
    case QmpType::kAny:
      return true;
  }
  return false;
}

std::string_view type_name(QmpType type) {
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
      return "any";
  }
  return "any";
}

std::expected<void, QmpError> check_arguments(const QmpCommand& command, const Json& arguments) {
  for (const auto& [name, value] : arguments.items()) {
    const auto known = std::ranges::find(command.arguments, std::string_view(name), &QmpArgument::name);
    if (known == command.arguments.end()) {
      if (!command.open_arguments) {
        return qmp_fail(fmt::format("Parameter '{}' is unexpected", clip(name, 80)));
      }
      continue;
    }
    if (!has_type(value, known->type)) {
      return qmp_fail(
          fmt::format("Invalid parameter type for '{}', expected: {}", name, type_name(known->type)));
    }
  }
  for (const QmpArgument& argument : command.arguments) {
    if (argument.required && !arguments.contains(argument.name)) {
      return qmp_fail(fmt::format("Parameter '{}' is missing", argument.name));
    }
  }
  return {};
}

}  // namespace

std::string_view error_class_name(QmpErrorClass error_class) {
  switch (error_class) {
    case QmpErrorClass::kGeneric:
      return "GenericError";
    case QmpErrorClass::kCommandNotFound:
      return "CommandNotFound";
    case QmpErrorClass::kDeviceNotActive:
      return "DeviceNotActive";
    case QmpErrorClass::kDeviceNotFound:
      return "DeviceNotFound";
  }
  return "GenericError";
}

std::span<const QmpCommand> qmp_commands() {
  return kCommands;
}

std::span<const QmpEventInfo> qmp_events() {
  return kEvents;
}

QmpReply run_qmp_command(QmpContext& context, const Json& request) {
  if (!request.is_object()) {
    return qmp_fail("QMP input must be a JSON object");
  }
  for (const auto& [name, value] : request.items()) {
    if (name != "execute" && name != "arguments" && name != "id") {
      return qmp_fail(fmt::format("QMP input member '{}' is unexpected", clip(name, 80)));
    }
  }
  const auto execute = request.find("execute");
  if (execute == request.end()) {
    return qmp_fail("QMP input lacks member 'execute'");
  }
  if (!execute->is_string()) {
    return qmp_fail("QMP input member 'execute' must be a string");
  }
  const auto given = request.find("arguments");
  if (given != request.end() && !given->is_object()) {
    return qmp_fail("QMP input member 'arguments' must be an object");
  }
  const auto& name = execute->get_ref<const std::string&>();
  const auto command = std::ranges::find(kCommands, std::string_view(name), &QmpCommand::name);
  if (command == kCommands.end()) {
    return std::unexpected(
        QmpError{.error_class = QmpErrorClass::kCommandNotFound,
                 .text = fmt::format("The command {} has not been found", clip(name, 80))});
  }
  static const Json kNoArguments = Json::object();
  const Json& arguments = given != request.end() ? *given : kNoArguments;
  if (auto checked = check_arguments(*command, arguments); !checked) {
    return std::unexpected(std::move(checked).error());
  }
  try {
    return command->handler(context, arguments);
  } catch (const Json::exception&) {
    return qmp_fail(fmt::format("Invalid parameter type in the arguments of {}", command->name));
  }
}

}  // namespace wisp
