#include "devices/slot_hotplug.h"

#include <gtest/gtest.h>

#include "boot/acpi_layout.h"
#include "devices/fake_parts.h"

namespace wisp {
namespace {

using Registers = SlotHotplugRegisters;

class SlotHotplugTest : public ::testing::Test {
 protected:
  std::uint64_t read32(std::uint64_t offset) { return in(slots_, offset, 4); }
  std::uint64_t present() { return read32(Registers::kPresent0) | read32(Registers::kPresent1) << 32; }
  std::uint64_t changed() { return read32(Registers::kChanged0) | read32(Registers::kChanged1) << 32; }

  int notified_ = 0;
  // Reads a register from inside the notification: no lock is held there.
  SlotHotplug slots_{[this] {
    ++notified_;
    (void)in(slots_, Registers::kPresent0, 4);
  }};
};

TEST_F(SlotHotplugTest, WhatIsThereFromTheStartIsNoChange) {
  slots_.set_initial(0x8000'0001'0000'0003);
  EXPECT_EQ(present(), 0x8000'0001'0000'0003);
  EXPECT_EQ(changed(), 0U);
  EXPECT_EQ(notified_, 0);
}

TEST_F(SlotHotplugTest, WhatComesAndGoesIsChangedUntilAcknowledged) {
  slots_.set_initial(0x3);
  slots_.set_present(0x8000'0000'0000'0003);
  EXPECT_EQ(changed(), 0x8000'0000'0000'0000);
  EXPECT_EQ(notified_, 1);
  slots_.set_present(0x8000'0000'0000'0002);
  EXPECT_EQ(present(), 0x8000'0000'0000'0002);
  EXPECT_EQ(changed(), 0x8000'0000'0000'0001) << "the first change was not acknowledged yet";
  EXPECT_EQ(notified_, 2);

  out(slots_, Registers::kChanged0, 0xffff'ffff, 4);
  EXPECT_EQ(changed(), 0x8000'0000'0000'0000);
  out(slots_, Registers::kChanged1, 0x7fff'ffff, 4);
  EXPECT_EQ(changed(), 0x8000'0000'0000'0000) << "bits written as zero stay";
  out(slots_, Registers::kChanged1, 0x8000'0000, 4);
  EXPECT_EQ(changed(), 0U);
  EXPECT_EQ(present(), 0x8000'0000'0000'0002);
}

TEST_F(SlotHotplugTest, ASlotThatComesAndGoesUnseenIsStillChanged) {
  slots_.set_present(0x10);
  slots_.set_present(0);
  EXPECT_EQ(present(), 0U);
  EXPECT_EQ(changed(), 0x10U);
}

TEST_F(SlotHotplugTest, TheGuestCannotChangeWhatIsPresent) {
  slots_.set_initial(0xff);
  for (std::uint64_t offset = 0; offset < Registers::kChanged0; ++offset) {
    for (const std::size_t size : {1U, 2U, 4U, 8U}) {
      out(slots_, offset, 0, size);
      out(slots_, offset, UINT64_MAX, size);
    }
  }
  EXPECT_EQ(present(), 0xffU);
}

TEST_F(SlotHotplugTest, OnlyAlignedDoubleWordsMeanSomething) {
  slots_.set_present(UINT64_MAX);
  for (std::uint64_t offset = 0; offset < Registers::kSize; ++offset) {
    for (const std::size_t size : {1U, 2U, 4U, 8U}) {
      if (size == 4 && offset % 4 == 0) {
        continue;
      }
      EXPECT_EQ(in(slots_, offset, size), 0U) << offset << "+" << size;
      out(slots_, offset, UINT64_MAX, size);
    }
  }
  EXPECT_EQ(present(), UINT64_MAX);
  EXPECT_EQ(changed(), UINT64_MAX) << "nothing was acknowledged";
}

TEST_F(SlotHotplugTest, AfterAResetNothingIsChangedAndWhatIsThereStays) {
  slots_.set_present(0x5);
  slots_.reset();
  EXPECT_EQ(changed(), 0U);
  EXPECT_EQ(present(), 0x5U);
}

TEST_F(SlotHotplugTest, ChangesNotYetSeenAreSaved) {
  slots_.set_initial(0x1);
  slots_.set_present(0x8000'0000'0000'0000);
  SlotHotplug other([] {});
  ASSERT_TRUE(other.load(slots_.save()));
  EXPECT_EQ(in(other, Registers::kPresent1, 4), 0x8000'0000U);
  EXPECT_EQ(in(other, Registers::kChanged0, 4), 0x1U);
  EXPECT_EQ(in(other, Registers::kChanged1, 4), 0x8000'0000U);
}

}  // namespace
}  // namespace wisp
