#include "hypervisor/soft/soft_cpuid.h"

#include <cpuid.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>

#include "hypervisor/cpuid_topology.h"
#include "hypervisor/soft/cpu.h"

namespace wisp::soft {
namespace {

constexpr std::uint32_t bit(unsigned number) {
  return 1U << number;
}

// The sum of those that are there.
struct Offer {
  unsigned number;
  bool there = true;
};
template <std::size_t N>
std::uint32_t features(const std::array<Offer, N>& list) {
  std::uint32_t word = 0;
  for (const Offer& feature : list) {
    word |= feature.there ? bit(feature.number) : 0;
  }
  return word;
}

// Family 6, model 61, stepping 4: a Broadwell, the last before features that are not here (MPX, AVX-512) came
// in, and without quirks that kernels look for under a hypervisor.
constexpr std::uint32_t kSignature = 0x306d4;
constexpr std::string_view kBrand = "Wisp software processor, x86-64-v3";
static_assert(kBrand.size() < 48);

constexpr std::uint32_t kMaxBasic = 0x16;
constexpr std::uint32_t kMaxExtended = 0x80000008;
constexpr std::uint32_t kKvmFeatures = 0x40000001;

// KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid.rst): the clock at its old and its new MSRs,
// no delays after port accesses, a clock that is stable across processors.
constexpr std::uint32_t kParavirtual = bit(0) | bit(1) | bit(3) | bit(24);

std::uint32_t le32(std::string_view text, std::size_t offset) {
  std::array<char, 4> bytes{};
  for (std::size_t i = 0; i < bytes.size() && offset + i < text.size(); ++i) {
    bytes[i] = text[offset + i];
  }
  std::uint32_t word = 0;
  std::memcpy(&word, bytes.data(), sizeof word);
  return word;
}

CpuidEntry sub(std::uint32_t leaf, std::uint32_t subleaf, std::uint32_t eax, std::uint32_t ebx,
               std::uint32_t ecx, std::uint32_t edx) {
  return {
      .leaf = leaf, .subleaf = subleaf, .has_subleaf = true, .eax = eax, .ebx = ebx, .ecx = ecx, .edx = edx};
}

// Leaf 4: type (1 data, 2 code, 3 both), level, ways, sets, of lines of 64 bytes.
CpuidEntry cache(std::uint32_t subleaf, std::uint32_t type, std::uint32_t level, std::uint32_t ways,
                 std::uint32_t sets) {
  const std::uint32_t inclusive = level == 3 ? bit(1) : 0;
  return sub(4, subleaf, type | (level << 5) | bit(8), ((ways - 1) << 22) | 63, sets - 1, inclusive);
}

CpuidEntry leaf_1(const SoftCpuidInput& input, std::uint32_t apic_id, const CpuidLevels& levels) {
  const HostFeatures& host = input.host;
  const std::uint32_t ids_per_package = std::min(1U << std::min(levels.shifts.package, 8U), 255U);
  return {.leaf = 1,
          .eax = kSignature,
          .ebx = (8U << 8) | (ids_per_package << 16) | ((apic_id & 0xff) << 24),  // CLFLUSH: 64 bytes
          .ecx = features(std::array{Offer{0},                                    // SSE3
                                     Offer{1, host.has(Feature::kPclmul)}, Offer{9},
                                     Offer{12, host.has(Feature::kFma)}, Offer{13},  // CMPXCHG16B
                                     Offer{17},                                      // PCID
                                     Offer{19},                                      // SSE4.1
                                     Offer{20}, Offer{21},                           // x2APIC
                                     Offer{22, host.has(Feature::kMovbe)},           //
                                     Offer{23}, Offer{24},                           // TSC deadline
                                     Offer{25, host.has(Feature::kAes)}, Offer{26},  // XSAVE
                                     Offer{28, host.has(Feature::kAvx)}, Offer{29, host.has(Feature::kF16c)},
                                     Offer{30},    // RDRAND
                                     Offer{31}}),  // hypervisor
          .edx = features(std::array{Offer{0},     // x87
                                     Offer{2},     // debugging extensions
                                     Offer{3},     // 4 MiB pages
                                     Offer{4},     // TSC
                                     Offer{5},     // MSRs
                                     Offer{6},     // PAE
                                     Offer{7},     // machine check exception
                                     Offer{8},     // CMPXCHG8B
                                     Offer{9},     // local APIC
                                     Offer{11},    // SYSENTER
                                     Offer{12},    // MTRRs
                                     Offer{13},    // global pages
                                     Offer{14},    // machine check architecture, with no banks
                                     Offer{15},    // CMOV
                                     Offer{16},    // PAT
                                     Offer{19},    // CLFLUSH
                                     Offer{23},    // MMX
                                     Offer{24},    // FXSAVE
                                     Offer{25},
                                     Offer{26},  // SSE, SSE2
                                     Offer{28, levels.per_package > 1}})};
}

CpuidEntry leaf_7(const HostFeatures& host, std::uint32_t x87_bits) {
  return sub(
      7, 0, 0,
      x87_bits | features(std::array{Offer{0},  // FSGSBASE
                                     Offer{1},  // TSC_ADJUST
                                     Offer{3, host.has(Feature::kBmi1)}, Offer{5, host.has(Feature::kAvx2)},
                                     Offer{7},                                       // SMEP
                                     Offer{8, host.has(Feature::kBmi2)}, Offer{9},   // fast string moves
                                     Offer{10},                                      // INVPCID
                                     Offer{18},                                      // RDSEED
                                     Offer{19, host.has(Feature::kAdx)}, Offer{20},  // SMAP
                                     Offer{23},                                      // CLFLUSHOPT
                                     Offer{24}}),                                    // CLWB
      features(std::array{Offer{2},                                                  // UMIP
                          Offer{22}}),                                               // RDPID
      features(std::array{Offer{4},      // fast short string moves
                          Offer{26},     // SPEC_CTRL and PRED_CMD
                          Offer{29}}));  // ARCH_CAPABILITIES
}

void add_xsave(CpuidTable& table, const HostFeatures& host) {
  const std::uint32_t components = host.has(Feature::kAvx) ? 7 : 3;
  const std::uint32_t size = host.has(Feature::kAvx) ? kXsaveSize : xsave::kYmm;
  table.set(sub(0xd, 0, components, xsave::kYmm, size, 0));  // EBX follows XCR0
  table.set(sub(0xd, 1, bit(0), 0, 0, 0));                   // XSAVEOPT
  if (host.has(Feature::kAvx)) {
    table.set(sub(0xd, 2, xsave::kYmmSize, xsave::kYmm, 0, 0));
  }
}

}  // namespace

std::uint32_t host_x87_bits() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 ? b & (bit(6) | bit(13)) : 0;
}

