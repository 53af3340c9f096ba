// Jumps, calls and returns, the stack, and flags (SDM volume 2).
#include <algorithm>
#include <array>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/stack_frame.h"

namespace wisp::soft {
namespace {

using operand::general_protection;

Outcome done(Core& core, bool good, Outcome outcome = Outcome::kNext) {
  return good ? outcome : core.mmu.stopped();
}

std::uint64_t next_rip(const Cpu& cpu, const Insn& insn) {
  const std::uint64_t next = cpu.rip + insn.length;
  if (cpu.code64()) {
    return next;
  }
  return next & (cpu.segments[kCs].big() ? 0xffffffff : 0xffff);
}

// --- near jumps, calls and returns

Outcome jump(Core& core, const Insn& insn, std::uint64_t target) {
  return done(core, set_rip(core.cpu, target, insn.operand_size), Outcome::kJump);
}

Outcome call(Core& core, const Insn& insn, std::uint64_t target) {
  Cpu& cpu = core.cpu;
  const std::uint64_t sp = cpu.gpr[kRsp];
  // In this order, as processors of both makers do it; the SDM says it the other way round.
  if (!push(core, next_rip(cpu, insn), insn.operand_size)) {
    return core.mmu.stopped();
  }
  if (!set_rip(cpu, target, insn.operand_size)) {
    cpu.gpr[kRsp] = sp;
    return Outcome::kFault;
  }
  return Outcome::kJump;
}

Outcome near_return(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t target = 0;
  if (!peek(core, 0, target, insn.operand_size)) {
    return core.mmu.stopped();
  }
  if (!set_rip(cpu, target, insn.operand_size)) {
    return Outcome::kFault;
  }
  const std::uint64_t dropped = insn.op == Op::kReturnImm ? insn.immediate & 0xffff : 0;
  add_to_sp(cpu, static_cast<std::int64_t>(insn.operand_size + dropped));
  return Outcome::kJump;
}

std::uint64_t relative_target(const Cpu& cpu, const Insn& insn) {
  return cpu.rip + insn.length + insn.immediate;
}

Outcome loop(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint64_t count = (sized(cpu, kRcx, insn.address_size) - 1) & size_mask(insn.address_size);
  const bool zero = (cpu.arithmetic_flags & flag::kZf) != 0;
  const bool taken = count != 0 && (insn.op == Op::kLoop || zero == (insn.op == Op::kLoopEqual));
  if (taken && !set_rip(cpu, relative_target(cpu, insn), insn.operand_size)) {
    return Outcome::kFault;
  }
  set_sized(cpu, kRcx, insn.address_size, count);
  return taken ? Outcome::kJump : Outcome::kNext;
}

Outcome jump_if(Core& core, const Insn& insn, bool holds) {
  return holds ? jump(core, insn, relative_target(core.cpu, insn)) : Outcome::kNext;
}

// --- far ones

// A far pointer in memory: an offset of the operand's size, then a selector.
bool load_pointer(Core& core, const Insn& insn, std::uint64_t& offset, std::uint16_t& selector) {
  std::array<std::uint8_t, 10> bytes{};
  const std::uint32_t size = insn.operand_size;
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size + 2, Access::kRead, linear) ||
      !core.mmu.read(linear, bytes.data(), size + 2)) {
    return false;
  }
  offset = 0;
  std::memcpy(&offset, bytes.data(), size);
  std::memcpy(&selector, bytes.data() + size, sizeof selector);
  return true;
}

Outcome far_transfer(Core& core, const Insn& insn) {
  std::uint64_t offset = insn.immediate;
  std::uint16_t selector = insn.immediate2;
  const bool indirect = insn.op == Op::kCallFarIndirect || insn.op == Op::kJumpFarIndirect;
  if (indirect && !load_pointer(core, insn, offset, selector)) {
    return core.mmu.stopped();
  }
  if (insn.op == Op::kCallFar || insn.op == Op::kCallFarIndirect) {
    return far_call(core, selector, offset, insn.operand_size, next_rip(core.cpu, insn));
  }
  return far_jump(core, selector, offset, insn.operand_size);
}

// --- the stack

Outcome push_operand(Core& core, const Insn& insn) {
  std::uint64_t value = 0;
  return done(core,
              operand::load(core, insn, insn.operand_size, value) && push(core, value, insn.operand_size));
}

