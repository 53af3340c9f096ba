// Instructions of the system: what does not touch control registers or descriptors; see system_groups.h for
// the rest.
#include <array>
#include <utility>

#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/system_groups.h"

namespace wisp::soft {
namespace {

Outcome cpuid(Core& core) {
  Cpu& cpu = core.cpu;
  const CpuidEntry answer =
      core.env.cpuid(static_cast<std::uint32_t>(cpu.gpr[kRax]), static_cast<std::uint32_t>(cpu.gpr[kRcx]));
  cpu.gpr[kRax] = answer.eax;
  cpu.gpr[kRbx] = answer.ebx;
  cpu.gpr[kRcx] = answer.ecx;
  cpu.gpr[kRdx] = answer.edx;
  return Outcome::kNext;
}

void put_edx_eax(Cpu& cpu, std::uint64_t value) {
  cpu.gpr[kRax] = value & 0xffffffff;
  cpu.gpr[kRdx] = value >> 32;
}

Outcome read_tsc(Core& core, bool with_aux) {
  Cpu& cpu = core.cpu;
  if ((cpu.cr4 & cr4::kTsd) != 0 && cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  put_edx_eax(cpu, core.env.read_tsc() + cpu.tsc_offset);
  if (with_aux) {
    cpu.gpr[kRcx] = cpu.msr.tsc_aux;
  }
  return Outcome::kNext;
}

Outcome move_msr(Core& core, bool write) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  const auto index = static_cast<std::uint32_t>(cpu.gpr[kRcx]);
  if (write) {
    const std::uint64_t value = (cpu.gpr[kRdx] << 32) | (cpu.gpr[kRax] & 0xffffffff);
    return write_msr(core, index, value) ? Outcome::kNext : Outcome::kFault;
  }
  std::uint64_t value = 0;
  if (!read_msr(core, index, value)) {
    return Outcome::kFault;
  }
  put_edx_eax(cpu, value);
  return Outcome::kNext;
}

Outcome hypercall(Core& core) {
  constexpr std::uint64_t kNotPermitted = ~0ULL;  // KVM_EPERM, negated
  Cpu& cpu = core.cpu;
  const std::uint64_t mask = cpu.code64() ? ~0ULL : 0xffffffff;
  std::uint64_t result = kNotPermitted;
  if (cpu.cpl == 0) {
    const std::array<std::uint64_t, 4> arguments{cpu.gpr[kRbx] & mask, cpu.gpr[kRcx] & mask,
                                                 cpu.gpr[kRdx] & mask, cpu.gpr[kRsi] & mask};
    result = core.env.hypercall(cpu.gpr[kRax] & mask, arguments);
  }
  cpu.gpr[kRax] = result & mask;
  return Outcome::kNext;
}

Outcome invalidate_page(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  const std::uint64_t offset = effective_address(cpu, insn);
  const Segment& segment = cpu.segments[insn.segment];
  if (!cpu.code64()) {
    core.mmu.flush_page((segment.base + offset) & 0xffffffff);
    return Outcome::kNext;
  }
  const std::uint64_t linear = insn.segment >= kFs ? segment.base + offset : offset;
  if (canonical(linear)) {
    core.mmu.flush_page(linear);
  }
  return Outcome::kNext;
}

Outcome invalidate_pcid(Core& core, const Insn& insn) {
  enum : std::uint64_t { kAddress, kContext, kAllWithGlobal, kAll };
  Cpu& cpu = core.cpu;
  if (!cpu.protected_mode() || cpu.virtual_8086()) {
    return cpu.virtual_8086() ? operand::general_protection(core) : operand::fault(core, vec::kUd);
  }
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  const std::uint64_t type = sized(cpu, insn.reg, cpu.code64() ? 8 : 4);
  std::array<std::uint64_t, 2> descriptor{};
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, sizeof descriptor, Access::kRead, linear) ||
      !core.mmu.load(linear, descriptor)) {
    return core.mmu.stopped();
  }
  const std::uint64_t context = descriptor[0];
  const std::uint64_t address = descriptor[1];
  const bool without_contexts = (cpu.cr4 & cr4::kPcide) == 0 && type <= kContext && context != 0;
  if (type > kAll || context >> 12 != 0 || without_contexts || (type == kAddress && !canonical(address))) {
    return operand::general_protection(core);
  }
  if (type == kAddress) {
    core.mmu.flush_page(address);
  } else if (type != kContext) {
    core.mmu.flush_all();
  } else if ((cpu.cr4 & cr4::kPcide) != 0) {
    core.mmu.flush_pcid(static_cast<std::uint16_t>(context));
  } else {
    core.mmu.flush_context();
  }
  return Outcome::kNext;
}

