// XSAVE and its like, on the guest's registers as the Cpu keeps them; the x87 environment against this
// machine's own processor.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>

#include "hypervisor/soft/system_kit.h"
#include "hypervisor/soft/xsave_area.h"

namespace wisp::soft {
namespace {

using Kit = SystemKit;

constexpr std::uint64_t kArea = 0x200fc0;  // crosses a page

struct XsaveKit : Kit {
  explicit XsaveKit(std::uint8_t ring = 0) {
    long_mode(ring);
    cpu().gpr[kRbx] = kArea;
    ask(7);
  }
  void ask(std::uint64_t components) {
    cpu().gpr[kRax] = components & 0xffffffff;
    cpu().gpr[kRdx] = components >> 32;
  }
  void fill(std::uint32_t seed) {
    std::mt19937 random(seed);
    for (std::uint32_t i = xsave::kXmm; i < xsave::kXmmEnd; ++i) {
      cpu().vectors[i] = static_cast<std::uint8_t>(random());
    }
    for (std::uint32_t i = xsave::kYmm; i < kXsaveSize; ++i) {
      cpu().vectors[i] = static_cast<std::uint8_t>(random());
    }
    for (std::uint32_t i = 0; i < 8; ++i) {
      for (std::uint32_t j = 0; j < 10; ++j) {
        cpu().vectors[xsave::kStack + i * 16 + j] = static_cast<std::uint8_t>(random());
      }
    }
    put_x87_words(cpu(), 0x27f, 0x3800, 0xaa);
    vectors_put<std::uint64_t>(cpu(), xsave::kHeader, 7);
  }
};

TEST(Xsave, SavedAndRestoredStateIsTheSame) {
  XsaveKit kit;
  kit.fill(1);
  vectors_put<std::uint32_t>(kit.cpu(), xsave::kMxcsr, 0x9fc0);
  EXPECT_EQ(kit.faults({0x48, 0x0f, 0xae, 0x23}), "");  // xsave64 [rbx]
  const auto before = kit.cpu().vectors;
  EXPECT_EQ(kit.get<std::uint64_t>(kArea + 512), 7U);
  EXPECT_EQ(std::memcmp(kit.at(kArea), before.data(), 416), 0);
  EXPECT_EQ(std::memcmp(kit.at(kArea + 576), before.data() + 576, 256), 0);
  reset_xsave_area(kit.cpu());
  EXPECT_EQ(kit.faults({0x48, 0x0f, 0xae, 0x2b}), "");  // xrstor64 [rbx]
  EXPECT_EQ(kit.cpu().vectors, before);
}

TEST(Xsave, OnlyWhatIsAskedForIsWritten) {
  XsaveKit kit;
  kit.fill(2);
  std::memset(kit.at(kArea), 0xee, 832);
  kit.put<std::uint64_t>(kArea + 512, 0x5);
  kit.ask(2);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "");
  EXPECT_EQ(*kit.at(kArea), 0xee);
  EXPECT_NE(kit.get<std::uint32_t>(kArea + 24), 0xeeeeeeeeU);  // MXCSR goes with SSE
  EXPECT_EQ(*kit.at(kArea + 416), 0xee);
  EXPECT_EQ(*kit.at(kArea + 576), 0xee);
  EXPECT_EQ(kit.get<std::uint64_t>(kArea + 512), 7U);  // bits not asked for stay
  EXPECT_EQ(kit.get<std::uint64_t>(kArea + 520), 0xeeeeeeeeeeeeeeee);
}

TEST(Xsave, InitialComponentsAreMarkedAndXsaveoptLeavesThemOut) {
  XsaveKit kit;
  kit.fill(3);
  std::fill(kit.cpu().vectors.begin() + xsave::kYmm, kit.cpu().vectors.end(), 0);
  std::memset(kit.at(kArea), 0xee, 832);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x33}), "");  // xsaveopt [rbx]
  EXPECT_EQ(kit.get<std::uint64_t>(kArea + 512) & 7, 3U);
  EXPECT_EQ(*kit.at(kArea + 576), 0xee);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "");
  EXPECT_EQ(*kit.at(kArea + 576), 0);
}

TEST(Xsave, ComponentsThatTheHostLeftOutReadAsInitial) {
  XsaveKit kit;
  kit.fill(4);
  vectors_put<std::uint64_t>(kit.cpu(), xsave::kHeader, 0);  // the bytes are stale
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "");
  EXPECT_EQ(kit.get<std::uint16_t>(kArea), 0x37f);
  EXPECT_EQ(*kit.at(kArea + 160), 0);
  EXPECT_EQ(*kit.at(kArea + 576), 0);
  EXPECT_EQ(kit.get<std::uint64_t>(kArea + 512) & 7, 0U);
}

