#include "devices/i8042.h"

#include <gtest/gtest.h>

#include "devices/fake_parts.h"

namespace wisp {
namespace {

constexpr std::uint64_t kCommand = 4;

class I8042Test : public ::testing::Test {
 protected:
  int resets_ = 0;
  I8042 i8042_{[this] { ++resets_; }};
};

TEST_F(I8042Test, TheResetCommandsPulseTheLine) {
  for (unsigned command = 0; command < 256; ++command) {
    resets_ = 0;
    out(i8042_, kCommand, command);
    EXPECT_EQ(resets_, command >= 0xf0 && command % 2 == 0 ? 1 : 0) << command;
    i8042_.reset();
  }
}

// What machine_emergency_restart() does: wait for bit 1 of the status, then command 0xfe.
TEST_F(I8042Test, LinuxKeyboardResetDoesNotWait) {
  EXPECT_EQ(in8(i8042_, kCommand) & 0x02, 0);
  out(i8042_, kCommand, 0xfe);
  EXPECT_EQ(resets_, 1);
}

// What i8042_flush() does: it gives up on a controller whose buffer does not run empty within 16 bytes.
TEST_F(I8042Test, LinuxFindsNoController) {
  int read = 0;
  while ((in8(i8042_, kCommand) & 0x01) != 0 && read <= 16) {
    EXPECT_EQ(in8(i8042_, 0), 0xff);
    ++read;
  }
  EXPECT_GT(read, 16);
}

TEST_F(I8042Test, TheOutputPortResetsWithItsLowestBitClear) {
  out(i8042_, kCommand, 0xd1);
  out(i8042_, 0, 0xdf);  // A20 on, no reset
  EXPECT_EQ(resets_, 0);
  out(i8042_, 0, 0x00);
  EXPECT_EQ(resets_, 0) << "not announced by 0xd1";
  out(i8042_, kCommand, 0xd1);
  out(i8042_, 0, 0xde);
  EXPECT_EQ(resets_, 1);
}

TEST_F(I8042Test, TheAnnouncedByteIsPartOfTheState) {
  out(i8042_, kCommand, 0xd1);
  const StateRecord record = i8042_.save();
  i8042_.reset();
  out(i8042_, 0, 0x00);
  EXPECT_EQ(resets_, 0);
  ASSERT_TRUE(i8042_.load(record));
  out(i8042_, 0, 0x00);
  EXPECT_EQ(resets_, 1);
}

}  // namespace
}  // namespace wisp