Outcome invalidate_caches(Core& core) {
  return core.cpu.cpl == 0 ? Outcome::kNext : operand::general_protection(core);
}

// RDFSBASE and its like.
Outcome move_base(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if ((cpu.cr4 & cr4::kFsgsbase) == 0) {
    return operand::fault(core, vec::kUd);
  }
  const bool fs = insn.op == Op::kReadFsBase || insn.op == Op::kWriteFsBase;
  const std::uint32_t size = insn.rex_w() ? 8 : 4;
  std::uint64_t& base = cpu.segments[fs ? kFs : kGs].base;
  if (insn.op == Op::kReadFsBase || insn.op == Op::kReadGsBase) {
    set_sized(cpu, insn.rm, size, base);
    return Outcome::kNext;
  }
  const std::uint64_t value = sized(cpu, insn.rm, size);
  if (!canonical(value)) {
    return operand::general_protection(core);
  }
  base = value;
  return Outcome::kNext;
}

Outcome swap_gs(Core& core) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  std::swap(cpu.segments[kGs].base, cpu.msr.kernel_gs_base);
  return Outcome::kNext;
}

Outcome change_ac(Core& core, bool set) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::fault(core, vec::kUd);
  }
  cpu.other_flags = set ? cpu.other_flags | flag::kAc : cpu.other_flags & ~flag::kAc;
  return Outcome::kNext;
}

Outcome random_number(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  set_sized(cpu, insn.rm, insn.operand_size, core.env.random());
  cpu.arithmetic_flags = flag::kCf;
  return Outcome::kNext;
}

Outcome halt(Core& core) {
  return core.cpu.cpl == 0 ? Outcome::kHalt : operand::general_protection(core);
}

Outcome not_there(Core& core, const char* name) {
  core.env.note(name);
  return operand::fault(core, vec::kUd);
}

}  // namespace

Outcome execute_system(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  switch (insn.op) {
    case Op::kHalt:
      return halt(core);
    case Op::kPause:
      if (--cpu.pauses_left <= 0) {
        cpu.pauses_left = kPausesPerYield;
        core.env.pause();
      }
      return Outcome::kNext;
    case Op::kMoveFromCr:
      return move_from_cr(core, insn);
    case Op::kMoveToCr:
      return move_to_cr(core, insn);
    case Op::kMoveFromDr:
      return move_from_dr(core, insn);
    case Op::kMoveToDr:
      return move_to_dr(core, insn);
    case Op::kCpuid:
      return cpuid(core);
    case Op::kReadTsc:
      return read_tsc(core, false);
    case Op::kReadTscp:
      return read_tsc(core, true);
    case Op::kReadPid:
      set_sized(cpu, insn.rm, cpu.code64() ? 8 : 4, cpu.msr.tsc_aux);
      return Outcome::kNext;
    case Op::kReadPmc:
      return operand::general_protection(core);  // there is no counter that it could name
    case Op::kReadMsr:
      return move_msr(core, false);
    case Op::kWriteMsr:
      return move_msr(core, true);
    case Op::kSyscall:
    case Op::kSysret:
    case Op::kSysenter:
    case Op::kSysexit:
      return fast_call(core, insn);
    case Op::kSwapGs:
      return swap_gs(core);
    case Op::kHypercall:
      return hypercall(core);
    case Op::kLoadStatusWord:
      return load_status_word(core, insn);
    case Op::kStoreStatusWord:
      return store_status_word(core, insn);
    case Op::kClearTaskSwitched:
      return clear_task_switched(core);
    case Op::kInvalidatePage:
      return invalidate_page(core, insn);
    case Op::kInvalidatePcid:
      return invalidate_pcid(core, insn);
    case Op::kInvalidateCaches:
      return invalidate_caches(core);
    case Op::kMonitor:
      return not_there(core, "MONITOR");
    case Op::kMwait:
      return not_there(core, "MWAIT");
    case Op::kSerialize:
      return not_there(core, "SERIALIZE");
    case Op::kReadFsBase:
    case Op::kReadGsBase:
    case Op::kWriteFsBase:
    case Op::kWriteGsBase:
      return move_base(core, insn);
    case Op::kSetAc:
      return change_ac(core, true);
    case Op::kClearAc:
      return change_ac(core, false);
    case Op::kGetXcr:
      return get_xcr(core);
    case Op::kSetXcr:
      return set_xcr(core);
    case Op::kRandom:
      return random_number(core, insn);
    default:
      return table_instruction(core, insn);
  }
}

}  // namespace wisp::soft