TEST(Xrstor, ComponentsWithoutTheirBitBecomeInitialButMxcsrIsLoaded) {
  XsaveKit kit;
  kit.fill(5);
  std::memset(kit.at(kArea), 0, 832);
  kit.put<std::uint32_t>(kArea + 24, 0x1fa0);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x2b}), "");
  EXPECT_EQ(vectors_get<std::uint16_t>(kit.cpu(), xsave::kControl), 0x37f);
  EXPECT_EQ(vectors_get<std::uint8_t>(kit.cpu(), xsave::kTag), 0);
  EXPECT_EQ(vectors_get<std::uint64_t>(kit.cpu(), xsave::kXmm), 0U);
  EXPECT_EQ(vectors_get<std::uint64_t>(kit.cpu(), xsave::kYmm), 0U);
  EXPECT_EQ(vectors_get<std::uint32_t>(kit.cpu(), xsave::kMxcsr), 0x1fa0U);
}

TEST(Xrstor, RefusesWhatIsReserved) {
  XsaveKit kit;
  std::memset(kit.at(kArea), 0, 832);
  const auto attempt = [&kit](std::uint32_t offset, std::uint64_t value) {
    const auto old = kit.get<std::uint64_t>(kArea + offset);
    kit.put(kArea + offset, value);
    const std::string fault = kit.faults({0x0f, 0xae, 0x2b});
    kit.put(kArea + offset, old);
    return fault;
  };
  EXPECT_EQ(attempt(512, 8), "#GP(0)");
  EXPECT_EQ(attempt(520, 1ULL << 63), "#GP(0)");
  EXPECT_EQ(attempt(528, 1), "#GP(0)");
  EXPECT_EQ(attempt(536, 1), "");
  EXPECT_EQ(attempt(24, 0x10000), "#GP(0)");
  kit.ask(1);
  EXPECT_EQ(attempt(24, 0x10000), "");  // MXCSR is not loaded
  kit.cpu().xcr0 = 3;
  EXPECT_EQ(attempt(512, 4), "#GP(0)");
}

TEST(Xsave, Faults) {
  XsaveKit kit;
  kit.cpu().gpr[kRbx] = kArea + 16;
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "#GP(0)");
  kit.cpu().gpr[kRbx] = kArea;
  kit.cpu().cr0 |= cr0::kTs;
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "#NM");
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x03}), "#NM");
  kit.cpu().cr4 &= ~cr4::kOsxsave;
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "#UD");
}

TEST(Xsave, AFaultInTheSecondPageLeavesTheFirstAlone) {
  XsaveKit kit;
  kit.fill(6);
  std::memset(kit.at(kArea), 0xee, 64);
  kit.put<std::uint64_t>(Kit::kPageTable + 8, 0);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x23}), "#PF(2)");
  EXPECT_EQ(kit.cpu().fault.address, 0x201000U);
  EXPECT_EQ(*kit.at(kArea), 0xee);
}

TEST(Fxsave, RoundTripAndTheRegistersOfTheMode) {
  XsaveKit kit;
  kit.fill(7);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x03}), "");
  const auto before = kit.cpu().vectors;
  EXPECT_EQ(std::memcmp(kit.at(kArea), before.data(), 416), 0);
  std::fill(kit.cpu().vectors.begin(), kit.cpu().vectors.begin() + 416, 0);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x0b}), "");
  EXPECT_EQ(kit.cpu().vectors, before);
  kit.put<std::uint32_t>(kArea + 24, 0xfffff);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x0b}), "#GP(0)");
  kit.cpu().gpr[kRbx] = kArea + 8;
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x03}), "#GP(0)");

  XsaveKit compat;
  compat.compatibility_mode(0);
  compat.cpu().gpr[kRbx] = kArea;
  compat.fill(8);
  std::memset(compat.at(kArea), 0xee, 512);
  EXPECT_EQ(compat.faults({0x0f, 0xae, 0x03}), "");
  EXPECT_NE(*compat.at(kArea + 160), 0xee);
  EXPECT_EQ(*compat.at(kArea + 288), 0xee);  // XMM8 is not there
}

TEST(Mxcsr, LoadAndStore) {
  XsaveKit kit;
  kit.put<std::uint32_t>(kArea, 0x1fc0);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x13}), "");
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x5b, 0x10}), "");
  EXPECT_EQ(kit.get<std::uint32_t>(kArea + 16), 0x1fc0U);
  kit.put<std::uint32_t>(kArea, 0x11fc0);
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x13}), "#GP(0)");
  kit.cpu().cr4 &= ~cr4::kOsfxsr;
  EXPECT_EQ(kit.faults({0x0f, 0xae, 0x13}), "#UD");
}

