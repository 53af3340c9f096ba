#include "virtio/blk.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "block/support/memory_backend.h"
#include "virtio/blk_kit.h"

namespace wisp {
namespace {

using test::BlkDriver;
using test::BlkSegment;
using test::ChainBuilder;
using test::DeviceHarness;
using test::MemoryBackend;

constexpr std::uint64_t kDisk = 1 << 20;
constexpr std::uint8_t kOk = 0;
constexpr std::uint8_t kIoError = 1;
constexpr std::uint8_t kUnsupported = 2;

std::vector<std::uint8_t> bytes(std::size_t size, std::uint8_t seed) {
  std::vector<std::uint8_t> result(size);
  for (std::size_t i = 0; i < size; ++i) {
    result[i] = static_cast<std::uint8_t>(seed + i * 7 + i / 256);
  }
  return result;
}

class BlkTest : public testing::Test {
 protected:
  explicit BlkTest(MemoryBackend::Mode mode = MemoryBackend::Mode::kAtKick) : disk_(kDisk, mode) {
    disk_.data() = bytes(kDisk, 3);
  }
  // The device with its queues running. `options` and the geometry are set before.
  BlkDriver& driver() {
    if (!driver_) {
      driver_.emplace(disk_, options_);
      EXPECT_TRUE(driver_->harness.activate(setup_).has_value());
    }
    return *driver_;
  }
  DeviceHarness& harness() { return driver().harness; }
  bool broken() { return harness().interrupts().broken(); }

