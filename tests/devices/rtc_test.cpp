#include "devices/rtc.h"

#include <gtest/gtest.h>

#include <ctime>
#include <thread>

#include "devices/fake_parts.h"

namespace wisp {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;

class RtcTest : public ::testing::Test {
 protected:
  void SetUp() override { rtc_ = *Rtc::create(*loop_, clock_, std::make_unique<FakeIrqLine>(irq_)); }
  std::uint8_t get(std::uint8_t index) {
    out(*rtc_, 0, index);
    return in8(*rtc_, 1);
  }
  void set(std::uint8_t index, std::uint8_t value) {
    out(*rtc_, 0, index);
    out(*rtc_, 1, value);
  }
  // "YYYY-MM-DD hh:mm:ss w" as the registers show them, in hexadecimal digits: BCD reads as it is.
  std::string time() {
    return fmt::format("{:02x}{:02x}-{:02x}-{:02x} {:02x}:{:02x}:{:02x} {:x}", get(0x32), get(9), get(8),
                       get(7), get(4), get(2), get(0), get(6));
  }
  void set_unix(std::int64_t seconds) { clock_.now = static_cast<std::uint64_t>(seconds) * kSecond; }
  void wait_for_pulses(int count) {
    for (int i = 0; i < 200 && irq_.pulses < count; ++i) {
      loop_->run_once(10);
    }
  }

