#include "hypervisor/soft/lapic.h"

#include <algorithm>
#include <bit>

#include "base/bytes.h"

namespace wisp::soft {
namespace {

// Register offsets (SDM table 11-1).
constexpr std::uint32_t kRegId = 0x20;
constexpr std::uint32_t kRegVersion = 0x30;
constexpr std::uint32_t kRegTpr = 0x80;
constexpr std::uint32_t kRegApr = 0x90;
constexpr std::uint32_t kRegPpr = 0xa0;
constexpr std::uint32_t kRegEoi = 0xb0;
constexpr std::uint32_t kRegLdr = 0xd0;
constexpr std::uint32_t kRegDfr = 0xe0;
constexpr std::uint32_t kRegSvr = 0xf0;
constexpr std::uint32_t kRegIsr = 0x100;
constexpr std::uint32_t kRegTmr = 0x180;
constexpr std::uint32_t kRegIrr = 0x200;
constexpr std::uint32_t kRegEsr = 0x280;
constexpr std::uint32_t kRegLvtCmci = 0x2f0;
constexpr std::uint32_t kRegIcrLow = 0x300;
constexpr std::uint32_t kRegIcrHigh = 0x310;
constexpr std::uint32_t kRegLvtTimer = 0x320;
constexpr std::uint32_t kRegLvtThermal = 0x330;
constexpr std::uint32_t kRegLvtPerformance = 0x340;
constexpr std::uint32_t kRegLvtLint0 = 0x350;
constexpr std::uint32_t kRegLvtLint1 = 0x360;
constexpr std::uint32_t kRegLvtError = 0x370;
constexpr std::uint32_t kRegInitialCount = 0x380;
constexpr std::uint32_t kRegCurrentCount = 0x390;
constexpr std::uint32_t kRegDivide = 0x3e0;
constexpr std::uint32_t kRegSelfIpi = 0x3f0;

// Integrated APIC, 7 LVT entries (max index 6), no EOI-broadcast suppression.
constexpr std::uint32_t kVersion = 0x00060014;

constexpr std::uint32_t kLvtMasked = 1U << 16;
constexpr std::uint32_t kSvrEnabled = 1U << 8;
constexpr std::uint32_t kTimerModeShift = 17;
constexpr std::uint32_t kTimerOneShot = 0;
constexpr std::uint32_t kTimerPeriodic = 1;
constexpr std::uint32_t kTimerTscDeadline = 2;
constexpr std::uint32_t kEsrSendIllegalVector = 1U << 5;
constexpr std::uint32_t kEsrReceiveIllegalVector = 1U << 6;
constexpr std::uint32_t kEsrIllegalRegister = 1U << 7;

constexpr std::uint64_t kMaxTimerNs = 1ULL << 62;

std::uint32_t timer_mode(std::uint32_t lvt) { return (lvt >> kTimerModeShift) & 3; }

}  // namespace

Lapic::Lapic(std::uint32_t id, Wiring wiring) : id_(id), wiring_(std::move(wiring)), base_(0) { reset(false); }

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
    base_.store(kApicBaseDefault | kApicBaseEnable | (id_ == 0 ? kApicBaseBsp : 0), std::memory_order_relaxed);
    init_pending_.store(false, std::memory_order_relaxed);
    nmi_pending_.store(false, std::memory_order_relaxed);
  }
  sipi_.store(-1, std::memory_order_relaxed);
  clear(irr_);
  clear(isr_);
  clear(tmr_);
  task_priority_ = 0;
  spurious_ = 0xff;
  logical_destination_ = 0;
  destination_format_ = 0xffffffff;
  error_status_ = error_pending_ = 0;
  icr_ = 0;
  lvt_timer_ = lvt_cmci_ = lvt_thermal_ = lvt_performance_ = lvt_lint1_ = lvt_error_ = kLvtMasked;
  lvt_lint0_ = kLvtMasked;
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
  if (was_enabled && !now_enabled) {
    const std::uint64_t keep = value;
    reset(true);
    base_.store(keep, std::memory_order_relaxed);
    return true;
  }
  base_.store(value, std::memory_order_relaxed);
  if (now_x2apic && !was_x2apic) {
    logical_destination_ = ((id_ >> 4) << 16) | (1U << (id_ & 0xf));
    icr_ = 0;
  }
  return true;
}