  MemoryBackend disk_;
  VirtioBlkOptions options_{.id = "blk0", .drive = "d", .serial = "SERIAL-1"};
  DeviceHarness::Setup setup_;
  std::optional<BlkDriver> driver_;
};

class ManualBlkTest : public BlkTest {
 protected:
  ManualBlkTest() : BlkTest(MemoryBackend::Mode::kManual) {}
};

TEST_F(BlkTest, ReadsAndWrites) {
  const auto data = bytes(1536, 99);
  const auto write = driver().start_write(10, data);
  EXPECT_EQ(driver().finish(write), kOk);
  EXPECT_EQ(driver().last_used->written, 1U);
  EXPECT_TRUE(std::equal(data.begin(), data.end(), disk_.data().begin() + 5120));

  const auto read = driver().start_read(9, 2560);
  EXPECT_EQ(driver().finish(read), kOk);
  EXPECT_EQ(driver().last_used->written, 2561U);
  const auto back = harness().guest().read(read.data, 2560);
  EXPECT_TRUE(std::equal(back.begin(), back.end(), disk_.data().begin() + 4608));
  EXPECT_EQ(harness().interrupts().used(0), 2U);
  EXPECT_FALSE(broken());
}

TEST_F(BlkTest, TheLastSectorIsThereAndTheNextIsNot) {
  constexpr std::uint64_t kLast = kDisk / 512 - 1;
  EXPECT_EQ(driver().finish(driver().start_read(kLast, 512)), kOk);
  EXPECT_EQ(driver().finish(driver().start_read(kLast, 1024)), kIoError);
  EXPECT_EQ(driver().last_used->written, 0U);
  EXPECT_EQ(driver().finish(driver().start_read(kLast + 1, 512)), kIoError);
  EXPECT_EQ(driver().finish(driver().start_read(kLast + 1, 0)), kOk);
  EXPECT_EQ(driver().finish(driver().start_read(kLast + 2, 0)), kIoError);
  EXPECT_EQ(driver().finish(driver().start_write(kLast, bytes(1024, 0))), kIoError);
  EXPECT_FALSE(broken());
}

TEST_F(BlkTest, ASectorThatOverflowsIsAnErrorOfTheRequest) {
  for (const std::uint64_t sector :
       {UINT64_MAX, UINT64_MAX / 512, UINT64_MAX / 512 + 1, std::uint64_t{1} << 55, std::uint64_t{1} << 63}) {
    EXPECT_EQ(driver().finish(driver().start_read(sector, 512)), kIoError) << sector;
    EXPECT_EQ(driver().finish(driver().start_write(sector, bytes(512, 0))), kIoError) << sector;
  }
  EXPECT_EQ(disk_.data(), bytes(kDisk, 3));
}

TEST_F(BlkTest, DataThatIsNoWholeSectorIsAnError) {
  for (const std::uint32_t size : {1U, 511U, 513U, 1023U}) {
    EXPECT_EQ(driver().finish(driver().start_read(0, size)), kIoError);
    EXPECT_EQ(driver().finish(driver().start_write(0, bytes(size, 0))), kIoError);
  }
  EXPECT_EQ(driver().finish(driver().start_write(0, {})), kOk);
  EXPECT_EQ(driver().finish(driver().start_read(0, 0)), kOk);
  EXPECT_EQ(disk_.data(), bytes(kDisk, 3));
}

// 2.7.4: the device must not care how the driver cuts a request into descriptors.
TEST_F(BlkTest, AnyCutOfARequestIntoDescriptorsWorks) {
  setup_.queue_size = 256;
  auto& guest = harness().guest();
  const auto data = bytes(1024, 42);
  for (std::uint32_t cut = 1; cut < 16 + 1024; cut += cut < 40 ? 1 : 61) {
    // Header and data as one range of memory, cut in two; the status alone.
    const Gpa request = guest.allocate(16 + 1024);
    guest.store<std::uint64_t>(request, test::kBlkOut);
    guest.store<std::uint64_t>(request + 8, cut);
    guest.write(request + 16, data);
    const Gpa status = driver().status();
    harness().submit(
        0,
        ChainBuilder().readable(request, cut).readable(request + cut, 16 + 1024 - cut).writable(status, 1));
    ASSERT_TRUE(harness().wait_used(0).has_value());
    ASSERT_EQ(guest.load<std::uint8_t>(status), kOk);
    ASSERT_TRUE(std::equal(data.begin(), data.end(), disk_.data().begin() + cut * 512)) << cut;
  }
  // A header of single bytes.
  const Gpa header = driver().header(test::kBlkIn, 1);
  const Gpa status = guest.allocate(513);
  ChainBuilder chain;
  for (std::uint32_t i = 0; i < 16; ++i) {
    chain.readable(header + i, 1);
  }
  // Data and status in one buffer: the status is its last byte.
  harness().submit(0, chain.writable(status, 200).writable(status + 200, 313));
  const auto used = harness().wait_used(0);
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->written, 513U);
  EXPECT_EQ(guest.load<std::uint8_t>(status + 512), kOk);
  const auto back = guest.read(status, 512);
  EXPECT_TRUE(std::equal(back.begin(), back.end(), disk_.data().begin() + 512));
}

TEST_F(BlkTest, IndirectChainsWork) {
  auto& guest = harness().guest();
  const Gpa data = guest.allocate(4096);
  const Gpa status = driver().status();
  ChainBuilder chain;
  chain.indirect().readable(driver().header(test::kBlkIn, 8), 16);
  for (std::uint32_t i = 0; i < 32; ++i) {  // more than the queue has descriptors
    chain.writable(data + i * 128, 128);
  }
  harness().submit(0, chain.writable(status, 1));
  ASSERT_TRUE(harness().wait_used(0).has_value());
  EXPECT_EQ(guest.load<std::uint8_t>(status), kOk);
  const auto back = guest.read(data, 4096);
  EXPECT_TRUE(std::equal(back.begin(), back.end(), disk_.data().begin() + 4096));
}

TEST_F(BlkTest, AShortHeaderOrNoStatusBreaksTheDeviceOnceAndReturnsTheChain) {
  const auto check = [&](const ChainBuilder& chain) {
    ASSERT_TRUE(driver().restart(setup_));
    harness().interrupts().clear();
    const Gpa header = driver().header(test::kBlkIn, 0);
    static_cast<void>(header);
    const std::uint16_t head = harness().submit(0, chain);
    const auto used = harness().wait_used(0);
    ASSERT_TRUE(used.has_value());
    EXPECT_EQ(used->head, head);
    EXPECT_EQ(used->written, 0U);
    EXPECT_TRUE(broken());
    // Nothing is taken up any more, until a reset.
    const auto flush = driver().start_flush();
    harness().notify(0);
    harness().pump();
    EXPECT_FALSE(harness().queue(0).take_used().has_value());
    EXPECT_EQ(harness().guest().load<std::uint8_t>(flush.status), BlkDriver::kNoStatus);
    ASSERT_TRUE(driver().restart(setup_));
    EXPECT_EQ(driver().finish(driver().start_flush()), kOk);
  };
  driver();
  const Gpa at = test::FakeGuest::kBase + 0x8000;
  check(ChainBuilder().readable(at, 15).writable(at + 64, 1));
  check(ChainBuilder().readable(at, 16));
  check(ChainBuilder().writable(at, 64));
  check(ChainBuilder().readable(at, 0).writable(at + 64, 1));
  check(ChainBuilder().readable(at, 16).readable(at + 16, 512));
  check(ChainBuilder().readable(at, 16).writable(at + 64, 0));
}

TEST_F(BlkTest, ABrokenRingAsksForReset) {
  harness().queue(0).set_available_entry(0, 0xffff);
  harness().queue(0).set_available_index(1);
  harness().notify(0);
  EXPECT_TRUE(broken());
  harness().notify(0);
  ASSERT_TRUE(driver().restart(setup_));
  EXPECT_EQ(driver().finish(driver().start_flush()), kOk);
}

TEST_F(BlkTest, UnknownTypesAreUnsupported) {
  for (const std::uint32_t type :
       {2U, 3U, 5U, 6U, 7U, 9U, 10U, 12U, 14U, 16U, 26U, 0x100U, 0x80000000U, 0xffffffffU}) {
    EXPECT_EQ(driver().finish(driver().start(type, {})), kUnsupported) << type;
  }
  EXPECT_FALSE(broken());
}

TEST_F(BlkTest, GetIdGivesTheSerialWithinTheBuffer) {
  auto& guest = harness().guest();
  for (const std::uint32_t size : {0U, 5U, 20U, 64U}) {
    const Gpa id = guest.allocate(96);
    guest.write(id, bytes(96, 0x77));
    const auto before = guest.read(id, 96);
    const Gpa status = driver().status();
    ChainBuilder chain;
    chain.readable(driver().header(test::kBlkGetId, 0), 16);
    if (size > 0) {
      chain.writable(id, size);
    }
    harness().submit(0, chain.writable(status, 1));
    const auto used = harness().wait_used(0);
    ASSERT_TRUE(used.has_value());
    EXPECT_EQ(used->written, size <= 20 ? size + 1 : 20);
    EXPECT_EQ(guest.load<std::uint8_t>(status), kOk);
    std::string expected = "SERIAL-1";
    expected.resize(20);
    expected.resize(std::min<std::size_t>(size, 20));
    EXPECT_EQ(guest.read_text(id, expected.size()), expected);
    const auto after = guest.read(id, 96);
    EXPECT_TRUE(std::equal(after.begin() + static_cast<std::ptrdiff_t>(expected.size()), after.end(),
                           before.begin() + static_cast<std::ptrdiff_t>(expected.size())));
  }
}

TEST_F(BlkTest, DiscardAndWriteZeroes) {
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkDiscard, {{4, 2, 0}, {10, 1, 0}, {20, 0, 0}})),
            kOk);
  EXPECT_EQ(disk_.count(BlockOp::kDiscard), 2U);
  bool unmap = false;
  disk_.inject = [&](const BlockRequest& request) {
    unmap = request.may_unmap;
    return 0;
  };
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkWriteZeroes, {{100, 8, 0}})), kOk);
  EXPECT_FALSE(unmap);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkWriteZeroes, {{200, 1, 1}})), kOk);
  EXPECT_TRUE(unmap);
  auto expected = bytes(kDisk, 3);
  for (const auto& [sector, count] :
       {std::pair{4, 2}, std::pair{10, 1}, std::pair{100, 8}, std::pair{200, 1}}) {
    std::fill_n(expected.begin() + sector * 512, count * 512, std::uint8_t{0});
  }
  EXPECT_EQ(disk_.data(), expected);
}

