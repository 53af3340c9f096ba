// The model-specific registers that are part of a vCPU's state (SDM volume 4). Private to this folder.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "hypervisor/cpu_state.h"

namespace wisp::kvm {

namespace msr {
inline constexpr std::uint32_t kTsc = 0x10;
inline constexpr std::uint32_t kArchCapabilities = 0x10a;
inline constexpr std::uint32_t kMiscEnable = 0x1a0;
inline constexpr std::uint32_t kMtrrDefType = 0x2ff;
inline constexpr std::uint32_t kTscDeadline = 0x6e0;
}  // namespace msr

// Of the MSRs that KVM lists, those that a Wisp vCPU's state holds, and the MTRRs, which KVM keeps but does
// not list. Left out: what CpuSpecialRegs holds, Hyper-V's and those of nested virtualization, which no guest
// here sees. The time-stamp counter comes first and its deadline last, which is the order in which they are
// loaded.
[[nodiscard]] std::vector<std::uint32_t> state_msrs(std::span<const std::uint32_t> listed);

// Reads each MSR of `indices` and takes out of it those that the vCPU does not have.
[[nodiscard]] Result<std::vector<CpuMsr>> read_msrs(int vcpu_fd, std::vector<std::uint32_t>& indices);

// Writes them in order. An MSR that refuses the value which it already has is passed over.
[[nodiscard]] Result<void> write_msrs(int vcpu_fd, std::span<const CpuMsr> msrs);

// Checks MSRs from a saved state against those that this vCPU has, and puts them in the order in which they
// are loaded. An MSR unknown here is passed over where its value is 0. Errors: one twice, an unknown one with
// a value, immunities in IA32_ARCH_CAPABILITIES that `host_immunities` has not.
[[nodiscard]] Result<std::vector<CpuMsr>> msrs_to_load(std::span<const CpuMsr> saved,
                                                       std::span<const std::uint32_t> known,
                                                       std::uint64_t host_immunities);

}  // namespace wisp::kvm
