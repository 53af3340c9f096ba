#include "block/raw_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "block/support/block_kit.h"

namespace wisp {
namespace {

using test::BackendDriver;
using test::TempDir;

constexpr std::size_t kSize = 4UL << 20;

struct Kind {
  AioKind aio;
  bool direct;
};

class RawFileTest : public testing::TestWithParam<Kind> {
 protected:
  std::unique_ptr<RawFile> open(const std::string& file, bool read_only = false, bool discard = true) {
    auto image =
        open_image({.path = file, .read_only = read_only, .direct = GetParam().direct}, "drive d", log_);
    if (!image && GetParam().direct) {
      return nullptr;
    }
    EXPECT_TRUE(image.has_value()) << image.error().message;
    auto backend = RawFile::create(
        *std::move(image), {.file = file, .read_only = read_only, .discard = discard, .aio = GetParam().aio});
    EXPECT_TRUE(backend.has_value());
    return *std::move(backend);
  }
  TempDir dir_;
  Log log_;
};

#define OPEN_OR_SKIP(backend, ...)                       \
  const auto backend = open(__VA_ARGS__);                \
  if (backend == nullptr) {                              \
    GTEST_SKIP() << "no direct I/O on this file system"; \
  }

INSTANTIATE_TEST_SUITE_P(Kinds, RawFileTest,
                         testing::Values(Kind{AioKind::kIoUring, false}, Kind{AioKind::kIoUring, true},
                                         Kind{AioKind::kThreads, false}, Kind{AioKind::kThreads, true},
                                         Kind{AioKind::kOff, false}, Kind{AioKind::kOff, true}),
                         [](const auto& param) {
                           const std::string aio = param.param.aio == AioKind::kIoUring   ? "uring"
                                                   : param.param.aio == AioKind::kThreads ? "threads"
                                                                                          : "off";
                           return aio + (param.param.direct ? "_direct" : "_buffered");
                         });

TEST_P(RawFileTest, WritesReachTheFileAndReadsComeFromIt) {
  const std::string file = dir_.file("disk", kSize);
  std::vector<std::uint8_t> expected = TempDir::pattern(kSize, 1);
  OPEN_OR_SKIP(backend, file);
  BackendDriver driver(*backend);
  std::vector<std::uint8_t> data = TempDir::pattern(12288, 2);
  const std::array<iovec, 2> out{{{data.data(), 4096}, {data.data() + 4096, 8192}}};
  ASSERT_EQ(driver.transfer(BlockOp::kWrite, 8192, out), 0);
  ASSERT_EQ(driver.run({.op = BlockOp::kFlush}), 0);
  std::ranges::copy(data, expected.begin() + 8192);
  EXPECT_EQ(TempDir::read(file), expected);
  std::vector<std::uint8_t> back(16384);
  const std::array<iovec, 2> in{{{back.data(), 512}, {back.data() + 512, 15872}}};
  ASSERT_EQ(driver.transfer(BlockOp::kRead, 4096, in), 0);
  EXPECT_TRUE(std::equal(back.begin(), back.end(), expected.begin() + 4096));
}

// Every mix of aligned and unaligned memory, odd buffer splits, sizes beyond the bounce buffers.
TEST_P(RawFileTest, AnyBufferLayoutGivesTheSameBytes) {
  const std::string file = dir_.file("disk", kSize);
  std::vector<std::uint8_t> expected = TempDir::pattern(kSize, 1);
  OPEN_OR_SKIP(backend, file);
  BackendDriver driver(*backend);
  std::mt19937 random(7);
  std::vector<std::uint8_t> memory(1UL << 20);
  for (int round = 0; round < 60; ++round) {
    const bool write = random() % 2 == 0;
    const std::uint64_t length = 512 * (1 + random() % (round % 8 == 0 ? 1500 : 40));
    const std::uint64_t offset = 512 * (random() % ((kSize - length) / 512 + 1));
    const std::size_t skew = random() % 3 == 0 ? random() % 5000 : 4096 * (random() % 4);
    const auto fresh = TempDir::pattern(length, random());
    if (write) {
      std::ranges::copy(fresh, memory.begin() + static_cast<std::ptrdiff_t>(skew));
      std::ranges::copy(fresh, expected.begin() + static_cast<std::ptrdiff_t>(offset));
    } else {
      std::ranges::fill(memory, 0xee);
    }
    std::vector<iovec> buffers;
    for (std::size_t at = 0; at < length;) {
      const std::size_t part = std::min<std::size_t>(
          length - at, random() % 4 == 0 ? 1 + random() % 3000 : 512 * (1 + random() % 64));
      buffers.push_back({memory.data() + skew + at, part});
      at += part;
    }
    ASSERT_EQ(driver.transfer(write ? BlockOp::kWrite : BlockOp::kRead, offset, buffers), 0);
    if (!write) {
      ASSERT_TRUE(std::equal(memory.begin() + static_cast<std::ptrdiff_t>(skew),
                             memory.begin() + static_cast<std::ptrdiff_t>(skew + length),
                             expected.begin() + static_cast<std::ptrdiff_t>(offset)))
          << "round " << round;
      ASSERT_EQ(memory[skew + length], 0xee) << "bytes behind the buffer were written";
    }
  }
  ASSERT_EQ(driver.run({.op = BlockOp::kFlush}), 0);
  EXPECT_EQ(TempDir::read(file), expected);
}

TEST_P(RawFileTest, ZeroesReadAsZeroesWithAndWithoutUnmap) {
  const std::string file = dir_.file("disk", kSize);
  OPEN_OR_SKIP(backend, file);
  std::vector<std::uint8_t> expected = TempDir::pattern(kSize, 1);
  BackendDriver driver(*backend);
  for (const bool unmap : {false, true}) {
    const std::uint64_t offset = unmap ? 2 << 20 : 512 * 3;
    const std::uint64_t length = (1 << 20) + 512 * 5;
    ASSERT_EQ(
        driver.run({.op = BlockOp::kWriteZeroes, .may_unmap = unmap, .offset = offset, .length = length}), 0);
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(offset), length, std::uint8_t{0});
  }
  EXPECT_EQ(TempDir::read(file), expected);
}

TEST_P(RawFileTest, DiscardGivesSpaceBackWhereAskedFor) {
  const std::string file = dir_.file("disk", kSize);
  const auto blocks = [&] {
    struct stat info{};
    EXPECT_EQ(::stat(file.c_str(), &info), 0);
    return info.st_blocks;
  };
  for (const bool discard : {false, true}) {
    OPEN_OR_SKIP(backend, file, false, discard);
    BackendDriver driver(*backend);
    ASSERT_EQ(driver.run({.op = BlockOp::kFlush}), 0);
    const auto before = blocks();
    ASSERT_EQ(driver.run({.op = BlockOp::kDiscard, .offset = 1 << 20, .length = 1 << 20}), 0);
    if (discard) {
      EXPECT_LE(blocks(), before - (1 << 20) / 512);
    } else {
      EXPECT_EQ(TempDir::read(file), TempDir::pattern(kSize, 1));
    }
    EXPECT_EQ(std::filesystem::file_size(file), kSize);
  }
}

TEST_P(RawFileTest, RefusesWhatIsOutOfRangeOrReadOnly) {
  const std::string file = dir_.file("disk", 8192 + 100);
  OPEN_OR_SKIP(backend, file, true);
  EXPECT_EQ(backend->geometry().size, 8192U);
  EXPECT_TRUE(backend->geometry().read_only);
  EXPECT_FALSE(backend->geometry().discard);
  BackendDriver driver(*backend);
  std::vector<std::uint8_t> data(1024);
  const iovec buffer{data.data(), data.size()};
  EXPECT_EQ(driver.transfer(BlockOp::kRead, 8192 - 1024, {&buffer, 1}), 0);
  EXPECT_EQ(driver.transfer(BlockOp::kRead, 8192 - 512, {&buffer, 1}), EIO);
  EXPECT_EQ(driver.transfer(BlockOp::kRead, UINT64_MAX - 511, {&buffer, 1}), EIO);
  EXPECT_EQ(driver.transfer(BlockOp::kWrite, 0, {&buffer, 1}), EROFS);
  EXPECT_EQ(driver.run({.op = BlockOp::kDiscard, .length = 512}), EROFS);
  EXPECT_EQ(driver.run({.op = BlockOp::kWriteZeroes, .length = 512}), EROFS);
  EXPECT_EQ(driver.run({.op = BlockOp::kFlush}), 0);
  EXPECT_EQ(driver.run({.op = BlockOp::kRead, .offset = 512}), 0);
}

TEST_P(RawFileTest, AFileCutShortGivesAnError) {
  const std::string file = dir_.file("disk", kSize);
  OPEN_OR_SKIP(backend, file);
  BackendDriver driver(*backend);
  ASSERT_EQ(::truncate(file.c_str(), 8192), 0);
  std::vector<std::uint8_t> data(8192);
  const iovec buffer{data.data(), data.size()};
  EXPECT_EQ(driver.transfer(BlockOp::kRead, 1 << 20, {&buffer, 1}), EIO);
  // Half of it is there: the short read goes on and meets the end.
  EXPECT_EQ(driver.transfer(BlockOp::kRead, 4096, {&buffer, 1}), EIO);
  EXPECT_EQ(driver.transfer(BlockOp::kRead, 0, {&buffer, 1}), 0);
}

// More requests than the engine takes at once; each must end exactly once.
TEST_P(RawFileTest, ManyRequestsAtOnce) {
  const std::string file = dir_.file("disk", kSize);
  OPEN_OR_SKIP(backend, file);
  BackendDriver driver(*backend);
  constexpr std::size_t kCount = 3 * kIoDepth;
  std::vector<std::uint8_t> memory(kCount * 4096 + 512);
  std::vector<iovec> buffers(kCount);
  std::vector<BlockRequest> requests(kCount);
  std::vector<BlockRequest*> pointers;
  for (std::size_t i = 0; i < kCount; ++i) {
    // Every third has memory that direct I/O does not take: more than there are bounce buffers.
    buffers[i] = {memory.data() + i * 4096 + (i % 3 == 0 ? 1 : 0), 4095 / 512 * 512};
    requests[i] = {.op = BlockOp::kRead, .offset = i * 4096, .length = 3584, .buffers = {&buffers[i], 1}};
    pointers.push_back(&requests[i]);
  }
  driver.start(pointers);
  ASSERT_TRUE(driver.wait(kCount));
  EXPECT_EQ(driver.done().size(), kCount);
  EXPECT_EQ(backend->in_flight(), 0U);
  const auto expected = TempDir::pattern(kSize, 1);
  for (std::size_t i = 0; i < kCount; ++i) {
    ASSERT_TRUE(std::equal(expected.begin() + static_cast<std::ptrdiff_t>(i * 4096),
                           expected.begin() + static_cast<std::ptrdiff_t>(i * 4096 + 3584),
                           static_cast<const std::uint8_t*>(buffers[i].iov_base)));
  }
}

TEST_P(RawFileTest, DrainFromAnotherThreadWhileTheLoopRuns) {
  const std::string file = dir_.file("disk", kSize);
  OPEN_OR_SKIP(backend, file);
  BackendDriver driver(*backend);
  std::thread runner([&] { driver.loop().run(); });
  std::vector<std::uint8_t> memory(64 * 4096);
  std::vector<iovec> buffers(64);
  std::vector<BlockRequest> requests(64);
  for (int round = 0; round < 50; ++round) {
    std::vector<BlockRequest*> pointers;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      buffers[i] = {memory.data() + i * 4096, 4096};
      requests[i] = {.op = i % 2 == 0 ? BlockOp::kWrite : BlockOp::kRead,
                     .offset = i * 4096,
                     .length = 4096,
                     .buffers = {&buffers[i], 1}};
      pointers.push_back(&requests[i]);
    }
    driver.start(pointers);
    const std::lock_guard lock(driver.strand().mutex());
    backend->drain(round % 2 == 0 ? DrainMode::kComplete : DrainMode::kCancel);
    ASSERT_EQ(driver.done().size(), requests.size());
    ASSERT_EQ(backend->in_flight(), 0U);
    for (const auto& done : driver.done()) {
      ASSERT_TRUE(done.error == 0 || (round % 2 == 1 && done.error == ECANCELED)) << done.error;
    }
    driver.done().clear();
  }
  driver.loop().stop();
  runner.join();
}

