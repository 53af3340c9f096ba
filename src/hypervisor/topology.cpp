#include "hypervisor/topology.h"

namespace wisp {

Result<void> check_topology(const VmOptions& options, std::uint32_t most_vcpus, std::uint32_t apic_ids,
                            std::string_view engine) {
  const CpuTopology& topology = options.topology;
  const std::uint64_t places =
      std::uint64_t{topology.sockets} * topology.dies * topology.clusters * topology.cores * topology.threads;
  if (places == 0 || places > UINT16_MAX) {
    return fail(
        "CPU topology of {} sockets, {} dies, {} clusters, {} cores, {} threads: each must be at least 1, "
        "and their product at most {}",
        topology.sockets, topology.dies, topology.clusters, topology.cores, topology.threads, UINT16_MAX);
  }
  if (options.max_vcpus == 0 || options.max_vcpus > most_vcpus) {
    return fail("{} vCPUs: {} takes 1 to {}", options.max_vcpus, engine, most_vcpus);
  }
  if (const std::uint32_t last = apic_id_of(topology, options.max_vcpus - 1); last >= apic_ids) {
    return fail(
        "{} vCPUs: with this CPU topology the last has APIC id {}, and the highest possible is {}; use "
        "counts that are powers of two",
        options.max_vcpus, last, apic_ids - 1);
  }
  return {};
}

}  // namespace wisp