Outcome pop_operand(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t value = 0;
  if (!peek(core, 0, value, insn.operand_size)) {
    return core.mmu.stopped();
  }
  // An address by rSP is formed with what rSP becomes.
  const std::uint64_t rsp = cpu.gpr[kRsp];
  add_to_sp(cpu, insn.operand_size);
  if (!operand::store(core, insn, insn.operand_size, insn.operand_size, value)) {
    cpu.gpr[kRsp] = rsp;
    return core.mmu.stopped();
  }
  return Outcome::kNext;
}

SegmentId segment_in_opcode(const Insn& insn) {
  return static_cast<SegmentId>(insn.opcode >> 3 & 7);
}

Outcome push_segment(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint16_t selector = cpu.segments[segment_in_opcode(insn)].selector;
  if (insn.operand_size != 4) {
    return done(core, push(core, selector, insn.operand_size));
  }
  // Processors of today leave the upper half of a doubleword on the stack alone.
  const std::uint64_t rsp = cpu.gpr[kRsp];
  add_to_sp(cpu, -2);
  if (!push(core, selector, 2)) {
    cpu.gpr[kRsp] = rsp;
    return core.mmu.stopped();
  }
  return Outcome::kNext;
}

Outcome pop_segment(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t value = 0;
  if (!peek(core, 0, value, insn.operand_size)) {
    return core.mmu.stopped();
  }
  const SegmentId segment = segment_in_opcode(insn);
  // Before SS changes how wide rSP is.
  const std::uint64_t rsp = cpu.gpr[kRsp];
  add_to_sp(cpu, insn.operand_size);
  if (!load_segment(core, segment, static_cast<std::uint16_t>(value))) {
    cpu.gpr[kRsp] = rsp;
    return core.mmu.stopped();
  }
  if (segment == kSs) {
    cpu.interrupt_shadow |= 2;
  }
  return Outcome::kNext;
}

Outcome push_all(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  StackFrame frame(cpu.segments[kSs], cpu.gpr[kRsp], stack_address_size(cpu), insn.operand_size);
  for (const Gpr reg : {kRax, kRcx, kRdx, kRbx, kRsp, kRbp, kRsi, kRdi}) {
    frame.push(cpu.gpr[reg]);
  }
  if (!frame.place(cpu, 0) || !frame.write(core, As::kCode)) {
    return core.mmu.stopped();
  }
  cpu.gpr[kRsp] = frame.sp();
  return Outcome::kNext;
}

Outcome pop_all(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  constexpr std::array kOrder{kRdi, kRsi, kRbp, kRsp, kRbx, kRdx, kRcx, kRax};
  std::array<std::uint64_t, kOrder.size()> values{};
  std::uint32_t depth = 0;
  for (std::size_t i = 0; i < kOrder.size(); ++i, depth += insn.operand_size) {
    if (kOrder[i] != kRsp && !peek(core, depth, values[i], insn.operand_size)) {
      return core.mmu.stopped();
    }
  }
  for (std::size_t i = 0; i < kOrder.size(); ++i) {
    if (kOrder[i] != kRsp) {
      set_sized(cpu, kOrder[i], insn.operand_size, values[i]);
    }
  }
  add_to_sp(cpu, depth);
  return Outcome::kNext;
}

// What is pushed can be read as a frame pointer by the same instruction, so nothing is held back; where it
// faults, something may have been written below the stack.
Outcome enter(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = insn.operand_size;
  const std::uint32_t wide = stack_address_size(cpu);
  const std::uint64_t mask = size_mask(wide);
  const std::uint32_t level = insn.immediate2 & 31;
  std::uint64_t top = cpu.gpr[kRsp];
  std::uint64_t linear = 0;
  const auto push_below = [&](std::uint64_t value) {
    top = (top - size) & mask;
    return linear_address(cpu, kSs, top, size, Access::kWrite, linear) &&
           core.mmu.write(linear, &value, size);
  };
  if (!push_below(cpu.gpr[kRbp])) {
    return core.mmu.stopped();
  }
  const std::uint64_t frame_pointer = top;
  for (std::uint32_t i = 1; i < level; ++i) {
    const std::uint64_t offset = (cpu.gpr[kRbp] - std::uint64_t{i} * size) & mask;
    std::uint64_t value = 0;
    if (!linear_address(cpu, kSs, offset, size, Access::kRead, linear) ||
        !core.mmu.read(linear, &value, size) || !push_below(value)) {
      return core.mmu.stopped();
    }
  }
  if (level != 0 && !push_below(frame_pointer)) {
    return core.mmu.stopped();
  }
  // The new top must be writable, though nothing is written there.
  top = (top - (insn.immediate & 0xffff)) & mask;
  if (!linear_address(cpu, kSs, top, 1, Access::kWrite, linear) ||
      !core.mmu.probe(linear, 1, Access::kWrite)) {
    return core.mmu.stopped();
  }
  set_sized(cpu, kRsp, wide, top);
  set_sized(cpu, kRbp, std::min(size, wide), frame_pointer);
  return Outcome::kNext;
}

