// -drive, -netdev, -chardev, -serial, -device, -qmp, -mon.
#include <algorithm>
#include <array>

#include "control/backend_options.h"
#include "control/option_table.h"

namespace wisp {
namespace {

constexpr auto kMonProperties = std::to_array<PropertySpec>({
    {.name = "chardev", .help = "id of a listening socket", .required = true, .maximum = 127},
    {.name = "id", .help = "accepted", .maximum = 127},
    {.name = "mode",
     .kind = PropertyKind::kEnum,
     .help = "QMP",
     .default_text = "control",
     .choices = "control"},
    {.name = "pretty",
     .kind = PropertyKind::kBool,
     .help = "accepted",
     .ignored_because = "answers are one line"},
});

constexpr std::string_view kSerialId = "serial0";

// "-serial unix:PATH,server" and "-serial file:PATH", QEMU's way, as StratoVirt's "socket,path=PATH,server".
std::string strato_serial(const std::string& value) {
  if (value.starts_with("unix:")) {
    return "socket,path=" + value.substr(5);
  }
  if (value.starts_with("file:")) {
    return "file,path=" + value.substr(5);
  }
  // There is no monitor beside the console, but its escape key is the same.
  return value == "mon:stdio" ? "stdio,mux=on" : value;
}

}  // namespace

std::span<const PropertySpec> mon_properties() {
  return kMonProperties;
}

Result<void> take_drive(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  WISP_ASSIGN(auto pairs, split_options(value, ""));
  WISP_ASSIGN(BackendConfig drive,
              make_drive(std::move(pairs), builder.tables, what_of(option, value), builder.warnings));
  builder.launch.machine.drives.push_back(std::move(drive));
  return {};
}

Result<void> take_netdev(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(auto pairs, split_options(value, "type"));
  WISP_ASSIGN(const std::string kind, take_value(pairs, "type", what));
  WISP_ASSIGN(BackendConfig netdev,
              make_netdev(kind, std::move(pairs), builder.tables, what, builder.warnings));
  builder.launch.machine.netdevs.push_back(std::move(netdev));
  return {};
}

Result<void> take_chardev(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(auto pairs, split_options(value, "backend"));
  WISP_ASSIGN(const std::string kind, take_value(pairs, "backend", what));
  WISP_ASSIGN(BackendConfig chardev,
              make_chardev(kind, std::move(pairs), builder.tables, what, builder.warnings));
  builder.launch.machine.chardevs.push_back(std::move(chardev));
  return {};
}

Result<void> take_serial(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  MachineConfig& machine = builder.launch.machine;
  if (value == "none") {
    return {};
  }
  if (value.starts_with("chardev:")) {
    machine.serial = value.substr(8);
    return check_id(*machine.serial, what);
  }
  WISP_ASSIGN(auto pairs, split_options(strato_serial(value), "backend"));
  WISP_ASSIGN(const std::string kind, take_value(pairs, "backend", what));
  pairs.push_back({.key = "id", .value = std::string(kSerialId)});
  WISP_ASSIGN(BackendConfig chardev,
              make_chardev(kind, std::move(pairs), builder.tables, what, builder.warnings));
  machine.serial = chardev.id;
  machine.chardevs.push_back(std::move(chardev));
  return {};
}

Result<void> take_device(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(auto pairs, split_options(value, "driver"));
  WISP_ASSIGN(const std::string driver, take_value(pairs, "driver", what));
  WISP_ASSIGN(DeviceConfig device,
              make_device(driver, std::move(pairs), builder.tables, what, builder.warnings));
  builder.launch.machine.devices.push_back(std::move(device));
  return {};
}

Result<void> take_qmp(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  WISP_ASSIGN(QmpEndpoint endpoint, parse_qmp_endpoint(value, what_of(option, value)));
  builder.launch.process.qmp.push_back(std::move(endpoint));
  return {};
}

Result<void> take_mon(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "chardev"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kMonProperties, {}, what, builder.warnings));
  builder.monitors.push_back({.chardev = set.get_string("chardev"), .what = what});
  return {};
}

Result<void> finish_command_line(CommandLineBuilder& builder) {
  MachineConfig& machine = builder.launch.machine;
  WISP_TRY(finish_machine(builder));
  WISP_TRY(finish_memory(builder));
  // A monitor's chardev is QMP's alone: the machine never sees it.
  for (const MonitorRequest& monitor : builder.monitors) {
    const auto chardev = std::ranges::find(machine.chardevs, monitor.chardev, &BackendConfig::id);
    if (chardev == machine.chardevs.end()) {
      return fail(
          "{}: chardev '{}' is not there; define it with -chardev socket,id={},path=...,server,nowait",
          monitor.what, clip(monitor.chardev, 80), clip(monitor.chardev, 80));
    }
    WISP_ASSIGN(QmpEndpoint endpoint, qmp_endpoint_of(*chardev, monitor.what));
    builder.launch.process.qmp.push_back(std::move(endpoint));
    machine.chardevs.erase(chardev);
  }
  WISP_TRY(check_references(machine, builder.warnings));
  for (const MemoryBackend& backend : builder.memory_backends) {
    const auto same_id = [&](const auto& other) { return other.id == backend.id; };
    if (std::ranges::count_if(builder.memory_backends, same_id) > 1 ||
        std::ranges::any_of(machine.objects, same_id) ||
        std::ranges::find(machine.iothreads, backend.id) != machine.iothreads.end()) {
      return fail("-object: id '{}' is used twice; ids must differ", backend.id);
    }
  }
  const auto& qmp = builder.launch.process.qmp;
  for (auto endpoint = qmp.begin(); endpoint != qmp.end(); ++endpoint) {
    const auto same = [&](const QmpEndpoint& other) {
      return other.kind == endpoint->kind && other.path == endpoint->path && other.host == endpoint->host &&
             other.port == endpoint->port;
    };
    if (std::any_of(std::next(endpoint), qmp.end(), same)) {
      return fail("-qmp: {} is given twice; each socket needs its own path",
                  endpoint->kind == QmpEndpoint::Kind::kUnix ? endpoint->path : "the same TCP address");
    }
    if (endpoint->kind == QmpEndpoint::Kind::kTcp && !endpoint->host.starts_with("127.") &&
        endpoint->host != "::1") {
      builder.warn(fmt::format("-qmp tcp:{}:{}: whoever reaches this port controls the machine; prefer unix:",
                               endpoint->host, endpoint->port));
    }
  }
  if (builder.launch.process.daemonize) {
    const auto stdio = std::ranges::find(machine.chardevs, "stdio", &BackendConfig::kind);
    if (stdio != machine.chardevs.end()) {
      return fail(
          "-daemonize: chardev '{}' uses the terminal, which a daemon leaves; use a socket, pty or file",
          stdio->id);
    }
  }
  if (machine.boot.kernel.empty()) {
    return fail("-kernel is missing: give the kernel to start, such as -kernel vmlinux; see wisp --help");
  }
  return {};
}

}  // namespace wisp
