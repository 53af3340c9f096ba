#include "machine/device_table.h"

#include <array>

#include "block/drive.h"
#include "chardev/char_options.h"
#include "net/netdev.h"
#include "virtio/balloon.h"
#include "virtio/blk.h"
#include "virtio/console.h"
#include "virtio/net.h"
#include "virtio/rng.h"
#include "virtio/vhost_user_fs.h"
#include "virtio/vhost_vsock.h"
#include "virtio/vsock.h"

namespace wisp {
namespace {

constexpr auto kDebugExitProperties = std::to_array<PropertySpec>({
    {.name = "iobase",
     .kind = PropertyKind::kUint,
     .help = "the first port",
     .default_text = "0x501",
     .maximum = 0xffff},
    {.name = "iosize",
     .kind = PropertyKind::kUint,
     .help = "how many ports",
     .default_text = "2",
     .minimum = 1,
     .maximum = 4},
});

constexpr auto kRngRandomProperties = std::to_array<PropertySpec>({
    {.name = "filename",
     .help = "the file or device that gives random bytes",
     .default_text = "/dev/urandom",
     .maximum = 4095},
});

std::span<const DriverInfo> device_drivers() {
  static const auto kTable = std::to_array<DriverInfo>({
      {"virtio-blk-device", "a disk", virtio_blk_properties(), true},
      {"virtio-net-device", "a network card", kVirtioNetProperties, true},
      {"virtio-rng-device", "a source of randomness", kVirtioRngProperties, true},
      {"virtio-balloon-device", "takes memory from the guest and gives it back", kVirtioBalloonProperties,
       true},
      {"virtio-vsock-device", "sockets between host and guest, as Unix sockets on the host",
       kVirtioVsockProperties, true},
      {"vhost-vsock-device", "sockets between host and guest, by the kernel's vhost-vsock",
       kVhostVsockProperties, true},
      {"vhost-user-fs-device", "a directory of the host, served by virtiofsd", kVhostUserFsProperties, false},
      {"virtio-serial-device", "consoles and serial ports: those that follow it", kVirtioSerialProperties,
       false},
      {"virtconsole", "a console (/dev/hvcN) of the virtio-serial-device before it",
       kVirtioConsolePortProperties, false},
      {"virtserialport", "a port (/dev/virtio-ports/...) of the virtio-serial-device before it",
       kVirtioConsolePortProperties, false},
      {"isa-debug-exit",
       "a port by which the guest ends the process: its exit status is twice the value written, plus 1",
       kDebugExitProperties, false},
      {"pc-testdev",
       "the registers and interrupt lines of bare-metal test programs (kvm-unit-tests)",
       {},
       false},
  });
  return kTable;
}

std::span<const DriverInfo> drive_kinds() {
  static const auto kTable =
      std::to_array<DriverInfo>({{"", "a disk image or block device", drive_properties(), true}});
  return kTable;
}

std::span<const DriverInfo> netdev_kinds() {
  static const auto kTable = std::to_array<DriverInfo>({
      {"tap", "a tap interface of the host", kTapProperties, true},
      {"user", "the host's network through passt, without privileges", kPasstProperties, true},
      {"passt", "the same as user", kPasstProperties, true},
      {"stream", "length-prefixed frames over a stream socket", kStreamProperties, true},
      {"dgram", "frames as datagrams over an open socket", kDgramProperties, true},
  });
  return kTable;
}

std::span<const DriverInfo> chardev_kinds() {
  static const auto kTable = std::to_array<DriverInfo>({
      {"stdio", "the terminal that the program was started on", kStdioCharProperties, false},
      {"pty", "a new pseudo-terminal", {}, true},
      {"socket", "a Unix or TCP socket; Unix only once the machine runs", kSocketCharProperties, true},
      {"file", "a file that takes what is written", kFileCharProperties, true},
      {"null", "drops what is written", {}, true},
      {"ringbuf", "keeps the last bytes written", {}, true},
  });
  return kTable;
}

std::span<const DriverInfo> object_kinds() {
  static const auto kTable =
      std::to_array<DriverInfo>({{"rng-random", "random bytes from the host", kRngRandomProperties, false}});
  return kTable;
}

}  // namespace

DriverTables driver_tables() {
  return {.devices = device_drivers(),
          .drives = drive_kinds(),
          .netdevs = netdev_kinds(),
          .chardevs = chardev_kinds(),
          .objects = object_kinds()};
}

}  // namespace wisp
