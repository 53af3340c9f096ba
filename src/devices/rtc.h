// The real-time clock and its battery-backed memory: Motorola MC146818A at ports 0x70 (index) and 0x71
// (data).
//
// It runs on the clock it is given plus the difference that the guest has set, so a guest that was saved
// finds the right time when it is restored. Interrupts cost the host nothing until the guest enables one, and
// then at most one timer at a time: none while the guest has not read register C.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/clock.h"
#include "base/event_loop.h"
#include "devices/device.h"
#include "hypervisor/irq_line.h"

namespace wisp {

inline constexpr std::uint16_t kRtcPortCount = 2;
// Where the century is, for the FADT (BCD or binary as the rest).
inline constexpr std::uint8_t kRtcCenturyIndex = 0x32;

class Rtc final : public Device {
 public:
  // Starts at the clock's time of day in UTC.
  [[nodiscard]] static Result<std::unique_ptr<Rtc>> create(EventLoop& loop, const Clock& clock,
                                                           std::unique_ptr<IrqLine> irq);
  Rtc(const Rtc&) = delete;
  Rtc& operator=(const Rtc&) = delete;
  ~Rtc() override;

  [[nodiscard]] std::string_view name() const override { return "rtc"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  // Interrupts off; time and memory are on the battery and stay.
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  static constexpr std::size_t kBytes = 128;

  // What a snapshot keeps.
  struct State {
    std::uint8_t index = 0;
    std::array<std::uint8_t, kBytes> bytes{};
    // The guest's time is (host time + phase) in whole seconds + offset; see guest_seconds().
    std::uint64_t phase_ns = 0;
    std::int64_t offset_seconds = 0;
  };

  Rtc(const Clock& clock, std::unique_ptr<IrqLine> irq);

  [[nodiscard]] std::uint8_t read_data();
  void write_data(std::uint8_t value);
  void write_time(std::uint8_t index, std::uint8_t value);
  void write_control_b(std::uint8_t value);

  // Counting: neither being set (register B) nor with its divider stopped (register A).
  [[nodiscard]] bool running() const;
  [[nodiscard]] std::uint64_t base_ns() const;
  [[nodiscard]] std::int64_t guest_seconds(std::uint64_t base) const;
  [[nodiscard]] std::uint64_t period_ns() const;
  // Seconds from `from` to the next alarm after it, 0 where there is none.
  [[nodiscard]] std::uint64_t seconds_to_alarm(std::int64_t from) const;

  // Between registers and time.
  void show_time();
  void take_time();
  [[nodiscard]] std::uint8_t encode(std::uint32_t value) const;
  [[nodiscard]] std::uint32_t decode(std::uint8_t value) const;
  [[nodiscard]] std::uint8_t encode_hour(std::uint32_t hour) const;
  [[nodiscard]] std::uint32_t decode_hour(std::uint8_t value) const;

  // Sets the flags of register C for what happened since the last call.
  void advance();
  // Raises the interrupt where flags call for it, and sets the timer for the next one.
  void update_irq();
  void arm_timer();

  const Clock& clock_;
  const std::unique_ptr<IrqLine> irq_;
  mutable std::mutex mutex_;
  State state_;
  std::uint64_t advanced_to_ = 0;  // base_ns() at the last advance()
  Timer timer_;
};

}  // namespace wisp
