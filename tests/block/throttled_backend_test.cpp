#include "block/throttled_backend.h"

#include <gtest/gtest.h>

#include <vector>

#include "block/support/block_kit.h"
#include "block/support/memory_backend.h"

namespace wisp {
namespace {

using test::BackendDriver;
using test::MemoryBackend;

class FakeClock final : public Clock {
 public:
  [[nodiscard]] std::uint64_t monotonic_ns() const override { return now; }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return now; }
  std::uint64_t now = 1'000'000'000;
};

std::vector<BlockRequest*> pointers(std::vector<BlockRequest>& requests) {
  std::vector<BlockRequest*> result;
  for (BlockRequest& request : requests) {
    result.push_back(&request);
  }
  return result;
}

TEST(ThrottledBackend, RequestsOverTheLimitWaitInOrder) {
  FakeClock clock;
  ThrottledBackend backend(std::make_unique<MemoryBackend>(1 << 20), {.iops = 10, .iops_burst = 2}, clock);
  std::vector<BlockRequest> requests(5, BlockRequest{.op = BlockOp::kFlush});
  BackendDriver driver(backend);
  driver.start(pointers(requests));
  ASSERT_EQ(driver.done().size(), 2U);
  EXPECT_EQ(backend.in_flight(), 3U);
  for (std::size_t expected = 3; expected <= 5; ++expected) {
    clock.now += 100'000'000;
    ASSERT_TRUE(driver.wait(expected));  // the timer comes in real time, the allowance by the fake clock
    EXPECT_EQ(driver.done().size(), expected);
    EXPECT_EQ(driver.done().back().request, &requests[expected - 1]);
  }
}

TEST(ThrottledBackend, ATimerThatComesEarlyLetsNothingThrough) {
  FakeClock clock;
  ThrottledBackend backend(std::make_unique<MemoryBackend>(1 << 20), {.iops = 1000, .iops_burst = 1}, clock);
  std::vector<BlockRequest> requests(2, BlockRequest{.op = BlockOp::kFlush});
  BackendDriver driver(backend);
  driver.start(pointers(requests));
  for (int i = 0; i < 5; ++i) {
    driver.loop().run_once(5);  // real milliseconds pass, the clock stands
  }
  EXPECT_EQ(driver.done().size(), 1U);
}

TEST(ThrottledBackend, BytesAreCountedForTransfersAndZeroes) {
  FakeClock clock;
  ThrottledBackend backend(std::make_unique<MemoryBackend>(1 << 20), {.bps = 8192, .bps_burst = 4096}, clock);
  std::vector<BlockRequest> requests{{.op = BlockOp::kDiscard, .length = 1 << 20},
                                     {.op = BlockOp::kWriteZeroes, .length = 4096},
                                     {.op = BlockOp::kWriteZeroes, .offset = 4096, .length = 4096}};
  BackendDriver driver(backend);
  driver.start(pointers(requests));
  EXPECT_EQ(driver.done().size(), 2U);
  clock.now += 499'999'999;
  driver.start({});
  EXPECT_EQ(driver.done().size(), 2U);
  clock.now += 1;
  EXPECT_TRUE(driver.wait(3));
}

TEST(ThrottledBackend, DrainLetsWaitingRequestsThroughOrCancelsThem) {
  FakeClock clock;
  ThrottledBackend backend(std::make_unique<MemoryBackend>(1 << 20), {.iops = 1, .iops_burst = 1}, clock);
  std::vector<BlockRequest> requests(4, BlockRequest{.op = BlockOp::kFlush});
  BackendDriver driver(backend);
  driver.start(pointers(requests));
  driver.drain(DrainMode::kComplete);
  ASSERT_EQ(driver.done().size(), 4U);
  EXPECT_EQ(driver.done().back().error, 0);
  EXPECT_EQ(backend.in_flight(), 0U);

  driver.done().clear();
  driver.start(pointers(requests));
  EXPECT_TRUE(driver.done().empty()) << "what went through must be paid back first";
  driver.drain(DrainMode::kCancel);
  ASSERT_EQ(driver.done().size(), 4U);
  for (const auto& done : driver.done()) {
    EXPECT_EQ(done.error, ECANCELED);
  }
}

TEST(ThrottledBackend, DetachCancelsAndAttachWorksAgain) {
  FakeClock clock;
  ThrottledBackend backend(std::make_unique<MemoryBackend>(1 << 20), {.iops = 1, .iops_burst = 1}, clock);
  std::vector<BlockRequest> requests(2, BlockRequest{.op = BlockOp::kFlush});
  {
    BackendDriver driver(backend);
    driver.start(pointers(requests));
    EXPECT_FALSE(backend.attach(driver.strand(), driver).has_value());
  }
  EXPECT_FALSE(backend.attached());
  EXPECT_EQ(backend.in_flight(), 0U);
  clock.now += 10'000'000'000;
  BackendDriver driver(backend);
  driver.start({requests.data()});
  EXPECT_EQ(driver.done().size(), 1U);
}

// In real time: 40 requests at 200 a second with a burst of one take 39/200 of a second, on few wake-ups.
TEST(ThrottledBackend, KeepsItsRateInRealTime) {
  const SystemClock clock;
  ThrottledBackend backend(std::make_unique<MemoryBackend>(1 << 20), {.iops = 200, .iops_burst = 1}, clock);
  std::vector<BlockRequest> requests(40, BlockRequest{.op = BlockOp::kFlush});
  BackendDriver driver(backend);
  const std::uint64_t start = clock.monotonic_ns();
  driver.start(pointers(requests));
  ASSERT_TRUE(driver.wait(40));
  EXPECT_GE(clock.monotonic_ns() - start, 194'000'000U);
  EXPECT_LE(driver.batches(), 41);
}

}  // namespace
}  // namespace wisp
