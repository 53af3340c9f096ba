// The engine over Linux KVM (/dev/kvm; Documentation/virt/kvm/api.rst of the kernel).
//
// Each VM has KVM's own interrupt controllers (PICs, a 24-pin I/O APIC at 0xfec00000, local APICs at
// 0xfee00000), a PIT where asked for, and kvmclock. A kick uses one real-time signal (SIGRTMIN + 1), for
// which open() installs an empty handler in the process; run() unblocks it in the thread that calls it.
#pragma once

#include <memory>
#include <string>

#include "hypervisor/hypervisor.h"
#include "memory/gpa.h"

namespace wisp {

namespace kvm {

class System;

// Guest physical addresses that the engine keeps for itself below 4 GiB: a machine puts nothing there and
// tells the guest that they are reserved. Processors that cannot run real mode without help need them.
inline constexpr Gpa kReservedStart = 0xfeffc000;
inline constexpr std::uint64_t kReservedSize = 0x4000;

// APIC ids of 8 bits, without the broadcast id.
inline constexpr std::uint32_t kMaxVcpus = 255;

}  // namespace kvm

class KvmHypervisor final : public Hypervisor {
 public:
  // Errors: no such device, no permission, not KVM or one of another version, a capability missing, the kick
  // signal taken by somebody else.
  [[nodiscard]] static Result<std::unique_ptr<KvmHypervisor>> open(const std::string& path = "/dev/kvm");

  [[nodiscard]] std::string name() const override { return "kvm"; }
  [[nodiscard]] std::uint32_t max_vcpus() const override;
  [[nodiscard]] bool has_pmu() const override { return true; }
  // The VM may outlive the hypervisor.
  [[nodiscard]] Result<std::unique_ptr<Vm>> create_vm(const VmOptions& options) override;

 private:
  explicit KvmHypervisor(std::shared_ptr<const kvm::System> system) : system_(std::move(system)) {}
  std::shared_ptr<const kvm::System> system_;
};

}  // namespace wisp