Outcome leave(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint64_t rsp = cpu.gpr[kRsp];
  set_sized(cpu, kRsp, stack_address_size(cpu), cpu.gpr[kRbp]);
  std::uint64_t value = 0;
  if (!peek(core, 0, value, insn.operand_size)) {
    cpu.gpr[kRsp] = rsp;
    return core.mmu.stopped();
  }
  add_to_sp(cpu, insn.operand_size);
  set_sized(cpu, kRbp, insn.operand_size, value);
  return Outcome::kNext;
}

// --- flags

// Virtual-8086 mode without IOPL 3, which has no virtual interrupt flag here.
bool virtual_8086_refused(const Cpu& cpu) {
  return cpu.virtual_8086() && cpu.iopl() < 3;
}

Outcome push_flags(Core& core, const Insn& insn) {
  if (virtual_8086_refused(core.cpu)) {
    return general_protection(core);
  }
  return done(core, push(core, core.cpu.rflags() & ~(flag::kVm | flag::kRf), insn.operand_size));
}

Outcome pop_flags(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (virtual_8086_refused(cpu)) {
    return general_protection(core);
  }
  std::uint64_t value = 0;
  if (!peek(core, 0, value, insn.operand_size)) {
    return core.mmu.stopped();
  }
  std::uint64_t changes = flag::kArithmetic | flag::kTf | flag::kDf | flag::kNt | flag::kAc | flag::kId;
  changes |= cpu.cpl <= cpu.iopl() ? flag::kIf : 0;
  changes |= cpu.cpl == 0 ? flag::kIopl : 0;
  std::uint64_t flags = cpu.rflags();
  if (insn.operand_size == 2) {
    changes &= 0xffff;
  } else {
    flags &= ~flag::kRf;
  }
  cpu.set_rflags((flags & ~changes) | (value & changes));
  add_to_sp(cpu, insn.operand_size);
  return Outcome::kNext;
}

Outcome change_interrupt_flag(Core& core, bool on) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl > cpu.iopl()) {
    return general_protection(core);
  }
  if (on && cpu.interrupt_flag == 0) {
    cpu.interrupt_shadow |= 1;
  }
  cpu.interrupt_flag = on ? flag::kIf : 0;
  return Outcome::kNext;
}

Outcome move_ah_flags(Core& core, bool to_flags) {
  Cpu& cpu = core.cpu;
  constexpr std::uint64_t kMoved = flag::kSf | flag::kZf | flag::kAf | flag::kPf | flag::kCf;
  if (to_flags) {
    cpu.arithmetic_flags = (cpu.arithmetic_flags & ~kMoved) | (cpu.gpr[kRax] >> 8 & kMoved);
  } else {
    const std::uint64_t flags = (cpu.arithmetic_flags & kMoved) | flag::kFixed;
    cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xff00ULL) | flags << 8;
  }
  return Outcome::kNext;
}

// --- software interrupts

Outcome trap(Core& core, const Insn& insn, std::uint8_t vector) {
  core.cpu.rip = next_rip(core.cpu, insn);
  (void)core.cpu.raise(vector);
  return Outcome::kTrap;
}

Outcome interrupt(Core& core, const Insn& insn) {
  switch (insn.op) {
    case Op::kBreakpoint:
      return trap(core, insn, vec::kBp);
    case Op::kOverflow:
      return (core.cpu.arithmetic_flags & flag::kOf) != 0 ? trap(core, insn, vec::kOf) : Outcome::kNext;
    case Op::kIcebp:
      return trap(core, insn, vec::kDb);
    default:
      return virtual_8086_refused(core.cpu) ? general_protection(core)
                                            : trap(core, insn, static_cast<std::uint8_t>(insn.immediate));
  }
}

