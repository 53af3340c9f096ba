// Block devices, by way of a loop device; skipped where the host lets us have none.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <algorithm>

#include "block/drive.h"
#include "block/support/block_kit.h"

namespace wisp {
namespace {

using test::BackendDriver;
using test::TempDir;

constexpr std::size_t kSize = 4UL << 20;

class BlockDeviceTest : public testing::TestWithParam<AioKind> {
 protected:
  void SetUp() override {
    file_ = dir_.file("disk", kSize);
    const UniqueFd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    const UniqueFd backing(::open(file_.c_str(), O_RDWR | O_CLOEXEC));
    // Another program may take the free device between the two calls: try again.
    for (int attempt = 0; attempt < 5 && !loop_.valid(); ++attempt) {
      const int number = control.valid() ? ::ioctl(control.get(), LOOP_CTL_GET_FREE) : -1;
      if (number < 0) {
        break;
      }
      path_ = "/dev/loop" + std::to_string(number);
      UniqueFd loop(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
      loop_config config{};
      config.fd = static_cast<__u32>(backing.get());
      config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
      if (loop.valid() && ::ioctl(loop.get(), LOOP_CONFIGURE, &config) == 0) {
        loop_ = std::move(loop);
      }
    }
    if (!loop_.valid()) {
      GTEST_SKIP() << "no loop device to be had";
    }
  }
  TempDir dir_;
  Log log_{-1};
  SystemClock clock_;
  std::string file_;
  std::string path_;
  UniqueFd loop_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, BlockDeviceTest,
                         testing::Values(AioKind::kIoUring, AioKind::kThreads, AioKind::kOff));

TEST_P(BlockDeviceTest, ReadsWritesDiscardsAndZeroes) {
  std::vector<std::uint8_t> expected = TempDir::pattern(kSize, 1);
  {
    const auto backend =
        open_drive({.id = "d", .file = path_, .aio = GetParam(), .discard = true}, log_, clock_);
    ASSERT_TRUE(backend.has_value()) << backend.error().message;
    EXPECT_EQ((*backend)->geometry().size, kSize);
    EXPECT_TRUE((*backend)->geometry().discard);
    BackendDriver driver(**backend);
    std::vector<std::uint8_t> data = TempDir::pattern(8192, 2);
    const iovec buffer{data.data(), data.size()};
    ASSERT_EQ(driver.transfer(BlockOp::kWrite, 4096, {&buffer, 1}), 0);
    std::ranges::copy(data, expected.begin() + 4096);
    ASSERT_EQ(driver.run({.op = BlockOp::kWriteZeroes, .may_unmap = false, .offset = 65536, .length = 65536}),
              0);
    ASSERT_EQ(driver.run({.op = BlockOp::kWriteZeroes, .may_unmap = true, .offset = 262144, .length = 512}),
              0);
    std::fill_n(expected.begin() + 65536, 65536, std::uint8_t{0});
    std::fill_n(expected.begin() + 262144, 512, std::uint8_t{0});
    struct stat before{};
    ASSERT_EQ(driver.run({.op = BlockOp::kFlush}), 0);
    ASSERT_EQ(::stat(file_.c_str(), &before), 0);
    // A loop device discards by a hole in its file, which reads as zeroes.
    ASSERT_EQ(driver.run({.op = BlockOp::kDiscard, .offset = 1 << 20, .length = 1 << 20}), 0);
    std::fill_n(expected.begin() + (1 << 20), 1 << 20, std::uint8_t{0});
    struct stat after{};
    ASSERT_EQ(::stat(file_.c_str(), &after), 0);
    EXPECT_LE(after.st_blocks, before.st_blocks - (1 << 20) / 512);
    ASSERT_EQ(driver.run({.op = BlockOp::kFlush}), 0);
    std::vector<std::uint8_t> all(kSize);
    const iovec whole{all.data(), all.size()};
    ASSERT_EQ(driver.transfer(BlockOp::kRead, 0, {&whole, 1}), 0);
    EXPECT_EQ(all, expected);
  }
  EXPECT_EQ(TempDir::read(file_), expected);
}

TEST_P(BlockDeviceTest, ADeviceThatTheHostClaimedIsRefused) {
  const UniqueFd claim(::open(path_.c_str(), O_RDWR | O_EXCL | O_CLOEXEC));
  ASSERT_TRUE(claim.valid());
  const auto backend = open_drive({.id = "d", .file = path_, .aio = GetParam()}, log_, clock_);
  ASSERT_FALSE(backend.has_value());
  EXPECT_EQ(
      backend.error().message,
      "drive d: file '" + path_ + "' is mounted or in use by the host; unmount it, or give readonly=on");
}

TEST_P(BlockDeviceTest, TwoDrivesDoNotShareItForWriting) {
  const auto first = open_drive({.id = "d", .file = path_, .aio = GetParam()}, log_, clock_);
  ASSERT_TRUE(first.has_value()) << first.error().message;
  EXPECT_FALSE(open_drive({.id = "e", .file = path_, .aio = GetParam()}, log_, clock_).has_value());
  EXPECT_FALSE(
      open_drive({.id = "e", .file = path_, .read_only = true, .aio = GetParam()}, log_, clock_).has_value());
}

}  // namespace
}  // namespace wisp
