// Makes virtio devices from their configuration: with the table (device_table.cpp), the one place that knows
// every device class.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "devices/debug_exit.h"
#include "machine/backends.h"
#include "machine/config.h"
#include "machine/guest_ram.h"
#include "machine/machine_control.h"
#include "virtio/balloon.h"
#include "virtio/device.h"

namespace wisp {

class VirtioBlk;

class DeviceFactory final : private BalloonHost {
 public:
  struct Parts {
    Backends& backends;
    GuestRam& ram;
    Log& log;
    const Clock& clock;
    EntropySource& entropy;
    // The event loop that the device's iothread= names.
    std::function<Result<EventLoop*>(const DeviceConfig&)> loop_for;
    // The guest's memory is now `actual` bytes; called under the balloon's lock.
    std::function<void(std::uint64_t actual)> balloon_changed;
  };
  explicit DeviceFactory(Parts parts) : parts_(std::move(parts)) {}
  DeviceFactory(const DeviceFactory&) = delete;
  DeviceFactory& operator=(const DeviceFactory&) = delete;
  ~DeviceFactory() override = default;

  // Whether the driver takes a virtio slot of its own: the ports of a virtio-serial device, isa-debug-exit
  // and pc-testdev do not.
  [[nodiscard]] static bool is_virtio(const DeviceConfig& device);
  // Whether its chardev= names the socket of another process that serves it.
  [[nodiscard]] static bool is_vhost_user(const DeviceConfig& device);
  // What -device isa-debug-exit asks for, where it is among the devices.
  [[nodiscard]] static std::optional<DebugExitOptions> debug_exit_options(
      std::span<const DeviceConfig> devices);

  // Whether -device pc-testdev is among the devices.
  [[nodiscard]] static bool has_testdev(std::span<const DeviceConfig> devices);

  // `all` are the machine's devices, among them the ports of a virtio-serial device.
  [[nodiscard]] Result<std::unique_ptr<VirtioDevice>> create(const DeviceConfig& device,
                                                             std::span<const DeviceConfig> all);
  // The device with this id is about to be destroyed.
  void forget(const std::string& id);

  // Of the disk with this id; zeroes where there is none.
  [[nodiscard]] BlockCounters block_counters(const std::string& id) const;
  // The one balloon; errors where there is none. Its statistics are those that the guest gave last, and it is
  // asked for new ones.
  [[nodiscard]] Result<BalloonInfo> balloon_info() const;
  [[nodiscard]] Result<void> set_balloon(std::uint64_t bytes);

 private:
  using Made = Result<std::unique_ptr<VirtioDevice>>;
  using Maker = Made (DeviceFactory::*)(const DeviceConfig&, EventLoop&, std::span<const DeviceConfig>);
  struct MakerEntry {
    std::string_view driver;
    Maker maker;
  };
  struct MakerTable;
  [[nodiscard]] static const MakerEntry* find_maker(std::string_view driver);

  [[nodiscard]] Made make_blk(const DeviceConfig& device, EventLoop& loop, std::span<const DeviceConfig> all);
  [[nodiscard]] Made make_net(const DeviceConfig& device, EventLoop& loop, std::span<const DeviceConfig> all);
  [[nodiscard]] Made make_rng(const DeviceConfig& device, EventLoop& loop, std::span<const DeviceConfig> all);
  [[nodiscard]] Made make_balloon(const DeviceConfig& device, EventLoop& loop,
                                  std::span<const DeviceConfig> all);
  [[nodiscard]] Made make_vsock(const DeviceConfig& device, EventLoop& loop,
                                std::span<const DeviceConfig> all);
  [[nodiscard]] Made make_vhost_vsock(const DeviceConfig& device, EventLoop& loop,
                                      std::span<const DeviceConfig> all);

  [[nodiscard]] Made make_console(const DeviceConfig& device, EventLoop& loop,
                                  std::span<const DeviceConfig> all);

  [[nodiscard]] Made make_vhost_user_fs(const DeviceConfig& device, EventLoop& loop,
                                        std::span<const DeviceConfig> all);

  // BalloonHost
  [[nodiscard]] Result<void> discard(Gpa gpa, std::uint64_t size) override;
  void balloon_changed(std::uint64_t actual) override { parts_.balloon_changed(actual); }

  const Parts parts_;
  std::map<std::string, VirtioBlk*, std::less<>> disks_;
  VirtioBalloon* balloon_ = nullptr;
  std::string balloon_id_;
};

}  // namespace wisp