Outcome bound(Core& core, const Insn& insn) {
  const std::uint32_t size = insn.operand_size;
  std::array<std::uint8_t, 8> bytes{};
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size * 2, Access::kRead, linear) ||
      !core.mmu.read(linear, bytes.data(), size * 2)) {
    return core.mmu.stopped();
  }
  const auto number = [size](const void* at) {
    std::uint32_t value = 0;
    std::memcpy(&value, at, size);
    return size == 2 ? std::int32_t{static_cast<std::int16_t>(value)} : static_cast<std::int32_t>(value);
  };
  const std::int32_t index = number(&core.cpu.gpr[insn.reg]);
  if (index < number(bytes.data()) || index > number(bytes.data() + size)) {
    return operand::fault(core, vec::kBr);
  }
  return Outcome::kNext;
}

Outcome execute_flag(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  switch (insn.op) {
    case Op::kClearCarry:
    case Op::kSetCarry:
      set_flag(cpu, flag::kCf, insn.op == Op::kSetCarry);
      return Outcome::kNext;
    case Op::kComplementCarry:
      cpu.arithmetic_flags ^= flag::kCf;
      return Outcome::kNext;
    case Op::kClearDirection:
      cpu.other_flags &= ~flag::kDf;
      return Outcome::kNext;
    case Op::kSetDirection:
      cpu.other_flags |= flag::kDf;
      return Outcome::kNext;
    case Op::kClearInterrupt:
    case Op::kSetInterrupt:
      return change_interrupt_flag(core, insn.op == Op::kSetInterrupt);
    case Op::kSahf:
    case Op::kLahf:
      return move_ah_flags(core, insn.op == Op::kSahf);
    case Op::kSalc: {
      const std::uint64_t all = (cpu.arithmetic_flags & flag::kCf) != 0 ? 0xff : 0;
      cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffULL) | all;
      return Outcome::kNext;
    }
    default:
      return operand::fault(core, vec::kUd);
  }
}

Outcome execute_stack(Core& core, const Insn& insn) {
  switch (insn.op) {
    case Op::kPush:
      return push_operand(core, insn);
    case Op::kPushImm:
      return done(core, push(core, insn.immediate, insn.operand_size));
    case Op::kPop:
      return pop_operand(core, insn);
    case Op::kPushSegment:
      return push_segment(core, insn);
    case Op::kPopSegment:
      return pop_segment(core, insn);
    case Op::kPushAll:
      return push_all(core, insn);
    case Op::kPopAll:
      return pop_all(core, insn);
    case Op::kPushFlags:
      return push_flags(core, insn);
    case Op::kPopFlags:
      return pop_flags(core, insn);
    case Op::kEnter:
      return enter(core, insn);
    case Op::kLeave:
      return leave(core, insn);
    default:
      return execute_flag(core, insn);
  }
}

}  // namespace

Outcome execute_control(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  switch (insn.op) {
    case Op::kCall:
      return call(core, insn, relative_target(cpu, insn));
    case Op::kCallIndirect:
    case Op::kJumpIndirect: {
      std::uint64_t target = 0;
      if (!operand::load(core, insn, insn.operand_size, target)) {
        return core.mmu.stopped();
      }
      return insn.op == Op::kCallIndirect ? call(core, insn, target) : jump(core, insn, target);
    }
    case Op::kJump:
      return jump(core, insn, relative_target(cpu, insn));
    case Op::kJumpIf:
      return jump_if(core, insn, condition(cpu, insn.opcode));
    case Op::kJumpRcxZero:
      return jump_if(core, insn, sized(cpu, kRcx, insn.address_size) == 0);
    case Op::kLoop:
    case Op::kLoopEqual:
    case Op::kLoopNotEqual:
      return loop(core, insn);
    case Op::kReturn:
    case Op::kReturnImm:
      return near_return(core, insn);
    case Op::kReturnFar:
    case Op::kReturnFarImm:
      return far_return(
          core, insn.operand_size,
          insn.op == Op::kReturnFarImm ? static_cast<std::uint32_t>(insn.immediate & 0xffff) : 0);
    case Op::kCallFar:
    case Op::kCallFarIndirect:
    case Op::kJumpFar:
    case Op::kJumpFarIndirect:
      return far_transfer(core, insn);
    case Op::kInterrupt:
    case Op::kBreakpoint:
    case Op::kOverflow:
    case Op::kIcebp:
      return interrupt(core, insn);
    case Op::kInterruptReturn:
      return interrupt_return(core, insn.operand_size);
    case Op::kBound:
      return bound(core, insn);
    default:
      return execute_stack(core, insn);
  }
}

}  // namespace wisp::soft
