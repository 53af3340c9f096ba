// One vCPU of a KVM VM. Private to this folder.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/unique_fd.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/kvm/kvm_state.h"
#include "hypervisor/kvm/kvm_system.h"
#include "hypervisor/kvm/vcpu_kicker.h"

namespace wisp::kvm {

// struct kvm_run, mapped.
class RunPage final {
 public:
  [[nodiscard]] static Result<RunPage> map(int vcpu_fd, std::size_t size);
  RunPage(RunPage&& other) noexcept
      : run_(std::exchange(other.run_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  RunPage(const RunPage&) = delete;
  RunPage& operator=(const RunPage&) = delete;
  RunPage& operator=(RunPage&&) = delete;
  ~RunPage();
  [[nodiscard]] kvm_run* get() const { return run_; }
  [[nodiscard]] std::uint8_t* at(std::uint64_t offset) const {
    return static_cast<std::uint8_t*>(static_cast<void*>(run_)) + offset;
  }

 private:
  RunPage(kvm_run* run, std::size_t size) : run_(run), size_(size) {}
  kvm_run* run_;
  std::size_t size_;
};

// Whether a state was loaded in this VM yet; see KvmVcpu::load().
struct TscStart {
  std::mutex mutex;
  bool loaded = false;
};

// What a vCPU is made with.
struct VcpuConfig {
  std::uint32_t index = 0;
  std::uint32_t apic_id = 0;
  bool boot = false;
  bool pmu = false;
  CpuTopology topology;
  StateContext context;
  TscStart* tsc_start = nullptr;  // the VM's, borrowed
};

class KvmVcpu final : public Vcpu {
 public:
  // Makes the vCPU and gives it its CPUID, MSRs and power-up state.
  [[nodiscard]] static Result<std::unique_ptr<KvmVcpu>> create(std::shared_ptr<const System> system,
                                                               int vm_fd, const VcpuConfig& config);

  [[nodiscard]] std::uint32_t id() const override { return config_.index; }
  [[nodiscard]] Exit run() override;
  void kick() override { kicker_.kick(); }
  [[nodiscard]] Result<CpuState> save() override;
  [[nodiscard]] Result<void> load(const CpuState& state) override;
  [[nodiscard]] Result<CpuRegs> regs() override;
  [[nodiscard]] Result<void> set_regs(const CpuRegs& regs) override;
  [[nodiscard]] Result<CpuSpecialRegs> special_regs() override;
  [[nodiscard]] Result<void> set_special_regs(const CpuSpecialRegs& sregs) override;
  [[nodiscard]] Result<void> reset() override;

 private:
  KvmVcpu(std::shared_ptr<const System> system, UniqueFd fd, RunPage run, const VcpuConfig& config);
  [[nodiscard]] Result<void> set_up();
  [[nodiscard]] Result<void> set_up_immunities();
  [[nodiscard]] Result<void> check_no_access_pending() const;
  [[nodiscard]] Exit port_exit();
  [[nodiscard]] Exit mmio_exit();
  [[nodiscard]] Exit other_exit();
  [[nodiscard]] std::string internal_error_text();

  const std::shared_ptr<const System> system_;
  const UniqueFd fd_;
  const RunPage run_;
  const VcpuConfig config_;
  VcpuKicker kicker_;
  std::vector<CpuidEntry> cpuid_;      // what the guest sees
  std::vector<std::uint32_t> msrs_;    // those of the state that this vCPU has
  std::vector<CpuMsr> power_up_msrs_;  // their values after power-up, without the time-stamp counter
  bool access_pending_ = false;        // a port or MMIO exit waits for the next KVM_RUN to complete it
};

}  // namespace wisp::kvm
