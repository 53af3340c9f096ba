// The block device over real files: contents, resets and pauses with I/O under way, for each kind of aio.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <thread>

#include "block/drive.h"
#include "block/support/block_kit.h"
#include "virtio/blk_kit.h"

namespace wisp {
namespace {

using test::BlkDriver;
using test::FakeGuest;
using test::TempDir;

constexpr std::uint64_t kDisk = 4 << 20;
constexpr std::uint32_t kSectors = kDisk / 512;

class Dice final {
 public:
  explicit Dice(unsigned seed) : engine_(seed) {}
  std::uint32_t next() { return static_cast<std::uint32_t>(engine_()); }

 private:
  std::mt19937 engine_;
};

class BlkStressTest : public testing::TestWithParam<AioKind> {
 protected:
  BlkStressTest()
      : file_(dir_.file("disk", kDisk)),
        backend_(open_drive({.id = "d", .file = file_, .aio = GetParam(), .discard = true, .limits = {}},
                            log_, clock_)
                     .value()),
        guest_({{FakeGuest::kBase, 32UL << 20}}),
        driver_(*backend_, {.id = "b", .drive = "d", .num_queues = 2, .queue_size = 64}, &guest_) {
    EXPECT_TRUE(driver_.harness.activate({.queue_size = 64}).has_value());
  }
  TempDir dir_;
  Log log_;
  SystemClock clock_;
  std::string file_;
  std::unique_ptr<BlockBackend> backend_;
  FakeGuest guest_;
  BlkDriver driver_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, BlkStressTest,
                         testing::Values(AioKind::kIoUring, AioKind::kThreads, AioKind::kOff),
                         [](const auto& param) {
                           return std::string(param.param == AioKind::kIoUring   ? "uring"
                                              : param.param == AioKind::kThreads ? "threads"
                                                                                 : "off");
                         });

// Many requests at a time on ranges that do not overlap, against a model of the disk.
TEST_P(BlkStressTest, RandomRequestsAgreeWithAModel) {
  Dice random(GetParam() == AioKind::kIoUring ? 1 : 2);
  std::vector<std::uint8_t> model = TempDir::pattern(kDisk, 1);
  struct Flight {
    std::uint32_t type;
    std::uint32_t sector;
    std::uint32_t count;
    BlkDriver::Pending pending;
  };
  std::array<std::map<std::uint16_t, Flight>, 2> flights;
  const auto overlaps = [&](std::uint32_t sector, std::uint32_t count) {
    for (const auto& queue : flights) {
      for (const auto& [head, flight] : queue) {
        if (sector < flight.sector + flight.count && flight.sector < sector + count) {
          return true;
        }
      }
    }
    return false;
  };
  const auto finish = [&](std::uint16_t queue, const test::FakeQueue::Used& used) {
    const auto node = flights.at(queue).extract(static_cast<std::uint16_t>(used.head));
    ASSERT_FALSE(node.empty()) << "a head that was not in flight came back";
    const Flight& flight = node.mapped();
    ASSERT_EQ(guest_.load<std::uint8_t>(flight.pending.status), 0);
    if (flight.type == test::kBlkIn) {
      const auto data = guest_.read(flight.pending.data, flight.count * 512UL);
      ASSERT_TRUE(std::equal(data.begin(), data.end(),
                             model.begin() + static_cast<std::ptrdiff_t>(flight.sector) * 512));
    }
  };
  int started = 0;
  while (started < 1500 || !flights[0].empty() || !flights[1].empty()) {
    const auto queue = static_cast<std::uint16_t>(random.next() % 2);
    if (started < 1500 && flights.at(queue).size() < 16) {
      const std::uint32_t count = 1 + random.next() % 64;
      const std::uint32_t sector = random.next() % (kSectors - count);
      const std::uint32_t dice = random.next() % 16;
      if (overlaps(sector, count)) {
        continue;
      }
      const auto at = model.begin() + static_cast<std::ptrdiff_t>(sector) * 512;
      Flight flight{.type = test::kBlkIn, .sector = sector, .count = count, .pending = {}};
      if (dice < 7) {
        flight.pending = driver_.start_read(sector, count * 512, queue);
      } else if (dice < 13) {
        flight.type = test::kBlkOut;
        const auto data = TempDir::pattern(count * 512UL, random.next());
        std::ranges::copy(data, at);
        flight.pending = driver_.start_write(sector, data, queue);
      } else if (dice < 14) {
        flight.type = test::kBlkFlush;
        flight.count = 0;
        flight.pending = driver_.start_flush(queue);
      } else {
        // Only on queue 0; discarding a file reads as zeroes afterwards.
        flight.type = dice == 14 ? test::kBlkWriteZeroes : test::kBlkDiscard;
        std::fill_n(at, count * 512UL, std::uint8_t{0});
        flight.pending =
            driver_.start_ranges(flight.type, {{sector, count, dice == 14 ? random.next() % 2 : 0}});
        ASSERT_TRUE(flights[0].emplace(flight.pending.head, flight).second);
        ++started;
        continue;
      }
      ASSERT_TRUE(flights.at(queue).emplace(flight.pending.head, flight).second);
      ++started;
      if (random.next() % 4 != 0) {
        continue;
      }
    }
    if (started % 600 == 0) {
      driver_.harness.pause();
      driver_.harness.resume();
    }
    for (std::uint16_t i = 0; i < 2; ++i) {
      if (flights.at(i).size() >= 16 || started >= 1500) {
        if (!flights.at(i).empty()) {
          const auto used = driver_.harness.wait_used(i);
          ASSERT_TRUE(used.has_value()) << "a request was lost";
          ASSERT_NO_FATAL_FAILURE(finish(i, *used));
        }
      }
      while (const auto used = driver_.harness.queue(i).take_used()) {
        ASSERT_NO_FATAL_FAILURE(finish(i, *used));
      }
    }
    if (guest_.allocate(0) > guest_.end() - (4UL << 20)) {
      // Running out of guest memory: let all requests end, then begin with fresh rings.
      for (std::uint16_t i = 0; i < 2; ++i) {
        while (!flights.at(i).empty()) {
          const auto used = driver_.harness.wait_used(i);
          ASSERT_TRUE(used.has_value());
          ASSERT_NO_FATAL_FAILURE(finish(i, *used));
        }
      }
      ASSERT_TRUE(driver_.restart({.queue_size = 64}));
    }
  }
  EXPECT_FALSE(driver_.harness.interrupts().broken());
  EXPECT_EQ(TempDir::read(file_), model);
}

// The loop runs on a thread of its own, as an iothread does; resets come at any moment. Afterwards the
// guest's memory must stay as the guest left it.
TEST_P(BlkStressTest, ResetWithRequestsUnderWay) {
  Dice random(5);
  std::thread runner([this] { driver_.harness.loop().run(); });
  for (int round = 0; round < 60; ++round) {
    if (round > 0) {
      guest_.clear();
      ASSERT_TRUE(driver_.harness.activate({.queue_size = 64}).has_value());
    }
    const std::uint32_t count = 1 + random.next() % 16;
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t sector = random.next() % (kSectors - 256);
      if (random.next() % 2 == 0) {
        static_cast<void>(driver_.start_read(sector, 512 * (1 + random.next() % 256)));
      } else {
        static_cast<void>(
            driver_.start_write(sector, TempDir::pattern(512 * (1 + random.next() % 64), random.next()), 1));
      }
    }
    if (round % 3 == 1) {
      std::this_thread::sleep_for(std::chrono::microseconds(random.next() % 500));
    }
    driver_.harness.reset();
    ASSERT_EQ(backend_->in_flight(), 0U);
    const auto used = driver_.harness.interrupts().used(0) + driver_.harness.interrupts().used(1);
    const auto before = guest_.read(guest_.base(), 4 << 20);
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    ASSERT_EQ(guest_.read(guest_.base(), 4 << 20), before);
    ASSERT_EQ(driver_.harness.interrupts().used(0) + driver_.harness.interrupts().used(1), used);
  }
  driver_.harness.loop().stop();
  runner.join();
}

// Waiting for the rate limit would take seconds.
TEST_P(BlkStressTest, AThrottledDiskCanBeResetAndPausedAtOnce) {
  driver_.harness.reset();
  const std::string other = dir_.file("other", 1 << 20);
  const auto slow =
      open_drive({.id = "s", .file = other, .aio = GetParam(), .limits = {.iops = 1}}, log_, clock_);
  ASSERT_TRUE(slow.has_value());
  BlkDriver driver(**slow, {.id = "b", .drive = "s"});
  ASSERT_TRUE(driver.harness.activate().has_value());
  const auto start = clock_.monotonic_ns();
  for (int i = 0; i < 4; ++i) {
    static_cast<void>(driver.start_read(0, 512));
  }
  EXPECT_GE((*slow)->in_flight(), 3U);
  driver.harness.pause();
  EXPECT_EQ(driver.harness.queue(0).used_index(), 4);
  driver.harness.resume();
  static_cast<void>(driver.start_read(0, 512));
  driver.harness.reset();
  EXPECT_EQ((*slow)->in_flight(), 0U);
  EXPECT_LT(clock_.monotonic_ns() - start, 1'000'000'000U);
}

}  // namespace
}  // namespace wisp
