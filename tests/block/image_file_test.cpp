#include "block/image_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <bit>
#include <csignal>

#include "block/support/block_kit.h"

namespace wisp {
namespace {

using test::TempDir;

class ImageFileTest : public testing::Test {
 protected:
  ImageFileTest() {
    int ends[2];
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
    log_read_.reset(ends[0]);
    log_write_.reset(ends[1]);
    log_.set_fd(ends[1]);
  }
  Result<ImageFile> open(const ImageOpenOptions& options) { return open_image(options, "drive d", log_); }
  std::string error(const ImageOpenOptions& options) {
    const auto image = open(options);
    return image ? std::string("no error") : image.error().message;
  }
  std::string logged() {
    char text[4096];
    const ssize_t size = ::read(log_read_.get(), text, sizeof text);
    return size > 0 ? std::string(text, static_cast<std::size_t>(size)) : std::string();
  }
  TempDir dir_;
  UniqueFd log_read_, log_write_;
  Log log_;
};

TEST_F(ImageFileTest, ErrorsSayWhatIsWrongAndWhatToDo) {
  EXPECT_EQ(error({.path = dir_.path("none")}),
            "does not exist; correct file=, or create it with: truncate -s 1G FILE");
  ::mkdir(dir_.path("dir").c_str(), 0700);
  EXPECT_EQ(error({.path = dir_.path("dir")}), "is a directory, expected a disk image or a block device");
  EXPECT_EQ(error({.path = dir_.path("dir"), .read_only = true}),
            "is a directory, expected a disk image or a block device");
  EXPECT_EQ(error({.path = dir_.file("empty", 0)}),
            "has 0 bytes, a disk needs at least 512; enlarge it with: truncate -s 1G FILE");
  EXPECT_EQ(error({.path = dir_.file("small", 511)}),
            "has 511 bytes, a disk needs at least 512; enlarge it with: truncate -s 1G FILE");
  EXPECT_EQ(error({.path = "/dev/null"}), "is neither a regular file nor a block device");
  EXPECT_EQ(error({.path = dir_.path("none/disk")}),
            "does not exist; correct file=, or create it with: truncate -s 1G FILE");
}

TEST_F(ImageFileTest, AFifoIsRefusedWithoutWaitingForItsOtherEnd) {
  ASSERT_EQ(::mkfifo(dir_.path("fifo").c_str(), 0600), 0);
  EXPECT_EQ(error({.path = dir_.path("fifo"), .read_only = true}),
            "is neither a regular file nor a block device");
}

TEST_F(ImageFileTest, NoPermissionIsSaidPlainly) {
  const std::string file = dir_.file("disk", 4096);
  ASSERT_EQ(::chmod(dir_.path(".").c_str(), 0711), 0);
  ASSERT_EQ(::chmod(file.c_str(), 0444), 0);
  // Root may open anything: ask in a child without that right.
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (::setresuid(65534, 65534, 65534) != 0) {
      ::_exit(2);
    }
    const bool writing = error({.path = file}) ==
                         "cannot be opened for writing; change its permissions, or give readonly=on: "
                         "Permission denied";
    const bool reading = open({.path = file, .read_only = true}).has_value();
    ::_exit(writing && reading ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_F(ImageFileTest, WarnsOfATailThatIsNoWholeSector) {
  const auto image = open({.path = dir_.file("disk", 1024 + 100)});
  ASSERT_TRUE(image.has_value());
  EXPECT_EQ(image->size, 1124U);
  EXPECT_NE(logged().find("1124 bytes, no multiple of 512; the last 100 are out of the guest's reach"),
            std::string::npos);
}

TEST_F(ImageFileTest, WarnsOfAnotherFormatButStaysRaw) {
  std::vector<std::uint8_t> bytes(4096);
  std::copy_n("QFI\xfb", 4, bytes.begin());
  dir_.write("disk", bytes);
  EXPECT_TRUE(open({.path = dir_.path("disk")}).has_value());
  EXPECT_NE(logged().find("looks like a qcow2 image but is used as format=raw"), std::string::npos);
  static_cast<void>(open({.path = dir_.file("plain", 4096)}));
  EXPECT_EQ(logged(), "");
}

TEST_F(ImageFileTest, OneWriterOrManyReaders) {
  const std::string file = dir_.file("disk", 4096);
  const ImageOpenOptions reader{.path = file, .read_only = true};
  const ImageOpenOptions writer{.path = file};
  {
    const auto first = open(writer);
    ASSERT_TRUE(first.has_value());
    EXPECT_EQ(error(writer),
              "is in use for writing by another process or drive; end that one, or use a copy");
    EXPECT_EQ(error(reader),
              "is in use for writing by another process or drive; end that one, or use a copy");
  }
  const auto first = open(reader);
  const auto second = open(reader);
  ASSERT_TRUE(first.has_value() && second.has_value());
  EXPECT_EQ(error(writer),
            "is in use by another process or drive that relies on its contents; end that one, use a copy, or "
            "give readonly=on to both");
}

TEST_F(ImageFileTest, ALockOfAnotherProcessIsSeenAndEndsWithIt) {
  const std::string file = dir_.file("disk", 4096);
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto image = open({.path = file});
    [[maybe_unused]] const ssize_t written = ::write(ready[1], image.has_value() ? "y" : "n", 1);
    ::pause();
    ::_exit(0);
  }
  char answer = 0;
  ASSERT_EQ(::read(ready[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  EXPECT_NE(error({.path = file}), "no error");
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  ::close(ready[0]);
  ::close(ready[1]);
  EXPECT_TRUE(open({.path = file}).has_value());
}

TEST_F(ImageFileTest, AFailedOpenLeavesNoLock) {
  const std::string file = dir_.file("disk", 100);
  EXPECT_NE(error({.path = file}), "no error");
  ASSERT_EQ(::truncate(file.c_str(), 4096), 0);
  EXPECT_TRUE(open({.path = file}).has_value());
}

TEST_F(ImageFileTest, DirectIsUsedWhereItIsPossible) {
  const std::string file = dir_.file("disk", 1 << 20);
  const auto off = open({.path = file, .read_only = true, .direct = false});
  ASSERT_TRUE(off.has_value());
  EXPECT_FALSE(off->direct.valid());
  const auto image = open({.path = file, .read_only = true});
  ASSERT_TRUE(image.has_value());
  if (!image->direct.valid()) {
    EXPECT_EQ(error({.path = file, .read_only = true, .direct = true}),
              "lies on a file system without direct I/O; give direct=off");
    GTEST_SKIP() << "no direct I/O on this file system";
  }
  EXPECT_NE(::fcntl(image->direct.get(), F_GETFL) & O_DIRECT, 0);
  EXPECT_EQ(::fcntl(image->direct.get(), F_GETFL) & O_NONBLOCK, 0);
  EXPECT_EQ(::fcntl(image->buffered.get(), F_GETFL) & (O_NONBLOCK | O_DIRECT), 0);
  EXPECT_TRUE(std::has_single_bit(image->memory_alignment));
  EXPECT_GE(image->offset_alignment, 512U);
  EXPECT_LE(image->offset_alignment, 4096U);
}

}  // namespace
}  // namespace wisp
