// The 8254 interval timer at ports 0x40-0x43 with the gate and output of channel 2 at port 0x61 (Intel 8254
// data sheet).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>

#include "base/error.h"
#include "base/state.h"

namespace wisp::soft {

// Thread-safe. Time is guest nanoseconds; channel 0 raises `irq` (an edge) from poll(). A count written to a
// running periodic channel takes effect at once, not at the end of the period.
class Pit final {
 public:
  Pit(std::function<std::uint64_t()> now_ns, std::function<void()> irq);

  [[nodiscard]] static bool owns(std::uint16_t port) {
    return (port >= 0x40 && port <= 0x43) || port == 0x61;
  }
  [[nodiscard]] std::uint8_t read(std::uint16_t port);
  void write(std::uint16_t port, std::uint8_t value);

  // When channel 0 raises its next edge, in guest nanoseconds; empty: never.
  [[nodiscard]] std::optional<std::uint64_t> next_event_ns() const;
  // Raises the edges that are due (at most one: missed periods are dropped).
  void poll();

  void reset();
  void save(StateWriter& writer) const;
  [[nodiscard]] Result<void> load(StateReader& reader);

 private:
  struct Channel {
    std::uint8_t mode = 0;
    std::uint8_t access = 3;  // 1: low byte, 2: high byte, 3: both
    bool bcd = false;
    bool gate = true;
    bool counting = false;  // a count was loaded since the control word
    bool write_high_next = false;
    bool read_high_next = false;
    bool count_latched = false;
    bool status_latched = false;
    std::uint8_t write_low = 0;
    std::uint8_t status = 0;
    std::uint16_t latch = 0;
    bool triggered = false;          // modes 1 and 5: the gate has risen
    std::uint32_t reload = 0x10000;  // the count last written
    std::uint32_t active = 0x10000;  // the count of the present period
    std::uint64_t start_ns = 0;      // when counting began, or went on after the gate was low
    std::uint64_t held_ticks = 0;    // counted before that
  };
  [[nodiscard]] std::uint64_t elapsed_ticks(const Channel& channel) const;
  [[nodiscard]] std::uint16_t count(const Channel& channel) const;
  [[nodiscard]] bool output(const Channel& channel) const;
  void load_count(std::uint32_t index, std::uint32_t value);
  void set_gate(Channel& channel, bool gate);
  void control(std::uint8_t value);
  // Ticks of channel 0 from its start to the edge it raises next; empty: none.
  [[nodiscard]] std::optional<std::uint64_t> ticks_to_event() const;

  const std::function<std::uint64_t()> now_ns_;
  const std::function<void()> irq_;
  mutable std::mutex mutex_;
  std::array<Channel, 3> channels_{};
  std::uint64_t fired_periods_ = 0;  // edges of channel 0 already raised since its start
  bool speaker_ = false;
};

}  // namespace wisp::soft
