#include "machine/device_factory.h"

#include <algorithm>
#include <array>

#include "base/lent_fds.h"
#include "virtio/blk.h"
#include "virtio/console.h"
#include "virtio/net.h"
#include "virtio/rng.h"
#include "virtio/vhost_user_fs.h"
#include "virtio/vhost_vsock.h"
#include "virtio/vsock.h"

namespace wisp {
namespace {

constexpr std::string_view kDebugExitDriver = "isa-debug-exit";
constexpr std::string_view kTestdevDriver = "pc-testdev";
constexpr std::string_view kSerialDriver = "virtio-serial-device";
constexpr std::string_view kVhostUserFsDriver = "vhost-user-fs-device";
constexpr std::string_view kConsolePortDriver = "virtconsole";
constexpr std::string_view kSerialPortDriver = "virtserialport";

// A device of a class where its base is wanted.
template <typename Device>
Result<std::unique_ptr<VirtioDevice>> as_device(Result<std::unique_ptr<Device>> device) {
  if (!device) {
    return std::unexpected(std::move(device).error());
  }
  return std::unique_ptr<VirtioDevice>(*std::move(device));
}

}  // namespace

struct DeviceFactory::MakerTable {
  static constexpr std::array kEntries = std::to_array<MakerEntry>({
      {"virtio-blk-device", &DeviceFactory::make_blk},
      {"virtio-net-device", &DeviceFactory::make_net},
      {"virtio-rng-device", &DeviceFactory::make_rng},
      {"virtio-balloon-device", &DeviceFactory::make_balloon},
      {"virtio-vsock-device", &DeviceFactory::make_vsock},
      {"vhost-vsock-device", &DeviceFactory::make_vhost_vsock},
      {kSerialDriver, &DeviceFactory::make_console},
      {kVhostUserFsDriver, &DeviceFactory::make_vhost_user_fs},
  });
};

const DeviceFactory::MakerEntry* DeviceFactory::find_maker(std::string_view driver) {
  const auto found = std::ranges::find(MakerTable::kEntries, driver, &MakerEntry::driver);
  return found != MakerTable::kEntries.end() ? &*found : nullptr;
}

bool DeviceFactory::is_virtio(const DeviceConfig& device) {
  return find_maker(device.driver) != nullptr;
}

bool DeviceFactory::is_vhost_user(const DeviceConfig& device) {
  return device.driver == kVhostUserFsDriver;
}

std::optional<DebugExitOptions> DeviceFactory::debug_exit_options(std::span<const DeviceConfig> devices) {
  const auto found = std::ranges::find(devices, kDebugExitDriver, &DeviceConfig::driver);
  if (found == devices.end()) {
    return std::nullopt;
  }
  const DebugExitOptions defaults;
  return DebugExitOptions{
      .iobase = static_cast<std::uint16_t>(found->properties.get_uint("iobase", defaults.iobase)),
      .iosize = static_cast<std::uint16_t>(found->properties.get_uint("iosize", defaults.iosize))};
}

bool DeviceFactory::has_testdev(std::span<const DeviceConfig> devices) {
  return std::ranges::find(devices, kTestdevDriver, &DeviceConfig::driver) != devices.end();
}

Result<std::unique_ptr<VirtioDevice>> DeviceFactory::create(const DeviceConfig& device,
                                                            std::span<const DeviceConfig> all) {
  LentFds lent(device.properties);
  const MakerEntry* entry = find_maker(device.driver);
  if (entry == nullptr) {
    return fail("{} is not a device of its own", device.driver);
  }
  WISP_ASSIGN(EventLoop * loop, parts_.loop_for(device));
  lent.release();
  return (this->*entry->maker)(device, *loop, all);
}

DeviceFactory::Made DeviceFactory::make_blk(const DeviceConfig& device, EventLoop& loop,
                                            std::span<const DeviceConfig> /*all*/) {
  WISP_ASSIGN(const VirtioBlkOptions options, virtio_blk_options(device.id, device.properties));
  WISP_ASSIGN(BlockBackend * backend, parts_.backends.use_drive(options.drive, device.id));
  WISP_ASSIGN(auto disk,
              VirtioBlk::create(loop, parts_.ram.memory(), options, *backend, parts_.log, parts_.clock));
  disks_[device.id] = disk.get();
  return std::unique_ptr<VirtioDevice>(std::move(disk));
}

DeviceFactory::Made DeviceFactory::make_net(const DeviceConfig& device, EventLoop& loop,
                                            std::span<const DeviceConfig> /*all*/) {
  WISP_ASSIGN(const VirtioNetOptions options, parse_virtio_net_options(device.id, device.properties));
  WISP_ASSIGN(Netdev netdev, parts_.backends.take_netdev(device.properties.get_string("netdev"), device.id));
  return as_device(VirtioNet::create(loop, parts_.ram.memory(), options, std::move(netdev), parts_.entropy,
                                     parts_.log, parts_.clock));
}

DeviceFactory::Made DeviceFactory::make_rng(const DeviceConfig& device, EventLoop& loop,
                                            std::span<const DeviceConfig> /*all*/) {
  WISP_ASSIGN(const VirtioRngOptions options, virtio_rng_options(device.id, device.properties));
  WISP_ASSIGN(auto source, parts_.backends.open_rng(options.rng));
  return as_device(
      VirtioRng::create(loop, parts_.ram.memory(), options, std::move(source), parts_.log, parts_.clock));
}

DeviceFactory::Made DeviceFactory::make_balloon(const DeviceConfig& device, EventLoop& loop,
                                                std::span<const DeviceConfig> /*all*/) {
  if (balloon_ != nullptr) {
    return fail("the machine has a balloon already: device '{}'", balloon_id_);
  }
  WISP_ASSIGN(auto balloon, VirtioBalloon::create(loop, parts_.ram.memory(),
                                                  virtio_balloon_options(device.id, device.properties), *this,
                                                  parts_.log, parts_.clock));
  balloon_ = balloon.get();
  balloon_id_ = device.id;
  return std::unique_ptr<VirtioDevice>(std::move(balloon));
}

DeviceFactory::Made DeviceFactory::make_vsock(const DeviceConfig& device, EventLoop& loop,
                                              std::span<const DeviceConfig> /*all*/) {
  WISP_ASSIGN(const VirtioVsockOptions options, parse_virtio_vsock_options(device.id, device.properties));
  return as_device(VirtioVsock::create(loop, parts_.ram.memory(), options, parts_.log, parts_.clock));
}

DeviceFactory::Made DeviceFactory::make_vhost_vsock(const DeviceConfig& device, EventLoop& loop,
                                                    std::span<const DeviceConfig> /*all*/) {
  WISP_ASSIGN(const VhostVsockOptions options, parse_vhost_vsock_options(device.id, device.properties));
  return as_device(VhostVsock::create(loop, parts_.ram.memory(), options, parts_.log, parts_.clock));
}

DeviceFactory::Made DeviceFactory::make_console(const DeviceConfig& device, EventLoop& loop,
                                                std::span<const DeviceConfig> all) {
  // Its ports are those that follow it, up to the next device of the kind.
  std::vector<VirtioConsolePort> ports;
  bool own = false;
  for (const DeviceConfig& other : all) {
    if (other.driver == kSerialDriver) {
      own = other.id == device.id;
    } else if (own && (other.driver == kConsolePortDriver || other.driver == kSerialPortDriver)) {
      auto options =
          virtio_console_port_options(other.id, other.driver == kConsolePortDriver, other.properties);
      WISP_ASSIGN(CharBackend * backend, parts_.backends.use_chardev(options.chardev, device.id));
      ports.push_back({.options = std::move(options), .backend = backend});
    }
  }
  return as_device(VirtioConsole::create(loop, parts_.ram.memory(), {.id = device.id}, std::move(ports),
                                         parts_.log, parts_.clock));
}

DeviceFactory::Made DeviceFactory::make_vhost_user_fs(const DeviceConfig& device, EventLoop& loop,
                                                      std::span<const DeviceConfig> /*all*/) {
  WISP_ASSIGN(VhostUserFsOptions options, parse_vhost_user_fs_options(device.id, device.properties));
  WISP_ASSIGN(options.path, parts_.backends.use_chardev_path(options.chardev, device.id));
  return as_device(VhostUserFs::create(loop, parts_.ram.memory(), options, parts_.log, parts_.clock));
}

void DeviceFactory::forget(const std::string& id) {
  disks_.erase(id);
  if (balloon_ != nullptr && id == balloon_id_) {
    balloon_ = nullptr;
    balloon_id_.clear();
  }
}

Result<void> DeviceFactory::discard(Gpa gpa, std::uint64_t size) {
  parts_.ram.discard(gpa, size);
  return {};
}

BlockCounters DeviceFactory::block_counters(const std::string& id) const {
  const auto disk = disks_.find(id);
  if (disk == disks_.end()) {
    return {};
  }
  const std::lock_guard lock(disk->second->strand().mutex());
  return disk->second->counters();
}

Result<BalloonInfo> DeviceFactory::balloon_info() const {
  if (balloon_ == nullptr) {
    return fail("no balloon device has been activated: add -device virtio-balloon-device,id=...");
  }
  const std::lock_guard lock(balloon_->strand().mutex());
  BalloonInfo info{.actual = balloon_->actual(), .statistics = balloon_->statistics()};
  balloon_->refresh_statistics();
  return info;
}

Result<void> DeviceFactory::set_balloon(std::uint64_t bytes) {
  if (balloon_ == nullptr) {
    return fail("no balloon device has been activated: add -device virtio-balloon-device,id=...");
  }
  const std::lock_guard lock(balloon_->strand().mutex());
  return balloon_->set_target(bytes);
}

}  // namespace wisp
