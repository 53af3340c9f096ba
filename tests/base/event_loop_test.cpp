#include "base/event_loop.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

namespace wisp {
namespace {

std::unique_ptr<EventLoop> make_loop() {
  auto loop = EventLoop::create();
  EXPECT_TRUE(loop.has_value());
  return *std::move(loop);
}

TEST(EventLoop, CallsBackWhileWatchedOnly) {
  const auto loop = make_loop();
  const UniqueFd fd = *make_eventfd();
  int calls = 0;
  Watch watch = *loop->watch(fd.get(), EPOLLIN, [&](std::uint32_t) {
    ++calls;
    drain_eventfd(fd.get());
  });
  loop->run_once(0);
  EXPECT_EQ(calls, 0);
  signal_eventfd(fd.get());
  loop->run_once(1000);
  EXPECT_EQ(calls, 1);
  watch.stop();
  signal_eventfd(fd.get());
  loop->run_once(0);
  EXPECT_EQ(calls, 1);
}

TEST(EventLoop, CallbackMayStopItsOwnWatch) {
  const auto loop = make_loop();
  const UniqueFd fd = *make_eventfd();
  int calls = 0;
  Watch watch;
  watch = *loop->watch(fd.get(), EPOLLIN, [&](std::uint32_t) {
    ++calls;
    watch.stop();
  });
  signal_eventfd(fd.get());
  loop->run_once(1000);
  loop->run_once(0);
  EXPECT_EQ(calls, 1);
  EXPECT_FALSE(watch.active());
}

TEST(EventLoop, AnAddedDescriptorThatIsClosedElsewhereIsAnError) {
  const auto loop = make_loop();
  EXPECT_FALSE(loop->watch(-1, EPOLLIN, [](std::uint32_t) {}).has_value());
}

TEST(EventLoop, TimerFiresOnceAndCanBeDisarmed) {
  const auto loop = make_loop();
  int fired = 0;
  Timer timer = *loop->timer([&] { ++fired; });
  timer.arm(1'000'000);
  loop->run_once(1000);
  EXPECT_EQ(fired, 1);
  loop->run_once(5);
  EXPECT_EQ(fired, 1);
  timer.arm(1'000'000);
  timer.disarm();
  loop->run_once(5);
  EXPECT_EQ(fired, 1);
}

TEST(EventLoop, RunsTasksOfOtherThreadsAndStops) {
  const auto loop = make_loop();
  std::thread::id ran_on;
  std::thread other([&] {
    loop->post([&] {
      ran_on = std::this_thread::get_id();
      loop->stop();
    });
  });
  loop->run();
  other.join();
  EXPECT_EQ(ran_on, std::this_thread::get_id());
}

TEST(EventLoop, StopUnderTheGuardMeansNoCallbackAfterwards) {
  const auto loop = make_loop();
  Strand strand(*loop);
  const UniqueFd fd = *make_eventfd();
  std::thread runner([&] { loop->run(); });
  for (int round = 0; round < 200; ++round) {
    bool alive = true;
    Watch watch = *strand.watch(fd.get(), EPOLLIN, [&](std::uint32_t) {
      drain_eventfd(fd.get());
      EXPECT_TRUE(alive);
    });
    signal_eventfd(fd.get());
    const std::lock_guard lock(strand.mutex());
    watch.stop();
    alive = false;
  }
  loop->stop();
  runner.join();
}

}  // namespace
}  // namespace wisp
