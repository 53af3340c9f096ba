// The virtio-mmio transport (virtio 1.2, section 4.2, version 2 of the register layout).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/state.h"
#include "base/unique_fd.h"
#include "hypervisor/irq_line.h"
#include "memory/address_space.h"
#include "memory/io_handler.h"
#include "virtio/device.h"

namespace wisp {

// Size of the register window: registers, then 256 bytes of the device's configuration space.
inline constexpr std::uint64_t kVirtioMmioSize = 0x200;

// Register offsets (4.2.2). All are 32 bits wide: other accesses below kConfig read as zero or are dropped.
namespace virtio_mmio {
inline constexpr std::uint64_t kMagicValue = 0x000;
inline constexpr std::uint64_t kVersion = 0x004;
inline constexpr std::uint64_t kDeviceId = 0x008;
inline constexpr std::uint64_t kVendorId = 0x00c;
inline constexpr std::uint64_t kDeviceFeatures = 0x010;
inline constexpr std::uint64_t kDeviceFeaturesSel = 0x014;
inline constexpr std::uint64_t kDriverFeatures = 0x020;
inline constexpr std::uint64_t kDriverFeaturesSel = 0x024;
inline constexpr std::uint64_t kQueueSel = 0x030;
inline constexpr std::uint64_t kQueueNumMax = 0x034;
inline constexpr std::uint64_t kQueueNum = 0x038;
inline constexpr std::uint64_t kQueueReady = 0x044;
inline constexpr std::uint64_t kQueueNotify = 0x050;
inline constexpr std::uint64_t kInterruptStatus = 0x060;
inline constexpr std::uint64_t kInterruptAck = 0x064;
inline constexpr std::uint64_t kStatus = 0x070;
inline constexpr std::uint64_t kQueueDescLow = 0x080;
inline constexpr std::uint64_t kQueueDescHigh = 0x084;
inline constexpr std::uint64_t kQueueDriverLow = 0x090;
inline constexpr std::uint64_t kQueueDriverHigh = 0x094;
inline constexpr std::uint64_t kQueueDeviceLow = 0x0a0;
inline constexpr std::uint64_t kQueueDeviceHigh = 0x0a4;
inline constexpr std::uint64_t kShmLenLow = 0x0b0;
inline constexpr std::uint64_t kShmLenHigh = 0x0b4;
inline constexpr std::uint64_t kShmBaseLow = 0x0b8;
inline constexpr std::uint64_t kShmBaseHigh = 0x0bc;
inline constexpr std::uint64_t kConfigGeneration = 0x0fc;
inline constexpr std::uint64_t kConfig = 0x100;

// Interrupt status bits.
inline constexpr std::uint32_t kInterruptUsed = 1;
inline constexpr std::uint32_t kInterruptConfig = 2;
}  // namespace virtio_mmio

// Device status bits (2.1).
inline constexpr std::uint32_t kVirtioStatusAcknowledge = 1;
inline constexpr std::uint32_t kVirtioStatusDriver = 2;
inline constexpr std::uint32_t kVirtioStatusDriverOk = 4;
inline constexpr std::uint32_t kVirtioStatusFeaturesOk = 8;
inline constexpr std::uint32_t kVirtioStatusNeedsReset = 64;
inline constexpr std::uint32_t kVirtioStatusFailed = 128;

// Owns the device and its registers, not its meaning. Thread-safe: takes the device's strand lock on each
// access, but not for interrupt status and notifications. Destroyed on the event loop's thread, or while
// that stands still.
class MmioTransport final : public IoHandler, private VirtioInterrupts {
 public:
  // `device` and `irq` are owned by the transport from now on; on failure `device` stays with the caller.
  // `irq` is pulsed (edge-triggered). What the guest makes it log goes through a gate.
  [[nodiscard]] static Result<std::shared_ptr<MmioTransport>> create(std::unique_ptr<VirtioDevice>&& device,
                                                                     std::unique_ptr<IrqLine> irq, Log& log,
                                                                     const Clock& clock);
  ~MmioTransport() override;

  // Of a transport that no guest has seen: the device, which can only be destroyed after this.
  [[nodiscard]] std::unique_ptr<VirtioDevice> give_back() { return std::move(device_); }

  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;

  // One doorbell per queue at QueueNotify, for the region that shows this transport.
  [[nodiscard]] std::vector<IoEvent> io_events() const;
  [[nodiscard]] VirtioDevice& device() { return *device_; }
  // Machine reset: registers and device to their power-up state.
  void reset();
  // Around a stop of the machine or a snapshot; see VirtioDevice::pause(). resume() also repeats the
  // interrupt where the driver did not acknowledge one, since the pulse may have been lost with the machine
  // it came from.
  void pause();
  void resume();
  // Registers, rings and the device's own state; pauses the device for as long as it takes.
  [[nodiscard]] StateRecord save();
  // Into a transport with the same device. After an error the device is as after reset().
  [[nodiscard]] Result<void> load(const StateRecord& record);

 private:
  MmioTransport(std::unique_ptr<VirtioDevice> device, std::unique_ptr<IrqLine> irq, Log& log,
                const Clock& clock);
  [[nodiscard]] std::uint32_t read_register(std::uint64_t offset);
  void write_register(std::uint64_t offset, std::uint32_t value);
  void write_queue_register(std::uint64_t offset, std::uint32_t value);
  void write_status(std::uint32_t value);
  [[nodiscard]] bool features_acceptable();
  [[nodiscard]] std::uint32_t config_generation();
  // `positions` holds the saved indices of the queues that are ready, or is null.
  [[nodiscard]] Result<void> activate(StateReader* positions);
  [[nodiscard]] Result<void> load_locked(const StateRecord& record);
  void reset_locked();
  void stop_watches();
  void kicked(std::uint16_t queue);
  void raise(std::uint32_t bits);
  template <typename... Args>
  void guest_error(fmt::format_string<Args...> format, Args&&... args);

  void queue_used(std::uint16_t queue) override;
  void config_changed() override;
  void needs_reset() override;
  [[nodiscard]] Result<int> call_fd(std::uint16_t queue) override;

  struct State;
  std::unique_ptr<VirtioDevice> device_;
  const std::unique_ptr<IrqLine> irq_;
  const std::unique_ptr<State> state_;
};

}  // namespace wisp
