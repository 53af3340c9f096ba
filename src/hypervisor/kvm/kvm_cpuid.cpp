#include "hypervisor/kvm/kvm_cpuid.h"

#include <algorithm>
#include <array>
#include <bit>
#include <optional>

#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"
#include "hypervisor/topology.h"

namespace wisp::kvm {
namespace {

constexpr std::uint32_t bit(unsigned number) {
  return 1U << number;
}

// The longest list that the kernel takes (KVM_MAX_CPUID_ENTRIES).
constexpr std::size_t kMaxEntries = 256;

constexpr std::uint32_t kHypervisorLeaf = 0x40000000;
constexpr std::uint32_t kHypervisorTimingLeaf = 0x40000010;

// KVM's local APIC timer counts nanoseconds (its bus runs at 1 GHz).
constexpr std::uint32_t kApicBusKhz = 1'000'000;

// The entries under construction.
class Table final {
 public:
  explicit Table(std::span<const CpuidEntry> entries) : entries_(entries.begin(), entries.end()) {}

  [[nodiscard]] CpuidEntry* find(std::uint32_t leaf, std::uint32_t subleaf = 0) {
    const auto found = std::ranges::find_if(entries_, [&](const CpuidEntry& entry) {
      return entry.leaf == leaf && (!entry.has_subleaf || entry.subleaf == subleaf);
    });
    return found != entries_.end() ? &*found : nullptr;
  }
  void set(const CpuidEntry& entry) {
    CpuidEntry* present = find(entry.leaf, entry.subleaf);
    if (present != nullptr) {
      *present = entry;
    } else {
      entries_.push_back(entry);
    }
  }
  void remove(std::uint32_t leaf) {
    std::erase_if(entries_, [leaf](const CpuidEntry& entry) { return entry.leaf == leaf; });
  }
  [[nodiscard]] std::uint32_t max_basic() {
    const CpuidEntry* first = find(0);
    return first != nullptr ? first->eax : 0;
  }
  void raise_max(std::uint32_t base, std::uint32_t leaf) {
    CpuidEntry* first = find(base);
    if (first != nullptr) {
      first->eax = std::max(first->eax, leaf);
    }
  }
  [[nodiscard]] bool vendor_is(std::uint32_t ebx) {
    const CpuidEntry* first = find(0);
    return first != nullptr && first->ebx == ebx;
  }
  [[nodiscard]] std::vector<CpuidEntry>& entries() { return entries_; }
  [[nodiscard]] std::vector<CpuidEntry> take() { return std::move(entries_); }

