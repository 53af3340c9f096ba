// A token bucket: an exact mean rate over time, with a bounded burst after idle time.
#pragma once

#include <cstdint>

namespace wisp {

// Times are nanoseconds of one monotonic clock. Integer arithmetic without rounding: what is taken from the
// bucket up to time t is at most burst + rate * t, plus one request larger than the burst.
class RateLimiter final {
 public:
  // `rate` tokens a second (1 to 2^48); the bucket starts full, with `burst` tokens (0: a tenth of a second's
  // worth).
  RateLimiter(std::uint64_t rate, std::uint64_t burst, std::uint64_t now_ns);

  // How long to wait, in nanoseconds, until `cost` tokens may be taken; 0: now. A cost above the burst waits
  // for a full bucket, and leaves a debt.
  [[nodiscard]] std::uint64_t delay_ns(std::uint64_t cost, std::uint64_t now_ns);
  // Takes them, whether they are there or not.
  void take(std::uint64_t cost, std::uint64_t now_ns);

 private:
  __extension__ using Wide = __int128;
  void refill(std::uint64_t now_ns);

  const std::uint64_t rate_;
  const Wide full_;  // in tokens times 1e9
  Wide level_;       // the same; below zero: debt
  std::uint64_t refilled_ns_;
};

}  // namespace wisp