TEST(VectorUse, ByControlRegisters) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  const auto check = [&](VectorUse use) {
    cpu.fault = {};
    return vector_allowed(cpu, use) ? "" : kit.fault();
  };
  for (const VectorUse use : {VectorUse::kX87, VectorUse::kMmx, VectorUse::kSse, VectorUse::kAvx}) {
    EXPECT_EQ(check(use), "");
  }
  cpu.cr0 |= cr0::kEm;
  EXPECT_EQ(check(VectorUse::kX87), "#NM");
  EXPECT_EQ(check(VectorUse::kMmx), "#UD");
  EXPECT_EQ(check(VectorUse::kSse), "#UD");
  cpu.cr0 = (cpu.cr0 & ~cr0::kEm) | cr0::kTs;
  for (const VectorUse use : {VectorUse::kX87, VectorUse::kMmx, VectorUse::kSse, VectorUse::kAvx}) {
    EXPECT_EQ(check(use), "#NM");
  }
  cpu.xcr0 = 3;
  EXPECT_EQ(check(VectorUse::kAvx), "#UD");
  cpu.cr4 &= ~cr4::kOsfxsr;
  EXPECT_EQ(check(VectorUse::kSse), "#UD");
}

// The environment, against this processor: the same registers, the same bytes but for the pointers.
struct alignas(16) Legacy {
  std::array<std::uint8_t, 512> bytes{};
};

TEST(FpuEnvironment, IsWhatThisProcessorStores) {
  XsaveKit kit;
  std::mt19937_64 random(9);
  for (int turn = 0; turn < 2000; ++turn) {
    Legacy start;
    const auto put = [&start](std::size_t at, auto value) {
      std::memcpy(start.bytes.data() + at, &value, sizeof value);
    };
    put(0, static_cast<std::uint16_t>(0x37f));
    put(2, static_cast<std::uint16_t>(random() & 0x7f3f));
    put(4, static_cast<std::uint8_t>(random()));
    put(24, 0x1f80U);
    for (std::size_t i = 0; i < 8; ++i) {
      static constexpr std::array<std::uint64_t, 5> kMantissas{0, 1, 1ULL << 63, ~0ULL, 0x7fffffffffffffff};
      static constexpr std::array<std::uint16_t, 5> kExponents{0, 1, 0x3fff, 0x7fff, 0x8000};
      put(32 + i * 16, kMantissas[random() % kMantissas.size()]);
      put(40 + i * 16, kExponents[random() % kExponents.size()]);
    }
    std::array<std::uint8_t, 108> native{};
    std::array<std::uint8_t, 28> stored{};
    Legacy host;
    Legacy after;
    asm volatile(
        "fxsave64 %[host]\n fxrstor64 %[start]\n fnstenv %[stored]\n fxsave64 %[after]\n"
        "fxrstor64 %[start]\n fnsave %[native]\n fxrstor64 %[host]\n"
        : [host] "+m"(host), [native] "=m"(native), [after] "=m"(after), [stored] "=m"(stored)
        : [start] "m"(start));
    const auto set = [&kit, &start] {
      std::copy_n(start.bytes.begin(), 416, kit.cpu().vectors.begin());
      vectors_put<std::uint64_t>(kit.cpu(), xsave::kHeader, 7);
    };
    set();
    EXPECT_EQ(kit.faults({0xd9, 0x33}), "");  // fnstenv [rbx]
    const auto compare = [&kit](const std::uint8_t* expected, std::size_t from, std::size_t end) {
      return std::memcmp(kit.at(kArea + from), expected + from, end - from) == 0;
    };
    EXPECT_TRUE(compare(stored.data(), 0, 12)) << turn;
    EXPECT_EQ(vectors_get<std::uint16_t>(kit.cpu(), xsave::kControl), 0x37f);
    EXPECT_EQ(std::memcmp(kit.cpu().vectors.data(), after.bytes.data(), 5), 0) << turn;

    set();
    EXPECT_EQ(kit.faults({0xdd, 0x33}), "");  // fnsave [rbx]
    EXPECT_TRUE(compare(native.data(), 0, 12)) << turn;
    EXPECT_TRUE(compare(native.data(), 28, 108)) << turn;

    // FRSTOR of what was saved gives all back; FLDENV turns the stack.
    EXPECT_EQ(kit.faults({0xdd, 0x23}), "");
    EXPECT_EQ(std::memcmp(kit.cpu().vectors.data(), start.bytes.data(), 5), 0) << turn;
    EXPECT_EQ(std::memcmp(kit.cpu().vectors.data() + 32, start.bytes.data() + 32, 128), 0) << turn;
    if (::testing::Test::HasFailure()) {
      return;
    }
  }
}

