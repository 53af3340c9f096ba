#include "virtio/balloon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "virtio/support/device_harness.h"

namespace wisp {
namespace {

using test::ChainBuilder;
using test::DeviceHarness;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;

struct RecordingHost final : BalloonHost {
  [[nodiscard]] Result<void> discard(Gpa gpa, std::uint64_t size) override {
    discarded.emplace_back(gpa, size);
    return {};
  }
  void balloon_changed(std::uint64_t actual) override { told.push_back(actual); }
  std::vector<std::pair<Gpa, std::uint64_t>> discarded;
  std::vector<std::uint64_t> told;
};

class FakeClock final : public Clock {
 public:
  [[nodiscard]] std::uint64_t monotonic_ns() const override { return now; }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return now; }
  std::uint64_t now = 1;
};

constexpr std::uint64_t kReporting = 1ULL << 5;
constexpr std::uint64_t kStatistics = 1ULL << 1;

class BalloonTest : public testing::Test {
 protected:
  RecordingHost host_;
  Log log_{-1};
  FakeClock clock_;
  DeviceHarness harness_{[this](EventLoop& loop, const GuestMemory& memory) {
    return VirtioBalloon::create(loop, memory,
                                 {.id = "b", .deflate_on_oom = true, .free_page_reporting = true}, host_,
                                 log_, clock_)
        .value();
  }};
  VirtioBalloon& balloon_ = harness_.device_as<VirtioBalloon>();
  const std::uint64_t ram_ = test::FakeGuest::kDefaultSize;

