// The keyboard controller's ports, as far as a machine without keyboard and mouse needs them: resetting.
//
// Linux resets a machine by command 0xfe ("reboot=k" and as its fallback) after waiting for the status bit
// "input buffer full" to be clear. It also probes for a controller where the ACPI tables do not deny one, and
// decides "no controller found" within a millisecond where it can read 16 bytes and the status still says
// "output buffer full"; a controller that answers would cost it commands with timeouts, two serio ports and a
// keyboard probe. So the status reads as all ones, an absent device, but for "input buffer full". With the
// FADT's 8042 flag clear, Linux does not touch the ports before it resets.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

#include "devices/device.h"

namespace wisp {

// Ports 0x60 to 0x64 as one region: data at offset 0, status and command at offset 4. Those between belong to
// nobody (0x61, the speaker, is the engine's PIT where it has one: it must win there by priority).
inline constexpr std::uint16_t kI8042PortBase = 0x60;
inline constexpr std::uint16_t kI8042PortCount = 5;

class I8042 final : public Device {
 public:
  // `on_reset` is called on the vCPU thread that asked, without a lock, as often as the guest likes.
  explicit I8042(std::function<void()> on_reset) : on_reset_(std::move(on_reset)) {}

  [[nodiscard]] std::string_view name() const override { return "i8042"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  // Whether the byte pulls the reset line.
  [[nodiscard]] bool write_byte(std::uint64_t offset, std::uint8_t value);

  mutable std::mutex mutex_;
  const std::function<void()> on_reset_;
  // The next byte to the data port is for the output port (command 0xd1).
  bool output_port_next_ = false;
};

}  // namespace wisp
