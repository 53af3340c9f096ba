// What every engine puts into CPUID by itself: the machine's topology, the sharing of its caches and its
// clock (SDM volume 2, CPUID leaves 4, 0xb, 0x15, 0x16 and 0x1f).
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "hypervisor/cpu_state.h"
#include "hypervisor/topology.h"

namespace wisp {

inline constexpr std::uint32_t kVendorIntel = 0x756e6547;  // "Genu"
inline constexpr std::uint32_t kVendorAmd = 0x68747541;    // "Auth"
inline constexpr std::uint32_t kVendorHygon = 0x6f677948;  // "Hygo"

inline constexpr std::uint32_t kHypervisorLeaf = 0x40000000;
inline constexpr std::uint32_t kHypervisorTimingLeaf = 0x40000010;

// The local APIC's timer counts nanoseconds: KVM's bus runs at 1 GHz, and the software CPU's does too.
inline constexpr std::uint32_t kApicBusKhz = 1'000'000;

// The entries under construction.
class CpuidTable final {
 public:
  explicit CpuidTable(std::span<const CpuidEntry> entries) : entries_(entries.begin(), entries.end()) {}

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

// Counts of logical processors up to each level, and the id's shifts.
struct CpuidLevels {
  explicit CpuidLevels(const CpuTopology& topology)
      : shifts(apic_id_shifts(topology)),
        per_core(topology.threads),
        per_cluster(per_core * topology.cores),
        per_die(per_cluster * topology.clusters),
        per_package(per_die * topology.dies) {}
  const ApicIdShifts shifts;
  const std::uint32_t per_core, per_cluster, per_die, per_package;
};

// How many ids share each cache of leaf 4 (Intel) and 0x8000001d (AMD), where these leaves are there.
void set_cpuid_caches(CpuidTable& table, const CpuidLevels& levels);
// Leaf 0xb, and 0x1f where there are levels that 0xb cannot tell or the table had it already.
void set_cpuid_topology(CpuidTable& table, const CpuTopology& topology, std::uint32_t apic_id,
                        const CpuidLevels& levels);
// The frequencies, in leaves 0x15 and 0x16 and in the hypervisor's own 0x40000010. 0 kHz: unknown, nothing
// changes.
void set_cpuid_clock(CpuidTable& table, std::uint32_t tsc_khz);

}  // namespace wisp