TEST(FpuEnvironment, LoadTurnsTheStackAsThisProcessorDoes) {
  XsaveKit kit;
  std::mt19937_64 random(10);
  for (int turn = 0; turn < 2000; ++turn) {
    Legacy start;
    const auto control = static_cast<std::uint16_t>(0x37f);
    std::memcpy(start.bytes.data(), &control, 2);
    start.bytes[3] = static_cast<std::uint8_t>(random() & 0x38);
    start.bytes[4] = 0xff;
    start.bytes[25] = 0x1f;
    start.bytes[24] = 0x80;
    for (std::size_t i = 0; i < 8; ++i) {
      start.bytes[32 + i * 16] = static_cast<std::uint8_t>(i + 1);
      start.bytes[32 + i * 16 + 7] = 0x80;
      start.bytes[32 + i * 16 + 9] = 0x3f;
    }
    std::array<std::uint16_t, 14> environment{};
    // Masked: an unmasked exception would be raised at the next instruction of this test.
    environment[0] = static_cast<std::uint16_t>(random() | 0x3f);
    environment[2] = static_cast<std::uint16_t>(random());
    environment[4] = static_cast<std::uint16_t>(random());
    Legacy host;
    Legacy after;
    asm volatile(
        "fxsave64 %[host]\n fxrstor64 %[start]\n fldenv %[env]\n fxsave64 %[after]\n fxrstor64 %[host]\n"
        : [host] "+m"(host), [after] "=m"(after)
        : [start] "m"(start), [env] "m"(environment));
    std::copy_n(start.bytes.begin(), 416, kit.cpu().vectors.begin());
    vectors_put<std::uint64_t>(kit.cpu(), xsave::kHeader, 7);
    std::memcpy(kit.at(kArea), environment.data(), 28);
    EXPECT_EQ(kit.faults({0xd9, 0x23}), "");  // fldenv [rbx]
    EXPECT_EQ(std::memcmp(kit.cpu().vectors.data(), after.bytes.data(), 5), 0) << turn;
    EXPECT_EQ(std::memcmp(kit.cpu().vectors.data() + 32, after.bytes.data() + 32, 128), 0) << turn;
    if (::testing::Test::HasFailure()) {
      return;
    }
  }
}

TEST(FpuEnvironment, UnmaskedExceptionsWaitForTheNextWaitingInstruction) {
  XsaveKit kit;
  vectors_put<std::uint64_t>(kit.cpu(), xsave::kHeader, 7);
  put_x87_words(kit.cpu(), 0x37e, 1, 0);  // invalid operation, not masked
  EXPECT_EQ(vectors_get<std::uint16_t>(kit.cpu(), xsave::kStatus), 0x8081);
  EXPECT_EQ(kit.faults({0x9b}), "#MF");
  EXPECT_EQ(kit.faults({0xd9, 0x23}), "#MF");
  EXPECT_EQ(kit.faults({0xd9, 0x33}), "");  // FNSTENV does not wait, and masks
  EXPECT_EQ(kit.get<std::uint16_t>(kArea + 4), 0x8081);
  EXPECT_EQ(kit.faults({0x9b}), "");
  kit.cpu().cr0 |= cr0::kTs | cr0::kMp;
  EXPECT_EQ(kit.faults({0x9b}), "#NM");
  kit.cpu().cr0 &= ~cr0::kMp;
  EXPECT_EQ(kit.faults({0x9b}), "");
}

TEST(FpuEnvironment, FormatsOf16Bits) {
  XsaveKit kit;
  vectors_put<std::uint64_t>(kit.cpu(), xsave::kHeader, 7);
  put_x87_words(kit.cpu(), 0x27f, 0x1800, 0);
  std::memset(kit.at(kArea), 0xee, 32);
  EXPECT_EQ(kit.faults({0x66, 0xd9, 0x33}), "");
  EXPECT_EQ(kit.get<std::uint16_t>(kArea), 0x27f);
  EXPECT_EQ(kit.get<std::uint16_t>(kArea + 2), 0x1800);
  EXPECT_EQ(kit.get<std::uint16_t>(kArea + 4), 0xffff);
  EXPECT_EQ(kit.get<std::uint16_t>(kArea + 12), 0);
  EXPECT_EQ(kit.get<std::uint16_t>(kArea + 14), 0xeeee);
}

}  // namespace
}  // namespace wisp::soft
