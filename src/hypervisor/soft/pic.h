// The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet): master at 0x20, slave at 0xa0 on
// its input 2, edge/level control at 0x4d0.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>

#include "base/error.h"
#include "base/state.h"
#include "memory/io_handler.h"

namespace wisp::soft {

// Thread-safe. `wake` is called, without the lock, when the output to the processor rises.
class PicPair final {
 public:
  explicit PicPair(std::function<void()> wake) : wake_(std::move(wake)) { reset(); }

  [[nodiscard]] std::uint8_t read(std::uint16_t port);
  void write(std::uint16_t port, std::uint8_t value);
  // Whether `port` belongs to the pair.
  [[nodiscard]] static bool owns(std::uint16_t port);

  void set_level(std::uint32_t irq, bool high);
  void pulse(std::uint32_t irq);
  [[nodiscard]] bool has_interrupt() const;
  // The processor's acknowledge cycle: the vector (spurious 7 or 15 where nothing is pending any more).
  [[nodiscard]] std::uint8_t acknowledge();

  void reset();
  void save(StateWriter& writer) const;
  [[nodiscard]] Result<void> load(StateReader& reader);

 private:
  struct Chip {
    std::uint8_t request = 0, service = 0, mask = 0, lines = 0, level_mode = 0;
    std::uint8_t base = 0;       // vector of input 0
    std::uint8_t priority = 0;   // input with the highest priority
    std::uint8_t init_step = 0;  // 0: ready, 2 to 4: the ICW expected next
    bool needs_icw4 = false, read_service = false, poll = false, special_mask = false;
    bool auto_eoi = false, rotate_on_auto_eoi = false, special_fully_nested = false, single = false;
    void set(std::uint8_t input, bool high);
    void set_level_mode(std::uint8_t inputs);
    // Inputs in service that hold back others.
    [[nodiscard]] std::uint8_t counted_service() const;
    [[nodiscard]] int pending(bool master) const;
    void take(std::uint8_t input);
    void command(std::uint8_t value);
    void data(std::uint8_t value);
  };
  void update();  // slave's output to the master's input 2
  [[nodiscard]] std::uint8_t acknowledge_locked();
  template <typename Body>
  void change(Body body);

  std::function<void()> wake_;
  mutable std::mutex mutex_;
  std::array<Chip, 2> chips_;
};

}  // namespace wisp::soft
