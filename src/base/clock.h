// Time as an input that a machine is given, so that it can be virtual or replayed.
#pragma once

#include <cstdint>

namespace wisp {

class Clock {
 public:
  virtual ~Clock() = default;
  // Nanoseconds since an arbitrary start; never goes back.
  [[nodiscard]] virtual std::uint64_t monotonic_ns() const = 0;
  // Nanoseconds since 1970-01-01 00:00:00 UTC.
  [[nodiscard]] virtual std::uint64_t realtime_ns() const = 0;
};

// The host's CLOCK_MONOTONIC and CLOCK_REALTIME.
class SystemClock final : public Clock {
 public:
  [[nodiscard]] std::uint64_t monotonic_ns() const override;
  [[nodiscard]] std::uint64_t realtime_ns() const override;
};

}  // namespace wisp
