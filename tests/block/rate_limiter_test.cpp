#include "block/rate_limiter.h"

#include <gtest/gtest.h>

namespace wisp {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;

TEST(RateLimiter, AFullBurstGoesAtOnceThenTheRateHolds) {
  RateLimiter limiter(10, 3, 0);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(limiter.delay_ns(1, 0), 0U);
    limiter.take(1, 0);
  }
  EXPECT_EQ(limiter.delay_ns(1, 0), kSecond / 10);
  EXPECT_EQ(limiter.delay_ns(1, kSecond / 10 - 1), 1U);
  EXPECT_EQ(limiter.delay_ns(1, kSecond / 10), 0U);
}

// Waits exactly as long as told, for a rate that does not divide a second: no rounding may add up.
TEST(RateLimiter, TheMeanIsExactOverAnHour) {
  constexpr std::uint64_t kRate = 7;
  constexpr std::uint64_t kHour = 3600 * kSecond;
  RateLimiter limiter(kRate, 2, 0);
  std::uint64_t now = 0;
  std::uint64_t taken = 0;
  while (true) {
    const std::uint64_t delay = limiter.delay_ns(1, now);
    now += delay;
    if (now > kHour) {
      break;
    }
    ASSERT_EQ(limiter.delay_ns(1, now), 0U);
    limiter.take(1, now);
    ++taken;
  }
  EXPECT_EQ(taken, kRate * 3600 + 2);
}

TEST(RateLimiter, IdleTimeGivesNoMoreThanTheBurst) {
  RateLimiter limiter(1000, 5, 0);
  const std::uint64_t later = 1'000'000 * kSecond;
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(limiter.delay_ns(1, later), 0U);
    limiter.take(1, later);
  }
  EXPECT_GT(limiter.delay_ns(1, later), 0U);
}

TEST(RateLimiter, ACostAboveTheBurstPassesAndIsPaidBack) {
  RateLimiter limiter(1'000'000, 1000, 0);
  EXPECT_EQ(limiter.delay_ns(5'000'000, 0), 0U);
  limiter.take(5'000'000, 0);
  // 5,000,000 - 1000 tokens of debt, then one token: at a million a second.
  EXPECT_EQ(limiter.delay_ns(1, 0), 4'999'001'000U);
}

TEST(RateLimiter, ByDefaultTheBurstIsATenthOfASecond) {
  RateLimiter limiter(1000, 0, 0);
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(limiter.delay_ns(1, 0), 0U);
    limiter.take(1, 0);
  }
  EXPECT_EQ(limiter.delay_ns(1, 0), 1'000'000U);
}

TEST(RateLimiter, AClockThatStandsOrGoesBackGivesNothing) {
  RateLimiter limiter(10, 1, kSecond);
  limiter.take(1, kSecond);
  EXPECT_EQ(limiter.delay_ns(1, 0), kSecond / 10);
  EXPECT_EQ(limiter.delay_ns(1, kSecond), kSecond / 10);
}

TEST(RateLimiter, HugeNumbersDoNotWrap) {
  RateLimiter limiter(1ULL << 48, 1ULL << 48, 0);
  limiter.take(UINT64_MAX, 0);
  const std::uint64_t delay = limiter.delay_ns(1, 0);
  EXPECT_GT(delay, 65000 * kSecond);
  EXPECT_EQ(limiter.delay_ns(1, delay), 0U);
}

}  // namespace
}  // namespace wisp
