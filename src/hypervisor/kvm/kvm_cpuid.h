// What a guest sees by CPUID (SDM volume 2, CPUID; AMD APM volume 3, appendix E): everything that KVM can
// show, with the machine's own topology, identity and clock put in. Private to this folder.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "hypervisor/cpu_state.h"
#include "hypervisor/hypervisor.h"

namespace wisp::kvm {

struct CpuidInput {
  CpuTopology topology = {};
  std::uint32_t index = 0;    // of the vCPU
  std::uint32_t tsc_khz = 0;  // 0: unknown, the frequency leaves stay out
  bool tsc_deadline = false;  // the local APIC timer has the deadline mode
  bool pmu = false;           // performance counters are passed through
};

// `supported` is KVM's answer for this host. The result is for KVM_SET_CPUID2.
[[nodiscard]] std::vector<CpuidEntry> guest_cpuid(std::span<const CpuidEntry> supported,
                                                  const CpuidInput& input);

// The kernel's form of it.
[[nodiscard]] Result<std::vector<CpuidEntry>> read_supported_cpuid(int kvm_fd);
[[nodiscard]] Result<void> write_cpuid(int vcpu_fd, std::span<const CpuidEntry> entries);

}  // namespace wisp::kvm