TEST_F(BlkTest, RangesAreJudgedBeforeAnyIsCarriedOut) {
  constexpr std::uint32_t kSectors = kDisk / 512;
  for (const std::uint32_t type : {test::kBlkDiscard, test::kBlkWriteZeroes}) {
    const BlkSegment good{0, 1, 0};
    const auto status = [&](const std::vector<BlkSegment>& segments) {
      return driver().finish(driver().start_ranges(type, segments));
    };
    EXPECT_EQ(status({good, {kSectors, 1, 0}}), kIoError);
    EXPECT_EQ(status({good, {kSectors - 1, 2, 0}}), kIoError);
    EXPECT_EQ(status({good, {UINT64_MAX, 1, 0}}), kIoError);
    EXPECT_EQ(status({good, {UINT64_MAX / 512, 1, 0}}), kIoError);
    EXPECT_EQ(status({good, {0, UINT32_MAX, 0}}), kIoError);
    EXPECT_EQ(status({good, {0, 1, 2}}), kUnsupported);
    EXPECT_EQ(status({good, {0, 1, 0x80000000}}), kUnsupported);
    EXPECT_EQ(status({good, {0, 1, 1}}), type == test::kBlkDiscard ? kUnsupported : kOk);
    EXPECT_EQ(status(std::vector<BlkSegment>(9, good)), kIoError);
    EXPECT_EQ(status({}), kIoError);
    EXPECT_EQ(driver().finish(driver().start(type, bytes(15, 0))), kIoError);
    EXPECT_EQ(driver().finish(driver().start(type, bytes(24, 0))), kIoError);
    EXPECT_EQ(status(std::vector<BlkSegment>(8, good)), kOk);
  }
  EXPECT_EQ(disk_.count(BlockOp::kDiscard), 8U);
  EXPECT_EQ(disk_.count(BlockOp::kWriteZeroes), 10U);
  EXPECT_FALSE(broken());
}

