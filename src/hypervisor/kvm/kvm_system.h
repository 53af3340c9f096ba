// What the host's KVM is and can do, found out once and shared by all VMs. Private to this folder.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "hypervisor/cpu_state.h"

namespace wisp::kvm {

struct Capabilities {
  std::uint32_t max_vcpus = 0;
  std::uint32_t max_vcpu_ids = 0;
  std::uint32_t memory_slots = 0;
  std::uint32_t irq_routes = 0;
  bool tsc_deadline = false;
  bool exception_payload = false;
  bool triple_fault_event = false;
  bool pmu_control = false;
  bool x2apic_ids = false;
  bool xsave2 = false;
};

class System final {
 public:
  // Errors: no such device, no permission, not KVM, another API version, a capability that Wisp needs is
  // missing; each says what to do.
  [[nodiscard]] static Result<std::shared_ptr<const System>> open(const std::string& path);

  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] const Capabilities& capabilities() const { return capabilities_; }
  // Bytes of the structure shared with the kernel for each vCPU.
  [[nodiscard]] std::size_t run_size() const { return run_size_; }
  // All that KVM can show a guest on this host (KVM_GET_SUPPORTED_CPUID), unchanged.
  [[nodiscard]] const std::vector<CpuidEntry>& supported_cpuid() const { return supported_cpuid_; }
  // The MSRs that make up the state of a vCPU here. Some may turn out unreadable on a vCPU.
  [[nodiscard]] const std::vector<std::uint32_t>& state_msrs() const { return state_msrs_; }
  // What this host's CPUs and kernel are immune to (IA32_ARCH_CAPABILITIES); 0 where KVM does not say.
  [[nodiscard]] std::uint64_t arch_capabilities() const { return arch_capabilities_; }

 private:
  System() = default;
  UniqueFd fd_;
  Capabilities capabilities_;
  std::size_t run_size_ = 0;
  std::vector<CpuidEntry> supported_cpuid_;
  std::vector<std::uint32_t> state_msrs_;
  std::uint64_t arch_capabilities_ = 0;
};

}  // namespace wisp::kvm
