#include "memory/guest_memory.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <numeric>
#include <thread>

namespace wisp {
namespace {

// Two blocks that touch in guest addresses but not in host memory, a hole, and one more.
class GuestMemoryTest : public ::testing::Test {
 protected:
  static constexpr Gpa kFirst = 0x1000;
  static constexpr Gpa kSecond = 0x3000;
  static constexpr Gpa kThird = 0x10000;

  void SetUp() override {
    std::iota(first_.begin(), first_.end(), std::uint8_t{0});
    std::iota(second_.begin(), second_.end(), std::uint8_t{100});
    dirty_ = std::make_shared<DirtyBitmap>(second_.size());
    memory_.set_blocks({{.gpa = kThird, .size = third_.size(), .host = third_.data()},
                        {.gpa = kFirst, .size = first_.size(), .host = first_.data()},
                        {.gpa = kSecond, .size = second_.size(), .host = second_.data(), .dirty = dirty_}});
  }

  std::array<std::uint8_t, 0x2000> first_{};
  std::array<std::uint8_t, 0x3000> second_{};
  std::array<std::uint8_t, 0x1000> third_{};
  std::shared_ptr<DirtyBitmap> dirty_;
  GuestMemory memory_;
};

TEST_F(GuestMemoryTest, BlocksAreSorted) {
  ASSERT_EQ(memory_.blocks().size(), 3U);
  EXPECT_EQ(memory_.blocks()[0].gpa, kFirst);
  EXPECT_EQ(memory_.blocks()[1].gpa, kSecond);
  EXPECT_EQ(memory_.blocks()[2].gpa, kThird);
}

TEST_F(GuestMemoryTest, SliceMustLieInOneBlock) {
  EXPECT_TRUE(memory_.slice(kFirst, 1));
  EXPECT_TRUE(memory_.slice(kFirst, first_.size()));
  EXPECT_TRUE(memory_.slice(kSecond - 1, 1));
  EXPECT_TRUE(memory_.slice(kSecond - 8, 8)) << "ends at the end of a block";
  EXPECT_FALSE(memory_.slice(kSecond - 8, 9)) << "crosses into the next block";
  EXPECT_FALSE(memory_.slice(kFirst, first_.size() + 1));
  EXPECT_FALSE(memory_.slice(kThird + third_.size() - 8, 9)) << "crosses the end of the last block";
  EXPECT_FALSE(memory_.slice(kThird + third_.size(), 1)) << "beyond";
  EXPECT_FALSE(memory_.slice(kFirst - 1, 1));
  EXPECT_FALSE(memory_.slice(kFirst - 1, 2)) << "starts before the block";
  EXPECT_FALSE(memory_.slice(0, 1));
  EXPECT_FALSE(memory_.slice(kFirst, 0)) << "nothing is no window";
  EXPECT_FALSE(memory_.slice(UINT64_MAX, 1));
}

TEST_F(GuestMemoryTest, LengthsThatWrapAreRefused) {
  for (const std::uint64_t size : {UINT64_MAX, UINT64_MAX - kFirst, UINT64_MAX - kFirst + 1,
                                   UINT64_MAX - kFirst + 2, std::uint64_t{1} << 63}) {
    EXPECT_FALSE(memory_.slice(kFirst, size)) << size;
  }
}

TEST_F(GuestMemoryTest, SliceReadsAndWritesWithinItsBounds) {
  const GuestSlice slice = *memory_.slice(kFirst + 4, 8);
  EXPECT_EQ(slice.gpa(), kFirst + 4);
  std::array<std::uint8_t, 16> out{};
  out.fill(0xee);
  EXPECT_EQ(slice.read(0, out), 8U) << "never more than the window";
  EXPECT_EQ(out[0], 4);
  EXPECT_EQ(out[7], 11);
  EXPECT_EQ(out[8], 0xee);
  EXPECT_EQ(slice.read(6, out), 2U);
  EXPECT_EQ(slice.read(8, out), 0U);
  EXPECT_EQ(slice.read(SIZE_MAX, out), 0U);
  EXPECT_EQ(slice.read(0, {}), 0U);

  const std::array<std::uint8_t, 16> in{1, 2, 3};
  EXPECT_EQ(slice.write(7, in), 1U);
  EXPECT_EQ(first_[11], 1);
  EXPECT_EQ(first_[12], 12) << "the byte after the window stays";
  EXPECT_EQ(slice.write(8, in), 0U);
  EXPECT_EQ(slice.write(SIZE_MAX, in), 0U);
}

TEST_F(GuestMemoryTest, PartsStayInside) {
  const GuestSlice slice = *memory_.slice(kFirst, 16);
  ASSERT_TRUE(slice.part(4, 12));
  EXPECT_EQ(slice.part(4, 12)->gpa(), kFirst + 4);
  EXPECT_EQ(slice.part(4, 12)->as_iovec().iov_base, first_.data() + 4);
  EXPECT_EQ(slice.part(4, 12)->as_iovec().iov_len, 12U);
  EXPECT_FALSE(slice.part(4, 13));
  EXPECT_FALSE(slice.part(17, 0));
  EXPECT_TRUE(slice.part(16, 0));
  EXPECT_FALSE(slice.part(1, SIZE_MAX)) << "the sum wraps";
  EXPECT_FALSE(slice.part(SIZE_MAX, 1));
}

TEST_F(GuestMemoryTest, NumbersOfEverySizeAtEveryAlignment) {
  for (std::size_t offset = 0; offset < 16; ++offset) {
    const GuestSlice slice = *memory_.slice(kThird + offset, 16);
    for (std::size_t size = 1; size <= 9; ++size) {
      std::array<std::uint8_t, 9> in{};
      std::iota(in.begin(), in.end(), static_cast<std::uint8_t>(offset * 16 + size));
      ASSERT_EQ(slice.write(0, std::span(in).first(size)), size);
      std::array<std::uint8_t, 9> out{};
      ASSERT_EQ(slice.read(0, std::span(out).first(size)), size);
      EXPECT_TRUE(std::equal(in.begin(), in.begin() + static_cast<std::ptrdiff_t>(size), out.begin()));
    }
  }
}

TEST_F(GuestMemoryTest, CopiesMayCrossBlocksThatTouch) {
  std::array<std::uint8_t, 4> out{};
  ASSERT_TRUE(memory_.read(kSecond - 2, out));
  EXPECT_EQ(out, (std::array<std::uint8_t, 4>{first_[0x1ffe], first_[0x1fff], 100, 101}));
  const std::array<std::uint8_t, 4> in{9, 8, 7, 6};
  ASSERT_TRUE(memory_.write(kSecond - 2, in));
  EXPECT_EQ(first_[0x1ffe], 9);
  EXPECT_EQ(first_[0x1fff], 8);
  EXPECT_EQ(second_[0], 7);
  EXPECT_EQ(second_[1], 6);
  EXPECT_FALSE(memory_.read(kSecond + second_.size() - 2, out)) << "runs into the hole";
  EXPECT_FALSE(memory_.read(kThird + third_.size() - 3, out));
  EXPECT_FALSE(memory_.read(UINT64_MAX - 1, out));
  EXPECT_FALSE(memory_.read(0, out));
  EXPECT_TRUE(memory_.read(0, {})) << "an empty copy touches nothing";
}

TEST_F(GuestMemoryTest, LoadAndStore) {
  ASSERT_TRUE(memory_.store<std::uint32_t>(kFirst + 1, 0x11223344));
  EXPECT_EQ(first_[1], 0x44);
  EXPECT_EQ(memory_.load<std::uint32_t>(kFirst + 1), 0x11223344U);
  EXPECT_FALSE(memory_.load<std::uint64_t>(kThird + third_.size() - 7));
  EXPECT_FALSE(memory_.store<std::uint64_t>(kThird + third_.size() - 7, 1));
  EXPECT_FALSE(memory_.load<std::uint16_t>(UINT64_MAX));
}

TEST_F(GuestMemoryTest, WritesMarkThePagesTheyTouch) {
  ASSERT_TRUE(memory_.store<std::uint64_t>(kSecond + 0xffc, 1));
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0b011}));
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0})) << "take clears";
  ASSERT_TRUE(memory_.store<std::uint64_t>(kSecond - 4, 1));
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0b001})) << "only the block's own part";
  EXPECT_TRUE(memory_.load<std::uint64_t>(kSecond).has_value());
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0})) << "reads mark nothing";
}