TEST_F(BlkTest, RangesBeyondTheLimitOfOneSegmentAreErrors) {
  disk_.geometry_for_change().size = 1ULL << 40;
  disk_.inject = [](const BlockRequest&) { return EOPNOTSUPP; };  // tells what was let through
  for (const auto& [type, offset] :
       {std::pair{test::kBlkDiscard, 36U}, std::pair{test::kBlkWriteZeroes, 48U}}) {
    const auto limit = harness().read_config<std::uint32_t>(offset);
    ASSERT_GT(limit, 0U);
    EXPECT_EQ(driver().finish(driver().start_ranges(type, {{0, limit, 0}})), kUnsupported);
    EXPECT_EQ(driver().finish(driver().start_ranges(type, {{0, limit + 1, 0}})), kIoError);
  }
}

TEST_F(BlkTest, RangesThatWereNotNegotiatedAreUnsupported) {
  setup_.features = 0;
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkDiscard, {{0, 1, 0}})), kUnsupported);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkWriteZeroes, {{0, 1, 0}})), kUnsupported);
  EXPECT_EQ(disk_.data(), bytes(kDisk, 3));
}

TEST_F(BlkTest, AReadOnlyDiskTakesNoWrites) {
  disk_.geometry_for_change().read_only = true;
  EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 0))), kIoError);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkDiscard, {{0, 1, 0}})), kUnsupported);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkWriteZeroes, {{0, 1, 0}})), kUnsupported);
  EXPECT_EQ(driver().finish(driver().start_read(0, 512)), kOk);
  EXPECT_EQ(harness().device().features() & ((1ULL << 5) | (1ULL << 11) | (1ULL << 13) | (1ULL << 14)),
            1ULL << 5);
}

TEST_F(BlkTest, ErrorsOfTheBackEndBecomeStatus) {
  int error = EIO;
  disk_.inject = [&](const BlockRequest&) { return error; };
  for (const auto& [number, status] : {std::pair{EIO, kIoError}, std::pair{ENOSPC, kIoError},
                                       std::pair{EROFS, kIoError}, std::pair{EOPNOTSUPP, kUnsupported}}) {
    error = number;
    EXPECT_EQ(driver().finish(driver().start_read(0, 512)), status);
    EXPECT_EQ(driver().last_used->written, 0U);
    EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 1))), status);
    EXPECT_EQ(driver().finish(driver().start_flush()), status);
    EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkDiscard, {{0, 1, 0}, {1, 1, 0}})), status);
  }
  EXPECT_EQ(disk_.count(BlockOp::kDiscard), 4U) << "a failed range ends the request";
  EXPECT_FALSE(broken());
}

