#include "hypervisor/kvm/kvm_hypervisor.h"

#include <algorithm>

#include "hypervisor/kvm/kvm_system.h"
#include "hypervisor/kvm/kvm_vm.h"
#include "hypervisor/kvm/vcpu_kicker.h"

namespace wisp {

Result<std::unique_ptr<KvmHypervisor>> KvmHypervisor::open(const std::string& path) {
  WISP_ASSIGN(auto system, kvm::System::open(path));
  WISP_TRY(kvm::VcpuKicker::install_signal());
  return std::unique_ptr<KvmHypervisor>(new KvmHypervisor(std::move(system)));
}

std::uint32_t KvmHypervisor::max_vcpus() const {
  return std::min(system_->capabilities().max_vcpus, kvm::kMaxVcpus);
}

Result<std::unique_ptr<Vm>> KvmHypervisor::create_vm(const VmOptions& options) {
  return kvm::KvmVm::create(system_, options);
}

}  // namespace wisp
