// What the guest reads and writes: register page, MSRs, and the saved form.
#include <algorithm>

#include "base/bytes.h"
#include "hypervisor/soft/lapic.h"
#include "hypervisor/soft/lapic_regs.h"

namespace wisp::soft {

using namespace lapic_regs;

std::uint64_t Lapic::tsc_deadline() const {
  return timer_mode(lvt_timer_) == kTimerTscDeadline ? tsc_deadline_ : 0;
}

void Lapic::set_tsc_deadline(std::uint64_t tsc) {
  if (timer_mode(lvt_timer_) == kTimerTscDeadline) {
    poll_timer();  // one that has passed has fired, whatever comes after it
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
    case kRegEoi:
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
  if ((offset & 0xf) != 0) {
    return;
  }
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
      poll_timer();
      spurious_ = value & 0x1ff;
      if ((value & kSvrEnabled) == 0) {
        for (std::uint32_t* entry :
             {&lvt_timer_, &lvt_cmci_, &lvt_thermal_, &lvt_performance_, &lvt_lint1_}) {
          *entry |= kLvtMasked;
        }
        lvt_lint0_ |= kLvtMasked;
        lvt_error_ |= kLvtMasked;
      }
      break;
    case kRegEsr:
      // A write latches what happened since the last one.
      error_status_ = error_pending_.exchange(0, std::memory_order_acq_rel);
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
      poll_timer();
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
        poll_timer();
        start_timer(value);
      }
      break;
    case kRegDivide:
      poll_timer();
      set_divide(value & 0xb);
      break;
    case kRegSelfIpi:
      if (!x2apic()) {
        note_error(kEsrIllegalRegister);
      } else if ((value & 0xff) < 16) {
        note_error(kEsrSendIllegalVector);
      } else {
        accept(
            {.mode = DeliveryMode::kFixed, .vector = static_cast<std::uint8_t>(value), .destination = id_});
      }
      break;
    case kRegId:
    case kRegVersion:
    case kRegApr:
    case kRegPpr:
    case kRegCurrentCount:
      break;  // read-only
    default:
      if (!x2apic() && (offset < kRegIsr || offset >= kRegEsr)) {
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
      return offset >= kRegIsr && offset < kRegEsr ? std::optional<std::uint64_t>(read(offset))
                                                   : std::nullopt;
  }
}

std::optional<std::uint64_t> Lapic::msr_writable_bits(std::uint32_t offset) {
  switch (offset) {
    case kRegEoi:
    case kRegEsr:
      return 0;
    case kRegTpr:
    case kRegSelfIpi:
      return 0xff;
    case kRegSvr:
      return 0x3ff;  // bit 9, focus checking, is accepted and dropped: Linux sets it on some paths
    case kRegLvtTimer:
      return 0x710ff;
    case kRegLvtCmci:
    case kRegLvtThermal:
    case kRegLvtPerformance:
      return 0x117ff;
    case kRegLvtLint0:
    case kRegLvtLint1:
      return 0x1f7ff;
    case kRegLvtError:
      return 0x110ff;
    case kRegIcrLow:
      return 0xffffffff000cdfffULL;
    case kRegInitialCount:
      return 0xffffffff;
    case kRegDivide:
      return 0xb;
    default:
      return std::nullopt;
  }
}

bool Lapic::write_msr(std::uint32_t index, std::uint64_t value) {
  if (!x2apic() || index < 0x800 || index > 0x83f) {
    return false;
  }
  const std::uint32_t offset = (index - 0x800) << 4;
  const auto writable = msr_writable_bits(offset);
  if (!writable || (value & ~*writable) != 0) {
    return false;
  }
  if (offset == kRegIcrLow) {
    icr_ = value & 0xffffffff000ccfffULL;
    send_ipi(icr_);
  } else {
    write(offset, static_cast<std::uint32_t>(value));
  }
  return true;
}

LapicState Lapic::save() {
  poll_timer();  // what is due is saved as a pending interrupt: a count of zero says "expired long ago"
  LapicState state;
  const auto put = [&](std::uint32_t offset, std::uint32_t value) {
    store_le(state.regs.data() + offset, value);
  };
  for (const std::uint32_t offset : {kRegId,           kRegVersion,
                                     kRegTpr,          kRegPpr,
                                     kRegLdr,          kRegDfr,
                                     kRegSvr,          kRegEsr,
                                     kRegLvtCmci,      kRegIcrLow,
                                     kRegIcrHigh,      kRegLvtTimer,
                                     kRegLvtThermal,   kRegLvtPerformance,
                                     kRegLvtLint0,     kRegLvtLint1,
                                     kRegLvtError,     kRegInitialCount,
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
  logical_destination_ = x2apic() ? x2apic_logical_id() : get(kRegLdr) & 0xff000000;
  destination_format_ = get(kRegDfr) | 0x0fffffff;
  spurious_ = get(kRegSvr) & 0x1ff;
  error_status_ = get(kRegEsr) & 0xff;
  error_pending_ = 0;
  const std::uint32_t icr_high = get(kRegIcrHigh) & (x2apic() ? 0xffffffff : 0xff000000);
  icr_ = (get(kRegIcrLow) & 0xccfff) | static_cast<std::uint64_t>(icr_high) << 32;
  // An APIC that is software-disabled has every entry masked, but for the pins, which a machine without
  // firmware sets up as firmware would have (virtual wire).
  const std::uint32_t forced = (spurious_ & kSvrEnabled) != 0 ? 0 : kLvtMasked;
  lvt_cmci_ = (get(kRegLvtCmci) & 0x107ff) | forced;
  lvt_timer_ = (get(kRegLvtTimer) & 0x700ff) | forced;
  lvt_thermal_ = (get(kRegLvtThermal) & 0x107ff) | forced;
  lvt_performance_ = (get(kRegLvtPerformance) & 0x107ff) | forced;
  lvt_lint0_ = get(kRegLvtLint0) & 0x1a7ff;
  lvt_lint1_ = get(kRegLvtLint1) & 0x1a7ff;
  lvt_error_ = (get(kRegLvtError) & 0x100ff) | forced;
  tsc_deadline_ = 0;
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
      timer_start_ns_ -= gone * timer_tick_ns();
    }
  }
  return {};
}

}  // namespace wisp::soft