TEST_F(BlkTest, CountsWhatWasCarriedOut) {
  EXPECT_EQ(driver().finish(driver().start_read(0, 2560)), kOk);
  EXPECT_EQ(driver().finish(driver().start_read(0, 512)), kOk);
  EXPECT_EQ(driver().finish(driver().start_write(10, bytes(1024, 1))), kOk);
  EXPECT_EQ(driver().finish(driver().start_write(2, bytes(512, 1))), kOk);
  EXPECT_EQ(driver().finish(driver().start_flush()), kOk);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkDiscard, {{4, 2, 0}, {10, 1, 0}})), kOk);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkWriteZeroes, {{20, 1, 0}})), kOk);
  // Requests that were never begun count nowhere.
  EXPECT_EQ(driver().finish(driver().start_read(kDisk / 512, 512)), kIoError);
  disk_.inject = [](const BlockRequest&) { return EIO; };
  EXPECT_EQ(driver().finish(driver().start_read(0, 512)), kIoError);
  EXPECT_EQ(driver().finish(driver().start_write(100, bytes(512, 1))), kIoError);
  EXPECT_EQ(driver().finish(driver().start_flush()), kIoError);
  ASSERT_TRUE(driver().restart(setup_)) << "a reset keeps what was counted";

  const BlockCounters& counters = driver().device().counters();
  EXPECT_EQ(counters.reads.done, 2U);
  EXPECT_EQ(counters.reads.bytes, 3072U);
  EXPECT_EQ(counters.reads.failed, 1U);
  EXPECT_EQ(counters.writes.done, 3U);
  EXPECT_EQ(counters.writes.bytes, 2048U);
  EXPECT_EQ(counters.writes.failed, 1U);
  EXPECT_EQ(counters.flushes.done, 1U);
  EXPECT_EQ(counters.flushes.bytes, 0U);
  EXPECT_EQ(counters.flushes.failed, 1U);
  EXPECT_EQ(counters.discards.done, 2U);
  EXPECT_EQ(counters.discards.bytes, 1536U);
  EXPECT_EQ(counters.highest_written, 21U * 512);
}

TEST_F(BlkTest, WithoutAWriteCacheWritesAreFlushedBeforeTheyComplete) {
  // Write back: FLUSH was negotiated.
  EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 1))), kOk);
  EXPECT_EQ(disk_.count(BlockOp::kFlush), 0U);
  // The driver turns the cache off, and on again.
  harness().write_config<std::uint8_t>(32, 0);
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 0);
  EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 1))), kOk);
  EXPECT_EQ(disk_.count(BlockOp::kFlush), 1U);
  EXPECT_EQ(driver().finish(driver().start_ranges(test::kBlkWriteZeroes, {{0, 1, 0}, {1, 1, 0}})), kOk);
  EXPECT_EQ(disk_.count(BlockOp::kFlush), 2U);
  harness().write_config<std::uint8_t>(32, 1);
  EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 1))), kOk);
  EXPECT_EQ(disk_.count(BlockOp::kFlush), 2U);
  harness().write_config<std::uint8_t>(32, 2);
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 1);
  // A driver that knows of no cache.
  setup_.features = 0;
  ASSERT_TRUE(driver().restart(setup_));
  EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 1))), kOk);
  EXPECT_EQ(disk_.count(BlockOp::kFlush), 3U);
  harness().write_config<std::uint8_t>(32, 0);
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 1) << "CONFIG_WCE was not negotiated";
  // A failed flush fails the write.
  disk_.inject = [](const BlockRequest& request) { return request.op == BlockOp::kFlush ? EIO : 0; };
  EXPECT_EQ(driver().finish(driver().start_write(0, bytes(512, 1))), kIoError);
}

