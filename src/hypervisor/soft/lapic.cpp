#include "hypervisor/soft/lapic.h"

#include <algorithm>
#include <bit>

#include "hypervisor/soft/lapic_regs.h"

namespace wisp::soft {

using namespace lapic_regs;

namespace {

// Products of times and frequencies do not fit 64 bits.
__extension__ typedef unsigned __int128 Wide;

__extension__ using Wide = Wide;
constexpr std::uint64_t kMaxTimerNs = 1ULL << 62;

}  // namespace

Lapic::Lapic(std::uint32_t id, Wiring wiring) : id_(id), wiring_(std::move(wiring)), base_(0) {
  reset(false);
}

void Lapic::clear(Bits& bits) {
  for (auto& word : bits) {
    word.store(0, std::memory_order_relaxed);
  }
}

int Lapic::highest(const Bits& bits) {
  for (int word = 7; word >= 0; --word) {
    const std::uint32_t value = bits[static_cast<std::size_t>(word)].load(std::memory_order_acquire);
    if (value != 0) {
      return word * 32 + 31 - std::countl_zero(value);
    }
  }
  return -1;
}

void Lapic::reset(bool after_init) {
  if (!after_init) {
    base_.store(kApicBaseDefault | kApicBaseEnable | (id_ == 0 ? kApicBaseBsp : 0),
                std::memory_order_relaxed);
    init_pending_.store(false, std::memory_order_relaxed);
    nmi_pending_.store(false, std::memory_order_relaxed);
    sipi_.store(-1, std::memory_order_relaxed);
  }
  // INIT leaves a start-up message alone: one that is pending now came after the INIT (see accept()), and its
  // sender does not repeat it for ever.
  clear(irr_);
  clear(isr_);
  clear(tmr_);
  task_priority_ = 0;
  spurious_ = 0xff;
  // In x2APIC mode, which INIT does not leave, the logical id follows from the id.
  logical_destination_ = x2apic() ? x2apic_logical_id() : 0;
  destination_format_ = 0xffffffff;
  error_status_ = 0;
  error_pending_ = 0;
  icr_ = 0;
  lvt_timer_ = lvt_cmci_ = lvt_thermal_ = lvt_performance_ = lvt_lint1_ = kLvtMasked;
  lvt_lint0_ = kLvtMasked;
  lvt_error_ = kLvtMasked;
  initial_count_ = 0;
  divide_ = 0;
  timer_armed_ = false;
  tsc_deadline_ = 0;
}

bool Lapic::set_base(std::uint64_t value) {
  const bool was_enabled = enabled();
  const bool was_x2apic = x2apic();
  const bool now_enabled = (value & kApicBaseEnable) != 0;
  const bool now_x2apic = (value & kApicBaseX2apic) != 0;
  // SDM figure 11-27: x2APIC needs enable; it is left only through disabled; disabled goes only to xAPIC.
  if ((now_x2apic && !now_enabled) || (was_x2apic && now_enabled && !now_x2apic) ||
      (!was_enabled && now_x2apic)) {
    return false;
  }
  const std::uint64_t known = 0xfffffff000ULL | kApicBaseBsp | kApicBaseX2apic | kApicBaseEnable;
  if ((value & ~known) != 0) {
    return false;
  }
  base_.store(value, std::memory_order_relaxed);
  if (was_enabled && !now_enabled) {
    reset(true);
  } else if (now_x2apic && !was_x2apic) {
    logical_destination_ = x2apic_logical_id();
    icr_ = 0;
  }
  return true;
}

std::uint32_t Lapic::x2apic_logical_id() const {
  return (id_ >> 4) << 16 | 1U << (id_ & 0xf);
}

std::uint32_t Lapic::processor_priority() const {
  const int in_service = highest(isr_);
  const std::uint32_t service_class = in_service < 0 ? 0 : static_cast<std::uint32_t>(in_service) & 0xf0;
  const std::uint32_t task = task_priority_.load(std::memory_order_relaxed);
  return (task & 0xf0) >= service_class ? task : service_class;
}

bool Lapic::accepts_fixed() const {
  return enabled() && (spurious_.load(std::memory_order_relaxed) & kSvrEnabled) != 0;
}

std::uint32_t Lapic::arbitration_priority() const {
  return processor_priority();
}

std::optional<std::uint8_t> Lapic::pending_vector() const {
  const int vector = highest(irr_);
  if (vector < 0 || !accepts_fixed() ||
      (static_cast<std::uint32_t>(vector) & 0xf0) <= (processor_priority() & 0xf0)) {
    return std::nullopt;
  }
  return static_cast<std::uint8_t>(vector);
}

void Lapic::acknowledge(std::uint8_t vector) {
  const std::uint32_t bit = 1U << (vector % 32);
  isr_[vector / 32].fetch_or(bit, std::memory_order_relaxed);
  irr_[vector / 32].fetch_and(~bit, std::memory_order_acq_rel);
}

void Lapic::eoi() {
  const int vector = highest(isr_);
  if (vector < 0) {
    return;
  }
  const auto index = static_cast<std::size_t>(vector) / 32;
  const std::uint32_t bit = 1U << (vector % 32);
  isr_[index].fetch_and(~bit, std::memory_order_relaxed);
  if ((tmr_[index].load(std::memory_order_relaxed) & bit) != 0 && wiring_.broadcast_eoi) {
    wiring_.broadcast_eoi(static_cast<std::uint8_t>(vector));
  }
}

void Lapic::set_irr(std::uint8_t vector, bool level) {
  const std::uint32_t bit = 1U << (vector % 32);
  if (level) {
    tmr_[vector / 32].fetch_or(bit, std::memory_order_relaxed);
  } else {
    tmr_[vector / 32].fetch_and(~bit, std::memory_order_relaxed);
  }
  irr_[vector / 32].fetch_or(bit, std::memory_order_release);
}

bool Lapic::accept(const ApicMessage& message) {
  if (!enabled()) {
    return false;
  }
  switch (message.mode) {
    case DeliveryMode::kFixed:
    case DeliveryMode::kLowestPriority:
      if (!accepts_fixed()) {
        return false;
      }
      if (message.vector < 16) {
        note_error(kEsrReceiveIllegalVector);
        return false;
      }
      set_irr(message.vector, message.level_triggered);
      break;
    case DeliveryMode::kNmi:
      nmi_pending_.store(true, std::memory_order_release);
      break;
    case DeliveryMode::kInit:
      // Takes with it a start-up message that came before; one that follows stays for after the INIT.
      sipi_.store(-1, std::memory_order_relaxed);
      init_pending_.store(true, std::memory_order_release);
      break;
    case DeliveryMode::kStartUp:
      sipi_.store(message.vector, std::memory_order_release);
      break;
    default:  // SMI and ExtINT have no receiver here; 3 is reserved
      return false;
  }
  if (wiring_.wake) {
    wiring_.wake();
  }
  return true;
}

std::optional<std::uint8_t> Lapic::take_sipi() {
  const int vector = sipi_.exchange(-1, std::memory_order_acq_rel);
  return vector < 0 ? std::nullopt : std::optional(static_cast<std::uint8_t>(vector));
}

bool Lapic::matches(const ApicMessage& message) const {
  const bool wide = x2apic();
  const std::uint32_t destination = message.destination;
  if (destination == 0xffffffff || (destination == 0xff && !wide)) {
    return true;
  }
  if (!message.logical) {
    return destination == id_;
  }
  const std::uint32_t own = logical_destination_.load(std::memory_order_relaxed);
  if (wide) {
    return (own >> 16) == (destination >> 16) && (own & destination & 0xffff) != 0;
  }
  const std::uint32_t own_logical = own >> 24;
  if (destination > 0xff) {
    return false;
  }
  if (destination_format_.load(std::memory_order_relaxed) >> 28 == 0xf) {
    return (own_logical & destination) != 0;  // flat
  }
  return (own_logical >> 4) == (destination >> 4) && (own_logical & destination & 0xf) != 0;
}

bool Lapic::accepts_ext_int() const {
  const std::uint32_t lvt = lvt_lint0_.load(std::memory_order_relaxed);
  return !enabled() ||
         ((lvt & kLvtMasked) == 0 && ((lvt >> 8) & 7) == static_cast<std::uint32_t>(DeliveryMode::kExtInt));
}

void Lapic::fire_lvt(std::uint32_t lvt) {
  if ((lvt & kLvtMasked) == 0) {
    accept({.mode = static_cast<DeliveryMode>((lvt >> 8) & 7),
            .vector = static_cast<std::uint8_t>(lvt),
            .level_triggered = false,
            .logical = false,
            .destination = id_});
  }
}

void Lapic::note_error(std::uint32_t bit) {
  // An error LVT with an illegal vector comes back here once, with another bit.
  if ((error_pending_.fetch_or(bit, std::memory_order_acq_rel) & bit) == 0) {
    fire_lvt(lvt_error_.load(std::memory_order_relaxed));
  }
}

void Lapic::send_ipi(std::uint64_t icr) {
  const auto low = static_cast<std::uint32_t>(icr);
  ApicMessage message{.mode = static_cast<DeliveryMode>((low >> 8) & 7),
                      .vector = static_cast<std::uint8_t>(low),
                      .level_triggered = false,
                      .logical = (low & (1U << 11)) != 0,
                      .destination = x2apic() ? static_cast<std::uint32_t>(icr >> 32)
                                              : widen_destination(static_cast<std::uint32_t>(icr >> 56),
                                                                  (low & (1U << 11)) != 0)};
  if (message.mode == DeliveryMode::kInit && (low & (1U << 15)) != 0 && (low & (1U << 14)) == 0) {
    return;  // INIT level de-assert: has no effect on processors since the P6
  }
  if ((message.mode == DeliveryMode::kFixed || message.mode == DeliveryMode::kLowestPriority) &&
      message.vector < 16) {
    note_error(kEsrSendIllegalVector);
    return;
  }
  switch ((low >> 18) & 3) {
    case 0:
      wiring_.bus->deliver(message, this, false);
      break;
    case 1:
      accept(message);
      break;
    default:
      message.destination = 0xffffffff;
      message.logical = false;
      wiring_.bus->deliver(message, this, ((low >> 18) & 3) == 3);
      break;
  }
}

std::uint64_t Lapic::timer_tick_ns() const {
  // The bus clock is 1 GHz; divide configuration bits 3,1,0: 2, 4, 8, 16, 32, 64, 128, 1.
  const std::uint32_t shift = ((divide_ & 3) | ((divide_ >> 1) & 4)) + 1;
  return 1ULL << (shift & 7);
}

void Lapic::start_timer(std::uint32_t initial_count) {
  initial_count_ = initial_count;
  timer_armed_ = initial_count != 0 && timer_mode(lvt_timer_) != kTimerTscDeadline;
  timer_start_ns_ = wiring_.now_ns();
}

void Lapic::set_divide(std::uint32_t divide) {
  // The count goes on from where it is, at the new pace.
  const std::uint32_t gone = timer_armed_ ? initial_count_ - current_count() : 0;
  divide_ = divide;
  if (timer_armed_) {
    timer_start_ns_ = wiring_.now_ns() - gone * timer_tick_ns();
  }
}

std::uint32_t Lapic::current_count() const {
  if (!timer_armed_) {
    return 0;
  }
  const std::uint64_t ticks = (wiring_.now_ns() - timer_start_ns_) / timer_tick_ns();
  if (timer_mode(lvt_timer_) == kTimerPeriodic) {
    return initial_count_ - static_cast<std::uint32_t>(ticks % initial_count_);
  }
  return ticks >= initial_count_ ? 0 : initial_count_ - static_cast<std::uint32_t>(ticks);
}

std::optional<std::uint64_t> Lapic::next_timer_ns() const {
  if (timer_mode(lvt_timer_) == kTimerTscDeadline) {
    if (tsc_deadline_ == 0) {
      return std::nullopt;
    }
    const std::uint64_t tsc = wiring_.read_tsc();
    if (tsc_deadline_ <= tsc) {
      return wiring_.now_ns();
    }
    const auto wait =
        static_cast<Wide>(tsc_deadline_ - tsc) * 1'000'000 / (wiring_.tsc_khz == 0 ? 1 : wiring_.tsc_khz);
    return wiring_.now_ns() + static_cast<std::uint64_t>(std::min<Wide>(wait + 1, kMaxTimerNs));
  }
  if (!timer_armed_) {
    return std::nullopt;
  }
  // Distances, not times, are compared: the start of a restored period may lie before the clock's zero.
  const std::uint64_t period = initial_count_ * timer_tick_ns();
  const std::uint64_t now = wiring_.now_ns();
  const std::uint64_t elapsed = now - timer_start_ns_;
  return elapsed >= period ? now : now + (period - elapsed);
}

void Lapic::poll_timer() {
  if (timer_mode(lvt_timer_) == kTimerTscDeadline) {
    if (tsc_deadline_ != 0 && wiring_.read_tsc() >= tsc_deadline_) {
      tsc_deadline_ = 0;
      fire_lvt(lvt_timer_);
    }
    return;
  }
  if (!timer_armed_) {
    return;
  }
  const std::uint64_t period = initial_count_ * timer_tick_ns();
  const std::uint64_t elapsed = wiring_.now_ns() - timer_start_ns_;
  if (elapsed < period) {
    return;
  }
  if (timer_mode(lvt_timer_) == kTimerPeriodic) {
    timer_start_ns_ += elapsed / period * period;
  } else {
    timer_armed_ = false;
  }
  fire_lvt(lvt_timer_);
}

}  // namespace wisp::soft
