// The machine's power: what ACPI calls the sleep and reset registers of hardware-reduced machines and the
// Generic Event Device that carries the power and sleep buttons. Layout: devices/power_registers.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "devices/device.h"
#include "devices/power_registers.h"
#include "hypervisor/irq_line.h"

namespace wisp {

// What the guest asks for. Called on the vCPU thread that asked, without a lock, as often as the guest likes:
// the owner only notes the wish and wakes whoever acts on it.
struct PowerCallbacks {
  std::function<void()> shutdown;
  std::function<void()> reset;
};

class PowerDevice final : public Device {
 public:
  // `irq` is the line of the Generic Event Device (power_registers.h).
  PowerDevice(std::unique_ptr<IrqLine> irq, PowerCallbacks callbacks);

  void press_power_button() { raise(kPowerEventPowerButton); }
  // Makes events (kPowerEvent...) pending; they stay so until the guest reads them. From any thread.
  void raise(std::uint32_t events);

  [[nodiscard]] std::string_view name() const override { return "power"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  [[nodiscard]] std::uint8_t read_byte(std::uint64_t offset);
  void set_events(std::uint32_t events);

  mutable std::mutex mutex_;
  const std::unique_ptr<IrqLine> irq_;
  const PowerCallbacks callbacks_;
  std::uint32_t events_ = 0;
  std::uint8_t sleep_control_ = 0;
};

}  // namespace wisp
