#include "hypervisor/soft/soft_hypervisor.h"

#include "hypervisor/soft/host_features.h"
#include "hypervisor/soft/soft_vm.h"

namespace wisp {

Result<std::unique_ptr<SoftHypervisor>> SoftHypervisor::open(SoftOptions options) {
  if (!soft::host_features().x86_64_v2) {
    return fail(
        "the software CPU runs guests' instructions on a host processor with at least x86-64-v2 (SSE4.2, "
        "POPCNT, XSAVE), and this host's lacks some of that; use a newer host, or show these features to "
        "this "
        "virtual machine");
  }
  return std::unique_ptr<SoftHypervisor>(new SoftHypervisor(std::move(options)));
}

Result<std::unique_ptr<Vm>> SoftHypervisor::create_vm(const VmOptions& options) {
  return soft::SoftVm::create(options_, options);
}

EngineReport describe_software_cpu() {
  if (!SoftHypervisor::open()) {
    return {.usable = false,
            .summary = "cannot run machines: the processor lacks some of x86-64-v2",
            .advice = "use a host with SSE4.2, POPCNT and XSAVE, or show them to this virtual machine"};
  }
  return {.usable = true, .summary = "can run machines without KVM (-accel soft)", .advice = {}};
}

}  // namespace wisp
