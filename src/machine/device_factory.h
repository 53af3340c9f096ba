// Makes virtio devices from their configuration: the one place that knows every device class.
#pragma once

#include <cstdint>
#include <functional>
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
#include "virtio/device.h"

namespace wisp {

class VirtioBalloon;

class DeviceFactory final {
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

  // Whether the driver takes a virtio slot of its own (the ports of a virtio-serial device and isa-debug-exit
  // do not).
  [[nodiscard]] static bool is_virtio(const DeviceConfig& device);
  // What -device isa-debug-exit asks for, where it is among the devices.
  [[nodiscard]] static std::optional<DebugExitOptions> debug_exit_options(
      std::span<const DeviceConfig> devices);
  // The slot that addr= names.
  [[nodiscard]] static std::optional<std::uint32_t> wanted_slot(const DeviceConfig& device);

  // `all` are the machine's devices, among them the ports of a virtio-serial device.
  [[nodiscard]] Result<std::unique_ptr<VirtioDevice>> create(const DeviceConfig& device,
                                                             std::span<const DeviceConfig> all);
  // The device with this id is about to be destroyed.
  void forget(const std::string& id);

  // The one balloon; errors where there is none.
  [[nodiscard]] Result<BalloonInfo> balloon_info() const;
  [[nodiscard]] Result<void> set_balloon(std::uint64_t bytes);

 private:
  const Parts parts_;
  VirtioBalloon* balloon_ = nullptr;
  std::string balloon_id_;
};

}  // namespace wisp
