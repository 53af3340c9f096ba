// What guests see by CPUID, for hosts of both vendors that need not be this one.
#include "hypervisor/kvm/kvm_cpuid.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "hypervisor/cpuid_fit.h"
#include "hypervisor/topology.h"

namespace wisp {
namespace {

using ::testing::HasSubstr;

constexpr CpuTopology kFlat{};
constexpr CpuTopology kOdd{.sockets = 2, .dies = 1, .clusters = 1, .cores = 3, .threads = 2};
constexpr CpuTopology kDeep{.sockets = 2, .dies = 2, .clusters = 2, .cores = 2, .threads = 2};

// Ids of powers of two are indices; others leave gaps where a socket is not full.
static_assert(apic_id_of(kFlat, 0) == 0 && apic_id_of(kFlat, 7) == 7);
static_assert(apic_id_of(kDeep, 31) == 31 && apic_id_of(kDeep, 17) == 17);
static_assert(apic_id_of(kOdd, 5) == 5 && apic_id_of(kOdd, 6) == 8 && apic_id_of(kOdd, 11) == 13);
static_assert(apic_id_shifts(kOdd).core == 1 && apic_id_shifts(kOdd).package == 3);

std::vector<CpuidEntry> intel_host() {
  return {
      {.leaf = 0, .eax = 0x1b, .ebx = 0x756e6547, .ecx = 0x6c65746e, .edx = 0x49656e69},
      {.leaf = 1, .eax = 0x806f8, .ebx = 0x07400800, .ecx = 0x7ffafbff, .edx = 0x0fabfbff},
      {.leaf = 4, .subleaf = 0, .has_subleaf = true, .eax = 0x7c004121, .ebx = 0x2c0003f, .ecx = 63},
      {.leaf = 4, .subleaf = 1, .has_subleaf = true, .eax = 0x7c004122, .ebx = 0x1c0003f, .ecx = 63},
      {.leaf = 4, .subleaf = 2, .has_subleaf = true, .eax = 0x7c004143, .ebx = 0x3c0003f, .ecx = 2047},
      {.leaf = 4, .subleaf = 3, .has_subleaf = true, .eax = 0x7c0fc163, .ebx = 0x380003f, .ecx = 0x1bfff},
      {.leaf = 4, .subleaf = 4, .has_subleaf = true},
      {.leaf = 7,
       .subleaf = 0,
       .has_subleaf = true,
       .eax = 1,
       .ebx = 0xf1bf27ef,
       .ecx = 0x1b415f6e,
       .edx = 0xffc14410},
      {.leaf = 7, .subleaf = 1, .has_subleaf = true, .eax = 0x201c30, .edx = 0x100},
      {.leaf = 0xa, .eax = 0x7300805},
      {.leaf = 0xb, .subleaf = 0, .has_subleaf = true, .edx = 55},
      {.leaf = 0xd, .subleaf = 0, .has_subleaf = true, .eax = 0x2e7, .ebx = 0xa88, .ecx = 0xa88},
      {.leaf = 0xd, .subleaf = 1, .has_subleaf = true, .eax = 0x1f},
      {.leaf = 0xd, .subleaf = 2, .has_subleaf = true, .eax = 0x100, .ebx = 0x240},
      {.leaf = 0xd, .subleaf = 9, .has_subleaf = true, .eax = 8, .ebx = 0xa80},
      {.leaf = 0x12, .subleaf = 0, .has_subleaf = true, .eax = 1},
      {.leaf = 0x1d, .subleaf = 0, .has_subleaf = true, .eax = 1},
      {.leaf = 0x40000000, .eax = 0x40000001, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d},
      {.leaf = 0x40000001, .eax = 0x1007efb},
      {.leaf = 0x80000000, .eax = 0x80000008},
      {.leaf = 0x80000001, .ecx = 0x121, .edx = 0x2c100800},
      {.leaf = 0x80000007, .edx = 0x100},
      {.leaf = 0x80000008, .eax = 0x3934, .ecx = 0x7777},
  };
}

std::vector<CpuidEntry> amd_host() {
  return {
      {.leaf = 0, .eax = 0xd, .ebx = 0x68747541, .ecx = 0x444d4163, .edx = 0x69746e65},
      {.leaf = 1, .eax = 0x800f12, .ebx = 0x800, .ecx = 0xfef83203, .edx = 0x178bfbff},
      {.leaf = 7, .subleaf = 0, .has_subleaf = true, .ebx = 0x209c01a9},
      {.leaf = 0xd, .subleaf = 0, .has_subleaf = true, .eax = 7, .ebx = 0x340, .ecx = 0x340},
      {.leaf = 0x40000000, .eax = 0x40000001, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d},
      {.leaf = 0x80000000, .eax = 0x8000001e},
      {.leaf = 0x80000001, .ecx = 0x14003f7, .edx = 0x2fd3fbff},
      {.leaf = 0x80000008, .eax = 0x3030},
      {.leaf = 0x8000000a, .eax = 1},
      {.leaf = 0x8000001d, .subleaf = 0, .has_subleaf = true, .eax = 0x4121, .ebx = 0x1c0003f},
      {.leaf = 0x8000001d, .subleaf = 3, .has_subleaf = true, .eax = 0x1c163, .ebx = 0x3c0003f},
      {.leaf = 0x8000001e, .eax = 99, .ebx = 0x177, .ecx = 0x333},
  };
}

const CpuidEntry* at(const std::vector<CpuidEntry>& entries, std::uint32_t leaf, std::uint32_t subleaf = 0) {
  const auto found = std::ranges::find_if(entries, [&](const CpuidEntry& entry) {
    return entry.leaf == leaf && (!entry.has_subleaf || entry.subleaf == subleaf);
  });
  return found != entries.end() ? &*found : nullptr;
}

TEST(KvmCpuid, IntelTopologyWithGaps) {
  // vCPU 9 of 2 sockets x 3 cores x 2 threads: socket 1, core 1, thread 1.
  const auto guest = kvm::guest_cpuid(intel_host(), {.topology = kOdd, .index = 9, .tsc_deadline = true});
  const std::uint32_t id = 8 + 2 + 1;
  EXPECT_EQ(at(guest, 1)->ebx, (id << 24) | (8U << 16) | 0x0800);
  EXPECT_NE(at(guest, 1)->edx & (1U << 28), 0U);
  const CpuidEntry thread = *at(guest, 0xb, 0);
  const CpuidEntry core = *at(guest, 0xb, 1);
  const CpuidEntry end = *at(guest, 0xb, 2);
  EXPECT_EQ((std::array{thread.eax, thread.ebx, thread.ecx, thread.edx}),
            (std::array<std::uint32_t, 4>{1, 2, 0x100, id}));
  EXPECT_EQ((std::array{core.eax, core.ebx, core.ecx, core.edx}),
            (std::array<std::uint32_t, 4>{3, 6, 0x201, id}));
  EXPECT_EQ((std::array{end.eax, end.ebx, end.ecx, end.edx}), (std::array<std::uint32_t, 4>{0, 0, 2, id}));
  // Level 1 and 2 caches belong to a core of two threads, level 3 to the socket of eight ids.
  EXPECT_EQ(at(guest, 4, 0)->eax >> 14, (3U << 12) | 1);
  EXPECT_EQ(at(guest, 4, 2)->eax >> 14, (3U << 12) | 1);
  EXPECT_EQ(at(guest, 4, 3)->eax >> 14, (3U << 12) | 7);
  EXPECT_EQ(at(guest, 4, 0)->eax & 0x3fff, 0x121U);
  EXPECT_EQ(at(guest, 4, 4)->eax, 0U);
  EXPECT_EQ(at(guest, 0x80000008)->ecx, 0U);
  EXPECT_EQ(at(guest, 0x1f), nullptr);
}

TEST(KvmCpuid, DeepTopologyHasLeaf1f) {
  const auto guest = kvm::guest_cpuid(intel_host(), {.topology = kDeep, .index = 21});
  EXPECT_GE(at(guest, 0)->eax, 0x1fU);
  const std::array<std::array<std::uint32_t, 3>, 4> expected{
      {{1, 2, 0x100}, {2, 4, 0x201}, {3, 8, 0x302}, {4, 16, 0x503}}};
  for (std::uint32_t level = 0; level < 4; ++level) {
    const CpuidEntry* entry = at(guest, 0x1f, level);
    ASSERT_NE(entry, nullptr);
    EXPECT_EQ((std::array{entry->eax, entry->ebx, entry->ecx}), expected.at(level)) << level;
    EXPECT_EQ(entry->edx, 21U);
  }
  EXPECT_EQ(at(guest, 0x1f, 4)->ecx, 4U);
  EXPECT_EQ(at(guest, 4, 3)->eax >> 14, (7U << 12) | 7);  // 8 ids for cores in a socket, 8 ids in a die
}

TEST(KvmCpuid, OneCpuIsAlone) {
  const auto guest = kvm::guest_cpuid(intel_host(), {});
  EXPECT_EQ(at(guest, 1)->ebx, (1U << 16) | 0x0800);
  EXPECT_EQ(at(guest, 1)->edx & (1U << 28), 0U);
  EXPECT_EQ(at(guest, 0xb, 0)->ebx, 1U);
  EXPECT_EQ(at(guest, 0xb, 1)->ebx, 1U);
  EXPECT_EQ(at(guest, 4, 3)->eax >> 14, 0U);
}

TEST(KvmCpuid, AmdTopology) {
  const CpuTopology topology{.sockets = 1, .dies = 2, .clusters = 1, .cores = 2, .threads = 2};
  const auto guest = kvm::guest_cpuid(amd_host(), {.topology = topology, .index = 7});
  EXPECT_EQ(at(guest, 0x80000008)->ecx, 7U | (3U << 12));
  EXPECT_EQ(at(guest, 0x8000001e)->eax, 7U);
  EXPECT_EQ(at(guest, 0x8000001e)->ebx, 3U | (1U << 8));
  EXPECT_EQ(at(guest, 0x8000001e)->ecx, 1U | (1U << 8));
  EXPECT_NE(at(guest, 0x80000001)->ecx & 2, 0U);  // CmpLegacy
  EXPECT_EQ(at(guest, 0x8000001d, 0)->eax >> 14, 1U);
  EXPECT_EQ(at(guest, 0x8000001d, 3)->eax >> 14, 3U);
  EXPECT_EQ(at(guest, 0x8000000a), nullptr);
  EXPECT_EQ(at(guest, 0x80000001)->ecx & 4, 0U);  // no SVM
  // Intel's frequency leaves are not for AMD's guests.
  const auto timed = kvm::guest_cpuid(amd_host(), {.tsc_khz = 2'000'000});
  EXPECT_EQ(at(timed, 0x15), nullptr);
  EXPECT_EQ(at(timed, 0x40000010)->eax, 2'000'000U);
}

TEST(KvmCpuid, FeaturesThatComeAndGo) {
  const auto guest = kvm::guest_cpuid(intel_host(), {});
  EXPECT_NE(at(guest, 1)->ecx & (1U << 31), 0U);
  EXPECT_NE(at(guest, 1)->ecx & (1U << 21), 0U);
  EXPECT_EQ(at(guest, 1)->ecx & ((1U << 5) | (1U << 15) | (1U << 24) | (1U << 27)), 0U);
  EXPECT_EQ(at(guest, 7, 0)->ebx & 4, 0U);
  EXPECT_EQ(at(guest, 0x12), nullptr);
  EXPECT_EQ(at(guest, 0xa), nullptr);
  // AMX without its state goes, and nothing else with it.
  EXPECT_EQ(at(guest, 7, 0)->edx, 0xffc14410 & ~((1U << 22) | (1U << 24) | (1U << 25)));
  EXPECT_EQ(at(guest, 7, 1)->eax, 0x1c30U);
  EXPECT_EQ(at(guest, 0x1d), nullptr);
  // KVM's own leaves stay.
  EXPECT_EQ(at(guest, 0x40000001)->eax, 0x1007efbU);
  EXPECT_EQ(at(guest, 0x40000000)->ebx, 0x4b4d564bU);

  const auto more = kvm::guest_cpuid(intel_host(), {.tsc_deadline = true, .pmu = true});
  EXPECT_NE(at(more, 1)->ecx & (1U << 24), 0U);
  EXPECT_NE(at(more, 1)->ecx & (1U << 15), 0U);
  EXPECT_NE(at(more, 0xa), nullptr);
  auto with_amx = intel_host();
  std::ranges::find(with_amx, 0xdU, &CpuidEntry::leaf)->eax |= 3U << 17;
  const auto amx = kvm::guest_cpuid(with_amx, {});
  EXPECT_EQ(at(amx, 7, 0)->edx, 0xffc14410U);
  EXPECT_NE(at(amx, 0x1d), nullptr);
}

// Linux computes the frequency from leaf 0x15 in 32 bits: right to a millionth without overflow, or not told.
TEST(KvmCpuid, ClockLeaves) {
  std::uint32_t told = 0;
  const auto check = [&](std::uint32_t khz) {
    const auto guest = kvm::guest_cpuid(intel_host(), {.tsc_khz = khz});
    EXPECT_EQ(at(guest, 0x16)->eax, khz / 1000);
    EXPECT_EQ(at(guest, 0x40000010)->eax, khz);
    EXPECT_EQ(at(guest, 0x40000010)->ebx, 1'000'000U);
    EXPECT_EQ(at(guest, 0x40000000)->eax, 0x40000010U);
    const CpuidEntry* ratio = at(guest, 0x15);
    if (ratio == nullptr) {
      return false;
    }
    ++told;
    EXPECT_EQ(ratio->ecx, 1'000'000'000U);  // the APIC timer of KVM
    const std::uint64_t crystal_khz = ratio->ecx / 1000;
    EXPECT_LE(crystal_khz * ratio->ebx, UINT32_MAX) << khz;
    const double computed = static_cast<double>(crystal_khz) * ratio->ebx / ratio->eax;
    EXPECT_LE(std::abs(computed - khz) / khz, 1e-6) << khz << " " << ratio->ebx << "/" << ratio->eax;
    return true;
  };
  for (const std::uint32_t khz :
       {1U, 25'000U, 1'000'000U, 1'996'250U, 2'000'000U, 2'100'000U, 2'299'998U, 2'593'904U, 4'200'000U}) {
    EXPECT_TRUE(check(khz)) << khz;
  }
  EXPECT_FALSE(check(2'000'100));  // no fraction near 2.0001 is small enough
  told = 0;
  for (std::uint32_t khz = 800'003; khz < 5'000'000; khz += 4'201) {
    (void)check(khz);
  }
  EXPECT_GT(told, 700U);  // of 1000
  EXPECT_EQ(at(kvm::guest_cpuid(intel_host(), {}), 0x15), nullptr);
  EXPECT_EQ(at(kvm::guest_cpuid(intel_host(), {}), 0x40000010), nullptr);
}

TEST(KvmCpuid, EmptyTablesDoNoHarm) {
  const auto guest = kvm::guest_cpuid({}, {.topology = kDeep, .index = 3, .tsc_khz = 1});
  EXPECT_NE(at(guest, 0xb), nullptr);
  EXPECT_TRUE(check_cpuid_fits({}, {}).has_value());
}

std::string lost(const std::function<void(std::vector<CpuidEntry>&)>& change) {
  const auto host = kvm::guest_cpuid(intel_host(), {});
  auto saved = host;
  change(saved);
  const auto fits = check_cpuid_fits(saved, host);
  return fits ? "" : fits.error().message;
}

TEST(KvmCpuid, FitsSaysWhatIsMissing) {
  EXPECT_EQ(lost([](auto&) {}), "");
  EXPECT_EQ(lost([](auto& s) { s.clear(); }), "");
  EXPECT_EQ(lost([](auto& s) { std::ranges::find(s, 1U, &CpuidEntry::leaf)->ecx = 0; }), "");
  // Bits that follow the topology or the running system are no features.
  EXPECT_EQ(lost([](auto& s) {
              std::ranges::find(s, 1U, &CpuidEntry::leaf)->ecx |= 1U << 27;
              std::ranges::find(s, 1U, &CpuidEntry::leaf)->edx |= 1U << 28;
              std::ranges::find(s, 1U, &CpuidEntry::leaf)->ebx = 0xffffffff;
            }),
            "");
  EXPECT_THAT(lost([](auto& s) { std::ranges::find(s, 7U, &CpuidEntry::leaf)->ebx |= 1U << 4; }),
              HasSubstr("hle (CPUID leaf 0x7 sub-leaf 0 EBX bit 4)"));
  EXPECT_THAT(lost([](auto& s) { s.push_back({.leaf = 0x80000021, .eax = 1U << 6}); }),
              HasSubstr("leaf 0x80000021 sub-leaf 0 EAX bit 6"));
  EXPECT_THAT(lost([](auto& s) { std::ranges::find(s, 0xdU, &CpuidEntry::leaf)->eax |= 1U << 17; }),
              HasSubstr("leaf 0xd"));
  EXPECT_THAT(lost([](auto& s) {
                s.push_back({.leaf = 0xd, .subleaf = 5, .has_subleaf = true, .eax = 64, .ebx = 0x440});
              }),
              HasSubstr("state component 5"));
  EXPECT_THAT(lost([](auto& s) {
                const auto ymm = std::ranges::find_if(
                    s, [](const CpuidEntry& entry) { return entry.leaf == 0xd && entry.subleaf == 2; });
                ymm->ebx = 0x300;
              }),
              HasSubstr("0x300"));
  EXPECT_THAT(lost([](auto& s) { std::ranges::find(s, 0x80000008U, &CpuidEntry::leaf)->eax = 0x3939; }),
              HasSubstr("57 bits"));
  EXPECT_THAT(lost([](auto& s) { std::ranges::find(s, 0x80000008U, &CpuidEntry::leaf)->eax = 0x3901; }),
              HasSubstr("1 bits"));
  EXPECT_THAT(lost([](auto& s) { s.resize(257); }), HasSubstr("257"));
}

}  // namespace
}  // namespace wisp