std::uint32_t Lapic::processor_priority() const {
  const int in_service = highest(isr_);
  const std::uint32_t service_class = in_service < 0 ? 0 : static_cast<std::uint32_t>(in_service) & 0xf0;
  const std::uint32_t task = task_priority_.load(std::memory_order_relaxed);
  return (task & 0xf0) >= service_class ? task : service_class;
}

std::uint32_t Lapic::arbitration_priority() const { return processor_priority(); }

std::optional<std::uint8_t> Lapic::pending_vector() const {
  const int vector = highest(irr_);
  if (vector < 0 || !enabled() || (spurious_.load(std::memory_order_relaxed) & kSvrEnabled) == 0 ||
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

void Lapic::accept(const ApicMessage& message) {
  if (!enabled()) {
    return;
  }
  switch (message.mode) {
    case DeliveryMode::kFixed:
    case DeliveryMode::kLowestPriority:
      if (message.vector < 16 || (spurious_.load(std::memory_order_relaxed) & kSvrEnabled) == 0) {
        return;
      }
      set_irr(message.vector, message.level_triggered);
      break;
    case DeliveryMode::kNmi:
      nmi_pending_.store(true, std::memory_order_release);
      break;
    case DeliveryMode::kInit:
      init_pending_.store(true, std::memory_order_release);
      break;
    case DeliveryMode::kStartUp:
      sipi_.store(message.vector, std::memory_order_release);
      break;
    case DeliveryMode::kSmi:
    case DeliveryMode::kExtInt:
      return;
  }
  if (wiring_.wake) {
    wiring_.wake();
  }
}

std::optional<std::uint8_t> Lapic::take_sipi() {
  const int vector = sipi_.exchange(-1, std::memory_order_acq_rel);
  return vector < 0 ? std::nullopt : std::optional(static_cast<std::uint8_t>(vector));
}

bool Lapic::matches(const ApicMessage& message) const {
  const bool wide = x2apic();
  if (message.destination == 0xffffffff || (message.destination == 0xff && !wide)) {
    return true;
  }
  if (!message.logical) {
    return message.destination == id_ || (wide && message.destination == 0xff && id_ != 0xff);
  }
  const std::uint32_t own = logical_destination_.load(std::memory_order_relaxed);
  if (wide) {
    return (own >> 16) == (message.destination >> 16) && (own & message.destination & 0xffff) != 0;
  }
  const std::uint32_t own_logical = own >> 24;
  if (destination_format_.load(std::memory_order_relaxed) >> 28 == 0xf) {
    return (own_logical & message.destination) != 0;  // flat
  }
  return (own_logical >> 4) == (message.destination >> 4) && (own_logical & message.destination & 0xf) != 0;
}

bool Lapic::accepts_ext_int() const {
  const std::uint32_t lvt = lvt_lint0_.load(std::memory_order_relaxed);
  return !enabled() || ((lvt & kLvtMasked) == 0 && ((lvt >> 8) & 7) == static_cast<std::uint32_t>(DeliveryMode::kExtInt));
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
  if ((error_pending_ & bit) == 0) {
    error_pending_ |= bit;
    fire_lvt(lvt_error_);
  }
}

void Lapic::send_ipi(std::uint64_t icr) {
  const auto low = static_cast<std::uint32_t>(icr);
  ApicMessage message{.mode = static_cast<DeliveryMode>((low >> 8) & 7),
                      .vector = static_cast<std::uint8_t>(low),
                      .level_triggered = false,
                      .logical = (low & (1U << 11)) != 0,
                      .destination = x2apic() ? static_cast<std::uint32_t>(icr >> 32)
                                              : static_cast<std::uint32_t>(icr >> 56)};
  if (message.mode == DeliveryMode::kInit && (low & (1U << 15)) != 0 && (low & (1U << 14)) == 0) {
    return;  // INIT level de-assert: has no effect on processors since the P6
  }
  if ((message.mode == DeliveryMode::kFixed || message.mode == DeliveryMode::kLowestPriority) && message.vector < 16) {
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
        static_cast<unsigned __int128>(tsc_deadline_ - tsc) * 1'000'000 / (wiring_.tsc_khz == 0 ? 1 : wiring_.tsc_khz);
    return wiring_.now_ns() + static_cast<std::uint64_t>(std::min<unsigned __int128>(wait + 1, kMaxTimerNs));
  }
  if (!timer_armed_) {
    return std::nullopt;
  }
  return timer_start_ns_ + initial_count_ * timer_tick_ns();
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

std::uint64_t Lapic::tsc_deadline() const {
  return timer_mode(lvt_timer_) == kTimerTscDeadline ? tsc_deadline_ : 0;
}

void Lapic::set_tsc_deadline(std::uint64_t tsc) {
  if (timer_mode(lvt_timer_) == kTimerTscDeadline) {
    tsc_deadline_ = tsc;
  }
}

std::uint32_t Lapic::read(std::uint32_t offset) {
  if ((offset & 0xf) != 0) {
    return 0;
  }
  const std::uint32_t word = (offset >> 4) & 7;
  switch (offset) {
    case kRegId:
      return x2apic() ? id_ : id_ << 24;
    case kRegVersion:
      return kVersion;
    case kRegTpr:
      return task_priority_;
    case kRegApr:
      return 0;
    case kRegPpr:
      return processor_priority();
    case kRegLdr:
      return logical_destination_;
    case kRegDfr:
      return destination_format_;
    case kRegSvr:
      return spurious_;
    case kRegEsr:
      return error_status_;
    case kRegLvtCmci:
      return lvt_cmci_;
    case kRegIcrLow:
      return static_cast<std::uint32_t>(icr_);
    case kRegIcrHigh:
      return static_cast<std::uint32_t>(icr_ >> 32);
    case kRegLvtTimer:
      return lvt_timer_;
    case kRegLvtThermal:
      return lvt_thermal_;
    case kRegLvtPerformance:
      return lvt_performance_;
    case kRegLvtLint0:
      return lvt_lint0_;
    case kRegLvtLint1:
      return lvt_lint1_;
    case kRegLvtError:
      return lvt_error_;
    case kRegInitialCount:
      return timer_mode(lvt_timer_) == kTimerTscDeadline ? 0 : initial_count_;
    case kRegCurrentCount:
      return current_count();
    case kRegDivide:
      return divide_;
    default:
      break;
  }
  if (offset >= kRegIsr && offset < kRegTmr) {
    return isr_[word];
  }
  if (offset >= kRegTmr && offset < kRegIrr) {
    return tmr_[word];
  }
  if (offset >= kRegIrr && offset < kRegEsr) {
    return irr_[word];
  }
  if (!x2apic()) {
    note_error(kEsrIllegalRegister);
  }
  return 0;
}

void Lapic::write(std::uint32_t offset, std::uint32_t value) {
  const bool software_enabled = (spurious_ & kSvrEnabled) != 0;
  const auto lvt = [&](std::uint32_t writable) {
    const std::uint32_t kept = value & (writable | kLvtMasked);
    return software_enabled ? kept : kept | kLvtMasked;
  };
  switch (offset) {
    case kRegTpr:
      task_priority_ = value & 0xff;
      break;
    case kRegEoi:
      eoi();
      break;
    case kRegLdr:
      if (!x2apic()) {
        logical_destination_ = value & 0xff000000;
      }
      break;
    case kRegDfr:
      if (!x2apic()) {
        destination_format_ = value | 0x0fffffff;
      }
      break;
    case kRegSvr:
      spurious_ = value & 0x1ff;
      if ((value & kSvrEnabled) == 0) {
        for (std::uint32_t* entry :
             {&lvt_timer_, &lvt_cmci_, &lvt_thermal_, &lvt_performance_, &lvt_lint1_, &lvt_error_}) {
          *entry |= kLvtMasked;
        }
        lvt_lint0_ |= kLvtMasked;
      }
      break;
    case kRegEsr:
      // A write latches what happened since the last one.
      error_status_ = error_pending_;
      error_pending_ = 0;
      break;
    case kRegLvtCmci:
      lvt_cmci_ = lvt(0x7ff);
      break;
    case kRegIcrLow:
      icr_ = (icr_ & ~0xffffffffULL) | (value & 0xccfff);
      send_ipi(icr_);
      break;
    case kRegIcrHigh:
      icr_ = (icr_ & 0xffffffffULL) | static_cast<std::uint64_t>(value & 0xff000000) << 32;
      break;
    case kRegLvtTimer: {
      const std::uint32_t before = timer_mode(lvt_timer_);
      lvt_timer_ = lvt(0x600ff);
      if ((before == kTimerTscDeadline) != (timer_mode(lvt_timer_) == kTimerTscDeadline)) {
        timer_armed_ = false;
        initial_count_ = 0;
        tsc_deadline_ = 0;
      }
      break;
    }
    case kRegLvtThermal:
      lvt_thermal_ = lvt(0x7ff);
      break;
    case kRegLvtPerformance:
      lvt_performance_ = lvt(0x7ff);
      break;
    case kRegLvtLint0:
      lvt_lint0_ = lvt(0xa7ff);
      break;
    case kRegLvtLint1:
      lvt_lint1_ = lvt(0xa7ff);
      break;
    case kRegLvtError:
      lvt_error_ = lvt(0xff);
      break;
    case kRegInitialCount:
      if (timer_mode(lvt_timer_) != kTimerTscDeadline) {
        start_timer(value);
      }
      break;
    case kRegDivide:
      divide_ = value & 0xb;
      break;
    case kRegSelfIpi:
      if (x2apic()) {
        accept({.mode = DeliveryMode::kFixed, .vector = static_cast<std::uint8_t>(value), .destination = id_});
        break;
      }
      [[fallthrough]];
    default:
      if (!x2apic()) {
        note_error(kEsrIllegalRegister);
      }
      break;
  }
}

std::optional<std::uint64_t> Lapic::read_msr(std::uint32_t index) {
  if (!x2apic() || index < 0x800 || index > 0x83f) {
    return std::nullopt;
  }
  const std::uint32_t offset = (index - 0x800) << 4;
  switch (offset) {
    case kRegEoi:
    case kRegDfr:
    case kRegIcrHigh:
    case kRegSelfIpi:
      return std::nullopt;
    case kRegIcrLow:
      return icr_;
    case kRegId:
    case kRegVersion:
    case kRegTpr:
    case kRegPpr:
    case kRegLdr:
    case kRegSvr:
    case kRegEsr:
    case kRegLvtCmci:
    case kRegLvtTimer:
    case kRegLvtThermal:
    case kRegLvtPerformance:
    case kRegLvtLint0:
    case kRegLvtLint1:
    case kRegLvtError:
    case kRegInitialCount:
    case kRegCurrentCount:
    case kRegDivide:
      return read(offset);
    default:
      return offset >= kRegIsr && offset < kRegEsr ? std::optional<std::uint64_t>(read(offset)) : std::nullopt;
  }
}

bool Lapic::write_msr(std::uint32_t index, std::uint64_t value) {
  if (!x2apic() || index < 0x800 || index > 0x83f) {
    return false;
  }
  const std::uint32_t offset = (index - 0x800) << 4;
  switch (offset) {
    case kRegIcrLow:
      icr_ = value & 0xffffffff000ccfffULL;
      send_ipi(icr_);
      return true;
    case kRegEoi:
    case kRegEsr:
      if (value != 0) {
        return false;
      }
      break;
    case kRegTpr:
    case kRegSelfIpi:
      if (value > 0xff) {
        return false;
      }
      break;
    case kRegSvr:
    case kRegLvtCmci:
    case kRegLvtTimer:
    case kRegLvtThermal:
    case kRegLvtPerformance:
    case kRegLvtLint0:
    case kRegLvtLint1:
    case kRegLvtError:
    case kRegInitialCount:
    case kRegDivide:
      if (value > 0xffffffff) {
        return false;
      }
      break;
    default:
      return false;
  }
  write(offset, static_cast<std::uint32_t>(value));
  return true;
}

LapicState Lapic::save() {
  LapicState state;
  const auto put = [&](std::uint32_t offset, std::uint32_t value) { store_le(state.regs.data() + offset, value); };
  for (const std::uint32_t offset :
       {kRegId, kRegVersion, kRegTpr, kRegPpr, kRegLdr, kRegDfr, kRegSvr, kRegEsr, kRegLvtCmci, kRegIcrLow, kRegIcrHigh,
        kRegLvtTimer, kRegLvtThermal, kRegLvtPerformance, kRegLvtLint0, kRegLvtLint1, kRegLvtError, kRegInitialCount,
        kRegCurrentCount, kRegDivide}) {
    put(offset, read(offset));
  }
  for (std::uint32_t word = 0; word < 8; ++word) {
    put(kRegIsr + word * 16, isr_[word]);
    put(kRegTmr + word * 16, tmr_[word]);
    put(kRegIrr + word * 16, irr_[word]);
  }
  return state;
}

Result<void> Lapic::load(const LapicState& state) {
  const auto get = [&](std::uint32_t offset) { return load_le<std::uint32_t>(state.regs.data() + offset); };
  const std::uint32_t saved_id = x2apic() ? get(kRegId) : get(kRegId) >> 24;
  if (saved_id != id_) {
    return fail("saved local APIC has id {}, expected {}", saved_id, id_);
  }
  task_priority_ = get(kRegTpr) & 0xff;
  logical_destination_ = get(kRegLdr);
  destination_format_ = get(kRegDfr) | 0x0fffffff;
  spurious_ = get(kRegSvr) & 0x1ff;
  error_status_ = get(kRegEsr) & 0xff;
  error_pending_ = 0;
  icr_ = get(kRegIcrLow) | static_cast<std::uint64_t>(get(kRegIcrHigh)) << 32;
  lvt_cmci_ = get(kRegLvtCmci) & 0x107ff;
  lvt_timer_ = get(kRegLvtTimer) & 0x700ff;
  lvt_thermal_ = get(kRegLvtThermal) & 0x107ff;
  lvt_performance_ = get(kRegLvtPerformance) & 0x107ff;
  lvt_lint0_ = get(kRegLvtLint0) & 0x1a7ff;
  lvt_lint1_ = get(kRegLvtLint1) & 0x1a7ff;
  lvt_error_ = get(kRegLvtError) & 0x100ff;
  divide_ = get(kRegDivide) & 0xb;
  for (std::uint32_t word = 0; word < 8; ++word) {
    // Vectors 0-15 do not exist.
    const std::uint32_t legal = word == 0 ? 0xffff0000 : 0xffffffff;
    isr_[word] = get(kRegIsr + word * 16) & legal;
    tmr_[word] = get(kRegTmr + word * 16) & legal;
    irr_[word] = get(kRegIrr + word * 16) & legal;
  }
  const std::uint32_t remaining = get(kRegCurrentCount);
  start_timer(get(kRegInitialCount));
  if (timer_armed_) {
    const std::uint32_t gone = initial_count_ - std::min(remaining, initial_count_);
    if (remaining == 0 && timer_mode(lvt_timer_) == kTimerOneShot) {
      timer_armed_ = false;
    } else {
      timer_start_ns_ -= std::min(timer_start_ns_, gone * timer_tick_ns());
    }
  }
  return {};
}

}  // namespace wisp::soft
