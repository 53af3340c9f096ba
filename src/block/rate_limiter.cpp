#include "block/rate_limiter.h"

#include <algorithm>

namespace wisp {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;
constexpr std::uint64_t kDefaultBurstsPerSecond = 10;

}  // namespace

RateLimiter::RateLimiter(std::uint64_t rate, std::uint64_t burst, std::uint64_t now_ns)
    : rate_(std::max<std::uint64_t>(rate, 1)),
      full_(Wide{burst != 0 ? burst : std::max<std::uint64_t>(rate / kDefaultBurstsPerSecond, 1)} * kSecond),
      level_(full_),
      refilled_ns_(now_ns) {}

void RateLimiter::refill(std::uint64_t now_ns) {
  if (now_ns > refilled_ns_) {
    level_ = std::min(full_, level_ + Wide{now_ns - refilled_ns_} * rate_);
    refilled_ns_ = now_ns;
  }
}

std::uint64_t RateLimiter::delay_ns(std::uint64_t cost, std::uint64_t now_ns) {
  refill(now_ns);
  const Wide needed = std::min(Wide{cost} * kSecond, full_);
  if (level_ >= needed) {
    return 0;
  }
  const Wide wait = (needed - level_ + rate_ - 1) / rate_;
  return static_cast<std::uint64_t>(std::min(wait, Wide{INT64_MAX}));
}

void RateLimiter::take(std::uint64_t cost, std::uint64_t now_ns) {
  refill(now_ns);
  level_ -= Wide{cost} * kSecond;
}

}  // namespace wisp