std::vector<CpuidEntry> soft_cpuid(const SoftCpuidInput& input) {
  const std::uint32_t apic_id = apic_id_of(input.topology, input.index);
  const CpuidLevels levels(input.topology);
  CpuidTable table({});
  table.set({.leaf = 0, .eax = kMaxBasic, .ebx = kVendorIntel, .ecx = 0x6c65746e, .edx = 0x49656e69});
  table.set(leaf_1(input, apic_id, levels));
  table.set({.leaf = 2, .eax = 0x00feff01});  // TLB and prefetch unsaid; caches: leaf 4
  table.set(cache(0, 1, 1, 8, 64));           // 32 KiB data
  table.set(cache(1, 2, 1, 8, 64));           // 32 KiB code
  table.set(cache(2, 3, 2, 16, 1024));        // 1 MiB
  table.set(cache(3, 3, 3, 16, 16384));       // 16 MiB
  table.set(sub(4, 4, 0, 0, 0, 0));
  table.set({.leaf = 6, .eax = bit(2)});  // the APIC timer never stops
  table.set(leaf_7(input.host, input.x87_bits));
  add_xsave(table, input.host);
  // "KVMKVMKVM", so that guests find the paravirtual clock.
  table.set(
      {.leaf = kHypervisorLeaf, .eax = kKvmFeatures, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d});
  table.set({.leaf = kKvmFeatures, .eax = kParavirtual});
  table.set({.leaf = 0x80000000, .eax = kMaxExtended});
  table.set({.leaf = 0x80000001,
             .ecx = features(std::array{Offer{0},  // LAHF in 64-bit mode
                                        Offer{5, input.host.has(Feature::kLzcnt)}, Offer{8}}),  // PREFETCHW
             .edx = features(std::array{Offer{11},                                              // SYSCALL
                                        Offer{20},                                              // NX
                                        Offer{26},                                              // 1 GiB pages
                                        Offer{27},                                              // RDTSCP
                                        Offer{29}})});                                          // long mode
  for (std::uint32_t i = 0; i < 3; ++i) {
    const std::size_t at = std::size_t{i} * 16;
    table.set({.leaf = 0x80000002 + i,
               .eax = le32(kBrand, at),
               .ebx = le32(kBrand, at + 4),
               .ecx = le32(kBrand, at + 8),
               .edx = le32(kBrand, at + 12)});
  }
  table.set({.leaf = 0x80000006, .ecx = (1024U << 16) | (8U << 12) | 64});  // level 2: 1 MiB, 16 ways
  table.set({.leaf = 0x80000007, .edx = bit(8)});                           // TSC of one rate
  table.set({.leaf = 0x80000008, .eax = kPhysicalBits | (48U << 8)});
  set_cpuid_caches(table, levels);
  set_cpuid_topology(table, input.topology, apic_id, levels);
  set_cpuid_clock(table, input.tsc_khz);
  return table.take();
}

