// MultiProcessor Specification 1.4: how a kernel without ACPI learns of CPUs, I/O APIC and interrupt pins.
#pragma once

#include <cstdint>
#include <vector>

#include "base/error.h"
#include "hypervisor/topology.h"
#include "memory/gpa.h"

namespace wisp {

// APIC ids in the table are 8 bits wide, 0xFF means all, and the I/O APIC needs one of its own.
inline constexpr std::uint32_t kMpMaxCpus = 254;

// The MP floating pointer followed by the configuration table, to be placed at `gpa` (16-byte aligned).
// Names CPUs 0 to cpus - 1, or as many as the table can, with the APIC ids of the topology; interrupt sources
// 0 to 23 of an ISA bus each on the pin of the same number, edge-triggered and active high.
[[nodiscard]] std::vector<std::uint8_t> build_mp_table(Gpa gpa, std::uint32_t cpus,
                                                       const CpuTopology& topology = {});

}  // namespace wisp