TEST_F(GuestMemoryTest, MarkDirtyClampsToRam) {
  memory_.mark_dirty(kSecond + 0x2fff, 1);
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0b100}));
  memory_.mark_dirty(0, UINT64_MAX);
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0b111}));
  memory_.mark_dirty(kSecond + 0x1000, UINT64_MAX);
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0b110})) << "a length that wraps";
  memory_.mark_dirty(kSecond + 0x3000, 0x1000);
  memory_.mark_dirty(kSecond - 1, 1);
  memory_.mark_dirty(kSecond, 0);
  EXPECT_EQ(dirty_->take(), (std::vector<std::uint64_t>{0}));
}

TEST(DirtyBitmap, RangesAcrossWords) {
  for (const auto& [first, count] :
       {std::pair{0U, 1U}, {63U, 1U}, {63U, 2U}, {64U, 64U}, {1U, 199U}, {0U, 200U}}) {
    DirtyBitmap bitmap(200 * kPageSize);
    bitmap.mark(first * kPageSize, count * kPageSize);
    const auto words = bitmap.take();
    ASSERT_EQ(words.size(), 4U);
    for (unsigned page = 0; page < 256; ++page) {
      EXPECT_EQ((words[page / 64] >> (page % 64)) & 1, page >= first && page < first + count ? 1U : 0U)
          << first << "+" << count << " page " << page;
    }
  }
}

