// One processor of a VM of the software CPU: the run loop around a Processor, with its local APIC, its timers
// and what instructions ask of the machine. Private to this folder.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/event_loop.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/soft/chipset.h"
#include "hypervisor/soft/halt_poll.h"
#include "hypervisor/soft/lapic.h"
#include "hypervisor/soft/notes.h"
#include "hypervisor/soft/physical_memory.h"
#include "hypervisor/soft/processor.h"
#include "hypervisor/soft/requests.h"
#include "hypervisor/soft/soft_clock.h"
#include "hypervisor/soft/state_log.h"
#include "hypervisor/soft/virtual_clock.h"

namespace wisp::soft {

// What brings the time-stamp counters of all processors of a VM in step when a state is loaded: see
// SoftVcpu::load().
struct TscStep {
  std::mutex mutex;
  std::optional<std::uint64_t> offset;
};

// The parts of a VM that its processors use; all of it outlives them.
struct SoftVmParts {
  const SoftClock& clock;
  VirtualClock* virtual_clock = nullptr;  // where `clock` is one
  Chipset& chipset;
  PhysicalMemory& memory;
  Requests& requests;
  EventLoop& loop;
  Notes& notes;
  TscStep& tsc_step;
  std::shared_ptr<SharedCode> code;
  StateLog* state_log = nullptr;  // with a virtual clock, where one is wanted
  std::uint64_t seed = 0;         // of random numbers with a virtual clock
  bool halt_poll = false;         // there is a host processor to spare while one looks for work
  std::uint64_t pause_every = 0;  // instructions, with a virtual clock; 0: never
  std::uint64_t tsc_offset = 0;   // what a fresh processor's counter is more than the machine's
};

struct SoftVcpuConfig {
  std::uint32_t index = 0;
  std::uint32_t apic_id = 0;
  CpuTopology topology = {};
};

class SoftVcpu final : public Vcpu, private Environment, private EngineMmio {
 public:
  [[nodiscard]] static Result<std::unique_ptr<SoftVcpu>> create(const SoftVmParts& parts,
                                                                const SoftVcpuConfig& config);
  SoftVcpu(const SoftVcpu&) = delete;
  SoftVcpu& operator=(const SoftVcpu&) = delete;
  ~SoftVcpu() override;

  [[nodiscard]] std::uint32_t id() const override { return config_.index; }
  [[nodiscard]] Exit run() override;
  void kick() override;
  [[nodiscard]] Result<CpuState> save() override;
  [[nodiscard]] Result<void> load(const CpuState& state) override;
  [[nodiscard]] Result<CpuRegs> regs() override;
  [[nodiscard]] Result<void> set_regs(const CpuRegs& regs) override;
  [[nodiscard]] Result<CpuSpecialRegs> special_regs() override;
  [[nodiscard]] Result<void> set_special_regs(const CpuSpecialRegs& sregs) override;
  [[nodiscard]] Result<void> reset() override;

  // Makes the processor look at what waits for it; from any thread.
  void wake();
  // Once it has stopped, with a virtual clock: instructions since the start, and the guest's time.
  [[nodiscard]] std::uint64_t retired() const { return processor_->cpu().retired(); }
  [[nodiscard]] std::uint64_t virtual_ns() const;
  // What its executors did so far, in one line; once it has stopped.
  [[nodiscard]] std::string describe_work() const { return processor_->describe_work(); }
  // The PIC has an interrupt; from any thread.
  void pic_changed();

 private:
  enum class Due : std::uint8_t { kNothing, kDelivered, kShutdown };

  SoftVcpu(const SoftVmParts& parts, const SoftVcpuConfig& config);
  [[nodiscard]] Result<void> set_up();
  [[nodiscard]] Cpu& cpu() { return processor_->cpu(); }
  [[nodiscard]] Result<void> check_no_access_pending();

