#include "hypervisor/soft/halt_poll.h"

#include <gtest/gtest.h>

namespace wisp::soft {
namespace {

TEST(HaltPoll, LooksAfterShortWaitsAndSleepsAfterLongOnes) {
  HaltPoll poll;
  EXPECT_EQ(poll.window(), 0U);
  poll.waited(HaltPoll::kLongest + 1);
  EXPECT_EQ(poll.window(), 0U);
  poll.waited(5'000);
  EXPECT_EQ(poll.window(), HaltPoll::kShortest);
  for (int i = 0; i < 20; ++i) {
    poll.waited(HaltPoll::kLongest);
  }
  EXPECT_EQ(poll.window(), HaltPoll::kLongest);
  poll.waited(1'000'000);
  EXPECT_EQ(poll.window(), HaltPoll::kLongest / 2);
  for (int i = 0; i < 20; ++i) {
    poll.waited(1'000'000);
  }
  EXPECT_EQ(poll.window(), 0U);
}

}  // namespace
}  // namespace wisp::soft
