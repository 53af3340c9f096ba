#include "machine/engine.h"

#include "hypervisor/kvm/kvm_hypervisor.h"
#include "hypervisor/kvm/kvm_probe.h"

namespace wisp {

Result<EngineChoice> choose_engine(Accel /*accel*/, const Clock& clock) {
  WISP_ASSIGN(auto kvm, KvmHypervisor::open());
  EngineChoice choice;
  choice.engine = std::move(kvm);
  // On a VM that is needed anyway: ending one takes the kernel long.
  choice.judge = [&clock](Vm& vm, Vcpu& vcpu) -> Result<void> {
    const EngineReport report = describe(probe_ring0(vm, vcpu, clock));
    if (!report.usable) {
      return fail("/dev/kvm: {}; {}", report.summary, report.advice);
    }
    return {};
  };
  return choice;
}

}  // namespace wisp
