// The local APIC of one processor: xAPIC and x2APIC registers, timer with TSC deadline (Intel SDM volume 3,
// chapter 11).
//
// The registers belong to the processor's own thread. Other threads only make interrupts pending (accept()
// and what follows it), which is lock-free, and then call the wake function.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>

#include "base/error.h"
#include "hypervisor/cpu_state.h"
#include "hypervisor/soft/apic_bus.h"

namespace wisp::soft {

inline constexpr std::uint64_t kApicBaseDefault = 0xfee00000;
inline constexpr std::uint64_t kApicBaseBsp = 1U << 8;
inline constexpr std::uint64_t kApicBaseX2apic = 1U << 10;
inline constexpr std::uint64_t kApicBaseEnable = 1U << 11;

class Lapic final {
 public:
  // What the local APIC needs from its machine.
  struct Wiring {
    ApicBus* bus = nullptr;
    // Makes the processor look at its pending interrupts soon; called by any thread.
    std::function<void()> wake;
    // A level-triggered vector was acknowledged: for the I/O APIC.
    std::function<void(std::uint8_t vector)> broadcast_eoi;
    // Guest time in nanoseconds, and the TSC's frequency.
    std::function<std::uint64_t()> now_ns;
    std::function<std::uint64_t()> read_tsc;
    std::uint64_t tsc_khz = 0;
  };
  Lapic(std::uint32_t id, Wiring wiring);
  Lapic(const Lapic&) = delete;
  Lapic& operator=(const Lapic&) = delete;

  // Power-up state; `after_init` keeps the id, the base and a start-up message that followed the INIT.
  void reset(bool after_init);

  [[nodiscard]] std::uint32_t id() const { return id_; }
  [[nodiscard]] std::uint64_t base() const { return base_.load(std::memory_order_relaxed); }
  // Writes IA32_APIC_BASE; false where the transition is not allowed (#GP).
  [[nodiscard]] bool set_base(std::uint64_t value);
  [[nodiscard]] bool enabled() const { return (base() & kApicBaseEnable) != 0; }
  [[nodiscard]] bool x2apic() const { return (base() & kApicBaseX2apic) != 0; }

  // Register page (32-bit registers at multiples of 16; anything else reads as 0 and drops writes). The
  // caller routes accesses here only in xAPIC mode: the page is not there in the others.
  [[nodiscard]] std::uint32_t read(std::uint32_t offset);
  void write(std::uint32_t offset, std::uint32_t value);
  // MSRs 0x800-0x8ff in x2APIC mode: empty or false means #GP.
  [[nodiscard]] std::optional<std::uint64_t> read_msr(std::uint32_t index);
  [[nodiscard]] bool write_msr(std::uint32_t index, std::uint64_t value);
  // IA32_TSC_DEADLINE.
  [[nodiscard]] std::uint64_t tsc_deadline() const;
  void set_tsc_deadline(std::uint64_t tsc);
  // CR8: bits 7:4 of the task priority.
  [[nodiscard]] std::uint8_t cr8() const { return static_cast<std::uint8_t>(task_priority_ >> 4); }
  void set_cr8(std::uint8_t value) { task_priority_ = static_cast<std::uint32_t>(value & 0xf) << 4; }

  // From any thread. Whether the message was accepted.
  bool accept(const ApicMessage& message);
  // Whether fixed and lowest-priority interrupts find a receiver here (enabled by hardware and software).
  [[nodiscard]] bool accepts_fixed() const;
  [[nodiscard]] bool matches(const ApicMessage& message) const;
  // Arbitration for lowest-priority delivery: the lower, the better.
  [[nodiscard]] std::uint32_t arbitration_priority() const;

  // From the processor's thread: what is pending, and taking it.
  [[nodiscard]] std::optional<std::uint8_t> pending_vector() const;
  void acknowledge(std::uint8_t vector);
  void eoi();
  [[nodiscard]] bool take_nmi() { return nmi_pending_.exchange(false, std::memory_order_acq_rel); }
  [[nodiscard]] bool nmi_pending() const { return nmi_pending_.load(std::memory_order_acquire); }
  [[nodiscard]] bool take_init() { return init_pending_.exchange(false, std::memory_order_acq_rel); }
  [[nodiscard]] std::optional<std::uint8_t> take_sipi();
  // Whether LINT0 passes the 8259's interrupts through (virtual wire mode).
  [[nodiscard]] bool accepts_ext_int() const;

  // The timer: when it fires next in guest nanoseconds (empty: never), and firing it when it is due.
  [[nodiscard]] std::optional<std::uint64_t> next_timer_ns() const;
  void poll_timer();

  // The register page. The mode (set_base()) is loaded before it, the TSC deadline after it; both belong to
  // the processor's MSRs.
  [[nodiscard]] LapicState save();
  [[nodiscard]] Result<void> load(const LapicState& state);

 private:
  [[nodiscard]] std::uint32_t processor_priority() const;
  void set_irr(std::uint8_t vector, bool level);
  void fire_lvt(std::uint32_t lvt);
  void send_ipi(std::uint64_t icr);
  [[nodiscard]] std::uint32_t x2apic_logical_id() const;
  // Bits that may be set in a write to the x2APIC MSR of the register; empty: not writable.
  [[nodiscard]] static std::optional<std::uint64_t> msr_writable_bits(std::uint32_t offset);
  void set_divide(std::uint32_t divide);
  void start_timer(std::uint32_t initial_count);
  [[nodiscard]] std::uint32_t current_count() const;
  [[nodiscard]] std::uint64_t timer_tick_ns() const;
  void note_error(std::uint32_t bit);

  using Bits = std::array<std::atomic<std::uint32_t>, 8>;
  static void clear(Bits& bits);
  static int highest(const Bits& bits);

  const std::uint32_t id_;
  const Wiring wiring_;
  std::atomic<std::uint64_t> base_;

  Bits irr_{};
  Bits isr_{};
  Bits tmr_{};
  std::atomic<bool> nmi_pending_ = false;
  std::atomic<bool> init_pending_ = false;
  std::atomic<int> sipi_ = -1;

  std::atomic<std::uint32_t> task_priority_ = 0;
  std::atomic<std::uint32_t> spurious_ = 0xff;
  std::atomic<std::uint32_t> logical_destination_ = 0;
  std::atomic<std::uint32_t> destination_format_ = 0xffffffff;
  std::uint32_t error_status_ = 0;
  std::atomic<std::uint32_t> error_pending_ = 0;
  std::uint64_t icr_ = 0;
  std::uint32_t lvt_timer_ = 0x10000;
  std::uint32_t lvt_cmci_ = 0x10000;
  std::uint32_t lvt_thermal_ = 0x10000;
  std::uint32_t lvt_performance_ = 0x10000;
  std::atomic<std::uint32_t> lvt_lint0_ = 0x10000;
  std::uint32_t lvt_lint1_ = 0x10000;
  std::atomic<std::uint32_t> lvt_error_ = 0x10000;
  std::uint32_t initial_count_ = 0;
  std::uint32_t divide_ = 0;
  std::uint64_t timer_start_ns_ = 0;  // one-shot and periodic: when the present period began
  bool timer_armed_ = false;
  std::uint64_t tsc_deadline_ = 0;
};

}  // namespace wisp::soft
