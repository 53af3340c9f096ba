// The engine in software: x86-64 guests in an ordinary process, on hosts without hardware virtualization.
//
// Each VM has the interrupt controllers and timers that KVM has (PICs, a 24-pin I/O APIC at 0xfec00000, local
// APICs at 0xfee00000, a PIT where asked for, the paravirtual clock), a thread of its own for timers and
// eventfds, and generated code in memory that is mapped twice, never writable and executable at once.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "hypervisor/hypervisor.h"
#include "hypervisor/soft/execution.h"

namespace wisp {

struct SoftOptions {
  soft::ExecutionOptions execution = {};
  // Lines for the log about what a guest tried and this CPU does not have; called on vCPU threads, each text
  // once. May be empty.
  std::function<void(const std::string&)> note = {};
  // Called on each thread that the engine starts, before it does anything (system-call filters). An error
  // fails the creation of the VM. May be empty.
  std::function<Result<void>()> thread_started = {};
};

class SoftHypervisor final : public Hypervisor {
 public:
  // APIC ids of 8 bits, without the broadcast id.
  static constexpr std::uint32_t kMaxVcpus = 255;

  // Errors: the host's processor lacks what guests' instructions are run with.
  [[nodiscard]] static Result<std::unique_ptr<SoftHypervisor>> open(SoftOptions options = {});

  [[nodiscard]] std::string name() const override { return "soft"; }
  [[nodiscard]] std::uint32_t max_vcpus() const override { return kMaxVcpus; }
  // The VM may outlive the hypervisor.
  [[nodiscard]] Result<std::unique_ptr<Vm>> create_vm(const VmOptions& options) override;

 private:
  explicit SoftHypervisor(SoftOptions options) : options_(std::move(options)) {}
  const SoftOptions options_;
};

// Whether it can run here, in words for the user.
[[nodiscard]] EngineReport describe_software_cpu();

}  // namespace wisp
