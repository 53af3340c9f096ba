#include "base/checked.h"

#include <gtest/gtest.h>

namespace wisp {
namespace {

static_assert(!checked_add<std::uint64_t>(UINT64_MAX, 1));
static_assert(checked_add<std::uint32_t>(1, 2) == 3U);
static_assert(!checked_mul<std::uint64_t>(1ULL << 55, 512));
static_assert(!checked_cast<std::uint32_t>(1ULL << 32));
static_assert(!checked_cast<std::uint32_t>(-1));
static_assert(align_up(4097, 4096) == 8192U);
static_assert(!align_up(UINT64_MAX, 4096));

TEST(Checked, RangeWithinNeverWraps) {
  EXPECT_TRUE(range_within(0, 10, 10));
  EXPECT_TRUE(range_within(10, 0, 10));
  EXPECT_FALSE(range_within(1, 10, 10));
  EXPECT_FALSE(range_within(11, 0, 10));
  EXPECT_FALSE(range_within(UINT64_MAX, 2, 10));
  EXPECT_FALSE(range_within(2, UINT64_MAX, 10));
}

}  // namespace
}  // namespace wisp
