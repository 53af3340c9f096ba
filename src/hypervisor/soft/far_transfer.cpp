// Far jumps and calls, directly and through call gates (SDM volume 3, 5.8; volume 2, JMP and CALL). There is
// no hardware task switching: task gates and TSS selectors raise #GP, as they do in IA-32e mode.
#include <array>

#include "hypervisor/soft/descriptor.h"
#include "hypervisor/soft/stack_frame.h"

namespace wisp::soft {
namespace {

struct FarTarget {
  std::uint16_t selector = 0;
  std::uint64_t offset = 0;
  std::uint32_t operand_size = 4;
};

std::uint64_t truncated(std::uint64_t offset, std::uint32_t operand_size) {
  return operand_size == 8 ? offset : operand_size == 4 ? offset & 0xffffffff : offset & 0xffff;
}

Outcome stopped(Core& core) {
  return core.mmu.stopped();
}

std::uint64_t stack_pointer(const Cpu& cpu) {
  return cpu.gpr[kRsp];
}

// CS and the return address on the present stack.
StackFrame return_frame(const Core& core, std::uint32_t operand_size, std::uint64_t return_rip) {
  const Cpu& cpu = core.cpu;
  StackFrame frame(cpu.segments[kSs], stack_pointer(cpu), stack_address_size(cpu), operand_size);
  frame.push(cpu.segments[kCs].selector);
  frame.push(return_rip);
  return frame;
}

Outcome real_mode_transfer(Core& core, const FarTarget& target, StackFrame* frame) {
  Cpu& cpu = core.cpu;
  const Segment cs = real_mode_segment(cpu, kCs, target.selector);
  if (frame != nullptr && !frame->place(cpu, 0)) {
    return Outcome::kFault;
  }
  if (target.offset > cs.limit) {
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  if (frame != nullptr) {
    if (!frame->write(core, As::kCode)) {
      return stopped(core);
    }
    cpu.gpr[kRsp] = frame->sp();
  }
  cpu.segments[kCs] = cs;
  cpu.rip = target.offset;
  return Outcome::kJump;
}

// To a code segment of the same ring.
Outcome direct_transfer(Core& core, const FarTarget& target, Descriptor& descriptor, StackFrame* frame) {
  Cpu& cpu = core.cpu;
  const bool allowed = descriptor.conforming()
                           ? descriptor.dpl() <= cpu.cpl
                           : rpl_of(target.selector) <= cpu.cpl && descriptor.dpl() == cpu.cpl;
  if (!allowed || (cpu.long_mode() && descriptor.long_mode() && descriptor.big())) {
    (void)selector_fault(cpu, vec::kGp, target.selector);
    return Outcome::kFault;
  }
  if (!descriptor.present()) {
    (void)selector_fault(cpu, vec::kNp, target.selector);
    return Outcome::kFault;
  }
  const Segment cs = segment_of(target.selector, descriptor);
  if ((frame != nullptr && !frame->place(cpu, 0)) || !code_offset_valid(cpu, cs, target.offset)) {
    return Outcome::kFault;
  }
  if (!mark_accessed(core, target.selector, descriptor)) {
    return stopped(core);
  }
  if (frame != nullptr) {
    if (!frame->write(core, As::kCode)) {
      return stopped(core);
    }
    cpu.gpr[kRsp] = frame->sp();
  }
  enter_code_segment(cpu, segment_of(target.selector, descriptor), cpu.cpl);
  cpu.rip = target.offset;
  return Outcome::kJump;
}

// A call gate, read and checked.
struct CallGate {
  std::uint16_t selector = 0;
  std::uint64_t offset = 0;
  std::uint32_t item = 4;  // bytes of what is pushed
  std::uint8_t parameters = 0;
  Descriptor code{};
};

// The code segment behind a gate; `jump`: it must not be of an inner ring.
bool gate_code(Core& core, CallGate& gate, bool jump) {
  Cpu& cpu = core.cpu;
  if (null_selector(gate.selector)) {
    return cpu.raise(vec::kGp, 0);
  }
  if (!need_descriptor(core, gate.selector, false, vec::kGp, 0, gate.code)) {
    return false;
  }
  const Descriptor& code = gate.code;
  const bool same_ring = jump && !code.conforming();
  if (!code.is_code() || code.dpl() > cpu.cpl || (same_ring && code.dpl() != cpu.cpl) ||
      (cpu.long_mode() && (!code.long_mode() || code.big()))) {
    return selector_fault(cpu, vec::kGp, gate.selector);
  }
  return code.present() || selector_fault(cpu, vec::kNp, gate.selector);
}

bool read_gate(Core& core, std::uint16_t selector, const Descriptor& first, bool jump, CallGate& gate) {
  Cpu& cpu = core.cpu;
  const std::uint8_t type = first.type();
  const bool call_gate =
      type == system_type::kCallGate || (type == system_type::kCallGate16 && !cpu.long_mode());
  if (!call_gate) {
    if (!cpu.long_mode() && (type == system_type::kTaskGate || type == system_type::kTss)) {
      core.env.note("a task switch by a far jump or call");
    }
    return selector_fault(cpu, vec::kGp, selector);
  }
  if (first.dpl() < cpu.cpl || rpl_of(selector) > first.dpl()) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  if (!first.present()) {
    return selector_fault(cpu, vec::kNp, selector);
  }
  gate.selector = first.gate_selector();
  if (cpu.long_mode()) {
    Descriptor whole;
    if (!need_descriptor(core, selector, true, vec::kGp, 0, whole)) {
      return false;
    }
    if (whole.high_type() != 0) {
      return selector_fault(cpu, vec::kGp, selector);
    }
    gate.offset = whole.gate_offset64();
    gate.item = 8;
  } else if (type == system_type::kCallGate) {
    gate.offset = first.gate_offset32();
    gate.parameters = first.gate_parameters();
  } else {
    gate.offset = first.gate_offset16();
    gate.item = 2;
    gate.parameters = first.gate_parameters();
  }
  return gate_code(core, gate, jump);
}

// Copies the parameters of the gate from the caller's stack into the frame, the first pushed one first.
bool copy_parameters(Core& core, const CallGate& gate, StackFrame& frame) {
  for (unsigned i = gate.parameters; i-- > 0;) {
    std::uint64_t value = 0;
    if (!peek(core, i * gate.item, value, gate.item)) {
      return false;
    }
    frame.push(value);
  }
  return true;
}

Outcome call_inner(Core& core, CallGate& gate, std::uint64_t return_rip) {
  Cpu& cpu = core.cpu;
  const std::uint8_t ring = gate.code.dpl();
  Segment ss;
  std::uint64_t sp = 0;
  if (!inner_stack(core, ring, 0, ss, sp)) {
    return stopped(core);
  }
  const std::uint32_t address_size = cpu.long_mode() ? 8 : ss.big() ? 4 : 2;
  StackFrame frame(ss, sp, address_size, gate.item);
  frame.push(cpu.segments[kSs].selector);
  frame.push(stack_pointer(cpu));
  if (!copy_parameters(core, gate, frame)) {
    return stopped(core);
  }
  frame.push(cpu.segments[kCs].selector);
  frame.push(return_rip);
  const Segment cs = segment_of(gate.selector, gate.code);
  if (!frame.place(cpu, ss.selector & 0xfffcU) || !code_offset_valid(cpu, cs, gate.offset)) {
    return Outcome::kFault;
  }
  if (!mark_accessed(core, gate.selector, gate.code) || !frame.write(core, As::kSystem)) {
    return stopped(core);
  }
  enter_code_segment(cpu, segment_of(gate.selector, gate.code), ring);
  cpu.segments[kSs] = ss;
  set_stack_pointer(cpu, frame.sp());
  cpu.rip = gate.offset;
  return Outcome::kJump;
}

// Jumps and calls in protected mode. `return_rip` is null for a jump.
Outcome protected_transfer(Core& core, const FarTarget& target, const std::uint64_t* return_rip) {
  Cpu& cpu = core.cpu;
  if (null_selector(target.selector)) {
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  Descriptor descriptor;
  if (!need_descriptor(core, target.selector, false, vec::kGp, 0, descriptor)) {
    return stopped(core);
  }
  if (descriptor.is_code()) {
    if (return_rip == nullptr) {
      return direct_transfer(core, target, descriptor, nullptr);
    }
    StackFrame frame = return_frame(core, target.operand_size, *return_rip);
    return direct_transfer(core, target, descriptor, &frame);
  }
  if (descriptor.is_code_or_data()) {
    (void)selector_fault(cpu, vec::kGp, target.selector);
    return Outcome::kFault;
  }
  CallGate gate;
  if (!read_gate(core, target.selector, descriptor, return_rip == nullptr, gate)) {
    return stopped(core);
  }
  if (return_rip != nullptr && !gate.code.conforming() && gate.code.dpl() < cpu.cpl) {
    return call_inner(core, gate, *return_rip);
  }
  // The checks of the ring are done; to direct_transfer() it is a segment of this ring.
  const FarTarget behind{.selector = static_cast<std::uint16_t>(gate.selector & 0xfffc),
                         .offset = gate.offset,
                         .operand_size = gate.item};
  if (return_rip == nullptr) {
    return direct_transfer(core, behind, gate.code, nullptr);
  }
  // In IA-32e mode a gate takes compatibility mode to 64-bit mode, whose stack has no segment.
  const std::uint32_t address_size = cpu.long_mode() ? 8 : stack_address_size(cpu);
  StackFrame frame(cpu.segments[kSs], stack_pointer(cpu), address_size, gate.item);
  frame.push(cpu.segments[kCs].selector);
  frame.push(*return_rip);
  return direct_transfer(core, behind, gate.code, &frame);
}

}  // namespace

Outcome far_jump(Core& core, std::uint16_t selector, std::uint64_t offset, std::uint32_t operand_size) {
  const FarTarget target{
      .selector = selector, .offset = truncated(offset, operand_size), .operand_size = operand_size};
  if (!core.cpu.protected_mode() || core.cpu.virtual_8086()) {
    return real_mode_transfer(core, target, nullptr);
  }
  return protected_transfer(core, target, nullptr);
}

Outcome far_call(Core& core, std::uint16_t selector, std::uint64_t offset, std::uint32_t operand_size,
                 std::uint64_t return_rip) {
  const FarTarget target{
      .selector = selector, .offset = truncated(offset, operand_size), .operand_size = operand_size};
  if (!core.cpu.protected_mode() || core.cpu.virtual_8086()) {
    StackFrame frame = return_frame(core, operand_size, return_rip);
    return real_mode_transfer(core, target, &frame);
  }
  return protected_transfer(core, target, &return_rip);
}

}  // namespace wisp::soft
