// Repeated moves and stores, which translated code does by itself where they stay inside a page: what they
// must not touch, and when they must not.
#include <algorithm>
#include <span>

#include "hypervisor/soft/payload_kit.h"

namespace wisp::soft {
namespace {

class Repeat : public Payload {
 protected:
  static constexpr std::uint64_t kNext = kData + kPageSize;

  std::span<std::uint8_t> memory(std::uint64_t gpa, std::size_t size) { return {ram_ + gpa, size}; }
  bool all(std::uint64_t gpa, std::size_t size, std::uint8_t value) {
    return std::ranges::all_of(memory(gpa, size), [value](std::uint8_t byte) { return byte == value; });
  }
  void start(std::uint64_t count, std::uint64_t target, std::uint64_t source = 0) {
    cpu().gpr[kRcx] = count;
    cpu().gpr[kRdi] = target;
    cpu().gpr[kRsi] = source;
    cpu().gpr[kRax] = 0x5a5a5a5a5a5a5a5a;
    cpu().set_rflags(2 | flag::kCf | flag::kZf);
  }
  // The page fault's handler stops at once.
  void stop_at_page_faults() {
    gate(vec::kPf, kHandler);
    code(kHandler, {0xf4});
  }
};

TEST_P(Repeat, StoresAsManyAsItSays) {
  code(kCode, {0xf3, 0x48, 0xab,  // rep stosq
               0xf4});
  start(8, kData + 8);
  run_to_halt();
  EXPECT_TRUE(all(kData, 8, 0));
  EXPECT_TRUE(all(kData + 8, 64, 0x5a));
  EXPECT_TRUE(all(kData + 72, 64, 0));
  EXPECT_EQ(cpu().gpr[kRcx], 0U);
  EXPECT_EQ(cpu().gpr[kRdi], kData + 72);
  EXPECT_EQ(cpu().rflags() & flag::kArithmetic, flag::kCf | flag::kZf);
}

TEST_P(Repeat, MovesEachSizeToThePagesLastByte) {
  for (const unsigned size : {1U, 2U, 4U, 8U}) {
    std::ranges::fill(memory(kData, 2 * kPageSize), std::uint8_t{0});
    for (std::uint64_t i = 0; i < 64; ++i) {
      ram_[kData + i] = static_cast<std::uint8_t>(i + 1);
    }
    const auto prefix = static_cast<std::uint8_t>(size == 2 ? 0x66 : size == 8 ? 0x48 : 0x90);
    const bool rex = size == 8;
    const std::uint64_t at = kCode + std::uint64_t{16} * size;
    code(at, {rex ? std::uint8_t{0xf3} : prefix, rex ? prefix : std::uint8_t{0xf3},
              static_cast<std::uint8_t>(size == 1 ? 0xa4 : 0xa5), 0xf4});  // rep movs
    start(64 / size, kNext - 64, kData);
    cpu().rip = at;
    run_to_halt();
    EXPECT_TRUE(std::ranges::equal(memory(kNext - 64, 64), memory(kData, 64))) << size;
    EXPECT_TRUE(all(kNext, 64, 0)) << size;
    EXPECT_EQ(cpu().gpr[kRsi], kData + 64) << size;
    EXPECT_EQ(cpu().gpr[kRdi], kNext) << size;
  }
}

TEST_P(Repeat, GoesOnInTheNextPage) {
  for (std::uint64_t i = 0; i < 3000; ++i) {
    ram_[kData + 3000 + i] = static_cast<std::uint8_t>(i * 7);
  }
  code(kCode, {0xf3, 0xa4, 0xf4});  // rep movsb
  start(3000, kData + 0x3f00, kData + 3000);
  run_to_halt();
  EXPECT_TRUE(std::ranges::equal(memory(kData + 0x3f00, 3000), memory(kData + 3000, 3000)));
  EXPECT_EQ(cpu().gpr[kRcx], 0U);
}

// A count whose bytes are a multiple of 1 << 64, and one that ends just before its start again.
TEST_P(Repeat, AHugeCountEndsWhereTheMemoryDoes) {
  stop_at_page_faults();
  for (const std::uint64_t count :
       {std::uint64_t{1} << 61, (std::uint64_t{1} << 61) - 1, ~std::uint64_t{0}}) {
    code(kCode, {0xf3, 0x48, 0xab, 0xf4});  // rep stosq
    start(count, kData + 8);
    cpu().rip = kCode;
    cpu().gpr[kRsp] = kStack - 0x1000;
    run_to_halt();
    EXPECT_EQ(cpu().cr2, 0x200000U) << std::hex << count;
    EXPECT_EQ(cpu().gpr[kRdi], 0x200000U);
    EXPECT_EQ(cpu().gpr[kRcx], count - (0x200000 - kData - 8) / 8);
    EXPECT_TRUE(all(kData, 8, 0));
    EXPECT_TRUE(all(kData + 8, 0x200000 - kData - 8, 0x5a));
    EXPECT_TRUE(all(0x200000, kRamSize - 0x200000, 0));
  }
}

TEST_P(Repeat, DownwardsWithTheDirectionFlag) {
  code(kCode, {0xfd, 0xf3, 0xaa, 0xfc, 0xf4});  // std; rep stosb; cld
  start(4, kData + 16);
  run_to_halt();
  EXPECT_TRUE(all(kData, 13, 0));
  EXPECT_TRUE(all(kData + 13, 4, 0x5a));
  EXPECT_TRUE(all(kData + 17, 16, 0));
  EXPECT_EQ(cpu().gpr[kRdi], kData + 12);
}

TEST_P(Repeat, NothingIsTouchedWithACountOfZero) {
  code(kCode, {0xf3, 0x48, 0xa5, 0xf3, 0x48, 0xab, 0xf4});  // rep movsq; rep stosq
  start(0, 0x7000000000, 0x6000000000);                     // where there is nothing
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRdi], 0x7000000000U);
  EXPECT_EQ(cpu().gpr[kRsi], 0x6000000000U);
}

TEST_P(Repeat, APageThatCannotBeWrittenIsNot) {
  stop_at_page_faults();
  page(kNext, kNext | 5);
  code(kCode, {0xf3, 0x48, 0xa5, 0xf4});  // rep movsq
  start(4, kNext, kData);
  ram_[kData] = 1;
  // Read before, so that it is known for reads.
  code(kCode - 8, {0x48, 0x8b, 0x1c, 0x25, 0x00, 0x10, 0x12, 0x00});  // mov rbx, [kNext]
  cpu().rip = kCode - 8;
  run_to_halt();
  EXPECT_EQ(cpu().cr2, kNext);
  EXPECT_TRUE(all(kNext, 32, 0));
  EXPECT_EQ(cpu().gpr[kRcx], 4U);
}

TEST_P(Repeat, CodeThatIsOverwrittenRunsAsItIsThen) {
  code(kCode, {0xf3, 0xaa,                    // rep stosb
               0xbb, 0x01, 0x00, 0x00, 0x00,  // mov ebx, 1
               0xf4});
  cpu().gpr[kRbx] = 0;
  start(5, kCode + 2);
  cpu().gpr[kRax] = 0x90;
  run_to_halt();
  EXPECT_EQ(cpu().gpr[kRbx], 0U);
}

INSTANTIATE_TEST_SUITE_P(Executors, Repeat, each_executor(), executor_name);

}  // namespace
}  // namespace wisp::soft