TEST_F(BlkTest, ConfigurationSpace) {
  options_.num_queues = 4;
  options_.queue_size = 64;
  disk_.geometry_for_change().physical_block_size = 4096;
  disk_.geometry_for_change().discard_granularity = 4096;
  EXPECT_EQ(harness().read_config<std::uint64_t>(0), kDisk / 512);
  EXPECT_EQ(harness().read_config<std::uint32_t>(8), 0U);
  EXPECT_EQ(harness().read_config<std::uint32_t>(12), 62U);
  EXPECT_EQ(harness().read_config<std::uint32_t>(20), 512U);
  EXPECT_EQ(harness().read_config<std::uint8_t>(24), 3U);
  EXPECT_EQ(harness().read_config<std::uint16_t>(26), 8U);
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 1U);
  EXPECT_EQ(harness().read_config<std::uint16_t>(34), 4U);
  EXPECT_EQ(harness().read_config<std::uint32_t>(40), 8U);
  EXPECT_EQ(harness().read_config<std::uint32_t>(44), 8U);
  EXPECT_EQ(harness().read_config<std::uint8_t>(56), 1U);
  EXPECT_EQ(harness().device().queue_sizes().size(), 4U);
  EXPECT_NE(harness().device().features() & (1ULL << 12), 0U);
  // Any place, any width: nothing but the one byte changes, nothing crashes.
  for (std::uint64_t offset : {0ULL, 28ULL, 31ULL, 32ULL, 33ULL, 57ULL, 60ULL, 4096ULL, ~0ULL - 7, ~0ULL}) {
    for (std::size_t size = 1; size <= 8; ++size) {
      std::array<std::uint8_t, 8> data{};
      data.fill(0x5a);
      const std::lock_guard lock(harness().device().strand().mutex());
      harness().device().write_config(offset, std::span(data).first(size));
      harness().device().read_config(offset, std::span(data).first(size));
      if (offset >= 60) {
        EXPECT_TRUE(std::all_of(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(size),
                                [](std::uint8_t byte) { return byte == 0; }));
      }
    }
  }
  EXPECT_EQ(harness().read_config<std::uint64_t>(0), kDisk / 512);
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 1U);
}

TEST_F(BlkTest, ABatchGivesOneInterrupt) {
  auto& queue = harness().queue(0);
  for (int i = 0; i < 5; ++i) {
    queue.add(
        ChainBuilder().readable(driver().header(test::kBlkFlush, 0), 16).writable(driver().status(), 1));
  }
  harness().notify(0);
  EXPECT_EQ(queue.used_index(), 5);
  EXPECT_EQ(harness().interrupts().used(0), 1U);
  EXPECT_EQ(disk_.kicks(), 1U);
}

TEST_F(ManualBlkTest, RequestsCompleteInAnyOrder) {
  const auto first = driver().start_read(0, 512);
  const auto second = driver().start_read(8, 512);
  const auto third = driver().start_read(16, 512);
  ASSERT_EQ(disk_.begun().size(), 3U);
  disk_.complete(1);
  EXPECT_EQ(harness().queue(0).take_used()->head, second.head);
  disk_.complete(1);
  EXPECT_EQ(harness().queue(0).take_used()->head, third.head);
  disk_.complete(0);
  EXPECT_EQ(harness().queue(0).take_used()->head, first.head);
  EXPECT_EQ(harness().guest().load<std::uint8_t>(first.status), kOk);
}

TEST_F(ManualBlkTest, AHeadInFlightTwiceBreaksTheQueueButNotTheDevicesMemory) {
  const auto read = driver().start_read(0, 512);
  harness().queue(0).publish(read.head);
  harness().notify(0);
  EXPECT_TRUE(broken());
  EXPECT_EQ(disk_.begun().size(), 1U);
  disk_.complete_all();
  EXPECT_EQ(harness().queue(0).used_index(), 1) << "the first is returned, once";
}

