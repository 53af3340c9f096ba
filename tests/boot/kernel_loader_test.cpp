#include "boot/kernel_loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "boot_fixtures.h"

namespace wisp {
namespace {

using test::Bytes;
using test::ScratchFile;
using test::TestRam;
using ::testing::HasSubstr;

constexpr std::uint64_t kMiB = 1 << 20;

TEST(KernelLoader, SegmentsArriveAndTheRestStaysZero) {
  const Bytes text = test::pattern(0x2345, 1);
  const Bytes data = test::pattern(0x1801, 2);
  // The data shares neither offset in the page nor size with whole pages, as the linker leaves it.
  const ScratchFile file(test::build_elf(
      0x20'0000,
      {{.paddr = 0x20'0000, .content = text}, {.paddr = 0x30'0123, .content = data, .memory_size = 0x4000}}));
  const auto reader = ImageReader::from_fd(file.fd());
  ASSERT_TRUE(reader);
  const auto image = read_kernel_image(*reader);
  ASSERT_TRUE(image) << test::error_of(image);
  TestRam ram(8 * kMiB);
  ASSERT_TRUE(load_kernel(*reader, *image, ram.placements));
  EXPECT_EQ(ram.bytes(0x20'0000, text.size()), text);
  EXPECT_EQ(ram.bytes(0x20'0000 + text.size(), 0x1000), Bytes(0x1000));
  EXPECT_EQ(ram.bytes(0x30'0123, data.size()), data);
  EXPECT_EQ(ram.bytes(0x30'0000, 0x123), Bytes(0x123));
  EXPECT_EQ(ram.bytes(0x30'0123 + data.size(), 0x4000), Bytes(0x4000));
  // The guest's writes do not reach the file.
  ASSERT_TRUE(ram.memory.store<std::uint64_t>(0x20'1000, ~0ULL));
  EXPECT_EQ(*reader->load<std::uint64_t>(0x2000), load_le<std::uint64_t>(&text[0x1000]));
}

TEST(KernelLoader, KernelBeyondRamNamesBothSizes) {
  const ScratchFile file(test::build_elf(
      0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(16, 1), .memory_size = 7 * kMiB}}));
  const auto reader = ImageReader::from_fd(file.fd());
  const auto image = read_kernel_image(*reader);
  ASSERT_TRUE(image);
  TestRam enough(9 * kMiB);
  EXPECT_TRUE(load_kernel(*reader, *image, enough.placements));
  TestRam small(8 * kMiB);
  const std::string error = test::error_of(load_kernel(*reader, *image, small.placements));
  EXPECT_THAT(error, HasSubstr("up to 9 MiB"));
  EXPECT_THAT(error, HasSubstr("has 8 MiB"));
  EXPECT_FALSE(load_kernel(*reader, *image, {}));
}

TEST(KernelLoader, RamInTouchingPartsTakesAKernelAcross) {
  const Bytes text = test::pattern(0x4000, 1);
  const ScratchFile file(test::build_elf(0x1F'F000, {{.paddr = 0x1F'F000, .content = text}}));
  const auto reader = ImageReader::from_fd(file.fd());
  const auto image = read_kernel_image(*reader);
  TestRam ram(4 * kMiB);
  const std::vector<RamPlacement> parts = {{2 * kMiB, 2 * kMiB, 2 * kMiB, ram.block.get()},
                                           {0, 0, 2 * kMiB, ram.block.get()}};
  EXPECT_EQ(low_ram_end(parts), 4 * kMiB);
  ASSERT_TRUE(load_kernel(*reader, *image, parts));
  EXPECT_EQ(ram.bytes(0x1F'F000, text.size()), text);
}

TEST(KernelLoader, LowRamEndsAtTheFirstHoleOrAt3GiB) {
  const auto end = [](std::initializer_list<RamPlacement> parts) {
    return low_ram_end(std::vector<RamPlacement>(parts));
  };
  EXPECT_EQ(end({}), 0U);
  EXPECT_EQ(end({{kMiB, 0, kMiB, nullptr}}), 0U);
  EXPECT_EQ(end({{0, 0, kMiB, nullptr}, {2 * kMiB, 0, kMiB, nullptr}}), kMiB);
  EXPECT_EQ(end({{0, 0, 4ULL << 30, nullptr}}), layout::kLowRamEnd);
  EXPECT_EQ(end({{0, 0, layout::kLowRamEnd, nullptr}, {layout::kHighRamStart, 0, 1ULL << 30, nullptr}}),
            layout::kLowRamEnd);
}

KernelImage kernel_until(Gpa end, Gpa initrd_last = 0xFFFF'FFFF) {
  KernelImage image;
  image.start = kMiB;
  image.end = end;
  image.initrd_last = initrd_last;
  return image;
}

TEST(InitrdPlacement, AsHighAsAllowedOnAPage) {
  EXPECT_EQ(place_initrd(1, kernel_until(4 * kMiB), 64 * kMiB), 64 * kMiB - 0x1000);
  EXPECT_EQ(place_initrd(0x1001, kernel_until(4 * kMiB), 64 * kMiB), 64 * kMiB - 0x2000);
  EXPECT_EQ(place_initrd(0x1000, kernel_until(4 * kMiB, 0x37FF'FFFF), layout::kLowRamEnd), 0x37FF'F000U);
  EXPECT_EQ(place_initrd(0x1000, kernel_until(4 * kMiB), layout::kLowRamEnd), layout::kLowRamEnd - 0x1000);
}

TEST(InitrdPlacement, ExactFitAndOneByteMore) {
  EXPECT_EQ(place_initrd(4 * kMiB, kernel_until(4 * kMiB), 8 * kMiB), 4 * kMiB);
  EXPECT_EQ(place_initrd(4 * kMiB + 1, kernel_until(4 * kMiB), 8 * kMiB), std::nullopt);
  EXPECT_EQ(place_initrd(UINT64_MAX, kernel_until(4 * kMiB), 8 * kMiB), std::nullopt);
  EXPECT_EQ(place_initrd(1, kernel_until(4 * kMiB, 0), 8 * kMiB), std::nullopt);
}

TEST(InitrdPlacement, ErrorNamesTheSizes) {
  const ScratchFile file(Bytes(3 * kMiB));
  const auto reader = ImageReader::from_fd(file.fd());
  TestRam ram(8 * kMiB);
  const std::string error = test::error_of(load_initrd(*reader, kernel_until(6 * kMiB), ram.placements));
  EXPECT_THAT(error, HasSubstr("of 3 MiB does not fit between the end of the kernel at 6 MiB and 8 MiB"));
  EXPECT_THAT(error, HasSubstr("-m"));
  EXPECT_THAT(test::error_of(load_initrd(*reader, kernel_until(2 * kMiB, 4 * kMiB - 1), ram.placements)),
              HasSubstr("highest address this kernel takes"));
}

TEST(InitrdPlacement, BytesArriveAndTheTailIsZero) {
  const Bytes content = test::pattern(0x2801, 4);
  const ScratchFile file(content);
  const auto reader = ImageReader::from_fd(file.fd());
  TestRam ram(8 * kMiB);
  const auto loaded = load_initrd(*reader, kernel_until(2 * kMiB), ram.placements);
  ASSERT_TRUE(loaded) << test::error_of(loaded);
  EXPECT_EQ(*loaded, (LoadedRange{8 * kMiB - 0x3000, 0x2801}));
  EXPECT_EQ(ram.bytes(loaded->gpa, content.size()), content);
  EXPECT_EQ(ram.bytes(loaded->gpa + content.size(), 0x7FF), Bytes(0x7FF));
}

}  // namespace
}  // namespace wisp
