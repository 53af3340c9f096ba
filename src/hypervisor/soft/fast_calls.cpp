// SYSCALL, SYSRET, SYSENTER and SYSEXIT as Intel's processors have them (SDM volume 3, 5.8.7 and 5.8.8):
// SYSCALL and SYSRET in 64-bit mode only, SYSENTER and SYSEXIT in every protected mode.
#include "hypervisor/soft/descriptor.h"
#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/system_groups.h"

namespace wisp::soft {
namespace {

void enter(Cpu& cpu, std::uint16_t cs, std::uint16_t ss, std::uint8_t ring, bool long_mode) {
  enter_code_segment(cpu, flat_code(cs, ring, long_mode), ring);
  cpu.segments[kSs] = flat_stack(static_cast<std::uint16_t>((ss & 0xfffc) | ring), ring);
}

bool system_call_enabled(const Cpu& cpu) {
  return cpu.code64() && (cpu.efer & efer::kSce) != 0;
}

Outcome syscall(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!system_call_enabled(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  cpu.gpr[kRcx] = cpu.rip + insn.length;
  cpu.gpr[kR11] = cpu.rflags() & ~flag::kRf;
  cpu.rip = cpu.msr.lstar;
  cpu.set_rflags(cpu.rflags() & ~(cpu.msr.sfmask | flag::kRf));
  const auto cs = static_cast<std::uint16_t>(cpu.msr.star >> 32);
  enter(cpu, cs & 0xfffc, static_cast<std::uint16_t>((cs & 0xfffc) + 8), 0, true);
  return Outcome::kJump;
}

Outcome sysret(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!system_call_enabled(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  const bool wide = insn.rex_w();
  if (cpu.cpl != 0 || (wide && !canonical(cpu.gpr[kRcx]))) {
    return operand::general_protection(core);
  }
  const auto base = static_cast<std::uint16_t>(cpu.msr.star >> 48);
  const auto cs = static_cast<std::uint16_t>(wide ? base + 16 : base);
  cpu.rip = wide ? cpu.gpr[kRcx] : cpu.gpr[kRcx] & 0xffffffff;
  cpu.set_rflags(cpu.gpr[kR11] & 0x3c7fd7);
  enter(cpu, cs, static_cast<std::uint16_t>(base + 8), 3, wide);
  return Outcome::kJump;
}

Outcome sysenter(Core& core) {
  Cpu& cpu = core.cpu;
  const auto cs = static_cast<std::uint16_t>(cpu.msr.sysenter_cs & 0xfffc);
  if (!cpu.protected_mode() || cs == 0) {
    return operand::general_protection(core);
  }
  const bool long_mode = cpu.long_mode();
  const std::uint64_t mask = long_mode ? ~0ULL : 0xffffffff;
  cpu.other_flags &= ~(flag::kVm | flag::kRf);
  cpu.interrupt_flag = 0;
  cpu.gpr[kRsp] = cpu.msr.sysenter_esp & mask;
  cpu.rip = cpu.msr.sysenter_eip & mask;
  enter(cpu, cs, static_cast<std::uint16_t>(cs + 8), 0, long_mode);
  return Outcome::kJump;
}

Outcome sysexit(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const auto base = static_cast<std::uint16_t>(cpu.msr.sysenter_cs & 0xfffc);
  if (!cpu.protected_mode() || base == 0 || cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  const bool wide = cpu.code64() && insn.rex_w();
  std::uint64_t sp = cpu.gpr[kRcx];
  std::uint64_t ip = cpu.gpr[kRdx];
  if (wide) {
    if (!canonical(sp) || !canonical(ip)) {
      return operand::general_protection(core);
    }
  } else {
    sp &= 0xffffffff;
    ip &= 0xffffffff;
  }
  const auto cs = static_cast<std::uint16_t>(base + (wide ? 32 : 16));
  cpu.gpr[kRsp] = sp;
  cpu.rip = ip;
  enter(cpu, cs, static_cast<std::uint16_t>(cs + 8), 3, wide);
  return Outcome::kJump;
}

}  // namespace

Outcome fast_call(Core& core, const Insn& insn) {
  switch (insn.op) {
    case Op::kSyscall:
      return syscall(core, insn);
    case Op::kSysret:
      return sysret(core, insn);
    case Op::kSysenter:
      return sysenter(core);
    case Op::kSysexit:
      return sysexit(core, insn);
    default:
      return operand::fault(core, vec::kUd);
  }
}

}  // namespace wisp::soft
