// The I/O APIC: 24 pins at 0xfec00000 (Intel 82093AA data sheet; Intel ICH I/O APIC with EOI register,
// version 0x20).
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <span>

#include "base/error.h"
#include "base/state.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/soft/apic_bus.h"
#include "memory/io_handler.h"

namespace wisp::soft {

inline constexpr std::uint64_t kIoApicAddress = 0xfec00000;
inline constexpr std::uint64_t kIoApicSize = 0x1000;

// Thread-safe.
class IoApic final : public IoHandler {
 public:
  explicit IoApic(const ApicBus& bus) : bus_(bus) { reset(); }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;

  // An edge on a pin: up and down.
  void pulse(std::uint32_t pin);
  void set_level(std::uint32_t pin, bool high);
  // A local APIC acknowledged a level-triggered vector.
  void eoi(std::uint8_t vector);

  void reset();
  void save(StateWriter& writer) const;
  [[nodiscard]] Result<void> load(StateReader& reader);

 private:
  [[nodiscard]] std::uint32_t read_register() const;
  void write_register(std::uint32_t value);
  [[nodiscard]] static bool level_triggered(std::uint64_t entry);
  // Whether a local APIC accepted what the entry says.
  bool send(std::uint64_t entry) const;
  // With the lock held. service() sends a level-triggered pin's interrupt where it is due: high, not masked,
  // not waiting for an EOI. change() moves the pin; an edge on a masked pin is lost (82093AA, 3.2.4).
  void service(std::uint32_t pin);
  void change(std::uint32_t pin, bool high);

  const ApicBus& bus_;
  mutable std::mutex mutex_;
  std::array<std::uint64_t, kIoApicPins> entries_{};
  std::uint32_t levels_ = 0;  // pins that are high
  std::uint32_t id_ = 0;
  std::uint8_t select_ = 0;
};

}  // namespace wisp::soft
