// The virtio-mmio transport (virtio 1.2, section 4.2, version 2 of the register layout).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
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

// Size of the register window.
inline constexpr std::uint64_t kVirtioMmioSize = 0x200;

// Owns the device's registers, not its meaning. Thread-safe: takes the device's strand lock on each access.
class MmioTransport final : public IoHandler, private VirtioInterrupts {
 public:
  // `device` and `irq` are owned by the transport from now on; `irq` is pulsed (edge-triggered).
  [[nodiscard]] static Result<std::shared_ptr<MmioTransport>> create(std::unique_ptr<VirtioDevice> device,
                                                                     std::unique_ptr<IrqLine> irq, Log& log,
                                                                     const Clock& clock);
  ~MmioTransport() override;

  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;

  // One doorbell per queue at QueueNotify, for the region that shows this transport.
  [[nodiscard]] std::vector<IoEvent> io_events() const;
  [[nodiscard]] VirtioDevice& device() { return *device_; }
  // Machine reset: registers and device to their power-up state.
  void reset();
  // Registers, rings and the device's own state.
  [[nodiscard]] StateRecord save();
  [[nodiscard]] Result<void> load(const StateRecord& record);

 private:
  MmioTransport(std::unique_ptr<VirtioDevice> device, std::unique_ptr<IrqLine> irq, Log& log,
                const Clock& clock);
  std::unique_ptr<VirtioDevice> device_;
  std::unique_ptr<IrqLine> irq_;
  struct State;
  std::unique_ptr<State> state_;
  void queue_used(std::uint16_t queue) override;
  void config_changed() override;
  void needs_reset() override;
  [[nodiscard]] Result<int> call_fd(std::uint16_t queue) override;
};

}  // namespace wisp