  // --- the run loop (soft_vcpu.cpp)
  void take_answer();
  [[nodiscard]] std::optional<Exit> next_access();
  [[nodiscard]] Exit access_exit(IoState::Access& access);
  void take_init_and_startup();
  [[nodiscard]] bool interrupt_waits() const;
  [[nodiscard]] Due deliver_due();
  [[nodiscard]] Due deliver_one();
  [[nodiscard]] Due deliver_interrupt();
  [[nodiscard]] std::optional<std::uint64_t> next_event_ns() const;
  void sleep_virtually(std::optional<std::uint64_t> until);
  [[nodiscard]] bool stopped_until_woken();
  void sleep();
  [[nodiscard]] static std::uint64_t host_now();  // ns
  [[nodiscard]] bool look_for_work(std::uint64_t now, std::uint64_t until);
  [[nodiscard]] bool pause_due();
  // Has the processor stop when the next timer of its local APIC is due.
  void arm_timer();
  // Has the processor look at once for what its local APIC would deliver now.
  void look_for_interrupt();
  void serve_requests(std::uint32_t bits);
  void publish_clock(bool stopped);

  // --- state (soft_vcpu_state.cpp)
  [[nodiscard]] Result<void> load_special_regs(const CpuSpecialRegs& sregs);
  [[nodiscard]] Result<void> load_msrs(const std::vector<CpuMsr>& msrs);
  [[nodiscard]] Result<void> load_time(const CpuState& state);
  [[nodiscard]] Result<void> load_events(const CpuState& state);
  [[nodiscard]] bool force_apic_base(std::uint64_t value);

  // --- what instructions ask (soft_vcpu_environment.cpp)
  std::uint64_t read_tsc() override;
  CpuidEntry cpuid(std::uint32_t leaf, std::uint32_t subleaf) override;
  std::optional<std::uint64_t> read_msr(std::uint32_t index) override;
  MsrWrite write_msr(std::uint32_t index, std::uint64_t value) override;
  std::uint64_t read_cr8() override;
  void write_cr8(std::uint64_t value) override;
  bool port_read(std::uint16_t port, std::span<std::uint8_t> data) override;
  bool port_write(std::uint16_t port, std::span<const std::uint8_t> data) override;
  std::uint64_t hypercall(std::uint64_t number, std::span<const std::uint64_t, 4> arguments) override;
  std::uint64_t random() override;
  void pause() override;
  void note(const std::string& what) override;
  bool mmio_read(std::uint64_t gpa, std::span<std::uint8_t> data) override;
  bool mmio_write(std::uint64_t gpa, std::span<const std::uint8_t> data) override;
  [[nodiscard]] bool in_lapic(std::uint64_t gpa, std::size_t size) const;

  const SoftVmParts parts_;
  const SoftVcpuConfig config_;
  std::unique_ptr<Processor> processor_;
  std::optional<Lapic> lapic_;
  Requests::Party party_;
  std::vector<CpuidEntry> cpuid_;  // what the guest sees

  std::atomic<bool> kicked_ = false;
  std::atomic<std::uint32_t> asleep_ = 0;  // a futex
  Timer timer_;
  std::uint64_t timer_due_ns_ = 0;  // when timer_ fires; 0: not set, or past

  CpuRunState run_state_ = CpuRunState::kRunnable;  // kHalted is in Cpu::halted
  bool shut_down_ = false;
  bool thread_prepared_ = false;
  bool nmi_waits_ = false;
  bool clock_unpublished_ = false;  // a state was loaded: the guest's copy of the clock is old
  std::uint64_t next_pause_ = 0;    // in instructions
  HaltPoll halt_poll_{};
  std::uint32_t writes_told_ = 0;  // of cpu.io.writes
  bool read_asked_ = false;        // cpu.io.wanted went out as an exit
  bool access_pending_ = false;    // the last exit was an access, and run() was not called again
  // An event of a loaded state that was on its way into the guest.
  struct LoadedEvent {
    Fault fault{};
    EventKind kind = EventKind::kFault;
  };
  std::optional<LoadedEvent> loaded_event_;

  std::uint64_t seeded_ = 0;  // state of the generator where random numbers come from a seed
  std::array<std::uint64_t, 32> random_{};
  std::size_t random_left_ = 0;
};

}  // namespace wisp::soft
