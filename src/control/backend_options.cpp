#include "control/backend_options.h"

#include <arpa/inet.h>
#include <fcntl.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <optional>

#include "base/checked.h"

namespace wisp {
namespace {

constexpr std::string_view kNoPci = "a microVM has no PCI bus; leave it out";
constexpr std::string_view kPciOnly = "it belongs to devices on PCI";

constexpr auto kDriveCompat = std::to_array<CompatOption>({
    {.name = "unit", .refusal = "it belongs to if=pflash, which only a standard machine has"},
    {.name = "werror", .warning = "errors are always told to the guest"},
    {.name = "rerror", .warning = "errors are always told to the guest"},
});

constexpr auto kNetdevCompat = std::to_array<CompatOption>({
    {.name = "dnssearch", .warning = "the host's resolver decides"},
    {.name = "macnat", .warning = "addresses are not translated"},
});

constexpr auto kChardevCompat = std::to_array<CompatOption>({
    {.name = "mux", .accepted = "off|no|false"},
});

constexpr auto kDeviceCompat = std::to_array<CompatOption>({
    {.name = "bus", .refusal = kNoPci},
    {.name = "addr", .refusal = kNoPci},
    {.name = "multifunction", .refusal = kNoPci},
    {.name = "bootindex", .warning = "the kernel is given by -kernel"},
    {.name = "romfile", .warning = kPciOnly},
    {.name = "vectors", .warning = kPciOnly},
    {.name = "disable-modern", .accepted = "off|no|false"},
    {.name = "disable-legacy", .accepted = "on|yes|true"},
    {.name = "share-rw", .warning = "the drive's own lock decides"},
});

// Drivers that only a machine with PCI, USB or a display has.
bool needs_standard_machine(std::string_view driver) {
  static constexpr auto kNames = std::to_array<std::string_view>(
      {"pcie-root-port",    "vfio-pci",       "scsi-hd",       "scsi-cd",
       "scsi-block",        "nec-usb-xhci",   "qemu-xhci",     "usb-kbd",
       "usb-tablet",        "usb-mouse",      "usb-consumer",  "usb-storage",
       "usb-uas",           "usb-camera",     "usb-host",      "ramfb",
       "pvpanic",           "ivshmem-scream", "pcie-demo-dev", "virtio-gpu-device",
       "virtio-scsi-device"});
  return driver.ends_with("-pci") || std::ranges::find(kNames, driver) != kNames.end();
}

std::vector<std::string_view> names_of(std::span<const DriverInfo> table) {
  std::vector<std::string_view> names;
  for (const DriverInfo& driver : table) {
    names.push_back(driver.name);
  }
  return names;
}

// The descriptors that fd= or fds= names, which must be open.
Result<std::vector<int>> open_fds(std::string_view text, std::string_view what) {
  auto fds = parse_fds(text);
  if (!fds) {
    return fail("{}: {}", what, fds.error().message);
  }
  for (const int fd : *fds) {
    if (::fcntl(fd, F_GETFD) < 0) {
      return fail("{}: file descriptor {} is not open; the starting program must hand it over", what, fd);
    }
  }
  return fds;
}

// Takes and checks the id; required.
Result<std::string> take_id(std::vector<KeyValue>& pairs, std::string_view what) {
  WISP_ASSIGN(std::string id, take_value(pairs, "id", what));
  if (id.empty()) {
    return fail("{}: option 'id' is missing", what);
  }
  WISP_TRY(check_id(id, what));
  return id;
}

Result<BackendConfig> make_backend(std::string_view kind, const DriverInfo& info, std::vector<KeyValue> pairs,
                                   std::span<const CompatOption> compat, std::string_view what,
                                   std::vector<std::string>& warnings) {
  BackendConfig backend{.kind = std::string(kind), .id = {}, .properties = {}, .fds = {}};
  WISP_ASSIGN(backend.id, take_id(pairs, what));
  WISP_ASSIGN(backend.properties, parse_properties(pairs, info.properties, compat, what, warnings));
  return backend;
}

Result<std::uint16_t> parse_port(std::string_view text, std::string_view what) {
  const auto port = parse_uint(text);
  const auto small = port ? checked_cast<std::uint16_t>(*port) : std::nullopt;
  if (!small || *small == 0) {
    return fail("{}: '{}' is not a TCP port, expected 1 to 65535", what, clip(text, 40));
  }
  return *small;
}

Result<std::string> numeric_host(std::string_view host, std::string_view what) {
  if (host.empty() || host == "localhost") {
    return std::string("127.0.0.1");
  }
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  std::string text(host);
  std::array<unsigned char, sizeof(in6_addr)> address{};
  if (::inet_pton(AF_INET, text.c_str(), address.data()) != 1 &&
      ::inet_pton(AF_INET6, text.c_str(), address.data()) != 1) {
    return fail("{}: '{}' is not a numeric address such as 127.0.0.1 or [::1]", what, clip(host, 80));
  }
  return text;
}

using Owners = std::map<std::string, std::string, std::less<>>;  // id -> who uses it

// One kind of thing that devices name by one of their properties.
struct Reference {
  std::string_view property;
  std::string_view option;  // that defines it
  bool shareable;
};
constexpr auto kReferences = std::to_array<Reference>({
    {"drive", "-drive", false},
    {"netdev", "-netdev", false},
    {"chardev", "-chardev", false},
    {"rng", "-object", true},
    {"iothread", "-object iothread", true},
    {"rx-iothread", "-object iothread", true},
    {"tx-iothread", "-object iothread", true},
});

Result<void> add_ids(Owners& ids, std::span<const BackendConfig> backends, std::string_view option) {
  for (const BackendConfig& backend : backends) {
    if (!ids.emplace(backend.id, std::string()).second) {
      return fail("{}: id '{}' is used twice; ids must differ", option, backend.id);
    }
  }
  return {};
}

Result<void> use(Owners& ids, const Reference& reference, const std::string& id, const std::string& user) {
  const auto found = ids.find(id);
  if (found == ids.end()) {
    std::vector<std::string_view> known;
    for (const auto& [name, owner] : ids) {
      known.push_back(name);
    }
    return fail("{}: {} '{}' is not there; define it with {}{}", user, reference.property, clip(id, 80),
                reference.option, suggest(id, known));
  }
  if (!reference.shareable && !found->second.empty()) {
    return fail("{}: {} '{}' is used by {} already", user, reference.property, id, found->second);
  }
  found->second = user;
  return {};
}

void warn_unused(const Owners& ids, std::string_view option, std::string_view user,
                 std::vector<std::string>& warnings) {
  for (const auto& [id, owner] : ids) {
    if (owner.empty()) {
      warnings.push_back(fmt::format("{} id={} is not used by any {}", option, id, user));
    }
  }
}

}  // namespace

Result<BackendConfig> make_drive(std::vector<KeyValue> pairs, const DriverTables& tables,
                                 std::string_view what, std::vector<std::string>& warnings) {
  const DriverInfo* info = find_driver(tables.drives, "");
  if (info == nullptr) {
    return fail("{}: this build has no drives", what);
  }
  for (const KeyValue& pair : pairs) {
    if (pair.key == "if" && pair.value == "pflash") {
      return fail(
          "{}: firmware flash (if=pflash) needs a standard machine; a microVM starts -kernel directly", what);
    }
    if (pair.key == "format" && pair.value != "raw") {
      return fail(
          "{}: option 'format': '{}' is not supported, expected raw; convert the image with: qemu-img "
          "convert -O raw OLD NEW",
          what, clip(pair.value, 80));
    }
  }
  return make_backend("", *info, std::move(pairs), kDriveCompat, what, warnings);
}

Result<BackendConfig> make_netdev(std::string_view kind, std::vector<KeyValue> pairs,
                                  const DriverTables& tables, std::string_view what,
                                  std::vector<std::string>& warnings) {
  const DriverInfo* info = find_driver(tables.netdevs, kind);
  if (info == nullptr) {
    return fail("{}: unknown network '{}'{}", what, clip(kind, 80), suggest(kind, names_of(tables.netdevs)));
  }
  std::string fds;
  for (const KeyValue& pair : pairs) {
    if (pair.key == "fd" || pair.key == "fds") {
      if (!fds.empty()) {
        return fail("{}: give fd= or fds= once", what);
      }
      fds = pair.value;
    }
  }
  WISP_ASSIGN(BackendConfig netdev,
              make_backend(kind, *info, std::move(pairs), kNetdevCompat, what, warnings));
  if (!fds.empty()) {
    WISP_ASSIGN(netdev.fds, open_fds(fds, what));
  }
  return netdev;
}

Result<BackendConfig> make_chardev(std::string_view kind, std::vector<KeyValue> pairs,
                                   const DriverTables& tables, std::string_view what,
                                   std::vector<std::string>& warnings) {
  const DriverInfo* info = find_driver(tables.chardevs, kind);
  if (info == nullptr) {
    return fail("{}: unknown character device '{}'{}", what, clip(kind, 80),
                suggest(kind, names_of(tables.chardevs)));
  }
  return make_backend(kind, *info, std::move(pairs), kChardevCompat, what, warnings);
}

Result<DeviceConfig> make_device(std::string_view driver, std::vector<KeyValue> pairs,
                                 const DriverTables& tables, std::string_view what,
                                 std::vector<std::string>& warnings) {
  const DriverInfo* info = find_driver(tables.devices, driver);
  if (info == nullptr) {
    if (driver.ends_with("-pci")) {
      const std::string twin = std::string(driver.substr(0, driver.size() - 3)) + "device";
      if (find_driver(tables.devices, twin) != nullptr) {
        return fail("{}: '{}' needs a standard machine with PCI; on a microVM use '{}'", what, driver, twin);
      }
    }
    if (needs_standard_machine(driver)) {
      return fail("{}: '{}' needs a standard machine, and this is a microVM", what, clip(driver, 80));
    }
    return fail("{}: unknown device '{}'{}", what, clip(driver, 80),
                suggest(driver, names_of(tables.devices)));
  }
  DeviceConfig device{.driver = std::string(driver), .id = {}, .properties = {}};
  WISP_ASSIGN(device.id, take_value(pairs, "id", what));
  if (!device.id.empty()) {
    WISP_TRY(check_id(device.id, what));
  }
  WISP_ASSIGN(device.properties, parse_properties(pairs, info->properties, kDeviceCompat, what, warnings));
  return device;
}

Result<QmpEndpoint> parse_qmp_endpoint(std::string_view text, std::string_view what) {
  WISP_ASSIGN(const auto pairs, split_options(text, "address"));
  QmpEndpoint endpoint;
  bool server = false;
  std::optional<bool> wait;
  for (const KeyValue& pair : pairs) {
    if (pair.key == "address") {
      continue;
    }
    const auto value = pair.bare ? std::optional(true) : parse_bool(pair.value);
    if (pair.key == "iothread") {
      continue;  // a slow client never holds up the loop, so it needs no thread of its own
    }
    if (pair.key != "server" && pair.key != "nowait" && pair.key != "wait") {
      static constexpr auto kKnown =
          std::to_array<std::string_view>({"server", "nowait", "wait", "iothread"});
      return fail("{}: unknown option '{}'{}", what, clip(pair.key, 80), suggest(pair.key, kKnown));
    }
    if (!value) {
      return fail("{}: option '{}': '{}' is not on or off", what, pair.key, clip(pair.value, 40));
    }
    if (pair.key == "server") {
      server = *value;
    } else {
      if (wait) {
        return fail("{}: give wait or nowait once", what);
      }
      wait = (pair.key == "wait") == *value;
    }
  }
  const KeyValue& address = pairs.front();
  if (address.key == "address" && address.value.starts_with("unix:") && address.value.size() > 5) {
    endpoint.kind = QmpEndpoint::Kind::kUnix;
    endpoint.path = address.value.substr(5);
  } else if (address.key == "address" && address.value.starts_with("tcp:")) {
    endpoint.kind = QmpEndpoint::Kind::kTcp;
    const std::string_view rest = std::string_view(address.value).substr(4);
    const std::size_t colon = rest.rfind(':');
    if (colon == std::string_view::npos) {
      return fail("{}: expected tcp:ADDRESS:PORT,server,nowait", what);
    }
    WISP_ASSIGN(endpoint.host, numeric_host(rest.substr(0, colon), what));
    WISP_ASSIGN(endpoint.port, parse_port(rest.substr(colon + 1), what));
  } else {
    return fail("{}: expected unix:PATH,server,nowait or tcp:ADDRESS:PORT,server,nowait", what);
  }
  if (!server) {
    return fail("{}: option 'server' is missing: wisp listens here, it does not connect", what);
  }
  endpoint.wait = wait.value_or(true);
  return endpoint;
}

Result<QmpEndpoint> qmp_endpoint_of(const BackendConfig& chardev, std::string_view what) {
  const PropertySet& set = chardev.properties;
  if (chardev.kind != "socket") {
    return fail(
        "{}: chardev '{}' is of kind {}; QMP needs a socket: -chardev socket,id={},path=...,server,nowait",
        what, chardev.id, chardev.kind, chardev.id);
  }
  if (!set.get_bool("server", false)) {
    return fail("{}: chardev '{}' connects to a socket; QMP needs one that listens: add server,nowait", what,
                chardev.id);
  }
  QmpEndpoint endpoint;
  endpoint.wait = set.get_bool("wait", true);
  if (auto path = set.find_string("path")) {
    endpoint.path = *std::move(path);
    return endpoint;
  }
  endpoint.kind = QmpEndpoint::Kind::kTcp;
  WISP_ASSIGN(endpoint.host, numeric_host(set.get_string("host"), what));
  const auto& values = set.values();
  const auto port = values.find("port");
  if (port == values.end()) {
    return fail("{}: chardev '{}' has neither path nor port", what, chardev.id);
  }
  const auto* number = std::get_if<std::uint64_t>(&port->second);
  const auto* word = std::get_if<std::string>(&port->second);
  WISP_ASSIGN(endpoint.port, parse_port(number != nullptr ? std::to_string(*number)
                                        : word != nullptr ? *word
                                                          : "",
                                        what));
  return endpoint;
}

Result<void> check_references(const MachineConfig& machine, std::vector<std::string>& warnings) {
  std::map<std::string_view, Owners> owners;  // by the option that defines them
  WISP_TRY(add_ids(owners["-drive"], machine.drives, "-drive"));
  WISP_TRY(add_ids(owners["-netdev"], machine.netdevs, "-netdev"));
  WISP_TRY(add_ids(owners["-chardev"], machine.chardevs, "-chardev"));
  WISP_TRY(add_ids(owners["-object"], machine.objects, "-object"));
  Owners& iothreads = owners["-object iothread"];
  for (const std::string& id : machine.iothreads) {
    if (owners["-object"].contains(id) || !iothreads.emplace(id, std::string()).second) {
      return fail("-object: id '{}' is used twice; ids must differ", id);
    }
  }
  Owners device_ids;
  if (machine.serial) {
    WISP_TRY(use(owners["-chardev"], {"chardev", "-chardev", false}, *machine.serial, "-serial"));
  }
  for (const DeviceConfig& device : machine.devices) {
    if (!device.id.empty() && !device_ids.emplace(device.id, std::string()).second) {
      return fail("-device: id '{}' is used twice; ids must differ", device.id);
    }
    const std::string user =
        "-device " + device.driver + (device.id.empty() ? std::string() : " id=" + device.id);
    if (device.driver.starts_with("vhost-user") && !machine.memory.share) {
      return fail(
          "{}: another process serves it and must see the guest's memory: add mem-share=on to -machine",
          user);
    }
    for (const Reference& reference : kReferences) {
      if (const auto found = device.properties.values().find(reference.property);
          found != device.properties.values().end()) {
        if (const auto* id = std::get_if<std::string>(&found->second)) {
          WISP_TRY(use(owners[reference.option], reference, *id, user));
        }
      }
    }
  }
  std::string stdio;
  for (const BackendConfig& chardev : machine.chardevs) {
    if (chardev.kind == "stdio") {
      if (!stdio.empty()) {
        return fail("standard input and output are used twice: by chardev '{}' and by chardev '{}'", stdio,
                    chardev.id);
      }
      stdio = chardev.id;
    }
  }
  warn_unused(owners["-drive"], "-drive", "-device", warnings);
  warn_unused(owners["-netdev"], "-netdev", "-device", warnings);
  warn_unused(owners["-chardev"], "-chardev", "-device or -serial", warnings);
  return {};
}

}  // namespace wisp
