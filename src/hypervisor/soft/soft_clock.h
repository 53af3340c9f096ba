// Time as the software CPU's parts see it, behind one interface, so that a clock counted in instructions can
// take the host's place.
#pragma once

#include <cstdint>

namespace wisp::soft {

// Thread-safe.
class SoftClock {
 public:
  virtual ~SoftClock() = default;
  // Nanoseconds since an arbitrary start, never going back: the clock of the PIT and the local APIC timers.
  [[nodiscard]] virtual std::uint64_t now_ns() const = 0;
  // The time-stamp counter that all processors of the machine count from, and its frequency.
  [[nodiscard]] virtual std::uint64_t tsc() const = 0;
  [[nodiscard]] virtual std::uint64_t tsc_khz() const = 0;
  // Nanoseconds since 1970.
  [[nodiscard]] virtual std::uint64_t realtime_ns() const = 0;
};

// The host's clocks: CLOCK_MONOTONIC, and its own time-stamp counter where that runs at one rate (CPUID leaf
// 0x80000007). Where it does not, CLOCK_MONOTONIC stands for it: a counter of 1 GHz.
class HostClock final : public SoftClock {
 public:
  // Takes some milliseconds the first time in a process, where nothing tells the counter's frequency and it
  // must be measured.
  HostClock();
  [[nodiscard]] std::uint64_t now_ns() const override;
  [[nodiscard]] std::uint64_t tsc() const override;
  [[nodiscard]] std::uint64_t tsc_khz() const override { return khz_; }
  [[nodiscard]] std::uint64_t realtime_ns() const override;
  // Whether tsc() is what RDTSC gives.
  [[nodiscard]] bool native_tsc() const { return native_; }

 private:
  const bool native_;
  const std::uint64_t khz_;
};

// a * b / c, whole in between; c is not 0. The result must fit.
[[nodiscard]] constexpr std::uint64_t multiply_divide(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::uint64_t>(static_cast<Wide>(a) * b / c);
}

}  // namespace wisp::soft
