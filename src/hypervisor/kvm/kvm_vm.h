// One VM of KVM. Private to this folder.
#pragma once

#include <memory>
#include <thread>

#include "base/unique_fd.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/kvm/kvm_doorbells.h"
#include "hypervisor/kvm/kvm_irq.h"
#include "hypervisor/kvm/kvm_memory.h"
#include "hypervisor/kvm/kvm_state.h"
#include "hypervisor/kvm/kvm_system.h"
#include "hypervisor/kvm/kvm_vcpu.h"

namespace wisp::kvm {

class KvmVm final : public Vm {
 public:
  [[nodiscard]] static Result<std::unique_ptr<KvmVm>> create(std::shared_ptr<const System> system,
                                                             const VmOptions& options);

  [[nodiscard]] Result<std::unique_ptr<Vcpu>> create_vcpu(std::uint32_t id) override;
  [[nodiscard]] AddressSpaceListener& memory_listener() override { return memory_; }
  [[nodiscard]] AddressSpaceListener& port_listener() override { return ports_; }
  [[nodiscard]] Result<std::unique_ptr<IrqLine>> irq_line(std::uint32_t gsi) override;
  [[nodiscard]] Result<std::unique_ptr<IrqLine>> msi_line(const MsiMessage& message) override;
  [[nodiscard]] Result<void> set_dirty_log(bool on) override { return memory_.set_dirty_log(on); }
  [[nodiscard]] Result<std::vector<std::uint64_t>> take_dirty_log(Gpa gpa) override {
    return memory_.take_dirty_log(gpa);
  }
  [[nodiscard]] Result<std::vector<std::uint8_t>> save_platform() override;
  [[nodiscard]] Result<void> load_platform(std::span<const std::uint8_t> record) override;
  void guest_started() override;
  ~KvmVm() override;

 private:
  KvmVm(std::shared_ptr<const System> system, UniqueFd fd, const VmOptions& options);
  [[nodiscard]] Result<void> set_up();
  // The interrupt controllers and the PIT, unless they are there.
  [[nodiscard]] Result<void> make_platform();

  const std::shared_ptr<const System> system_;
  const UniqueFd fd_;
  const VmOptions options_;
  StateContext context_;
  MemoryListener memory_;
  PortListener ports_;
  IrqRoutes routes_;
  TscStart tsc_start_;
  bool platform_made_ = false;
  std::thread pit_setter_;
};

}  // namespace wisp::kvm