 private:
  std::vector<CpuidEntry> entries_;
};

constexpr std::uint32_t kVendorIntel = 0x756e6547;  // "Genu"
constexpr std::uint32_t kVendorAmd = 0x68747541;    // "Auth"
constexpr std::uint32_t kVendorHygon = 0x6f677948;  // "Hygo"

// Counts of logical processors up to each level, and the id's shifts.
struct Levels {
  explicit Levels(const CpuTopology& topology)
      : shifts(apic_id_shifts(topology)),
        per_core(topology.threads),
        per_cluster(per_core * topology.cores),
        per_die(per_cluster * topology.clusters),
        per_package(per_die * topology.dies) {}
  const ApicIdShifts shifts;
  const std::uint32_t per_core, per_cluster, per_die, per_package;
};

void set_features(Table& table, const CpuidInput& input, std::uint32_t apic_id, const Levels& levels) {
  if (CpuidEntry* leaf = table.find(1)) {
    const std::uint32_t ids_per_package = std::min(1U << std::min(levels.shifts.package, 8U), 255U);
    leaf->ebx = (leaf->ebx & 0x0000ffffU) | (ids_per_package << 16) | ((apic_id & 0xff) << 24);
    leaf->ecx |= bit(21) | bit(31);    // x2APIC, hypervisor
    leaf->ecx &= ~(bit(5) | bit(27));  // VMX; OSXSAVE, which KVM keeps itself
    leaf->ecx = input.tsc_deadline ? leaf->ecx | bit(24) : leaf->ecx & ~bit(24);
    leaf->edx = levels.per_package > 1 ? leaf->edx | bit(28) : leaf->edx & ~bit(28);
    if (!input.pmu) {
      leaf->ecx &= ~bit(15);  // PDCM
    }
  }
  if (CpuidEntry* leaf = table.find(7, 0)) {
    leaf->ebx &= ~bit(2);  // SGX
  }
  if (CpuidEntry* leaf = table.find(0x80000001)) {
    leaf->ecx &= ~bit(2);  // SVM
    if (table.vendor_is(kVendorAmd) || table.vendor_is(kVendorHygon)) {
      leaf->ecx = levels.per_package > 1 ? leaf->ecx | bit(1) : leaf->ecx & ~bit(1);  // CmpLegacy
    }
    if (!input.pmu) {
      leaf->ecx &= ~(bit(23) | bit(24) | bit(28));  // performance counter extensions
    }
  }
  table.remove(0x12);        // SGX
  table.remove(0x8000000a);  // SVM
  if (!input.pmu) {
    for (const std::uint32_t leaf : {0x0aU, 0x23U, 0x80000022U}) {
      table.remove(leaf);
    }
  }
}

// AMX without its tiles in XCR0 is a processor that does not exist: the feature bits go with the state. (KVM
// shows the state only to a process that asked the kernel for it, which Wisp does not.)
void drop_amx_without_state(Table& table) {
  const CpuidEntry* state = table.find(0xd, 0);
  if (state != nullptr && (state->eax & (bit(17) | bit(18))) == (bit(17) | bit(18))) {
    return;
  }
  if (CpuidEntry* leaf = table.find(7, 0)) {
    leaf->edx &= ~(bit(22) | bit(24) | bit(25));  // AMX-BF16, AMX-TILE, AMX-INT8
  }
  if (CpuidEntry* leaf = table.find(7, 1); leaf != nullptr && leaf->subleaf == 1) {
    leaf->eax &= ~bit(21);  // AMX-FP16
    leaf->edx &= ~bit(8);   // AMX-COMPLEX
  }
  table.remove(0x1d);
  table.remove(0x1e);
}

// How many ids share a cache of this level, less one: levels 1 and 2 belong to a core, those above to a die.
std::uint32_t cache_sharing(std::uint32_t cache_level, const Levels& levels) {
  const std::uint32_t shift = cache_level <= 2 ? levels.shifts.core : levels.shifts.die;
  return (1U << std::min(shift, 12U)) - 1;
}

void set_caches(Table& table, const Levels& levels) {
  for (CpuidEntry& entry : table.entries()) {
    const bool intel_cache = entry.leaf == 4;
    if ((!intel_cache && entry.leaf != 0x8000001d) || (entry.eax & 0x1f) == 0) {
      continue;
    }
    const std::uint32_t cache_level = (entry.eax >> 5) & 7;
    entry.eax = (entry.eax & 0x3fffU) | (cache_sharing(cache_level, levels) << 14);
    if (intel_cache) {
      const std::uint32_t cores = (1U << (levels.shifts.package - levels.shifts.core)) - 1;
      entry.eax |= std::min(cores, 63U) << 26;
    }
  }
}

void set_extended_topology(Table& table, const CpuTopology& topology, std::uint32_t apic_id,
                           const Levels& levels) {
  // Level types: 1 thread, 2 core, 3 module, 5 die. Each sub-leaf gives the shift to the level above.
  struct Level {
    std::uint32_t type, shift, processors;
  };
  const auto write = [&](std::uint32_t leaf, std::span<const Level> list) {
    table.remove(leaf);
    std::uint32_t subleaf = 0;
    for (const Level& level : list) {
      table.set({.leaf = leaf,
                 .subleaf = subleaf,
                 .has_subleaf = true,
                 .eax = level.shift,
                 .ebx = level.processors,
                 .ecx = (level.type << 8) | subleaf,
                 .edx = apic_id});
      ++subleaf;
    }
    table.set({.leaf = leaf, .subleaf = subleaf, .has_subleaf = true, .ecx = subleaf, .edx = apic_id});
  };
  const Level thread{.type = 1, .shift = levels.shifts.core, .processors = levels.per_core};
  write(0xb, std::array{thread, Level{2, levels.shifts.package, levels.per_package}});
  table.raise_max(0, 0xb);

  const bool deep = topology.clusters > 1 || topology.dies > 1;
  if (!deep && table.max_basic() < 0x1f) {
    table.remove(0x1f);
    return;
  }
  std::vector<Level> list{thread, {2, levels.shifts.cluster, levels.per_cluster}};
  if (topology.clusters > 1) {
    list.push_back({3, levels.shifts.die, levels.per_die});
  }
  if (topology.dies > 1) {
    list.push_back({5, levels.shifts.package, levels.per_package});
  }
  write(0x1f, list);
  table.raise_max(0, 0x1f);
}

void set_amd_topology(Table& table, const CpuTopology& topology, std::uint32_t apic_id,
                      const Levels& levels) {
  const bool amd = table.vendor_is(kVendorAmd) || table.vendor_is(kVendorHygon);
  if (CpuidEntry* leaf = table.find(0x80000008)) {
    leaf->ecx =
        amd ? std::min(levels.per_package - 1, 255U) | (std::min(levels.shifts.package, 15U) << 12) : 0;
  }
  table.remove(0x80000026);  // the extended topology of Zen 4: 0xb says the same
  CpuidEntry* leaf = table.find(0x8000001e);
  if (leaf == nullptr) {
    return;
  }
  if (!amd) {
    table.remove(0x8000001e);
    return;
  }
  const std::uint32_t core =
      (apic_id >> levels.shifts.core) & ((1U << (levels.shifts.package - levels.shifts.core)) - 1);
  leaf->eax = apic_id;
  leaf->ebx = (core & 0xff) | (std::min(topology.threads - 1, 255U) << 8);
  leaf->ecx = ((apic_id >> levels.shifts.die) & 0xff) | (std::min(topology.dies - 1, 7U) << 8);
  leaf->edx = 0;
}

// tsc_khz / bus_khz as a fraction with a numerator small enough that a guest which computes bus_khz *
// numerator in 32 bits (Linux does) does not overflow: by continued fractions. Nothing where none comes
// within a millionth.
struct Fraction {
  std::uint32_t numerator, denominator;
};
std::optional<Fraction> clock_ratio(std::uint32_t tsc_khz, std::uint32_t bus_khz) {
  const std::uint64_t limit = UINT32_MAX / bus_khz;
  std::uint64_t a = tsc_khz;
  std::uint64_t b = bus_khz;
  std::uint64_t p0 = 0;
  std::uint64_t q0 = 1;
  std::uint64_t p1 = 1;
  std::uint64_t q1 = 0;
  while (b != 0) {
    const std::uint64_t quotient = a / b;
    const std::uint64_t p2 = quotient * p1 + p0;
    const std::uint64_t q2 = quotient * q1 + q0;
    if (p2 > limit || q2 > UINT32_MAX) {
      break;
    }
    p0 = p1;
    q0 = q1;
    p1 = p2;
    q1 = q2;
    const std::uint64_t rest = a % b;
    a = b;
    b = rest;
  }
  const std::uint64_t exact = std::uint64_t{tsc_khz} * q1;
  const std::uint64_t approximate = p1 * bus_khz;
  const std::uint64_t error = exact > approximate ? exact - approximate : approximate - exact;
  if (p1 == 0 || q1 == 0 || error > exact / 1'000'000) {
    return std::nullopt;
  }
  return Fraction{static_cast<std::uint32_t>(p1), static_cast<std::uint32_t>(q1)};
}

void set_clock(Table& table, std::uint32_t tsc_khz) {
  if (tsc_khz == 0) {
    return;
  }
  // Only Intel's guests look at 0x15 and 0x16. They take its crystal for the clock of the APIC timer too, so
  // it is that clock, or it is not told.
  if (table.vendor_is(kVendorIntel)) {
    if (const auto ratio = clock_ratio(tsc_khz, kApicBusKhz)) {
      table.set(
          {.leaf = 0x15, .eax = ratio->denominator, .ebx = ratio->numerator, .ecx = kApicBusKhz * 1000});
    } else {
      table.remove(0x15);
    }
    const std::uint32_t mhz = std::min(tsc_khz / 1000, 0xffffU);
    table.set({.leaf = 0x16, .eax = mhz, .ebx = mhz});
    table.raise_max(0, 0x16);
  }
  if (table.find(kHypervisorLeaf) != nullptr) {
    table.set({.leaf = kHypervisorTimingLeaf, .eax = tsc_khz, .ebx = kApicBusKhz});
    table.raise_max(kHypervisorLeaf, kHypervisorTimingLeaf);
  }
}

const CpuidEntry* find_entry(std::span<const CpuidEntry> entries, std::uint32_t leaf, std::uint32_t subleaf) {
  const auto found = std::ranges::find_if(entries, [&](const CpuidEntry& entry) {
    return entry.leaf == leaf && (!entry.has_subleaf || entry.subleaf == subleaf);
  });
  return found != entries.end() ? &*found : nullptr;
}

// Registers that are sets of features. `ignored` bits say something else.
struct FeatureWord {
  std::uint32_t leaf, subleaf;
  std::uint32_t CpuidEntry::* word;
  const char* name;
  std::uint32_t ignored = 0;
};
constexpr std::array kFeatureWords{
    FeatureWord{1, 0, &CpuidEntry::ecx, "ECX", bit(27)},  // OSXSAVE follows CR4
    FeatureWord{1, 0, &CpuidEntry::edx, "EDX", bit(28)},  // HTT follows the topology
    FeatureWord{7, 0, &CpuidEntry::ebx, "EBX"},
    FeatureWord{7, 0, &CpuidEntry::ecx, "ECX", bit(4)},  // OSPKE follows CR4
    FeatureWord{7, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{7, 1, &CpuidEntry::eax, "EAX"},
    FeatureWord{7, 1, &CpuidEntry::ebx, "EBX"},
    FeatureWord{7, 1, &CpuidEntry::edx, "EDX"},
    FeatureWord{7, 2, &CpuidEntry::edx, "EDX"},
    FeatureWord{0xd, 0, &CpuidEntry::eax, "EAX"},
    FeatureWord{0xd, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{0xd, 1, &CpuidEntry::eax, "EAX"},
    FeatureWord{0xd, 1, &CpuidEntry::ecx, "ECX"},
    FeatureWord{0x40000001, 0, &CpuidEntry::eax, "EAX"},
    FeatureWord{0x80000001, 0, &CpuidEntry::ecx, "ECX", bit(1)},  // CmpLegacy follows the topology
    FeatureWord{0x80000001, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{0x80000007, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{0x80000008, 0, &CpuidEntry::ebx, "EBX"},
    FeatureWord{0x80000021, 0, &CpuidEntry::eax, "EAX"},
};

// Names of the features whose loss a user is most likely to meet.
struct FeatureName {
  std::uint32_t leaf;
  std::uint32_t CpuidEntry::* word;
  unsigned bit_number;
  const char* name;
};
constexpr std::array kFeatureNames{
    FeatureName{1, &CpuidEntry::ecx, 12, "fma"},
    FeatureName{1, &CpuidEntry::ecx, 13, "cmpxchg16b"},
    FeatureName{1, &CpuidEntry::ecx, 20, "sse4.2"},
    FeatureName{1, &CpuidEntry::ecx, 21, "x2apic"},
    FeatureName{1, &CpuidEntry::ecx, 23, "popcnt"},
    FeatureName{1, &CpuidEntry::ecx, 24, "tsc-deadline"},
    FeatureName{1, &CpuidEntry::ecx, 25, "aes"},
    FeatureName{1, &CpuidEntry::ecx, 26, "xsave"},
    FeatureName{1, &CpuidEntry::ecx, 28, "avx"},
    FeatureName{1, &CpuidEntry::ecx, 30, "rdrand"},
    FeatureName{7, &CpuidEntry::ebx, 0, "fsgsbase"},
    FeatureName{7, &CpuidEntry::ebx, 3, "bmi1"},
    FeatureName{7, &CpuidEntry::ebx, 4, "hle"},
    FeatureName{7, &CpuidEntry::ebx, 5, "avx2"},
    FeatureName{7, &CpuidEntry::ebx, 8, "bmi2"},
    FeatureName{7, &CpuidEntry::ebx, 10, "invpcid"},
    FeatureName{7, &CpuidEntry::ebx, 11, "rtm"},
    FeatureName{7, &CpuidEntry::ebx, 16, "avx512f"},
    FeatureName{7, &CpuidEntry::ebx, 18, "rdseed"},
    FeatureName{7, &CpuidEntry::ebx, 20, "smap"},
    FeatureName{7, &CpuidEntry::ebx, 29, "sha"},
    FeatureName{7, &CpuidEntry::ebx, 30, "avx512bw"},
    FeatureName{7, &CpuidEntry::ecx, 3, "pku"},
    FeatureName{7, &CpuidEntry::ecx, 16, "la57"},
    FeatureName{7, &CpuidEntry::ecx, 22, "rdpid"},
    FeatureName{7, &CpuidEntry::edx, 23, "avx512-fp16"},
    FeatureName{7, &CpuidEntry::edx, 26, "spec-ctrl"},
    FeatureName{7, &CpuidEntry::edx, 31, "ssbd"},
    FeatureName{0x80000001, &CpuidEntry::edx, 20, "nx"},
    FeatureName{0x80000001, &CpuidEntry::edx, 26, "1-GiB pages"},
    FeatureName{0x80000001, &CpuidEntry::edx, 27, "rdtscp"},
};

std::string feature_name(const FeatureWord& word, unsigned bit_number) {
  const auto named = std::ranges::find_if(kFeatureNames, [&](const FeatureName& name) {
    return name.leaf == word.leaf && word.subleaf == 0 && name.word == word.word &&
           name.bit_number == bit_number;
  });
  return fmt::format("{}{}CPUID leaf {:#x} sub-leaf {} {} bit {}{}",
                     named != kFeatureNames.end() ? named->name : "",
                     named != kFeatureNames.end() ? " (" : "", word.leaf, word.subleaf, word.name, bit_number,
                     named != kFeatureNames.end() ? ")" : "");
}

}  // namespace

std::vector<CpuidEntry> guest_cpuid(std::span<const CpuidEntry> supported, const CpuidInput& input) {
  Table table(supported);
  const Levels levels(input.topology);
  const std::uint32_t apic_id = apic_id_of(input.topology, input.index);
  set_features(table, input, apic_id, levels);
  drop_amx_without_state(table);
  set_caches(table, levels);
  set_extended_topology(table, input.topology, apic_id, levels);
  set_amd_topology(table, input.topology, apic_id, levels);
  set_clock(table, input.tsc_khz);
  return table.take();
}

Result<void> check_cpuid_fits(std::span<const CpuidEntry> saved, std::span<const CpuidEntry> host) {
  if (saved.size() > kMaxEntries) {
    return fail("saved CPU state holds {} CPUID entries; at most {} are possible", saved.size(), kMaxEntries);
  }
  for (const FeatureWord& word : kFeatureWords) {
    const CpuidEntry* wanted = find_entry(saved, word.leaf, word.subleaf);
    if (wanted == nullptr) {
      continue;
    }
    const CpuidEntry* here = find_entry(host, word.leaf, word.subleaf);
    const std::uint32_t lost = wanted->*word.word & ~(here != nullptr ? here->*word.word : 0) & ~word.ignored;
    if (lost != 0) {
      return fail(
          "the guest uses a CPU feature that this host does not have: {}; load it on a host with the same or "
          "a "
          "newer CPU",
          feature_name(word, static_cast<unsigned>(std::countr_zero(lost))));
    }
  }
  for (const CpuidEntry& entry : saved) {
    if (entry.leaf == 0xd && entry.subleaf >= 2 && entry.eax != 0) {
      const CpuidEntry* here = find_entry(host, 0xd, entry.subleaf);
      if (here == nullptr || here->eax != entry.eax || here->ebx != entry.ebx) {
        return fail(
            "the guest keeps state component {} at {:#x}, {} bytes, in its XSAVE area; this host's CPU has "
            "it "
            "elsewhere or not at all",
            entry.subleaf, entry.ebx, entry.eax);
      }
    }
    if (entry.leaf == 0x80000008) {
      const CpuidEntry* here = find_entry(host, 0x80000008, 0);
      const std::uint32_t width = entry.eax & 0xff;
      if (here == nullptr || width > (here->eax & 0xff) || width < 36) {
        return fail("the guest uses physical addresses of {} bits; this host has {}", width,
                    here != nullptr ? here->eax & 0xff : 36U);
      }
    }
  }
  return {};
}

Result<std::vector<CpuidEntry>> read_supported_cpuid(int kvm_fd) {
  FlexArray<kvm_cpuid2, kvm_cpuid_entry2> list(kMaxEntries);
  list.header()->nent = kMaxEntries;
  WISP_KVM_TRY(kvm_fd, KVM_GET_SUPPORTED_CPUID, list.header());
  std::vector<CpuidEntry> entries;
  const std::size_t count = std::min<std::size_t>(list.header()->nent, kMaxEntries);
  entries.reserve(count + 16);
  for (const kvm_cpuid_entry2& entry : list.entries().first(count)) {
    entries.push_back({.leaf = entry.function,
                       .subleaf = entry.index,
                       .has_subleaf = (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0,
                       .eax = entry.eax,
                       .ebx = entry.ebx,
                       .ecx = entry.ecx,
                       .edx = entry.edx});
  }
  return entries;
}

Result<void> write_cpuid(int vcpu_fd, std::span<const CpuidEntry> entries) {
  if (entries.size() > kMaxEntries) {
    return fail("{} CPUID entries are more than the {} that KVM takes", entries.size(), kMaxEntries);
  }
  FlexArray<kvm_cpuid2, kvm_cpuid_entry2> list(entries.size());
  list.header()->nent = static_cast<std::uint32_t>(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const CpuidEntry& entry = entries[i];
    kvm_cpuid_entry2& out = list.entries()[i];
    out.function = entry.leaf;
    out.index = entry.subleaf;
    out.flags = entry.has_subleaf ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
    out.eax = entry.eax;
    out.ebx = entry.ebx;
    out.ecx = entry.ecx;
    out.edx = entry.edx;
  }
  WISP_KVM_TRY(vcpu_fd, KVM_SET_CPUID2, list.header());
  return {};
}

}  // namespace wisp::kvm
