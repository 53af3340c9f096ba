// Eventfds that another process holds too, and does what it likes to.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <future>

#include "base/unique_fd.h"

namespace wisp {
namespace {

constexpr std::uint64_t kFull = UINT64_MAX - 1;

// Whether the work ends within ten seconds; where not, what it hangs on is freed by `release`.
bool ends(const std::function<void()>& work, const std::function<void()>& release) {
  auto done = std::async(std::launch::async, work);
  const bool ended = done.wait_for(std::chrono::seconds(10)) == std::future_status::ready;
  if (!ended) {
    release();
  }
  return ended;
}

class EventfdTest : public ::testing::Test {
 protected:
  EventfdTest() : event_(*make_eventfd()) {}
  // As a peer with a descriptor of the same open file may.
  void make_blocking() {
    const UniqueFd peers = *event_.duplicate();
    ASSERT_EQ(::fcntl(peers.get(), F_SETFL, 0), 0);
    ASSERT_EQ(::fcntl(event_.get(), F_GETFL) & O_NONBLOCK, 0);
  }
  void add(std::uint64_t count) {
    ASSERT_EQ(::write(event_.get(), &count, sizeof count), static_cast<ssize_t>(sizeof count));
  }
  [[nodiscard]] std::function<void()> drainer() const {
    return [fd = event_.get()] {
      std::uint64_t count = 0;
      EXPECT_EQ(::read(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
    };
  }

  const UniqueFd event_;
};

TEST_F(EventfdTest, CountsAndIsDrained) {
  EXPECT_EQ(drain_eventfd(event_.get()), 0U);
  signal_eventfd(event_.get());
  signal_shared_eventfd(event_.get());
  EXPECT_EQ(drain_eventfd(event_.get()), 2U);
  EXPECT_EQ(drain_eventfd(event_.get()), 0U);
  EXPECT_EQ(drain_eventfd(-1), 0U);
  signal_shared_eventfd(-1);
}

TEST_F(EventfdTest, AnEmptyBlockingOneDoesNotHoldWhoDrainsIt) {
  make_blocking();
  std::uint64_t count = 1;
  EXPECT_TRUE(ends([&] { count = drain_eventfd(event_.get()); }, [&] { signal_eventfd(event_.get()); }));
  EXPECT_EQ(count, 0U);
  signal_eventfd(event_.get());
  EXPECT_EQ(drain_eventfd(event_.get()), 1U);
}

TEST_F(EventfdTest, AFullBlockingOneDoesNotHoldWhoSignalsIt) {
  make_blocking();
  add(kFull);
  EXPECT_TRUE(ends([&] { signal_shared_eventfd(event_.get()); }, drainer()));
  EXPECT_EQ(drain_eventfd(event_.get()), kFull);
  signal_shared_eventfd(event_.get());
  EXPECT_EQ(drain_eventfd(event_.get()), 1U);
}

}  // namespace
}  // namespace wisp
