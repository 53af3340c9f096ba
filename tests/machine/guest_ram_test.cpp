#include "machine/guest_ram.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "boot/layout.h"
#include "machine/machine_kit.h"

namespace wisp {
namespace {

constexpr std::uint64_t kGiB = 1ULL << 30;

class GuestRamTest : public ::testing::Test {
 protected:
  std::unique_ptr<GuestRam> make(std::uint64_t size) {
    auto ram = GuestRam::create({.size = size}, space_);
    EXPECT_TRUE(ram) << ram.error().message;
    return ram ? *std::move(ram) : nullptr;
  }
  static void fill(const GuestRam& ram, Gpa page) {
    EXPECT_TRUE(ram.memory().store<std::uint64_t>(page, 0x1122'3344'5566'7788)) << page;
    EXPECT_TRUE(ram.memory().store<std::uint64_t>(page + kPageSize - 8, 0x99)) << page;
  }
  static bool zero(const GuestRam& ram, Gpa page) {
    return ram.memory().load<std::uint64_t>(page) == 0U &&
           ram.memory().load<std::uint64_t>(page + kPageSize - 8) == 0U;
  }

  AddressSpace space_{"memory", 0};
};

TEST_F(GuestRamTest, UpToThreeGiBIsOnePiece) {
  for (const std::uint64_t size : {std::uint64_t{2} << 20, 3 * kGiB}) {
    const auto ram = make(size);
    EXPECT_EQ(ram->low_size(), size);
    EXPECT_EQ(ram->high_size(), 0U);
    ASSERT_EQ(space_.snapshot().ranges().size(), 1U);
    ASSERT_EQ(ram->memory().blocks().size(), 1U);
    EXPECT_TRUE(ram->memory().slice(size - 1, 1));
    EXPECT_FALSE(ram->memory().slice(size, 1));
    EXPECT_FALSE(ram->memory().slice(layout::kHighRamStart, 1));
  }
}

TEST_F(GuestRamTest, ADescriptorIsToldOnlyWhereOthersSeeTheSameBytes) {
  const test::TempDir dir;
  const auto has_descriptor = [&](const RamOptions& options) {
    const auto ram = GuestRam::create(options, space_);
    EXPECT_TRUE(ram) << ram.error().message;
    return ram && (*ram)->memory().blocks()[0].fd >= 0;
  };
  const std::uint64_t size = test::kMiB;
  EXPECT_FALSE(has_descriptor({.size = size}));
  EXPECT_TRUE(has_descriptor({.size = size, .source = RamSource::kMemfd}));
  const std::string file = dir.image("ram", size);
  EXPECT_TRUE(has_descriptor({.size = size, .source = RamSource::kFile, .path = file, .share = true}));
  EXPECT_FALSE(has_descriptor({.size = size, .source = RamSource::kFile, .path = file}))
      << "writes do not reach the file";
}

TEST_F(GuestRamTest, WhatIsLargerGoesOnAtFourGiB) {
  const auto ram = make(3 * kGiB + (2 << 20));
  EXPECT_EQ(ram->low_size(), 3 * kGiB);
  EXPECT_EQ(ram->high_size(), 2U << 20);
  const FlatView view = space_.snapshot();
  ASSERT_EQ(view.ranges().size(), 2U);
  EXPECT_EQ(view.ranges()[0].start, 0U);
  EXPECT_EQ(view.ranges()[0].size, layout::kLowRamEnd);
  EXPECT_EQ(view.ranges()[1].start, layout::kHighRamStart);
  EXPECT_EQ(view.ranges()[1].size, 2U << 20);
  EXPECT_EQ(view.ranges()[1].host, ram->block().host() + layout::kLowRamEnd)
      << "one mapping, no byte shown twice";

  // No access reaches across the hole.
  EXPECT_FALSE(ram->memory().slice(layout::kLowRamEnd - 4, 8));
  EXPECT_FALSE(ram->memory().load<std::uint64_t>(layout::kLowRamEnd));
  EXPECT_FALSE(ram->memory().load<std::uint64_t>(layout::kHighRamStart - 4));
  ASSERT_TRUE(ram->memory().store<std::uint32_t>(layout::kLowRamEnd - 4, 1));
  ASSERT_TRUE(ram->memory().store<std::uint32_t>(layout::kHighRamStart, 2));
  EXPECT_EQ(ram->memory().load<std::uint32_t>(layout::kLowRamEnd - 4), 1U);
  EXPECT_EQ(ram->memory().load<std::uint32_t>(layout::kHighRamStart), 2U);
}

TEST_F(GuestRamTest, ClearLeavesNoByte) {
  const auto ram = make(3 * kGiB + (2 << 20));
  const Gpa pages[] = {0, 0x10'0000, layout::kLowRamEnd - kPageSize, layout::kHighRamStart,
                       layout::kHighRamStart + (2 << 20) - kPageSize};
  for (const Gpa page : pages) {
    fill(*ram, page);
    EXPECT_FALSE(zero(*ram, page));
  }
  ASSERT_TRUE(ram->clear());
  for (const Gpa page : pages) {
    EXPECT_TRUE(zero(*ram, page)) << page;
  }
}

TEST_F(GuestRamTest, DiscardTakesWhatIsRamAndNothingElse) {
  const auto ram = make(3 * kGiB + (2 << 20));
  const Gpa last_low = layout::kLowRamEnd - kPageSize;
  const Gpa first_high = layout::kHighRamStart;
  const Gpa second_high = first_high + kPageSize;
  const Gpa end = first_high + (2 << 20);
  const auto fill_all = [&] {
    for (const Gpa page :
         {Gpa{0}, last_low - kPageSize, last_low, first_high, second_high, end - kPageSize}) {
      fill(*ram, page);
    }
  };

  fill_all();
  ram->discard(last_low, kPageSize);
  EXPECT_TRUE(zero(*ram, last_low));
  EXPECT_FALSE(zero(*ram, last_low - kPageSize));
  EXPECT_FALSE(zero(*ram, first_high)) << "the next byte of the mapping is another page of the guest";

  fill_all();
  ram->discard(last_low, first_high + kPageSize - last_low);  // across the hole
  EXPECT_TRUE(zero(*ram, last_low));
  EXPECT_TRUE(zero(*ram, first_high));
  EXPECT_FALSE(zero(*ram, last_low - kPageSize));
  EXPECT_FALSE(zero(*ram, second_high));

  fill_all();
  ram->discard(end - kPageSize, 16 * kGiB);  // beyond the end
  EXPECT_TRUE(zero(*ram, end - kPageSize));
  EXPECT_FALSE(zero(*ram, second_high));

  // Nowhere, of no size, and wrapping.
  fill_all();
  ram->discard(layout::kLowRamEnd, layout::kHighRamStart - layout::kLowRamEnd);
  ram->discard(end, kPageSize);
  ram->discard(0, 0);
  ram->discard(second_high, UINT64_MAX);
  ram->discard(UINT64_MAX - 10, 20);
  ram->discard(UINT64_MAX & ~(kPageSize - 1), kPageSize);
  for (const Gpa page : {Gpa{0}, last_low - kPageSize, last_low, first_high, second_high, end - kPageSize}) {
    EXPECT_FALSE(zero(*ram, page)) << page;
  }
}

TEST_F(GuestRamTest, WhatIsDiscardedGoesBackToTheHost) {
  const auto ram = make(4 << 20);
  const auto resident = [&] {
    std::vector<unsigned char> pages((4 << 20) / kPageSize);
    EXPECT_EQ(::mincore(ram->block().host(), 4 << 20, pages.data()), 0);
    return std::ranges::count_if(pages, [](unsigned char page) { return (page & 1) != 0; });
  };
  for (Gpa page = 0; page < 4 << 20; page += kPageSize) {
    fill(*ram, page);
  }
  const auto before = resident();
  EXPECT_GE(before, 1024);
  ram->discard(0, 2 << 20);
  EXPECT_LE(resident(), before - 512);
}

TEST_F(GuestRamTest, LeavesTheSpaceEmpty) {
  make(3 * kGiB + (2 << 20)).reset();
  EXPECT_TRUE(space_.snapshot().ranges().empty());
}

TEST_F(GuestRamTest, APlaceThatIsTakenLeavesNothingBehind) {
  // A space that ends below 4 GiB has no room for the second piece.
  AddressSpace small("memory", layout::kHighRamStart);
  EXPECT_FALSE(GuestRam::create({.size = 3 * kGiB + (2 << 20)}, small));
  EXPECT_TRUE(small.snapshot().ranges().empty());
}

}  // namespace
}  // namespace wisp