CpuidEntry cpuid_answer(std::span<const CpuidEntry> entries, std::uint32_t leaf, std::uint32_t subleaf,
                        std::uint64_t cr4, std::uint64_t xcr0) {
  const auto find = [&](std::uint32_t wanted) -> const CpuidEntry* {
    const auto found = std::ranges::find_if(entries, [&](const CpuidEntry& entry) {
      return entry.leaf == wanted && (!entry.has_subleaf || entry.subleaf == subleaf);
    });
    return found != entries.end() ? &*found : nullptr;
  };
  const auto most = [&](std::uint32_t base) {
    const auto found = std::ranges::find(entries, base, &CpuidEntry::leaf);
    return found != entries.end() ? found->eax : base;
  };
  // Beyond the last of its range a leaf gives what the highest basic one does (SDM volume 2, CPUID).
  const std::uint32_t range = leaf & 0xc0000000;
  const bool known_range = range == 0 || range == 0x80000000 || (leaf & 0xffffff00) == kHypervisorLeaf;
  const std::uint32_t effective = known_range && leaf <= most(range) ? leaf : most(0);
  CpuidEntry out{.leaf = leaf, .subleaf = subleaf};
  if (const CpuidEntry* entry = find(effective); entry != nullptr) {
    out = *entry;
  } else if (effective == 0xb || effective == 0x1f) {
    // Past the last level these still give the sub-leaf asked for and the id.
    const auto any = std::ranges::find(entries, effective, &CpuidEntry::leaf);
    out.ecx = subleaf & 0xff;
    out.edx = any != entries.end() ? any->edx : 0;
  }
  if (effective == 1) {
    out.ecx = (cr4 & cr4::kOsxsave) != 0 ? out.ecx | bit(27) : out.ecx & ~bit(27);
  } else if (effective == 0xd && subleaf == 0) {
    out.ebx = (xcr0 & 4) != 0 ? kXsaveSize : xsave::kYmm;
  }
  return out;
}

std::uint64_t allowed_xcr0(std::span<const CpuidEntry> entries) {
  for (const CpuidEntry& entry : entries) {
    if (entry.leaf == 0xd && entry.subleaf == 0) {
      return entry.eax | (std::uint64_t{entry.edx} << 32);
    }
  }
  return 3;
}

}  // namespace wisp::soft
