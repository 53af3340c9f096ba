// Commands that tell about the program's tables, and the monitor's few words for people.
#include <algorithm>
#include <array>

#include "control/command_line.h"
#include "control/option_table.h"
#include "control/qmp_commands.h"

namespace wisp {
namespace {

// The type words of QEMU's CommandLineParameterInfo.
std::string_view option_type(PropertyKind kind) {
  switch (kind) {
    case PropertyKind::kBool:
      return "boolean";
    case PropertyKind::kUint:
      return "number";
    case PropertyKind::kSize:
      return "size";
    case PropertyKind::kString:
    case PropertyKind::kEnum:
    case PropertyKind::kMac:
      return "string";
  }
  return "string";
}

// The type words of QEMU's ObjectPropertyInfo.
std::string_view property_type(PropertyKind kind) {
  switch (kind) {
    case PropertyKind::kBool:
      return "bool";
    case PropertyKind::kUint:
      return "uint64";
    case PropertyKind::kSize:
      return "size";
    case PropertyKind::kString:
    case PropertyKind::kEnum:
    case PropertyKind::kMac:
      return "str";
  }
  return "str";
}

void append_parameters(Json& list, std::span<const PropertySpec> specs) {
  for (const PropertySpec& spec : specs) {
    const auto same = [&](const Json& entry) { return entry["name"] == spec.name; };
    if (std::any_of(list.begin(), list.end(), same)) {
      continue;
    }
    Json entry{{"name", spec.name}, {"type", option_type(spec.kind)}, {"help", spec.help}};
    if (!spec.default_text.empty()) {
      entry["default"] = spec.default_text;
    }
    list.push_back(std::move(entry));
  }
}

Json parameters_of(std::string_view option, const DriverTables& tables) {
  struct Kinds {
    std::string_view option;
    std::span<const DriverInfo> drivers;
  };
  Json list = Json::array();
  append_parameters(list, fixed_properties(option));
  for (const Kinds& kinds :
       {Kinds{"drive", tables.drives}, Kinds{"netdev", tables.netdevs}, Kinds{"chardev", tables.chardevs},
        Kinds{"object", own_object_kinds()}, Kinds{"object", tables.objects}}) {
    if (kinds.option == option) {
      for (const DriverInfo& driver : kinds.drivers) {
        append_parameters(list, driver.properties);
      }
    }
  }
  return list;
}

// Monitor text ends its lines the way a terminal wants them.
constexpr std::string_view kEol = "\r\n";

std::string info_status(QmpContext& context) {
  return fmt::format("VM status: {}{}", run_state_name(context.machine.state()), kEol);
}
std::string info_name(QmpContext& context) {
  return fmt::format("{}{}", context.machine.config().name, kEol);
}
std::string info_version(QmpContext&) {
  return fmt::format("wisp {}{}", program_version(), kEol);
}
std::string info_uuid(QmpContext& context) {
  return fmt::format("{}{}", context.uuid.empty() ? "00000000-0000-0000-0000-000000000000" : context.uuid,
                     kEol);
}
std::string info_kvm(QmpContext& context) {
  return fmt::format("kvm support: {}{}", context.machine.engine_name() == "kvm" ? "enabled" : "disabled",
                     kEol);
}
std::string info_cpus(QmpContext& context) {
  std::string text;
  for (const VcpuInfo& vcpu : context.machine.vcpus()) {
    text += fmt::format("{} CPU #{}: thread_id={}{}", vcpu.index == 0 ? '*' : ' ', vcpu.index, vcpu.thread_id,
                        kEol);
  }
  return text;
}
std::string info_block(QmpContext& context) {
  std::string text;
  for (const BlockInfo& block : context.machine.blocks()) {
    text += fmt::format("{}: {} ({}{}){}", block.drive_id, block.file, block.format,
                        block.read_only ? ", read-only" : "", kEol);
    if (!block.device_id.empty()) {
      text += fmt::format("    Attached to:      {}{}", device_path(block.device_id), kEol);
    }
  }
  return text;
}
std::string info_chardev(QmpContext& context) {
  std::string text;
  for (const ChardevInfo& chardev : context.machine.chardevs()) {
    text += fmt::format("{}: filename={}{}", chardev.id, chardev.description, kEol);
  }
  return text;
}
std::string info_balloon(QmpContext& context) {
  const auto balloon = context.machine.balloon();
  return balloon ? fmt::format("balloon: actual={}{}", balloon->actual >> 20, kEol)
                 : fmt::format("Error: {}{}", balloon.error().message, kEol);
}
std::string info_snapshots(QmpContext&) {
  return fmt::format("There is no snapshot available.{}", kEol);
}

struct Info {
  std::string_view word;
  std::string (*text)(QmpContext&);
};
constexpr auto kInfos = std::to_array<Info>({{"balloon", info_balloon},
                                             {"block", info_block},
                                             {"chardev", info_chardev},
                                             {"cpus", info_cpus},
                                             {"kvm", info_kvm},
                                             {"name", info_name},
                                             {"snapshots", info_snapshots},
                                             {"status", info_status},
                                             {"uuid", info_uuid},
                                             {"version", info_version}});

}  // namespace

QmpReply qmp_command_line_options(QmpContext& context, const Json& arguments) {
  const std::string wanted = arguments.value("option", std::string());
  Json list = Json::array();
  for (const OptionSpec& option : option_table()) {
    if (option.example.empty() || (!wanted.empty() && option.name != wanted)) {
      continue;
    }
    list.push_back({{"option", option.name}, {"parameters", parameters_of(option.name, context.tables)}});
  }
  if (list.empty()) {
    return qmp_fail(fmt::format("invalid option name: {}", clip(wanted, 80)));
  }
  return list;
}

QmpReply qmp_qom_list_types(QmpContext& context, const Json& arguments) {
  const std::string base = arguments.value("implements", std::string());
  Json list = Json::array();
  for (const DriverInfo& driver : context.tables.devices) {
    if (base.empty() || base == "device" || base == "object" || base == driver.name) {
      list.push_back({{"name", driver.name}, {"parent", "device"}});
    }
  }
  return list;
}

QmpReply qmp_device_list_properties(QmpContext& context, const Json& arguments) {
  const auto& name = arguments["typename"].get_ref<const std::string&>();
  const DriverInfo* driver = find_driver(context.tables.devices, name);
  if (driver == nullptr) {
    return std::unexpected(QmpError{.error_class = QmpErrorClass::kDeviceNotFound,
                                    .text = fmt::format("Device '{}' not found", clip(name, 80))});
  }
  Json list = Json::array();
  for (const PropertySpec& spec : driver->properties) {
    list.push_back({{"name", spec.name}, {"type", property_type(spec.kind)}, {"description", spec.help}});
  }
  return list;
}

QmpReply qmp_human_monitor_command(QmpContext& context, const Json& arguments) {
  std::string_view line = arguments["command-line"].get_ref<const std::string&>();
  while (line.ends_with(' ')) {
    line.remove_suffix(1);
  }
  if (line == "help" || line == "info") {
    std::string text;
    for (const Info& info : kInfos) {
      text += fmt::format("info {}{}", info.word, kEol);
    }
    return Json(text);
  }
  if (line.starts_with("info ")) {
    const auto info = std::ranges::find(kInfos, line.substr(5), &Info::word);
    if (info != kInfos.end()) {
      return Json(info->text(context));
    }
  }
  return Json(fmt::format("unknown command: '{}'{}", clip(line, 80), kEol));
}

}  // namespace wisp