TEST(DirtyBitmap, NothingIsLostBetweenMarkersAndATaker) {
  constexpr std::uint64_t kPages = 128;
  constexpr int kRounds = 3000;
  DirtyBitmap bitmap(kPages * kPageSize);
  std::array<std::atomic<int>, kPages> written{};
  std::array<int, kPages> seen{};
  std::atomic<bool> done = false;
  std::thread marker([&] {
    for (int round = 1; round <= kRounds; ++round) {
      const auto page = static_cast<std::size_t>(round * 37) % kPages;
      written[page].store(round, std::memory_order_relaxed);
      bitmap.mark(page * kPageSize, 1);
    }
    done.store(true);
  });
  auto collect = [&] {
    const auto words = bitmap.take();
    for (std::size_t page = 0; page < kPages; ++page) {
      if ((words[page / 64] >> (page % 64)) & 1) {
        seen[page] = written[page].load(std::memory_order_relaxed);
      }
    }
  };
  while (!done.load()) {
    collect();
  }
  marker.join();
  collect();
  for (std::size_t page = 0; page < kPages; ++page) {
    EXPECT_EQ(seen[page], written[page].load()) << page;
  }
}

TEST(GuestMemory, EmptyMemoryAnswersNothing) {
  const GuestMemory memory;
  EXPECT_TRUE(memory.blocks().empty());
  EXPECT_FALSE(memory.slice(0, 1));
  EXPECT_FALSE(memory.load<std::uint8_t>(0));
}

TEST(GuestMemory, ABlockAtTheTopOfTheAddressSpace) {
  std::array<std::uint8_t, kPageSize> page{};
  GuestMemory memory;
  memory.set_blocks({{.gpa = UINT64_MAX - kPageSize + 1, .size = kPageSize, .host = page.data()}});
  EXPECT_TRUE(memory.slice(UINT64_MAX, 1));
  EXPECT_TRUE(memory.slice(UINT64_MAX - 3, 4));
  EXPECT_FALSE(memory.slice(UINT64_MAX - 3, 5));
  EXPECT_TRUE(memory.load<std::uint32_t>(UINT64_MAX - 3));
  EXPECT_FALSE(memory.load<std::uint32_t>(UINT64_MAX - 2)) << "must not wrap to address 0";
}

TEST(GuestMemory, ABlockAtTheTopDoesNotWrapToOneAtTheBottom) {
  std::array<std::uint8_t, kPageSize> top{};
  std::array<std::uint8_t, kPageSize> bottom{};
  GuestMemory memory;
  memory.set_blocks({{.gpa = UINT64_MAX - kPageSize + 1, .size = kPageSize, .host = top.data()},
                     {.gpa = 0, .size = kPageSize, .host = bottom.data()}});
  EXPECT_FALSE(memory.load<std::uint16_t>(UINT64_MAX));
  EXPECT_FALSE(memory.store<std::uint16_t>(UINT64_MAX, 0xffff));
  EXPECT_EQ(bottom[0], 0);
}

TEST(GuestMemoryDeathTest, OverlappingBlocksAreABrokenInvariant) {
  std::array<std::uint8_t, 2 * kPageSize> pages{};
  GuestMemory memory;
  EXPECT_DEATH(memory.set_blocks({{.gpa = 0, .size = 2 * kPageSize, .host = pages.data()},
                                  {.gpa = kPageSize, .size = kPageSize, .host = pages.data()}}),
               "block.gpa >= end");
}

TEST(GuestMemory, ReadersSeeOldOrNewTableWhileBlocksAreAdded) {
  std::array<std::uint8_t, kPageSize> first{};
  std::array<std::uint8_t, kPageSize> second{};
  GuestMemory memory;
  const GuestMemoryBlock block{.gpa = 0, .size = kPageSize, .host = first.data()};
  const GuestMemoryBlock more{.gpa = kPageSize, .size = kPageSize, .host = second.data()};
  memory.set_blocks({block});
  std::atomic<bool> stop = false;
  std::thread reader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      ASSERT_TRUE(memory.slice(0, kPageSize));
      if (const auto slice = memory.slice(kPageSize, 8)) {
        ASSERT_EQ(slice->as_iovec().iov_base, second.data());
      }
    }
  });
  for (int i = 0; i < 500; ++i) {
    memory.set_blocks({block, more});
    memory.set_blocks({block});
  }
  stop.store(true);
  reader.join();
}

}  // namespace
}  // namespace wisp