TEST_F(ManualBlkTest, ResetAtEveryPointDropsWhatIsInFlight) {
  for (std::size_t finished = 0; finished <= 4; ++finished) {
    ASSERT_TRUE(driver().restart(setup_));
    for (std::uint64_t i = 0; i < 4; ++i) {
      static_cast<void>(driver().start_read(i, 512));
    }
    for (std::size_t i = 0; i < finished; ++i) {
      disk_.complete(0);
    }
    const auto used = harness().queue(0).used_index();
    harness().interrupts().clear();
    harness().reset();
    EXPECT_EQ(disk_.in_flight(), 0U);
    EXPECT_EQ(harness().queue(0).used_index(), used) << "the driver's memory is its own again";
    EXPECT_EQ(harness().interrupts().used(0), 0U);
  }
  ASSERT_TRUE(driver().restart(setup_));
  const auto read = driver().start_read(0, 512);
  disk_.complete_all();
  EXPECT_EQ(driver().finish(read), kOk);
}

TEST_F(ManualBlkTest, ResetBetweenTheRangesOfOneRequest) {
  static_cast<void>(driver().start_ranges(test::kBlkDiscard, {{0, 1, 0}, {1, 1, 0}, {2, 1, 0}}));
  disk_.complete(0);
  ASSERT_EQ(disk_.begun().size(), 1U);
  harness().reset();
  EXPECT_EQ(disk_.in_flight(), 0U);
  EXPECT_EQ(disk_.count(BlockOp::kDiscard), 2U) << "the third range is not begun";
}

TEST_F(ManualBlkTest, PauseFinishesWhatIsInFlight) {
  const auto ranges = driver().start_ranges(test::kBlkDiscard, {{0, 1, 0}, {1, 1, 0}});
  const auto read = driver().start_read(0, 512);
  harness().pause();
  EXPECT_EQ(disk_.in_flight(), 0U);
  EXPECT_EQ(harness().queue(0).used_index(), 2);
  EXPECT_EQ(harness().guest().load<std::uint8_t>(ranges.status), kOk);
  EXPECT_EQ(harness().guest().load<std::uint8_t>(read.status), kOk);
  const auto later = driver().start_read(0, 512);
  EXPECT_EQ(disk_.in_flight(), 0U);
  harness().resume();
  EXPECT_EQ(disk_.in_flight(), 1U);
  disk_.complete_all();
  static_cast<void>(harness().queue(0).take_used());
  static_cast<void>(harness().queue(0).take_used());
  EXPECT_EQ(driver().finish(later), kOk);
}

TEST_F(ManualBlkTest, MoreRequestsThanTheDeviceTakesAtOnceWaitInTheRing) {
  options_.queue_size = 1024;
  setup_.queue_size = 1024;
  auto& queue = harness().queue(0);
  for (std::uint32_t i = 0; i < 170; ++i) {
    queue.add(ChainBuilder()
                  .readable(driver().header(test::kBlkIn, i), 16)
                  .writable(harness().guest().allocate(512), 512)
                  .writable(driver().status(), 1));
  }
  harness().notify(0);
  EXPECT_LE(disk_.begun().size(), 64U) << "one notification does a bounded amount of work";
  harness().pump();
  EXPECT_EQ(disk_.begun().size(), VirtioBlk::kRequestsInFlight);
  disk_.complete_all();
  harness().pump();
  EXPECT_EQ(disk_.begun().size(), 170U - VirtioBlk::kRequestsInFlight);
  disk_.complete_all();
  EXPECT_EQ(queue.used_index(), 170);
  // Asleep again: the next request needs, and gets, a notification.
  const auto next = driver().start_read(0, 512);
  disk_.complete_all();
  for (int i = 0; i < 170; ++i) {
    static_cast<void>(queue.take_used());
  }
  EXPECT_EQ(driver().finish(next), kOk);
}

TEST_F(ManualBlkTest, NotificationsAreSuppressedWhileTheRingIsNotLookedAt) {
  options_.queue_size = 512;
  setup_.queue_size = 512;
  auto& queue = harness().queue(0);
  for (std::uint32_t i = 0; i < 70; ++i) {
    queue.add(
        ChainBuilder().readable(driver().header(test::kBlkFlush, 0), 16).writable(driver().status(), 1));
  }
  harness().notify(0);
  EXPECT_EQ(queue.used_flags() & 1, 1);
  harness().pump();
  EXPECT_EQ(queue.used_flags() & 1, 0);
}

