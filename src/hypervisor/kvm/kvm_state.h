// Between KVM's structures and the plain ones that all engines share, and the whole state of a vCPU read and
// written in the order that KVM needs. Private to this folder.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "hypervisor/cpu_state.h"
#include "hypervisor/kvm/kvm_abi.h"

namespace wisp::kvm {

[[nodiscard]] CpuRegs from_kvm(const kvm_regs& regs);
[[nodiscard]] kvm_regs to_kvm(const CpuRegs& regs);
[[nodiscard]] CpuSpecialRegs from_kvm(const kvm_sregs& sregs);
[[nodiscard]] kvm_sregs to_kvm(const CpuSpecialRegs& sregs);

[[nodiscard]] Result<CpuRegs> read_regs(int vcpu_fd);
[[nodiscard]] Result<void> write_regs(int vcpu_fd, const CpuRegs& regs);
[[nodiscard]] Result<CpuSpecialRegs> read_special_regs(int vcpu_fd);
[[nodiscard]] Result<void> write_special_regs(int vcpu_fd, const CpuSpecialRegs& sregs);

// What the reading and writing of a vCPU's state depends on in its VM and host.
struct StateContext {
  std::size_t xsave_size = 4096;  // bytes of the XSAVE area here
  bool xsave2 = false;            // KVM_GET_XSAVE2 is there
  bool exception_payload = false;
  bool triple_fault_event = false;
  std::uint64_t host_immunities = 0;  // IA32_ARCH_CAPABILITIES
};

// All but `cpuid`. Takes out of `msrs` what the vCPU does not have.
[[nodiscard]] Result<CpuState> read_state(int vcpu_fd, const StateContext& context,
                                          std::vector<std::uint32_t>& msrs);

// All but `cpuid`, which the vCPU must have been given. `state` may be hostile. After an error the vCPU holds
// a mixture and must be loaded again before it runs.
[[nodiscard]] Result<void> write_state(int vcpu_fd, const StateContext& context, const CpuState& state,
                                       std::span<const std::uint32_t> msrs);

}  // namespace wisp::kvm
