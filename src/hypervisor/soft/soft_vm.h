// A VM of the software CPU. Private to this folder.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "hypervisor/hypervisor.h"
#include "hypervisor/soft/soft_hypervisor.h"
#include "hypervisor/soft/soft_memory.h"
#include "hypervisor/soft/soft_vcpu.h"
#include "hypervisor/soft/virtual_clock.h"

namespace wisp::soft {

// The thread of a VM that waits for timers and eventfds.
class ServiceThread final {
 public:
  [[nodiscard]] static Result<std::unique_ptr<ServiceThread>> start(
      const std::function<Result<void>()>& started);
  ServiceThread(const ServiceThread&) = delete;
  ServiceThread& operator=(const ServiceThread&) = delete;
  ~ServiceThread() { stop(); }
  void stop();
  [[nodiscard]] EventLoop& loop() { return *loop_; }

 private:
  explicit ServiceThread(std::unique_ptr<EventLoop> loop) : loop_(std::move(loop)) {}
  std::unique_ptr<EventLoop> loop_;
  std::thread thread_;
};

class SoftVm final : public Vm {
 public:
  [[nodiscard]] static Result<std::unique_ptr<SoftVm>> create(const SoftOptions& soft,
                                                              const VmOptions& options);
  SoftVm(const SoftVm&) = delete;
  SoftVm& operator=(const SoftVm&) = delete;
  ~SoftVm() override;

  [[nodiscard]] Result<std::unique_ptr<Vcpu>> create_vcpu(std::uint32_t id) override;
  [[nodiscard]] AddressSpaceListener& memory_listener() override { return listener_; }
  [[nodiscard]] std::function<void(Gpa, std::uint64_t)> host_write_hook() override {
    return [this](Gpa gpa, std::uint64_t size) { memory_.host_wrote(gpa, size); };
  }
  [[nodiscard]] AddressSpaceListener& port_listener() override { return ports_; }
  [[nodiscard]] Result<std::unique_ptr<IrqLine>> irq_line(std::uint32_t gsi) override;
  [[nodiscard]] Result<std::unique_ptr<IrqLine>> msi_line(const MsiMessage& message) override;
  [[nodiscard]] Result<void> set_dirty_log(bool on) override;
  [[nodiscard]] Result<std::vector<std::uint64_t>> take_dirty_log(Gpa gpa) override;
  [[nodiscard]] const Clock* guest_clock() const override { return virtual_clock_.get(); }
  [[nodiscard]] bool prefers_large_pages() const override { return true; }
  [[nodiscard]] Result<std::vector<std::uint8_t>> save_platform() override;
  [[nodiscard]] Result<void> load_platform(std::span<const std::uint8_t> record) override;

 private:
  // Doorbells on ports are answered by the machine's port space: a port access costs an exit anyway.
  class PortListener final : public AddressSpaceListener {
   public:
    [[nodiscard]] Result<void> range_added(const FlatRange& /*range*/) override { return {}; }
    void range_removed(const FlatRange& /*range*/) override {}
  };

  SoftVm(const SoftOptions& soft, const VmOptions& options);
  [[nodiscard]] Result<void> set_up(const SoftOptions& soft);

  const VmOptions options_;
  // One of them is there.
  const std::unique_ptr<const HostClock> host_clock_;
  const std::unique_ptr<VirtualClock> virtual_clock_;
  const SoftClock& clock_;
  const std::uint64_t tsc_offset_;
  const std::function<void(const std::string&)> note_;  // may be empty
  Notes notes_;
  TscStep tsc_step_;
  PhysicalMemory memory_;
  MemoryListener listener_{memory_};
  PortListener ports_;
  Requests requests_;
  std::unique_ptr<ServiceThread> service_;
  std::unique_ptr<Chipset> chipset_;
  std::unique_ptr<StateLog> state_log_;
  std::shared_ptr<SharedCode> code_;
  // They stay until the VM goes: interrupts, messages and changes of the memory reach them after their
  // owners have let go of them. Only create_vcpu() changes the list, before the machine runs.
  std::vector<std::unique_ptr<SoftVcpu>> vcpus_;
};

}  // namespace wisp::soft
