// The processor that guests of the software CPU see.
#include "hypervisor/soft/soft_cpuid.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <set>

#include "hypervisor/cpuid_fit.h"
#include "hypervisor/soft/cpu.h"

namespace wisp::soft {
namespace {

HostFeatures host_with_everything() {
  HostFeatures host{.xcr0 = 7, .x86_64_v2 = true};
  host.present = ~0U;
  return host;
}

std::vector<CpuidEntry> table(const HostFeatures& host = host_with_everything()) {
  return soft_cpuid({.tsc_khz = 2'500'000, .host = host});
}

CpuidEntry ask(const std::vector<CpuidEntry>& entries, std::uint32_t leaf, std::uint32_t subleaf = 0,
               std::uint64_t cr4 = 0, std::uint64_t xcr0 = 1) {
  return cpuid_answer(entries, leaf, subleaf, cr4, xcr0);
}

TEST(SoftCpuid, IsX86_64V3OnAHostThatHasIt) {
  const auto entries = table();
  constexpr std::uint32_t kLeaf1 = 1U << 0 | 1U << 9 | 1U << 12 | 1U << 13 | 1U << 19 | 1U << 20 | 1U << 22 |
                                   1U << 23 | 1U << 26 | 1U << 28 | 1U << 29;
  constexpr std::uint32_t kLeaf7 = 1U << 3 | 1U << 5 | 1U << 8;
  EXPECT_EQ(ask(entries, 1).ecx & kLeaf1, kLeaf1);
  EXPECT_EQ(ask(entries, 7).ebx & kLeaf7, kLeaf7);
  EXPECT_EQ(ask(entries, 0x80000001).ecx & 0x21, 0x21U);
  EXPECT_EQ(ask(entries, 0xd).eax, 7U);
}

TEST(SoftCpuid, OffersNothingOfAvxWithoutIt) {
  HostFeatures host{.xcr0 = 3, .x86_64_v2 = true};
  const auto entries = table(host);
  EXPECT_EQ(ask(entries, 1).ecx & (1U << 12 | 1U << 28 | 1U << 29), 0U);
  EXPECT_EQ(ask(entries, 7).ebx & (1U << 3 | 1U << 5 | 1U << 8), 0U);
  EXPECT_EQ(ask(entries, 0xd).eax, 3U);
  EXPECT_EQ(ask(entries, 0xd).ecx, 576U);
  EXPECT_EQ(ask(entries, 0xd, 2).eax, 0U);
  EXPECT_EQ(allowed_xcr0(entries), 3U);
}

// What this CPU has no instructions or registers for.
TEST(SoftCpuid, OffersNothingThatIsNotThere) {
  const auto entries = table();
  EXPECT_EQ(ask(entries, 1).ecx & (1U << 3 | 1U << 5 | 1U << 15), 0U) << "MONITOR, VMX, PDCM";
  const CpuidEntry leaf7 = ask(entries, 7);
  EXPECT_EQ(leaf7.ebx & (1U << 2 | 1U << 4 | 1U << 11 | 1U << 14 | 1U << 16 | 1U << 29), 0U)
      << "SGX, TSX, MPX, AVX-512, SHA";
  EXPECT_EQ(leaf7.ecx & (1U << 3 | 1U << 7 | 1U << 16), 0U) << "PKU, shadow stacks, five-level paging";
  EXPECT_EQ(ask(entries, 0xd, 1).eax, 1U) << "XSAVEOPT alone";
  EXPECT_EQ(ask(entries, 0xa).eax, 0U) << "no performance counters";
}

TEST(SoftCpuid, SaysItsFrequencyAndItsClock) {
  const auto entries = table();
  const CpuidEntry ratio = ask(entries, 0x15);
  ASSERT_NE(ratio.eax, 0U);
  EXPECT_EQ(std::uint64_t{ratio.ecx} * ratio.ebx / ratio.eax, 2'500'000'000U);
  EXPECT_EQ(ask(entries, 0x16).eax, 2500U);
  EXPECT_EQ(ask(entries, 0x40000010).eax, 2'500'000U);
  EXPECT_EQ(ask(entries, 0x40000010).ebx, 1'000'000U);
  EXPECT_EQ(ask(entries, 0x80000007).edx, 1U << 8);
  const CpuidEntry hypervisor = ask(entries, 0x40000000);
  EXPECT_EQ(hypervisor.ebx, 0x4b4d564bU);
  EXPECT_EQ(hypervisor.eax, 0x40000010U);
  EXPECT_EQ(ask(entries, 0x40000001).eax, 1U << 0 | 1U << 1 | 1U << 3 | 1U << 24);
}

TEST(SoftCpuid, FollowsControlRegisters) {
  const auto entries = table();
  EXPECT_EQ(ask(entries, 1).ecx & (1U << 27), 0U);
  EXPECT_NE(ask(entries, 1, 0, cr4::kOsxsave).ecx & (1U << 27), 0U);
  EXPECT_EQ(ask(entries, 0xd, 0, 0, 3).ebx, 576U);
  EXPECT_EQ(ask(entries, 0xd, 0, 0, 7).ebx, 832U);
  EXPECT_EQ(ask(entries, 0xd).ecx, 832U);
}

TEST(SoftCpuid, BeyondTheLastLeafComesTheLastBasicOne) {
  const auto entries = table();
  const CpuidEntry last = ask(entries, 0x16);
  for (const std::uint32_t leaf : {0x17U, 0x3fffffffU, 0x80000009U, 0x40000011U, 0x40000100U, 0xc0000000U}) {
    EXPECT_EQ(ask(entries, leaf).eax, last.eax) << std::hex << leaf;
  }
  EXPECT_EQ(ask(entries, 3).eax, 0U) << "in range, but nothing there";
  // Past the last level the topology leaf still gives the sub-leaf and the id.
  EXPECT_EQ(ask(entries, 0xb, 9).ecx, 9U);
  EXPECT_EQ(ask(entries, 0xb, 9).ebx, 0U);
}

TEST(SoftCpuid, TellsEachCpuItsPlace) {
  const CpuTopology topology{.sockets = 2, .dies = 1, .clusters = 1, .cores = 2, .threads = 2};
  std::set<std::uint32_t> ids;
  for (std::uint32_t index = 0; index < 8; ++index) {
    const auto entries = soft_cpuid(
        {.topology = topology, .index = index, .tsc_khz = 1'000'000, .host = host_with_everything()});
    const std::uint32_t id = ask(entries, 0xb).edx;
    EXPECT_EQ(ask(entries, 1).ebx >> 24, id);
    EXPECT_EQ(ask(entries, 0xb, 0).ebx, 2U);
    EXPECT_EQ(ask(entries, 0xb, 1).ebx, 4U);
    EXPECT_NE(ask(entries, 1).edx & (1U << 28), 0U);
    // Levels 1 and 2 are a core's, level 3 the socket's.
    EXPECT_EQ(ask(entries, 4, 0).eax >> 14 & 0xfff, 1U);
    EXPECT_EQ(ask(entries, 4, 3).eax >> 14 & 0xfff, 3U);
    ids.insert(id);
  }
  EXPECT_EQ(ids, (std::set<std::uint32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST(SoftCpuid, HasAName) {
  const auto entries = table();
  std::array<char, 49> brand{};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const CpuidEntry part = ask(entries, 0x80000002 + i);
    for (const auto& [word, at] :
         {std::pair{part.eax, 0U}, {part.ebx, 4U}, {part.ecx, 8U}, {part.edx, 12U}}) {
      std::memcpy(brand.data() + i * 16 + at, &word, 4);
    }
  }
  EXPECT_STREQ(brand.data(), "Wisp software processor, x86-64-v3");
}

// A guest goes on on another host where that has what it saw, and not where it has less.
TEST(SoftCpuid, FitsItselfAndNotAPoorerHost) {
  const auto entries = table();
  EXPECT_TRUE(check_cpuid_fits(entries, entries).has_value());
  HostFeatures poor{.xcr0 = 3, .x86_64_v2 = true};
  EXPECT_TRUE(check_cpuid_fits(table(poor), entries).has_value());
  EXPECT_FALSE(check_cpuid_fits(entries, table(poor)).has_value());
}

}  // namespace
}  // namespace wisp::soft