// What an instruction of a worker raises must reach its handler: blocked, it would end the process at once,
// and the terminal would keep its mode.
TEST_P(RawFileTest, WorkersHearOfTheirOwnFaultsAndOfNothingElse) {
  if (GetParam().aio != AioKind::kThreads) {
    GTEST_SKIP() << "no threads of its own";
  }
  const std::string file = dir_.file("disk", kSize);
  OPEN_OR_SKIP(backend, file);
  int workers = 0;
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream status(thread.path() / "status");
    const std::string text(std::istreambuf_iterator<char>(status), {});
    if (!text.contains("Name:\twisp-block\n")) {
      continue;
    }
    ++workers;
    constexpr std::string_view kField = "SigBlk:\t";
    const std::uint64_t blocked = std::stoull(text.substr(text.find(kField) + kField.size()), nullptr, 16);
    const auto is_blocked = [blocked](int signal) { return (blocked >> (signal - 1) & 1) != 0; };
    for (const int own : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGABRT}) {
      EXPECT_FALSE(is_blocked(own)) << own;
    }
    for (const int of_others : {SIGTERM, SIGINT, SIGHUP, SIGWINCH, SIGCHLD}) {
      EXPECT_TRUE(is_blocked(of_others)) << of_others;
    }
  }
  EXPECT_GT(workers, 0);
}

TEST_P(RawFileTest, TheThreadThatBeganARequestMayEnd) {
  const std::string file = dir_.file("disk", kSize);
  OPEN_OR_SKIP(backend, file);
  BackendDriver driver(*backend);
  std::vector<std::uint8_t> memory(32 * 65536);
  std::vector<iovec> buffers(32);
  std::vector<BlockRequest> requests(32);
  std::vector<BlockRequest*> pointers;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    buffers[i] = {memory.data() + i * 65536, 65536};
    requests[i] = {.op = BlockOp::kWrite, .offset = i * 65536, .length = 65536, .buffers = {&buffers[i], 1}};
    pointers.push_back(&requests[i]);
  }
  std::thread([&] { driver.start(pointers); }).join();
  ASSERT_TRUE(driver.wait(requests.size()));
  for (const auto& done : driver.done()) {
    EXPECT_EQ(done.error, 0);
  }
}

}  // namespace
}  // namespace wisp
