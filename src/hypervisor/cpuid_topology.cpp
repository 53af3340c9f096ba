#include "hypervisor/cpuid_topology.h"

#include <array>
#include <optional>

namespace wisp {
namespace {

// How many ids share a cache of this level, less one: levels 1 and 2 belong to a core, those above to a die.
std::uint32_t cache_sharing(std::uint32_t cache_level, const CpuidLevels& levels) {
  const std::uint32_t shift = cache_level <= 2 ? levels.shifts.core : levels.shifts.die;
  return (1U << std::min(shift, 12U)) - 1;
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

}  // namespace

void set_cpuid_caches(CpuidTable& table, const CpuidLevels& levels) {
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

void set_cpuid_topology(CpuidTable& table, const CpuTopology& topology, std::uint32_t apic_id,
                        const CpuidLevels& levels) {
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

void set_cpuid_clock(CpuidTable& table, std::uint32_t tsc_khz) {
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

}  // namespace wisp
