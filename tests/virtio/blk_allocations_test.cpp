// Proves that a request through the block device allocates nothing, once the device is warm: from the
// notification over the back end's threads or ring to the used ring.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "block/drive.h"
#include "block/support/block_kit.h"
#include "virtio/blk_kit.h"

namespace {

std::atomic<bool> counting = false;
std::atomic<std::uint64_t> allocations = 0;

void* allocate(std::size_t size) {
  if (counting.load(std::memory_order_relaxed)) {
    ++allocations;
  }
  void* const memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) {
    std::abort();
  }
  return memory;
}

}  // namespace

// The analyzer takes the free() of the replaced operators for one of its own kind.
// NOLINTBEGIN(clang-analyzer-cplusplus.NewDelete)
void* operator new(std::size_t size) {
  return allocate(size);
}
void* operator new[](std::size_t size) {
  return allocate(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
// NOLINTEND(clang-analyzer-cplusplus.NewDelete)

namespace wisp {
namespace {

using test::BlkDriver;
using test::ChainBuilder;
using test::TempDir;

class BlkAllocationsTest : public testing::TestWithParam<std::tuple<AioKind, bool>> {};

INSTANTIATE_TEST_SUITE_P(
    Kinds, BlkAllocationsTest,
    testing::Combine(testing::Values(AioKind::kIoUring, AioKind::kThreads, AioKind::kOff), testing::Bool()));

TEST_P(BlkAllocationsTest, NoneInTheSteadyState) {
  const auto& [aio, throttled] = GetParam();
  const TempDir dir;
  Log log;
  const SystemClock clock;
  const auto backend = open_drive({.id = "d",
                                   .file = dir.file("disk", 1 << 20),
                                   .aio = aio,
                                   .discard = true,
                                   .limits = {.iops = throttled ? 1'000'000U : 0U}},
                                  log, clock);
  ASSERT_TRUE(backend.has_value());
  BlkDriver driver(**backend, {.id = "b", .drive = "d", .queue_size = 256});
  ASSERT_TRUE(driver.harness.activate({.event_idx = true, .queue_size = 256}).has_value());
  test::FakeQueue& queue = driver.harness.queue(0);
  auto& guest = driver.harness.guest();
  // Reads, writes, flushes, zeroes and discards; some with many buffers, some that direct I/O cannot take.
  std::vector<std::uint16_t> heads;
  for (std::uint32_t i = 0; i < 32; ++i) {
    ChainBuilder chain;
    const Gpa data = guest.allocate(4096 + 16, 512) + (i % 5 == 0 ? 1 : 0);
    switch (i % 4) {
      case 0:
        chain.readable(driver.header(test::kBlkOut, i * 8), 16)
            .readable(data, 1000)
            .readable(data + 1000, 3096);
        break;
      case 1:
        chain.readable(driver.header(test::kBlkIn, i * 8), 16).writable(data, 512).writable(data + 512, 3584);
        break;
      case 2:
        chain.readable(driver.header(i == 2 ? test::kBlkFlush : test::kBlkGetId, 0), 16);
        break;
      default:
        guest.store(data, test::BlkSegment{1000, 8, 0});
        chain.readable(driver.header(i % 8 == 3 ? test::kBlkWriteZeroes : test::kBlkDiscard, 0), 16)
            .readable(data, 16);
        break;
    }
    heads.push_back(queue.build(chain.writable(driver.status(), 1)));
  }
  const auto round = [&] {
    for (const std::uint16_t head : heads) {
      queue.publish(head);
    }
    const auto target = static_cast<std::uint16_t>(queue.used_index() + heads.size());
    counting = true;
    driver.harness.notify(0);
    for (int i = 0; i < 5000 && queue.used_index() != target; ++i) {
      driver.harness.loop().run_once(1);
    }
    counting = false;
    ASSERT_EQ(queue.used_index(), target);
  };
  for (int i = 0; i < 10; ++i) {
    ASSERT_NO_FATAL_FAILURE(round());
  }
  allocations = 0;
  for (int i = 0; i < 40; ++i) {
    ASSERT_NO_FATAL_FAILURE(round());
  }
  EXPECT_EQ(allocations, 0U) << "over 1280 requests";
}

// The counter counts: a test that could not fail would prove nothing.
TEST(BlkAllocations, AreCounted) {
  allocations = 0;
  counting = true;
  const auto memory = std::make_unique<std::vector<int>>(100);
  counting = false;
  EXPECT_EQ(allocations, 2U);
  EXPECT_EQ(memory->size(), 100U);
}

}  // namespace
}  // namespace wisp