TEST_F(BlkTest, SixteenQueuesEachServeTheirOwn) {
  options_.num_queues = 16;
  setup_.unset = {3};
  for (std::uint16_t i = 0; i < 16; ++i) {
    if (i == 3) {
      harness().notify(i);
      continue;
    }
    const auto read = driver().start_read(i, 512, i);
    EXPECT_EQ(driver().finish(read, i), kOk);
    EXPECT_EQ(harness().interrupts().used(i), 1U);
  }
  harness().notify(15);
  EXPECT_FALSE(broken());
}

TEST_F(BlkTest, WorksWithTheEventIndex) {
  setup_.event_idx = true;
  for (std::uint64_t i = 0; i < 100; ++i) {
    ASSERT_EQ(driver().finish(driver().start_read(i, 512)), kOk);
  }
}

TEST_F(BlkTest, DataReadIsMarkedDirty) {
  const auto read = driver().start_read(0, 4096);
  static_cast<void>(driver().finish(read));
  static_cast<void>(harness().guest().take_dirty_pages());
  const auto again = driver().start_read(0, 8192);
  ASSERT_EQ(driver().finish(again), kOk);
  const auto dirty = harness().guest().take_dirty_pages();
  for (Gpa gpa = again.data; gpa < again.data + 8192; gpa += 4096) {
    EXPECT_TRUE(dirty[(gpa - test::FakeGuest::kBase) / 4096]);
  }
}

TEST_F(BlkTest, SavesAndLoadsWhatTheDriverChose) {
  harness().write_config<std::uint8_t>(32, 0);
  harness().pause();
  const StateRecord record = harness().device().save();
  harness().reset();
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 1);
  EXPECT_TRUE(harness().device().load(record).has_value());
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 0);
  ASSERT_TRUE(harness().activate(setup_).has_value());
  EXPECT_EQ(harness().read_config<std::uint8_t>(32), 0);

  disk_.geometry_for_change().size = kDisk / 2;
  const auto refused = harness().device().load(record);
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().message,
            "device blk0: drive d has 524288 bytes, the saved machine's had 1048576; give the disk it was "
            "saved with");
  StateRecord damaged = record;
  damaged.bytes.pop_back();
  EXPECT_FALSE(harness().device().load(damaged).has_value());
  damaged.version = 2;
  EXPECT_FALSE(harness().device().load(damaged).has_value());
}

TEST_F(BlkTest, ADriveHasOneDevice) {
  harness();
  Log log;
  const SystemClock clock;
  const auto second = VirtioBlk::create(harness().loop(), harness().guest().memory(),
                                        {.id = "b", .drive = "d"}, disk_, log, clock);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().message, "device b: drive d is in use by another device");
  EXPECT_EQ(driver().finish(driver().start_read(0, 512)), kOk) << "the first keeps it";
  driver_.reset();
  EXPECT_FALSE(disk_.attached());
}

TEST(BlkOptions, AreChecked) {
  PropertySet set;
  EXPECT_EQ(virtio_blk_options("b", set).error().message,
            "device b: drive= is missing; give the id of a -drive");
  set.set("drive", std::string("d"));
  EXPECT_EQ(virtio_blk_options("b", set)->queue_size, 256);
  EXPECT_EQ(virtio_blk_options("b", set)->num_queues, 1);
  set.set("queue-size", std::uint64_t{100});
  EXPECT_EQ(virtio_blk_options("b", set).error().message,
            "device b: queue-size=100 is not a power of two; try 64");
  const PropertySpec* const serial = find_property(virtio_blk_properties(), "serial");
  ASSERT_NE(serial, nullptr);
  EXPECT_TRUE(parse_property(*serial, "12345678901234567890").has_value());
  EXPECT_FALSE(parse_property(*serial, "123456789012345678901").has_value());
  EXPECT_FALSE(parse_property(*find_property(virtio_blk_properties(), "num-queues"), "17").has_value());
}

}  // namespace
}  // namespace wisp
