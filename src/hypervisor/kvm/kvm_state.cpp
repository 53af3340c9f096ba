#include "hypervisor/kvm/kvm_state.h"

#include <algorithm>
#include <cstring>

#include "base/bytes.h"
#include "hypervisor/kvm/kvm_ioctl.h"
#include "hypervisor/kvm/kvm_msrs.h"
#include "hypervisor/power_up.h"
#include "hypervisor/xsave_layout.h"

namespace wisp::kvm {
namespace {

static_assert(static_cast<unsigned>(CpuRunState::kRunnable) == KVM_MP_STATE_RUNNABLE &&
              static_cast<unsigned>(CpuRunState::kUninitialized) == KVM_MP_STATE_UNINITIALIZED &&
              static_cast<unsigned>(CpuRunState::kInitReceived) == KVM_MP_STATE_INIT_RECEIVED &&
              static_cast<unsigned>(CpuRunState::kHalted) == KVM_MP_STATE_HALTED &&
              static_cast<unsigned>(CpuRunState::kSipiReceived) == KVM_MP_STATE_SIPI_RECEIVED);

CpuSegment from_kvm(const kvm_segment& in) {
  return {.base = in.base,
          .limit = in.limit,
          .selector = in.selector,
          .type = in.type,
          .dpl = in.dpl,
          .present = in.present != 0,
          .system = in.s == 0,
          .long_mode = in.l != 0,
          .default_big = in.db != 0,
          .granularity = in.g != 0,
          .available = in.avl != 0,
          .unusable = in.unusable != 0};
}

kvm_segment to_kvm(const CpuSegment& in) {
  kvm_segment out{};
  out.base = in.base;
  out.limit = in.limit;
  out.selector = in.selector;
  out.type = in.type & 0xf;
  out.dpl = in.dpl & 3;
  out.present = in.present ? 1 : 0;
  out.s = in.system ? 0 : 1;
  out.l = in.long_mode ? 1 : 0;
  out.db = in.default_big ? 1 : 0;
  out.g = in.granularity ? 1 : 0;
  out.avl = in.available ? 1 : 0;
  out.unusable = in.unusable || !in.present ? 1 : 0;
  return out;
}

CpuTable from_kvm(const kvm_dtable& in) {
  return {.base = in.base, .limit = in.limit};
}

kvm_dtable to_kvm(const CpuTable& in) {
  kvm_dtable out{};
  out.base = in.base;
  out.limit = in.limit;
  return out;
}

CpuEvents from_kvm(const kvm_vcpu_events& in) {
  CpuEvents out;
  out.exception = {.injected = in.exception.injected != 0,
                   .pending = in.exception.pending != 0,
                   .vector = in.exception.nr,
                   .has_error_code = in.exception.has_error_code != 0,
                   .error_code = in.exception.error_code,
                   .has_payload = in.exception_has_payload != 0,
                   .payload = in.exception_payload};
  out.interrupt = {.injected = in.interrupt.injected != 0,
                   .vector = in.interrupt.nr,
                   .soft = in.interrupt.soft != 0,
                   .shadow = 0};
  if ((in.interrupt.shadow & KVM_X86_SHADOW_INT_STI) != 0) {
    out.interrupt.shadow |= 1;
  }
  if ((in.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS) != 0) {
    out.interrupt.shadow |= 2;
  }
  out.nmi = {.injected = in.nmi.injected != 0, .pending = in.nmi.pending != 0, .masked = in.nmi.masked != 0};
  out.sipi_vector = in.sipi_vector;
  return out;
}

kvm_vcpu_events to_kvm(const CpuEvents& in, const StateContext& context) {
  kvm_vcpu_events out{};
  out.exception.nr = in.exception.vector;
  out.exception.has_error_code = in.exception.has_error_code ? 1 : 0;
  out.exception.error_code = in.exception.error_code;
  // Without the capability KVM knows one kind only, and re-injects it.
  out.exception.injected =
      in.exception.injected || (in.exception.pending && !context.exception_payload) ? 1 : 0;
  if (context.exception_payload) {
    out.exception.pending = in.exception.pending && !in.exception.injected ? 1 : 0;
    out.exception_has_payload = in.exception.has_payload ? 1 : 0;
    out.exception_payload = in.exception.payload;
    out.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
  }
  out.interrupt.injected = in.interrupt.injected ? 1 : 0;
  out.interrupt.nr = in.interrupt.vector;
  out.interrupt.soft = in.interrupt.soft ? 1 : 0;
  if ((in.interrupt.shadow & 1) != 0) {
    out.interrupt.shadow |= KVM_X86_SHADOW_INT_STI;
  }
  if ((in.interrupt.shadow & 2) != 0) {
    out.interrupt.shadow |= KVM_X86_SHADOW_INT_MOV_SS;
  }
  out.nmi.injected = in.nmi.injected ? 1 : 0;
  out.nmi.pending = in.nmi.pending ? 1 : 0;
  out.nmi.masked = in.nmi.masked ? 1 : 0;
  out.sipi_vector = in.sipi_vector;
  out.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR |
               KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
  if (context.triple_fault_event) {
    out.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;  // none pending
  }
  return out;
}

Result<void> write_xsave(int fd, const StateContext& context, const CpuState& state) {
  if (state.xsave.size() < xsave::kYmm || state.xsave.size() > xsave::kMost) {
    return fail("saved CPU state has an XSAVE area of {} bytes; it must have {} to {}", state.xsave.size(),
                xsave::kYmm, xsave::kMost);
  }
  // What lies beyond this host's area must be empty; a state of another engine may be shorter than it.
  const std::size_t size = std::max<std::size_t>(context.xsave_size, sizeof(kvm_xsave));
  if (std::any_of(state.xsave.begin() + static_cast<std::ptrdiff_t>(std::min(size, state.xsave.size())),
                  state.xsave.end(), [](std::uint8_t byte) { return byte != 0; })) {
    return fail("saved CPU state has an XSAVE area of {} bytes in use; this host's has {}",
                state.xsave.size(), size);
  }
  if (load_le<std::uint64_t>(state.xsave.data() + xsave::kHeader + 8) != 0) {
    return fail("saved CPU state has a compacted XSAVE area; only the standard format is loaded");
  }
  FlexArray<kvm_xsave, std::uint32_t> area((size - sizeof(kvm_xsave) + 3) / 4);
  std::memcpy(area.header(), state.xsave.data(), std::min(size, state.xsave.size()));
  if (call(fd, KVM_SET_XSAVE, area.header()) < 0) {
    return fail_errno(errno,
                      "KVM refused the saved vector registers (KVM_SET_XSAVE, components {:#x}): this host "
                      "lacks a component, or the area is damaged",
                      load_le<std::uint64_t>(state.xsave.data() + xsave::kHeader));
  }
  return {};
}

Result<std::vector<std::uint8_t>> read_xsave(int fd, const StateContext& context) {
  const std::size_t size = std::max<std::size_t>(context.xsave_size, sizeof(kvm_xsave));
  FlexArray<kvm_xsave, std::uint32_t> area((size - sizeof(kvm_xsave) + 3) / 4);
  if (context.xsave2) {
    WISP_KVM_TRY(fd, KVM_GET_XSAVE2, area.header());
  } else {
    WISP_KVM_TRY(fd, KVM_GET_XSAVE, area.header());
  }
  const auto* bytes = static_cast<const std::uint8_t*>(static_cast<const void*>(area.header()));
  return std::vector<std::uint8_t>(bytes, bytes + size);
}

// KVM takes a rate other than the host's where the hardware scales, or where it is within the slack that it
// allows itself (250 ppm).
Result<void> write_tsc_khz(int fd, std::uint64_t khz) {
  if (khz == 0) {
    return {};
  }
  if (khz > UINT32_MAX) {
    return fail("saved CPU state has a time-stamp counter of {} kHz", khz);
  }
  const int now = call(fd, KVM_GET_TSC_KHZ);
  if (now > 0 && static_cast<std::uint64_t>(now) == khz) {
    return {};
  }
  if (call(fd, KVM_SET_TSC_KHZ, static_cast<unsigned long>(khz)) < 0) {
    return fail(
        "the guest's time-stamp counter runs at {} kHz; this host's runs at {} kHz and cannot be scaled: "
        "load "
        "it on a host with the same clock or with TSC scaling",
        khz, now);
  }
  return {};
}

}  // namespace

CpuRegs from_kvm(const kvm_regs& in) {
  return {.rax = in.rax,
          .rbx = in.rbx,
          .rcx = in.rcx,
          .rdx = in.rdx,
          .rsi = in.rsi,
          .rdi = in.rdi,
          .rsp = in.rsp,
          .rbp = in.rbp,
          .r8 = in.r8,
          .r9 = in.r9,
          .r10 = in.r10,
          .r11 = in.r11,
          .r12 = in.r12,
          .r13 = in.r13,
          .r14 = in.r14,
          .r15 = in.r15,
          .rip = in.rip,
          .rflags = in.rflags};
}

kvm_regs to_kvm(const CpuRegs& in) {
  kvm_regs out{};
  out.rax = in.rax;
  out.rbx = in.rbx;
  out.rcx = in.rcx;
  out.rdx = in.rdx;
  out.rsi = in.rsi;
  out.rdi = in.rdi;
  out.rsp = in.rsp;
  out.rbp = in.rbp;
  out.r8 = in.r8;
  out.r9 = in.r9;
  out.r10 = in.r10;
  out.r11 = in.r11;
  out.r12 = in.r12;
  out.r13 = in.r13;
  out.r14 = in.r14;
  out.r15 = in.r15;
  out.rip = in.rip;
  out.rflags = in.rflags | 2;
  return out;
}

CpuSpecialRegs from_kvm(const kvm_sregs& in) {
  return {.cs = from_kvm(in.cs),
          .ds = from_kvm(in.ds),
          .es = from_kvm(in.es),
          .fs = from_kvm(in.fs),
          .gs = from_kvm(in.gs),
          .ss = from_kvm(in.ss),
          .tr = from_kvm(in.tr),
          .ldt = from_kvm(in.ldt),
          .gdt = from_kvm(in.gdt),
          .idt = from_kvm(in.idt),
          .cr0 = in.cr0,
          .cr2 = in.cr2,
          .cr3 = in.cr3,
          .cr4 = in.cr4,
          .cr8 = in.cr8,
          .efer = in.efer,
          .apic_base = in.apic_base};
}

kvm_sregs to_kvm(const CpuSpecialRegs& in) {
  kvm_sregs out{};
  out.cs = to_kvm(in.cs);
  out.ds = to_kvm(in.ds);
  out.es = to_kvm(in.es);
  out.fs = to_kvm(in.fs);
  out.gs = to_kvm(in.gs);
  out.ss = to_kvm(in.ss);
  out.tr = to_kvm(in.tr);
  out.ldt = to_kvm(in.ldt);
  out.gdt = to_kvm(in.gdt);
  out.idt = to_kvm(in.idt);
  out.cr0 = in.cr0;
  out.cr2 = in.cr2;
  out.cr3 = in.cr3;
  out.cr4 = in.cr4;
  out.cr8 = in.cr8;
  out.efer = in.efer;
  out.apic_base = in.apic_base;
  return out;
}

Result<CpuRegs> read_regs(int vcpu_fd) {
  kvm_regs regs{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_REGS, &regs);
  return from_kvm(regs);
}

Result<void> write_regs(int vcpu_fd, const CpuRegs& regs) {
  kvm_regs out = to_kvm(regs);
  WISP_KVM_TRY(vcpu_fd, KVM_SET_REGS, &out);
  return {};
}

Result<CpuSpecialRegs> read_special_regs(int vcpu_fd) {
  kvm_sregs sregs{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_SREGS, &sregs);
  return from_kvm(sregs);
}

Result<void> write_special_regs(int vcpu_fd, const CpuSpecialRegs& sregs) {
  kvm_sregs out = to_kvm(sregs);
  if (call(vcpu_fd, KVM_SET_SREGS, &out) < 0) {
    return fail_errno(errno,
                      "KVM refused the special registers (CR0 {:#x}, CR3 {:#x}, CR4 {:#x}, EFER {:#x}, APIC "
                      "base {:#x})",
                      sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.apic_base);
  }
  return {};
}

Result<CpuState> read_state(int vcpu_fd, const StateContext& context, std::vector<std::uint32_t>& msrs) {
  CpuState state;
  // First: this one makes the vCPU take a waiting INIT or SIPI, which changes everything else.
  kvm_mp_state mp{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_MP_STATE, &mp);
  if (mp.mp_state > KVM_MP_STATE_SIPI_RECEIVED) {
    return fail("the vCPU is in KVM's run state {}, which cannot be saved", mp.mp_state);
  }
  state.run_state = static_cast<CpuRunState>(mp.mp_state);
  WISP_ASSIGN(state.regs, read_regs(vcpu_fd));
  WISP_ASSIGN(state.sregs, read_special_regs(vcpu_fd));
  kvm_debugregs debug{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_DEBUGREGS, &debug);
  std::ranges::copy(debug.db, state.debug.db.begin());
  state.debug.dr6 = debug.dr6;
  state.debug.dr7 = debug.dr7;
  WISP_ASSIGN(state.xsave, read_xsave(vcpu_fd, context));
  kvm_xcrs xcrs{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_XCRS, &xcrs);
  for (std::uint32_t i = 0; i < std::min<std::uint32_t>(xcrs.nr_xcrs, KVM_MAX_XCRS); ++i) {
    if (xcrs.xcrs[i].xcr == 0) {
      state.xcr0 = xcrs.xcrs[i].value;
    }
  }
  kvm_lapic_state lapic{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_LAPIC, &lapic);
  std::memcpy(state.lapic.regs.data(), lapic.regs, state.lapic.regs.size());
  WISP_ASSIGN(state.msrs, read_msrs(vcpu_fd, msrs));
  const int khz = call(vcpu_fd, KVM_GET_TSC_KHZ);
  state.tsc_khz = khz > 0 ? static_cast<std::uint64_t>(khz) : 0;
  // Last: the calls above may move an event from pending to injected.
  kvm_vcpu_events events{};
  WISP_KVM_TRY(vcpu_fd, KVM_GET_VCPU_EVENTS, &events);
  if (events.smi.smm != 0 || events.smi.pending != 0) {
    return fail("the vCPU is in system management mode, which cannot be saved; try again");
  }
  if ((events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) != 0 && events.triple_fault.pending != 0) {
    return fail("the vCPU is about to shut down by a triple fault, which cannot be saved");
  }
  state.events = from_kvm(events);
  return state;
}

Result<void> write_state(int vcpu_fd, const StateContext& context, const CpuState& state,
                         std::span<const std::uint32_t> msrs) {
  if (state.run_state > CpuRunState::kSipiReceived) {
    return fail("saved CPU state has an unknown run state {}", static_cast<unsigned>(state.run_state));
  }
  WISP_ASSIGN(const auto msr_values, msrs_to_load(state.msrs, msrs, context.host_immunities));

  // The clock's rate before its value; registers before the events, which they would clear; special registers
  // (the APIC base) before the local APIC; the local APIC, and among the MSRs the time-stamp counter, before
  // the deadline timer.
  WISP_TRY(write_tsc_khz(vcpu_fd, state.tsc_khz));
  WISP_TRY(write_regs(vcpu_fd, state.regs));
  WISP_TRY(write_special_regs(vcpu_fd, state.sregs));
  kvm_debugregs debug{};
  std::ranges::copy(state.debug.db, debug.db);
  debug.dr6 = state.debug.dr6;
  debug.dr7 = state.debug.dr7;
  WISP_KVM_TRY(vcpu_fd, KVM_SET_DEBUGREGS, &debug);
  kvm_xcrs xcrs{};
  xcrs.nr_xcrs = 1;
  xcrs.xcrs[0].value = state.xcr0;
  if (call(vcpu_fd, KVM_SET_XCRS, &xcrs) < 0) {
    return fail_errno(errno, "KVM refused the saved XCR0 {:#x}", state.xcr0);
  }
  WISP_TRY(write_xsave(vcpu_fd, context, state));
  kvm_lapic_state lapic{};
  std::memcpy(lapic.regs, state.lapic.regs.data(), state.lapic.regs.size());
  if (call(vcpu_fd, KVM_SET_LAPIC, &lapic) < 0) {
    return fail_errno(errno, "KVM refused the saved local APIC (id register {:#x})",
                      load_le<std::uint32_t>(state.lapic.regs.data() + lapic::kId));
  }
  WISP_TRY(write_msrs(vcpu_fd, msr_values));
  kvm_vcpu_events events = to_kvm(state.events, context);
  if (call(vcpu_fd, KVM_SET_VCPU_EVENTS, &events) < 0) {
    return fail_errno(errno, "KVM refused the saved pending events (exception {}, interrupt {})",
                      state.events.exception.vector, state.events.interrupt.vector);
  }
  kvm_mp_state mp{};
  mp.mp_state = static_cast<std::uint32_t>(state.run_state);
  WISP_KVM_TRY(vcpu_fd, KVM_SET_MP_STATE, &mp);
  return {};
}

}  // namespace wisp::kvm