  void send_pfns(std::uint16_t queue, const std::vector<std::uint32_t>& pfns) {
    const Gpa at = harness_.guest().allocate(4 * pfns.size());
    harness_.guest().write(at,
                           std::span(reinterpret_cast<const std::uint8_t*>(pfns.data()), 4 * pfns.size()));
    harness_.submit(queue, ChainBuilder().readable(at, static_cast<std::uint32_t>(4 * pfns.size())));
    ASSERT_TRUE(harness_.wait_used(queue).has_value());
  }
};

TEST_F(BalloonTest, TargetGoesToTheGuestInPages) {
  ASSERT_TRUE(harness_.activate().has_value());
  EXPECT_EQ(balloon_.target(), ram_);
  EXPECT_EQ(balloon_.actual(), ram_);
  ASSERT_TRUE(balloon_.set_target(ram_ - 10 * kPageSize).has_value());
  EXPECT_EQ(harness_.read_config<std::uint32_t>(0), 10U);
  EXPECT_EQ(harness_.interrupts().config(), 1U);
  ASSERT_TRUE(balloon_.set_target(ram_ - 10 * kPageSize).has_value());
  EXPECT_EQ(harness_.interrupts().config(), 1U);  // nothing new
  ASSERT_TRUE(balloon_.set_target(UINT64_MAX).has_value());
  EXPECT_EQ(harness_.read_config<std::uint32_t>(0), 0U);
  EXPECT_FALSE(balloon_.set_target(0).has_value());
}

TEST_F(BalloonTest, InflatedPagesGoBackInRunsAndOnlyOnce) {
  ASSERT_TRUE(harness_.activate().has_value());
  send_pfns(0, {0x103, 0x101, 0x102, 0x101, 0x110, 0x111});
  EXPECT_THAT(host_.discarded, ElementsAre(Pair(0x101000, 0x3000), Pair(0x110000, 0x2000)));
}

TEST_F(BalloonTest, PagesThatAreNoRamAreNobodys) {
  ASSERT_TRUE(harness_.activate().has_value());
  const auto last = static_cast<std::uint32_t>(harness_.guest().end() / kPageSize - 1);
  send_pfns(0, {0, 0xf, last, last + 1, 0xfeb00, 0xffffffff});
  EXPECT_THAT(host_.discarded, ElementsAre(Pair(std::uint64_t{last} * kPageSize, kPageSize)));
  EXPECT_FALSE(harness_.interrupts().broken());
}

TEST_F(BalloonTest, DiscardedPagesAreDirty) {
  ASSERT_TRUE(harness_.activate().has_value());
  static_cast<void>(harness_.guest().take_dirty_pages());
  send_pfns(0, {0x180});
  EXPECT_TRUE(harness_.guest().take_dirty_pages().at(0x180 - test::FakeGuest::kBase / kPageSize));
}

TEST_F(BalloonTest, DeflatedPagesAreLeftAlone) {
  ASSERT_TRUE(harness_.activate().has_value());
  send_pfns(1, {0x101});
  EXPECT_THAT(host_.discarded, IsEmpty());
}

TEST_F(BalloonTest, OversizedInflationIsCut) {
  ASSERT_TRUE(harness_.activate().has_value());
  const Gpa at = harness_.guest().allocate(1 << 20);
  harness_.submit(0, ChainBuilder().readable(at, 1 << 20));
  ASSERT_TRUE(harness_.wait_used(0).has_value());
  EXPECT_THAT(host_.discarded, IsEmpty());  // PFN 0 again and again
}

TEST_F(BalloonTest, ReportedPagesGoBackRoundedInwards) {
  // Linux numbers the queues it uses, the specification all: both places serve reporting.
  for (const std::uint16_t queue : {std::uint16_t{3}, std::uint16_t{4}}) {
    host_.discarded.clear();
    ASSERT_TRUE(harness_.activate().has_value());
    harness_.submit(
        queue,
        ChainBuilder().writable(0x100000, 0x4000).writable(0x200800, 0x1800).writable(0x300001, 0xfff));
    ASSERT_TRUE(harness_.wait_used(queue).has_value());
    EXPECT_THAT(host_.discarded, ElementsAre(Pair(0x100000, 0x4000), Pair(0x201000, 0x1000)));
    harness_.reset();
  }
  host_.discarded.clear();
  ASSERT_TRUE(harness_.activate({.features = ~kStatistics}).has_value());
  harness_.submit(2, ChainBuilder().writable(0x100000, 0x1000));
  ASSERT_TRUE(harness_.wait_used(2).has_value());
  EXPECT_THAT(host_.discarded, ElementsAre(Pair(0x100000, 0x1000)));
  harness_.reset();
  host_.discarded.clear();
  ASSERT_TRUE(harness_.activate({.features = ~kReporting}).has_value());
  harness_.submit(3, ChainBuilder().writable(0x100000, 0x1000));
  harness_.pump();
  EXPECT_THAT(host_.discarded, IsEmpty());
}

TEST_F(BalloonTest, ActualIsToldAtABoundedRate) {
  ASSERT_TRUE(harness_.activate().has_value());
  for (std::uint32_t i = 1; i <= 100; ++i) {
    harness_.write_config<std::uint32_t>(4, i);
  }
  EXPECT_THAT(host_.told, ElementsAre(ram_ - kPageSize));
  EXPECT_EQ(balloon_.actual(), ram_ - 100 * kPageSize);
  clock_.now += kBalloonEventNs;
  harness_.write_config<std::uint32_t>(4, 7);
  EXPECT_THAT(host_.told, ElementsAre(ram_ - kPageSize, ram_ - 7 * kPageSize));
  harness_.write_config<std::uint32_t>(4, 0xffffffff);  // more than there is
  EXPECT_EQ(balloon_.actual(), 0U);
  harness_.write_config<std::uint32_t>(0, 55);  // not the driver's
  EXPECT_EQ(harness_.read_config<std::uint32_t>(0), 0U);
}

TEST_F(BalloonTest, StatisticsArePolledWithTheBufferTheGuestGave) {
  ASSERT_TRUE(harness_.activate().has_value());
  const auto put = [&](Gpa at, std::uint16_t tag, std::uint64_t value) {
    harness_.guest().store(at, tag);
    harness_.guest().store(at + 2, value);
  };
  const Gpa buffer = harness_.guest().allocate(30);
  put(buffer, 4, 1000);
  put(buffer + 10, 5, 2000);
  put(buffer + 20, 999, 1);
  harness_.submit(2, ChainBuilder().readable(buffer, 30));
  harness_.pump();
  EXPECT_FALSE(harness_.queue(2).take_used().has_value());  // kept
  EXPECT_THAT(balloon_.statistics(),
              ElementsAre(Pair("stat-free-memory", 1000), Pair("stat-total-memory", 2000)));
  {
    const std::lock_guard lock(balloon_.strand().mutex());
    balloon_.set_statistics_interval(1);
  }
  ASSERT_TRUE(harness_.wait_used(2).has_value());  // asked anew
  put(buffer, 4, 3000);
  harness_.submit(2, ChainBuilder().readable(buffer, 10));
  harness_.pump();
  EXPECT_THAT(balloon_.statistics(), ElementsAre(Pair("stat-free-memory", 3000)));
  // A snapshot finds the kept buffer given back.
  harness_.pause();
  EXPECT_EQ(balloon_.queue(2)->in_flight(), 0U);
  harness_.resume();
  EXPECT_EQ(balloon_.queue(2)->in_flight(), 1U);
}

TEST_F(BalloonTest, ARefreshAsksTheGuestOnce) {
  ASSERT_TRUE(harness_.activate().has_value());
  const auto refresh = [&] {
    const std::lock_guard lock(balloon_.strand().mutex());
    balloon_.refresh_statistics();
  };
  refresh();  // nothing to give back yet
  const Gpa buffer = harness_.guest().allocate(10);
  const auto give = [&](std::uint64_t value) {
    harness_.guest().store(buffer, std::uint16_t{4});
    harness_.guest().store(buffer + 2, value);
    harness_.submit(2, ChainBuilder().readable(buffer, 10));
    harness_.pump();
  };
  give(1000);
  refresh();
  refresh();
  EXPECT_TRUE(harness_.wait_used(2).has_value());
  EXPECT_FALSE(harness_.queue(2).take_used().has_value());
  EXPECT_THAT(balloon_.statistics(), ElementsAre(Pair("stat-free-memory", 1000)));
  give(3000);
  EXPECT_THAT(balloon_.statistics(), ElementsAre(Pair("stat-free-memory", 3000)));
  harness_.pause();
  refresh();
  harness_.resume();
  EXPECT_FALSE(harness_.queue(2).take_used().has_value()) << "a paused device gives nothing back";
}

TEST_F(BalloonTest, TheOptionSetsTheInterval) {
  PropertySet properties;
  properties.set("guest-stats-polling-interval", std::uint64_t{7});
  EXPECT_EQ(virtio_balloon_options("b", properties).statistics_interval_s, 7U);
  DeviceHarness polling{[this](EventLoop& loop, const GuestMemory& memory) {
    return VirtioBalloon::create(loop, memory, {.id = "p", .statistics_interval_s = 1}, host_, log_, clock_)
        .value();
  }};
  ASSERT_TRUE(polling.activate().has_value());
  const Gpa buffer = polling.guest().allocate(10);
  polling.submit(2, ChainBuilder().readable(buffer, 10));
  EXPECT_TRUE(polling.wait_used(2).has_value()) << "asked anew, without a call";
}

TEST_F(BalloonTest, TargetSurvivesResetAndSnapshot) {
  ASSERT_TRUE(harness_.activate().has_value());
  ASSERT_TRUE(balloon_.set_target(ram_ / 2).has_value());
  harness_.write_config<std::uint32_t>(4, 5);
  harness_.pause();
  const StateRecord saved = balloon_.save();
  harness_.resume();
  harness_.reset();
  EXPECT_EQ(balloon_.target(), ram_ / 2);
  EXPECT_EQ(balloon_.actual(), ram_);
  ASSERT_TRUE(balloon_.set_target(ram_).has_value());
  ASSERT_TRUE(balloon_.load(saved).has_value());
  EXPECT_EQ(balloon_.target(), ram_ / 2);
  EXPECT_EQ(balloon_.actual(), ram_ - 5 * kPageSize);
}

}  // namespace
}  // namespace wisp
