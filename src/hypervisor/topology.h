// Which APIC id each vCPU of a topology has. The id is a bit field for each level, wide enough for the
// level's count (SDM volume 3, "Hierarchical Mapping of Shared Resources"), so counts that are no power of
// two leave gaps in the ids. What firmware tables say (MADT, MP table) and what CPUID says both come from
// here.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "hypervisor/hypervisor.h"

namespace wisp {

// How far an APIC id is shifted right to leave the number of the next level up.
struct ApicIdShifts {
  std::uint32_t core = 0;     // past the threads: what is left numbers cores
  std::uint32_t cluster = 0;  // past the cores
  std::uint32_t die = 0;      // past the clusters
  std::uint32_t package = 0;  // past the dies
};

[[nodiscard]] constexpr ApicIdShifts apic_id_shifts(const CpuTopology& topology) {
  const auto bits = [](std::uint32_t count) {
    return count > 1 ? static_cast<std::uint32_t>(std::bit_width(count - 1)) : 0U;
  };
  ApicIdShifts shifts;
  shifts.core = bits(topology.threads);
  shifts.cluster = shifts.core + bits(topology.cores);
  shifts.die = shifts.cluster + bits(topology.clusters);
  shifts.package = shifts.die + bits(topology.dies);
  return shifts;
}

// The APIC id of the vCPU number `index`: threads count first, then cores, clusters, dies, sockets. All
// counts of the topology are at least 1.
[[nodiscard]] constexpr std::uint32_t apic_id_of(const CpuTopology& topology, std::uint32_t index) {
  const ApicIdShifts shifts = apic_id_shifts(topology);
  const std::uint32_t thread = index % topology.threads;
  index /= topology.threads;
  const std::uint32_t core = index % topology.cores;
  index /= topology.cores;
  const std::uint32_t cluster = index % topology.clusters;
  index /= topology.clusters;
  const std::uint32_t die = index % topology.dies;
  const std::uint32_t socket = index / topology.dies;
  return (socket << shifts.package) | (die << shifts.die) | (cluster << shifts.cluster) |
         (core << shifts.core) | thread;
}

// Whether `engine` ("KVM on this host"), which takes `most_vcpus` vCPUs and APIC ids below `apic_ids`, can
// make this VM.
[[nodiscard]] Result<void> check_topology(const VmOptions& options, std::uint32_t most_vcpus,
                                          std::uint32_t apic_ids, std::string_view engine);

}  // namespace wisp
