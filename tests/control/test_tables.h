// Tables of devices and back ends like the machine's own, for tests and fuzzing of what parses against them.
#pragma once

#include <array>

#include "control/launch_config.h"

namespace wisp::test {

inline constexpr auto kBlkProperties = std::to_array<PropertySpec>({
    {.name = "drive", .help = "id of a -drive", .required = true, .maximum = 127},
    {.name = "serial", .help = "serial number", .maximum = 20},
    {.name = "iothread", .help = "id of an iothread", .maximum = 127},
    {.name = "num-queues",
     .kind = PropertyKind::kUint,
     .help = "queues",
     .default_text = "1",
     .minimum = 1,
     .maximum = 16},
    {.name = "bootindex",
     .kind = PropertyKind::kUint,
     .help = "boot order",
     .ignored_because = "the kernel is given by -kernel"},
});
inline constexpr auto kNetProperties = std::to_array<PropertySpec>({
    {.name = "netdev", .help = "id of a -netdev", .required = true, .maximum = 127},
    {.name = "mac", .kind = PropertyKind::kMac, .help = "address"},
});
inline constexpr auto kRngProperties = std::to_array<PropertySpec>({
    {.name = "rng", .help = "id of an rng-random object", .required = true, .maximum = 127},
    {.name = "max-bytes", .kind = PropertyKind::kSize, .help = "limit"},
});
inline constexpr auto kVsockProperties = std::to_array<PropertySpec>({
    {.name = "guest-cid",
     .kind = PropertyKind::kUint,
     .help = "context id",
     .required = true,
     .minimum = 3,
     .maximum = 0xfffffffe},
    {.name = "vhostfd", .kind = PropertyKind::kUint, .help = "open /dev/vhost-vsock", .maximum = 0x7fffffff},
});
inline constexpr auto kFsProperties = std::to_array<PropertySpec>({
    {.name = "chardev", .help = "id of a -chardev", .required = true, .maximum = 127},
    {.name = "tag", .help = "mount tag", .required = true, .maximum = 36},
});
inline constexpr auto kConsoleProperties = std::to_array<PropertySpec>({
    {.name = "chardev", .help = "id of a -chardev", .required = true, .maximum = 127},
    {.name = "nr", .kind = PropertyKind::kUint, .help = "port", .maximum = 30},
});
inline constexpr auto kBalloonProperties = std::to_array<PropertySpec>({
    {.name = "deflate-on-oom",
     .kind = PropertyKind::kBool,
     .help = "give memory back",
     .default_text = "off"},
});
inline constexpr std::array<PropertySpec, 0> kNoProperties{};
inline constexpr auto kDevices = std::to_array<DriverInfo>({
    {.name = "virtio-blk-device", .help = "a disk", .properties = kBlkProperties, .hotpluggable = true},
    {.name = "virtio-net-device",
     .help = "a network card",
     .properties = kNetProperties,
     .hotpluggable = true},
    {.name = "virtio-rng-device", .help = "randomness", .properties = kRngProperties},
    {.name = "virtio-balloon-device", .help = "memory balloon", .properties = kBalloonProperties},
    {.name = "vhost-vsock-device", .help = "sockets to the host", .properties = kVsockProperties},
    {.name = "vhost-user-fs-device", .help = "a shared folder", .properties = kFsProperties},
    {.name = "virtio-serial-device", .help = "a bus of consoles", .properties = kNoProperties},
    {.name = "virtconsole", .help = "a console", .properties = kConsoleProperties},
});
inline constexpr auto kDriveProperties = std::to_array<PropertySpec>({
    {.name = "file", .help = "path of the image", .required = true, .maximum = 4095},
    {.name = "readonly", .kind = PropertyKind::kBool, .help = "no writes", .default_text = "off"},
    {.name = "direct", .kind = PropertyKind::kBool, .help = "past the page cache", .default_text = "on"},
    {.name = "aio",
     .kind = PropertyKind::kEnum,
     .help = "how requests are made",
     .choices = "native|io_uring|threads|off"},
    {.name = "throttling.iops-total",
     .kind = PropertyKind::kUint,
     .help = "requests a second",
     .maximum = 1'000'000},
});
inline constexpr auto kDrives =
    std::to_array<DriverInfo>({{.name = "", .help = "a disk image", .properties = kDriveProperties}});
inline constexpr auto kTapProperties = std::to_array<PropertySpec>({
    {.name = "ifname", .help = "name of the tap", .maximum = 15},
    {.name = "fd", .help = "open tap", .maximum = 16},
    {.name = "fds", .help = "open taps", .maximum = 255},
    {.name = "queues", .kind = PropertyKind::kUint, .help = "queue pairs", .minimum = 1, .maximum = 16},
    {.name = "vhost", .kind = PropertyKind::kBool, .help = "the kernel's vhost-net"},
});
inline constexpr auto kVhostUserProperties = std::to_array<PropertySpec>({
    {.name = "chardev", .help = "id of a -chardev", .required = true, .maximum = 127},
});
inline constexpr auto kNetdevs = std::to_array<DriverInfo>({
    {.name = "tap", .help = "a tap interface", .properties = kTapProperties},
    {.name = "user", .help = "passt", .properties = kNoProperties},
    {.name = "vhost-user", .help = "another process", .properties = kVhostUserProperties},
});
inline constexpr auto kStdioProperties = std::to_array<PropertySpec>({
    {.name = "mux", .kind = PropertyKind::kBool, .help = "an escape key"},
});
inline constexpr auto kFileProperties = std::to_array<PropertySpec>({
    {.name = "path", .help = "path of the file", .required = true, .maximum = 4095},
});
inline constexpr auto kSocketProperties = std::to_array<PropertySpec>({
    {.name = "path", .help = "path of the socket", .maximum = 107},
    {.name = "host", .help = "address", .maximum = 64},
    {.name = "port", .kind = PropertyKind::kUint, .help = "TCP port", .minimum = 1, .maximum = 65535},
    {.name = "server", .kind = PropertyKind::kBool, .help = "listen"},
    {.name = "wait", .kind = PropertyKind::kBool, .help = "start with a peer only"},
});
inline constexpr auto kChardevs = std::to_array<DriverInfo>({
    {.name = "stdio", .help = "the terminal", .properties = kStdioProperties},
    {.name = "pty", .help = "a new pseudo terminal", .properties = kNoProperties},
    {.name = "null", .help = "nothing", .properties = kNoProperties},
    {.name = "file", .help = "a file", .properties = kFileProperties},
    {.name = "socket", .help = "a socket", .properties = kSocketProperties},
});
inline constexpr auto kRngRandomProperties = std::to_array<PropertySpec>({
    {.name = "filename", .help = "source", .default_text = "/dev/urandom", .maximum = 4095},
});
inline constexpr auto kObjects = std::to_array<DriverInfo>(
    {{.name = "rng-random", .help = "the host's randomness", .properties = kRngRandomProperties}});

inline DriverTables tables() {
  return {.devices = kDevices,
          .drives = kDrives,
          .netdevs = kNetdevs,
          .chardevs = kChardevs,
          .objects = kObjects};
}

}  // namespace wisp::test