  std::unique_ptr<EventLoop> loop_ = *EventLoop::create();
  FakeClock clock_;
  IrqRecord irq_;
  std::unique_ptr<Rtc> rtc_;
};

TEST_F(RtcTest, StartsWithTheClocksTime) {
  EXPECT_EQ(time(), "2001-09-09 01:46:40 1");
  EXPECT_EQ(get(0xa), 0x26);
  EXPECT_EQ(get(0xb), 0x02);
  EXPECT_EQ(get(0xd), 0x80);
  clock_.advance(20 * kSecond);
  EXPECT_EQ(time(), "2001-09-09 01:47:00 1");
}

TEST_F(RtcTest, DatesAgreeWithTheCLibrary) {
  for (std::int64_t at = 0; at < 17'000'000'000; at += 86'400 * 29 + 12'345) {
    set_unix(at);
    const time_t seconds = at;
    std::tm parts{};
    ::gmtime_r(&seconds, &parts);
    ASSERT_EQ(time(),
              fmt::format("{:04}-{:02}-{:02} {:02}:{:02}:{:02} {}", parts.tm_year + 1900, parts.tm_mon + 1,
                          parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec, parts.tm_wday + 1));
  }
}

TEST_F(RtcTest, SettingAndReadingBackGivesTheSameOverTheCalendar) {
  for (const auto& [year, month, day] : {std::array{2000, 2, 29},
                                         {1999, 12, 31},
                                         {2038, 1, 19},
                                         {1970, 1, 1},
                                         {1900, 3, 1},
                                         {2100, 2, 28},
                                         {9999, 12, 31},
                                         {0, 1, 1}}) {
    set(0xb, 0x82);  // SET
    const auto bcd = [](int value) { return static_cast<std::uint8_t>(value / 10 * 16 + value % 10); };
    set(0x32, bcd(year / 100));
    set(9, bcd(year % 100));
    set(8, bcd(month));
    set(7, bcd(day));
    set(4, 0x23);
    set(2, 0x59);
    set(0, 0x58);
    set(0xb, 0x02);
    EXPECT_EQ(time().substr(0, 19), fmt::format("{:04}-{:02}-{:02} 23:59:58", year, month, day));
    clock_.advance(kSecond);
    EXPECT_EQ(get(0), 0x59);
  }
}

TEST_F(RtcTest, WhileItIsSetTheTimeStands) {
  set(0xb, 0x82);
  clock_.advance(100 * kSecond);
  EXPECT_EQ(time(), "2001-09-09 01:46:40 1");
  set(0, 0x30);
  set(0xb, 0x02);
  EXPECT_EQ(time(), "2001-09-09 01:46:30 1");
}

TEST_F(RtcTest, TheDividersResetDelaysTheFirstUpdateByHalfASecond) {
  clock_.advance(123'456'789);
  set(0xa, 0x76);
  set(0xb, 0x82);
  set(0, 0x10);
  set(0xb, 0x02);
  set(0xa, 0x26);
  clock_.advance(kSecond / 2 - 1);
  EXPECT_EQ(get(0), 0x10);
  clock_.advance(1);
  EXPECT_EQ(get(0), 0x11);
}

TEST_F(RtcTest, BinaryAndTwelveHourModes) {
  set_unix(946'684'799);  // 1999-12-31 23:59:59
  set(0xb, 0x06);
  EXPECT_EQ(get(9), 99);
  EXPECT_EQ(get(4), 23);
  set(0xb, 0x04);
  EXPECT_EQ(get(4), 0x8b) << "11 PM in binary";
  set(0xb, 0x00);
  EXPECT_EQ(get(4), 0x91) << "11 PM in BCD";
  set(4, 0x12);
  EXPECT_EQ(get(4), 0x12) << "12 AM";
  set(0xb, 0x02);
  EXPECT_EQ(get(4), 0x00);
}

TEST_F(RtcTest, UpdateInProgressAtTheEndOfEachSecondOnly) {
  EXPECT_EQ(get(0xa) & 0x80, 0);
  clock_.advance(kSecond - 244'001);
  EXPECT_EQ(get(0xa) & 0x80, 0);
  clock_.advance(1);
  EXPECT_EQ(get(0xa) & 0x80, 0x80);
  clock_.advance(244'000);
  EXPECT_EQ(get(0xa) & 0x80, 0);
  clock_.advance(kSecond - 1);
  set(0xb, 0x82);
  EXPECT_EQ(get(0xa) & 0x80, 0) << "not while the time is set";
}

TEST_F(RtcTest, FlagsAreSetWithoutInterruptsAndReadingClearsThem) {
  EXPECT_EQ(get(0xc), 0);
  clock_.advance(kSecond);
  EXPECT_EQ(get(0xc), 0x50) << "update and periodic";
  EXPECT_EQ(get(0xc), 0);
  EXPECT_EQ(irq_.pulses, 0);
}

TEST_F(RtcTest, AlarmMatchesFieldByField) {
  // 01:46:40 now.
  const auto alarm = [&](std::uint8_t hour, std::uint8_t minute, std::uint8_t second) {
    set(5, hour);
    set(3, minute);
    set(1, second);
    (void)get(0xc);
  };
  alarm(0x01, 0x46, 0x45);
  clock_.advance(4 * kSecond);
  EXPECT_EQ(get(0xc) & 0x20, 0);
  clock_.advance(kSecond);
  EXPECT_EQ(get(0xc) & 0x20, 0x20);
  clock_.advance(86'399 * kSecond);
  EXPECT_EQ(get(0xc) & 0x20, 0);
  clock_.advance(kSecond);
  EXPECT_EQ(get(0xc) & 0x20, 0x20) << "each day";
  alarm(0xff, 0xff, 0xff);
  clock_.advance(kSecond);
  EXPECT_EQ(get(0xc) & 0x20, 0x20) << "each second";
  alarm(0xc0, 0x00, 0x00);
  clock_.advance(14 * 60 * kSecond);  // 02:00:46
  EXPECT_EQ(get(0xc) & 0x20, 0x20) << "each hour";
  alarm(0x02, 0x99, 0x00);
  clock_.advance(100 * 86'400 * kSecond);
  EXPECT_EQ(get(0xc) & 0x20, 0) << "never";
}

TEST_F(RtcTest, InterruptsComeOnceUntilTheFlagsAreRead) {
  set(0xb, 0x42);  // periodic, 1024 Hz
  clock_.advance(976'563);
  wait_for_pulses(1);
  EXPECT_EQ(irq_.pulses, 1);
  clock_.advance(10 * kSecond);
  for (int i = 0; i < 5; ++i) {
    loop_->run_once(1);
  }
  EXPECT_EQ(irq_.pulses, 1) << "no timer runs while the interrupt is up";
  EXPECT_EQ(get(0xc), 0xd0);
  clock_.advance(976'563);
  wait_for_pulses(2);
  EXPECT_EQ(irq_.pulses, 2);
}

TEST_F(RtcTest, UpdateInterruptAtTheNextSecond) {
  clock_.advance(kSecond - 5'000'000);
  set(0xb, 0x12);
  loop_->run_once(0);
  EXPECT_EQ(irq_.pulses, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(6));
  clock_.advance(6'000'000);
  wait_for_pulses(1);
  EXPECT_EQ(irq_.pulses, 1);
  EXPECT_EQ(get(0xc) & 0x90, 0x90);
}

TEST_F(RtcTest, EnablingWhatHasHappenedAlreadyInterrupts) {
  clock_.advance(kSecond);
  set(0xb, 0x12);
  EXPECT_EQ(irq_.pulses, 1);
}

TEST_F(RtcTest, MemoryKeepsItsBytesAndTheIndexIsSevenBits) {
  for (unsigned index = 0xe; index < 0x80; ++index) {
    if (index != kRtcCenturyIndex) {
      set(static_cast<std::uint8_t>(index | 0x80), static_cast<std::uint8_t>(index * 3));
    }
  }
  for (unsigned index = 0xe; index < 0x80; ++index) {
    if (index != kRtcCenturyIndex) {
      EXPECT_EQ(get(static_cast<std::uint8_t>(index)), static_cast<std::uint8_t>(index * 3));
    }
  }
  set(0x5f, 7);
  rtc_->reset();
  EXPECT_EQ(get(0x5f), 7) << "on the battery";
}

TEST_F(RtcTest, ResetTurnsInterruptsOffAndLeavesTheTime) {
  set(0, 0x10);
  set(0xb, 0x72);
  rtc_->reset();
  EXPECT_EQ(get(0xb), 0x02);
  EXPECT_EQ(get(0), 0x10);
  set(0xb, 0x82);
  rtc_->reset();
  clock_.advance(kSecond);
  EXPECT_EQ(get(0), 0x11) << "not left standing by a reset in the middle of setting";
}

TEST_F(RtcTest, ARestoredClockHasGoneOn) {
  set(0xb, 0x12);
  set(9, 0x30);  // the guest lives in 2030
  clock_.advance(kSecond);
  wait_for_pulses(0);
  const StateRecord record = rtc_->save();
  clock_.advance(3600 * kSecond);
  IrqRecord irq;
  auto other = *Rtc::create(*loop_, clock_, std::make_unique<FakeIrqLine>(irq));
  ASSERT_TRUE(other->load(record));
  rtc_ = std::move(other);
  EXPECT_EQ(time().substr(0, 13), "2030-09-09 02");
}

TEST_F(RtcTest, HostileStateCannotOverflowTheClock) {
  StateRecord record = rtc_->save();
  for (const std::int64_t offset : {INT64_MAX, INT64_MIN, std::int64_t{1'000'000'000'001}}) {
    store_le<std::int64_t>(record.bytes.data() + record.bytes.size() - 8, offset);
    EXPECT_FALSE(rtc_->load(record)) << offset;
  }
  for (const std::int64_t offset : {std::int64_t{1'000'000'000'000}, std::int64_t{-1'000'000'000'000}}) {
    store_le<std::int64_t>(record.bytes.data() + record.bytes.size() - 8, offset);
    EXPECT_TRUE(rtc_->load(record)) << offset;
    (void)time();
  }
}

}  // namespace
}  // namespace wisp
