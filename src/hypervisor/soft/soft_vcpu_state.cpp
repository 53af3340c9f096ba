// Making a processor, and its state in and out.
#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "hypervisor/cpuid_fit.h"
#include "hypervisor/power_up.h"
#include "hypervisor/soft/lapic_regs.h"
#include "hypervisor/soft/soft_cpuid.h"
#include "hypervisor/soft/soft_state.h"
#include "hypervisor/soft/soft_vcpu.h"

namespace wisp::soft {
namespace {

// MTRRs on, write-back where no range says else: no firmware sets it.
constexpr std::uint64_t kPowerUpMtrr = 0x806;
constexpr std::size_t kMostMsrs = 4096;

const CpuidEntry* find_leaf(std::span<const CpuidEntry> entries, std::uint32_t leaf) {
  const auto found = std::ranges::find(entries, leaf, &CpuidEntry::leaf);
  return found != entries.end() ? &*found : nullptr;
}

// Deadline timers are loaded after the local APIC's mode and the counter; see kvm_msrs.h.
bool handled_apart(std::uint32_t index) {
  return index == msr::kTsc || index == msr::kTscDeadline || index == msr::kArchCapabilities;
}

}  // namespace

SoftVcpu::SoftVcpu(const SoftVmParts& parts, const SoftVcpuConfig& config) : parts_(parts), config_(config) {}

SoftVcpu::~SoftVcpu() = default;

Result<std::unique_ptr<SoftVcpu>> SoftVcpu::create(const SoftVmParts& parts, const SoftVcpuConfig& config) {
  std::unique_ptr<SoftVcpu> vcpu(new SoftVcpu(parts, config));
  if (auto done = vcpu->set_up(); !done) {
    return with_context(fmt::format("vCPU {}", config.index), done.error());
  }
  return vcpu;
}

Result<void> SoftVcpu::set_up() {
  cpuid_ = soft_cpuid({.topology = config_.topology,
                       .index = config_.index,
                       .tsc_khz = static_cast<std::uint32_t>(parts_.clock.tsc_khz()),
                       .host = host_features(),
                       .x87_bits = host_x87_bits()});
  WISP_ASSIGN(processor_, Processor::create(parts_.memory, *this, *this, parts_.code));
  cpu().id = config_.apic_id;
  cpu().tsc_offset = parts_.tsc_offset;
  seeded_ = parts_.seed;
  if (parts_.virtual_clock != nullptr) {
    parts_.virtual_clock->attach(cpu());
  }
  lapic_.emplace(
      config_.apic_id,
      Lapic::Wiring{.bus = &parts_.chipset.bus(),
                    .wake = [this] { wake(); },
                    .broadcast_eoi = [this](std::uint8_t vector) { parts_.chipset.ioapic().eoi(vector); },
                    .now_ns = [this] { return parts_.clock.now_ns(); },
                    .read_tsc = [this] { return parts_.clock.tsc() + cpu().tsc_offset; },
                    .tsc_khz = parts_.clock.tsc_khz()});
  WISP_ASSIGN(timer_, parts_.loop.timer([this] { wake(); }));
  WISP_TRY(reset());
  party_.cpu = &cpu();
  party_.wake = [this] { wake(); };
  party_.serve = [this](std::uint32_t bits) { serve_requests(bits); };
  parts_.requests.add(&party_);
  parts_.chipset.bus().add(&*lapic_);
  return {};
}

Result<void> SoftVcpu::check_no_access_pending() {
  const IoState& io = cpu().io;
  if (access_pending_ || io.waiting || io.answer_count != 0 || writes_told_ < io.write_count) {
    return fail("vCPU {} waits for a port or MMIO access to be completed; kick it and run it once more",
                config_.index);
  }
  return {};
}

Result<CpuRegs> SoftVcpu::regs() {
  return regs_of(cpu());
}

Result<void> SoftVcpu::set_regs(const CpuRegs& regs) {
  soft::set_regs(cpu(), regs);
  shut_down_ = false;
  return {};
}

Result<CpuSpecialRegs> SoftVcpu::special_regs() {
  CpuSpecialRegs sregs = special_regs_of(cpu());
  sregs.cr8 = lapic_->cr8();
  sregs.apic_base = lapic_->base();
  return sregs;
}

Result<void> SoftVcpu::set_special_regs(const CpuSpecialRegs& sregs) {
  return load_special_regs(sregs);
}

// As a loader may: also by ways that a guest must not take in one step.
bool SoftVcpu::force_apic_base(std::uint64_t value) {
  const std::uint64_t now = lapic_->base();
  if (value == now || lapic_->set_base(value)) {
    return true;
  }
  // Through disabled and xAPIC mode, from which every mode can be reached.
  const std::uint64_t plain = now & ~(kApicBaseEnable | kApicBaseX2apic);
  (void)lapic_->set_base(plain);
  (void)lapic_->set_base(plain | kApicBaseEnable);
  if (lapic_->set_base(value)) {
    return true;
  }
  (void)lapic_->set_base(now);
  return false;
}

Result<void> SoftVcpu::load_special_regs(const CpuSpecialRegs& sregs) {
  if (!force_apic_base(sregs.apic_base)) {
    return fail("vCPU {}: {:#x} is no base of a local APIC", config_.index, sregs.apic_base);
  }
  WISP_TRY(soft::set_special_regs(cpu(), sregs));
  lapic_->set_cr8(static_cast<std::uint8_t>(sregs.cr8));
  processor_->core().mmu.flush_all();
  shut_down_ = false;
  return {};
}

Result<CpuState> SoftVcpu::save() {
  WISP_TRY(check_no_access_pending());
  take_init_and_startup();
  Cpu& cpu = processor_->cpu();
  CpuState state;
  state.regs = regs_of(cpu);
  WISP_ASSIGN(state.sregs, special_regs());
  state.debug = {.db = cpu.dr, .dr6 = cpu.dr6, .dr7 = cpu.dr7};
  state.xsave = xsave_of(cpu);
  state.xcr0 = cpu.xcr0;
  state.lapic = lapic_->save();
  state.msrs.push_back({.index = msr::kTsc, .value = parts_.clock.tsc() + cpu.tsc_offset});
  const auto plain = msrs_of(cpu);
  state.msrs.insert(state.msrs.end(), plain.begin(), plain.end());
  state.msrs.push_back({.index = msr::kArchCapabilities, .value = kSoftArchCapabilities});
  state.msrs.push_back({.index = msr::kTscDeadline, .value = lapic_->tsc_deadline()});
  state.tsc_khz = parts_.clock.tsc_khz();
  state.run_state = cpu.halted ? CpuRunState::kHalted : run_state_;
  state.events.interrupt.shadow = cpu.interrupt_shadow;
  state.events.nmi.masked = cpu.nmi_masked;
  state.events.nmi.pending = nmi_waits_ || lapic_->nmi_pending();
  if (loaded_event_) {
    const Fault& fault = loaded_event_->fault;
    switch (loaded_event_->kind) {
      case EventKind::kNmi:
        state.events.nmi.injected = true;
        break;
      case EventKind::kExternal:
        state.events.interrupt.injected = true;
        state.events.interrupt.vector = fault.vector;
        break;
      default:
        state.events.exception = {.injected = true,
                                  .vector = fault.vector,
                                  .has_error_code = fault.has_error_code,
                                  .error_code = fault.error_code};
        break;
    }
  }
  state.cpuid = cpuid_;
  return state;
}

Result<void> SoftVcpu::load(const CpuState& state) {
  WISP_TRY(check_no_access_pending());
  if (state.run_state > CpuRunState::kSipiReceived) {
    return fail("saved CPU state has an unknown run state {}", static_cast<unsigned>(state.run_state));
  }
  if (!state.cpuid.empty() && state.cpuid != cpuid_) {
    const CpuidEntry* leaf = find_leaf(state.cpuid, 1);
    if (leaf == nullptr) {
      return fail("saved CPU state has a CPUID without leaf 1");
    }
    if (leaf->ebx >> 24 != (config_.apic_id & 0xff)) {
      return fail("saved CPU state belongs to the CPU with APIC id {}, not to vCPU {} with APIC id {}",
                  leaf->ebx >> 24, config_.index, config_.apic_id);
    }
    WISP_TRY(check_cpuid_fits(state.cpuid, cpuid_));
    cpuid_ = state.cpuid;
  }
  if ((state.debug.dr6 | state.debug.dr7) >> 32 != 0) {
    return fail("saved CPU state has debug registers with bits that do not exist (DR6 {:#x}, DR7 {:#x})",
                state.debug.dr6, state.debug.dr7);
  }
  const std::uint64_t components = allowed_xcr0(cpuid_);
  if ((state.xcr0 & 1) == 0 || (state.xcr0 & ~components) != 0 ||
      ((state.xcr0 & 4) != 0 && (state.xcr0 & 2) == 0)) {
    return fail("saved CPU state has XCR0 {:#x}; this CPU has the components {:#x}", state.xcr0, components);
  }
  Cpu& cpu = processor_->cpu();
  cpu.io = {};
  cpu.breakpoint_hits = 0;
  WISP_TRY(load_special_regs(state.sregs));
  soft::set_regs(cpu, state.regs);
  cpu.dr = state.debug.db;
  cpu.dr6 = state.debug.dr6;
  cpu.dr7 = state.debug.dr7;
  cpu.xcr0 = state.xcr0;
  WISP_TRY(set_xsave(cpu, state.xsave, components));
  WISP_TRY(lapic_->load(state.lapic));
  WISP_TRY(load_msrs(state.msrs));
  WISP_TRY(load_time(state));
  return load_events(state);
}

Result<void> SoftVcpu::load_msrs(const std::vector<CpuMsr>& msrs) {
  if (msrs.size() > kMostMsrs) {
    return fail("saved CPU state holds {} MSRs; at most {} are possible", msrs.size(), kMostMsrs);
  }
  std::vector<std::uint32_t> seen;
  seen.reserve(msrs.size());
  for (const CpuMsr& entry : msrs) {
    seen.push_back(entry.index);
  }
  std::ranges::sort(seen);
  if (const auto twice = std::ranges::adjacent_find(seen); twice != seen.end()) {
    return fail("saved CPU state holds MSR {:#x} twice", *twice);
  }
  for (const CpuMsr& entry : msrs) {
    if (!handled_apart(entry.index) && load_msr(cpu(), entry) == MsrLoad::kUnknown) {
      return fail("saved CPU state holds MSR {:#x} = {:#x}, which the software CPU does not take",
                  entry.index, entry.value);
    }
  }
  return {};
}

Result<void> SoftVcpu::load_time(const CpuState& state) {
  const std::uint64_t khz = parts_.clock.tsc_khz();
  // KVM allows itself as much.
  constexpr std::uint64_t kSlackMillionths = 250;
  if (state.tsc_khz != 0) {
    const std::uint64_t apart = state.tsc_khz > khz ? state.tsc_khz - khz : khz - state.tsc_khz;
    if (apart > multiply_divide(khz, kSlackMillionths, 1'000'000)) {
      return fail(
          "the guest's time-stamp counter runs at {} kHz; this host's runs at {} kHz and is not scaled: load "
          "it on a host with the same clock",
          state.tsc_khz, khz);
    }
  }
  const auto value_of = [&](std::uint32_t index) -> std::optional<std::uint64_t> {
    const auto found = std::ranges::find(state.msrs, index, &CpuMsr::index);
    return found != state.msrs.end() ? std::optional(found->value) : std::nullopt;
  };
  if (const auto counter = value_of(msr::kTsc)) {
    // The counters were read one after another, and are written so. Those that are within a second of the
    // boot processor's were in step with it.
    const std::uint64_t offset = *counter - parts_.clock.tsc();
    const std::lock_guard lock(parts_.tsc_step.mutex);
    const auto common = parts_.tsc_step.offset;
    const std::uint64_t second = khz * 1000;
    const bool in_step = common && (offset - *common < second || *common - offset < second);
    if (config_.index == 0 || !in_step) {
      cpu().tsc_offset = offset;
      if (config_.index == 0) {
        parts_.tsc_step.offset = offset;
      }
    } else {
      cpu().tsc_offset = *common;
    }
  }
  lapic_->set_tsc_deadline(value_of(msr::kTscDeadline).value_or(0));
  timer_.disarm();
  timer_due_ns_ = 0;
  clock_unpublished_ = true;
  return {};
}

Result<void> SoftVcpu::load_events(const CpuState& state) {
  const CpuEvents& events = state.events;
  Cpu& cpu = processor_->cpu();
  loaded_event_.reset();
  if (events.exception.injected || events.exception.pending) {
    const auto& exception = events.exception;
    if (exception.vector > 31 || exception.vector == vec::kNmi) {
      return fail("saved CPU state has exception {}, which does not exist", exception.vector);
    }
    Fault fault{.vector = exception.vector,
                .has_error_code = exception.has_error_code,
                .error_code = exception.error_code};
    if (exception.vector == vec::kPf) {
      fault.address = exception.has_payload ? exception.payload : cpu.cr2;
    } else if (exception.vector == vec::kDb && exception.has_payload) {
      fault.address = exception.payload;
    }
    loaded_event_ = {.fault = fault, .kind = EventKind::kFault};
  } else if (events.nmi.injected) {
    loaded_event_ = {.fault = {.vector = vec::kNmi}, .kind = EventKind::kNmi};
  } else if (events.interrupt.injected) {
    loaded_event_ = {.fault = {.vector = events.interrupt.vector},
                     .kind = events.interrupt.soft ? EventKind::kSoftwareInterrupt : EventKind::kExternal};
  }
  cpu.interrupt_shadow = events.interrupt.shadow & 3;
  cpu.nmi_masked = events.nmi.masked;
  nmi_waits_ = events.nmi.pending;
  cpu.halted = state.run_state == CpuRunState::kHalted;
  run_state_ = cpu.halted ? CpuRunState::kRunnable : state.run_state;
  if (run_state_ == CpuRunState::kSipiReceived) {
    start_at(cpu, static_cast<std::uint8_t>(events.sipi_vector));
    run_state_ = CpuRunState::kRunnable;
  }
  shut_down_ = false;
  return {};
}

Result<void> SoftVcpu::reset() {
  WISP_TRY(check_no_access_pending());
  const bool boot = config_.index == 0;
  const CpuidEntry* leaf = find_leaf(cpuid_, 1);
  const CpuState state =
      power_up_state(config_.apic_id, boot, lapic_regs::kVersion, leaf != nullptr ? leaf->eax : 0);
  Cpu& cpu = processor_->cpu();
  lapic_->reset(false);
  // The counter runs on, in step with the others again where the guest had moved it.
  cpu.tsc_offset -= cpu.msr.tsc_adjust;
  cpu.msr = {};
  cpu.msr.mtrr_def_type = kPowerUpMtrr;
  cpu.io = {};
  writes_told_ = 0;
  WISP_TRY(load_special_regs(state.sregs));
  soft::set_regs(cpu, state.regs);
  cpu.dr = state.debug.db;
  cpu.dr6 = state.debug.dr6;
  cpu.dr7 = state.debug.dr7;
  cpu.xcr0 = state.xcr0;
  WISP_TRY(set_xsave(cpu, state.xsave, allowed_xcr0(cpuid_)));
  WISP_TRY(lapic_->load(state.lapic));
  timer_.disarm();
  timer_due_ns_ = 0;
  clock_unpublished_ = false;
  return load_events(state);
}

}  // namespace wisp::soft
