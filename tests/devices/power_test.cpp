#include "devices/power.h"

#include <gtest/gtest.h>

#include "devices/fake_parts.h"

namespace wisp {
namespace {

class PowerTest : public ::testing::Test {
 protected:
  IrqRecord irq_;
  int shutdowns_ = 0;
  int resets_ = 0;
  PowerDevice power_{std::make_unique<FakeIrqLine>(irq_),
                     {.shutdown = [this] { ++shutdowns_; }, .reset = [this] { ++resets_; }}};
};

TEST_F(PowerTest, AButtonHoldsTheLineUntilTheEventIsRead) {
  power_.press_power_button();
  EXPECT_TRUE(irq_.level);
  power_.raise(kPowerEventSleepButton);
  EXPECT_EQ(in(power_, kPowerEventSelector, 4), kPowerEventPowerButton | kPowerEventSleepButton);
  EXPECT_FALSE(irq_.level);
  EXPECT_EQ(in(power_, kPowerEventSelector, 4), 0U);
}

TEST_F(PowerTest, APartialReadTakesWhatItShows) {
  power_.raise(kPowerEventAll);
  EXPECT_EQ(in(power_, kPowerEventSelector + 1, 1), 0U);
  EXPECT_TRUE(irq_.level);
  EXPECT_EQ(in(power_, kPowerEventSelector, 2), kPowerEventAll);
  EXPECT_FALSE(irq_.level);
}

TEST_F(PowerTest, UnknownEventsAndWritesToTheSelectorDoNothing) {
  power_.raise(~kPowerEventAll);
  EXPECT_FALSE(irq_.level);
  out(power_, kPowerEventSelector, 0xffffffff, 4);
  EXPECT_FALSE(irq_.level);
  EXPECT_EQ(in(power_, kPowerEventSelector, 4), 0U);
}

TEST_F(PowerTest, OnlySoftOffWithEnableShutsDown) {
  for (unsigned value = 0; value < 256; ++value) {
    shutdowns_ = 0;
    out(power_, kPowerSleepControl, value);
    const bool wanted = (value & 0x20) != 0 && ((value >> 2) & 7) == kPowerSleepTypeS5;
    EXPECT_EQ(shutdowns_, wanted ? 1 : 0) << value;
    EXPECT_EQ(in8(power_, kPowerSleepControl), value & 0x1c) << "the enable bit reads as zero";
  }
  EXPECT_EQ(in8(power_, kPowerSleepStatus), 0);
}

TEST_F(PowerTest, OnlyTheResetValueResets) {
  for (unsigned value = 0; value < 256; ++value) {
    out(power_, kPowerReset, value);
  }
  EXPECT_EQ(resets_, 1);
  // As one byte of a wider write too.
  out(power_, kPowerSleepControl, std::uint64_t{kPowerResetValue} << 16, 4);
  EXPECT_EQ(resets_, 2);
  EXPECT_EQ(shutdowns_, 0);
}

TEST_F(PowerTest, PendingEventsSurviveASnapshotAndNotAReset) {
  power_.press_power_button();
  const StateRecord record = power_.save();
  power_.reset();
  EXPECT_FALSE(irq_.level);
  EXPECT_EQ(in(power_, kPowerEventSelector, 4), 0U);
  ASSERT_TRUE(power_.load(record));
  EXPECT_TRUE(irq_.level);
  EXPECT_EQ(in(power_, kPowerEventSelector, 4), kPowerEventPowerButton);
}

TEST(Power, CallbacksAreOptional) {
  IrqRecord irq;
  PowerDevice power(std::make_unique<FakeIrqLine>(irq), {});
  out(power, kPowerSleepControl, 0x34);
  out(power, kPowerReset, kPowerResetValue);
}

}  // namespace
}  // namespace wisp
