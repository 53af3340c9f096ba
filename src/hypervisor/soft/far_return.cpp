// RET to another segment, and IRET (SDM volume 2, RET and IRET).
#include <array>
#include <cstring>

#include "hypervisor/soft/descriptor.h"
#include "hypervisor/soft/stack_frame.h"

namespace wisp::soft {
namespace {

// What a return takes from the stack.
struct Popped {
  std::uint64_t rip = 0;
  std::uint64_t cs = 0;
  std::uint64_t flags = 0;
  std::uint64_t rsp = 0;
  std::uint64_t ss = 0;
};

std::uint16_t selector_in(std::uint64_t word) {
  return static_cast<std::uint16_t>(word);
}

// `count` values of `size` bytes, `skip` bytes above the top of the stack.
bool pop_values(Core& core, std::uint32_t skip, std::uint32_t size, std::uint64_t* out, std::uint32_t count) {
  Cpu& cpu = core.cpu;
  if (!cpu.code64()) {
    for (std::uint32_t i = 0; i < count; ++i) {
      if (!peek(core, skip + i * size, out[i], size)) {
        return false;
      }
    }
    return true;
  }
  std::array<std::uint8_t, 40> bytes;
  std::uint64_t linear = 0;
  if (!linear_address(cpu, kSs, cpu.gpr[kRsp] + skip, count * size, Access::kRead, linear) ||
      !core.mmu.read(linear, bytes.data(), count * size)) {
    return false;
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    out[i] = 0;
    std::memcpy(&out[i], bytes.data() + std::size_t{i} * size, size);
  }
  return true;
}

// The code segment to return to.
bool return_code_segment(Core& core, std::uint16_t selector, Descriptor& code) {
  Cpu& cpu = core.cpu;
  if (null_selector(selector)) {
    return cpu.raise(vec::kGp, 0);
  }
  if (!need_descriptor(core, selector, false, vec::kGp, 0, code)) {
    return false;
  }
  const std::uint8_t rpl = rpl_of(selector);
  if (!code.is_code() || rpl < cpu.cpl || (code.conforming() ? code.dpl() > rpl : code.dpl() != rpl) ||
      (cpu.long_mode() && code.long_mode() && code.big())) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  return code.present() || selector_fault(cpu, vec::kNp, selector);
}

// The stack segment for ring `cpl`, which the return goes to.
bool return_stack_segment(Core& core, std::uint16_t selector, std::uint8_t cpl, bool to_64, Segment& ss) {
  Cpu& cpu = core.cpu;
  if (null_selector(selector)) {
    if (!to_64 || cpl == 3 || rpl_of(selector) != cpl) {
      return cpu.raise(vec::kGp, 0);
    }
    ss = null_stack(cpl);
    return true;
  }
  Descriptor descriptor;
  if (!need_descriptor(core, selector, false, vec::kGp, 0, descriptor)) {
    return false;
  }
  if (rpl_of(selector) != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  if (!descriptor.present()) {
    return selector_fault(cpu, vec::kSs, selector);
  }
  if (!mark_accessed(core, selector, descriptor)) {
    return false;
  }
  ss = segment_of(selector, descriptor);
  return true;
}

// What IRET may change of RFLAGS from ring `cpl`.
std::uint64_t flags_after_return(const Cpu& cpu, std::uint64_t popped, std::uint32_t operand_size) {
  std::uint64_t mask = flag::kArithmetic | flag::kTf | flag::kDf | flag::kNt;
  if (operand_size > 2) {
    mask |= flag::kRf | flag::kAc | flag::kId;
  }
  if (cpu.cpl <= cpu.iopl()) {
    mask |= flag::kIf;
  }
  if (cpu.cpl == 0) {
    mask |= flag::kIopl;
  }
  return (cpu.rflags() & ~mask) | (popped & mask);
}

// In real mode and virtual-8086 mode.
Outcome real_mode_interrupt_return(Core& core, std::uint32_t operand_size) {
  Cpu& cpu = core.cpu;
  if (cpu.virtual_8086() && cpu.iopl() < 3) {
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  std::array<std::uint64_t, 3> values{};
  if (!pop_values(core, 0, operand_size, values.data(), 3)) {
    return core.mmu.stopped();
  }
  const Segment cs = real_mode_segment(cpu, kCs, selector_in(values[1]));
  if (values[0] > cs.limit) {
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  // In virtual-8086 mode the ring is 3, so that IOPL stays.
  const std::uint64_t flags = flags_after_return(cpu, values[2], operand_size);
  add_to_sp(cpu, 3 * std::int64_t{operand_size});
  cpu.segments[kCs] = cs;
  cpu.rip = values[0];
  cpu.set_rflags(flags);
  return Outcome::kJump;
}

// To virtual-8086 mode, from ring 0.
Outcome return_to_virtual_8086(Core& core, const Popped& popped) {
  Cpu& cpu = core.cpu;
  std::array<std::uint64_t, 6> values{};  // ESP, SS, ES, DS, FS, GS
  if (!pop_values(core, 12, 4, values.data(), 6)) {
    return core.mmu.stopped();
  }
  if (popped.rip > 0xffff) {
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  cpu.set_rflags(popped.flags);
  cpu.cpl = 3;
  const auto load = [&cpu](SegmentId which, std::uint64_t selector) {
    cpu.segments[which] = real_mode_segment(cpu, which, selector_in(selector));
  };
  load(kCs, popped.cs);
  load(kSs, values[1]);
  load(kEs, values[2]);
  load(kDs, values[3]);
  load(kFs, values[4]);
  load(kGs, values[5]);
  cpu.rip = popped.rip;
  cpu.gpr[kRsp] = values[0];
  return Outcome::kJump;
}

}  // namespace

Outcome interrupt_return(Core& core, std::uint32_t operand_size) {
  Cpu& cpu = core.cpu;
  if (cpu.nmi_masked) {
    cpu.nmi_masked = false;                       // even where IRET itself faults
    cpu.run.store(0, std::memory_order_relaxed);  // another may wait
  }
  if (!cpu.protected_mode() || cpu.virtual_8086()) {
    return real_mode_interrupt_return(core, operand_size);
  }
  if ((cpu.other_flags & flag::kNt) != 0) {
    if (!cpu.long_mode()) {
      core.env.note("a return from a nested task");
    }
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  const bool from_64 = cpu.code64();
  std::array<std::uint64_t, 5> values{};
  if (!pop_values(core, 0, operand_size, values.data(), from_64 ? 5 : 3)) {
    return core.mmu.stopped();
  }
  Popped popped{.rip = values[0], .cs = values[1], .flags = values[2], .rsp = values[3], .ss = values[4]};
  if (!cpu.long_mode() && operand_size == 4 && (popped.flags & flag::kVm) != 0 && cpu.cpl == 0) {
    return return_to_virtual_8086(core, popped);
  }
  const std::uint16_t selector = selector_in(popped.cs);
  Descriptor code;
  if (!return_code_segment(core, selector, code)) {
    return core.mmu.stopped();
  }
  const std::uint8_t cpl = rpl_of(selector);
  const bool outer = cpl != cpu.cpl;
  Segment ss;
  if (from_64 || outer) {
    if (!from_64) {
      if (!pop_values(core, 3 * operand_size, operand_size, &values[3], 2)) {
        return core.mmu.stopped();
      }
      popped.rsp = values[3];
      popped.ss = values[4];
    }
    const bool to_64 = cpu.long_mode() && code.long_mode();
    if (!return_stack_segment(core, selector_in(popped.ss), cpl, to_64, ss)) {
      return core.mmu.stopped();
    }
  }
  if (!code_offset_valid(cpu, segment_of(selector, code), popped.rip)) {
    return Outcome::kFault;
  }
  if (!mark_accessed(core, selector, code)) {
    return core.mmu.stopped();
  }
  const std::uint64_t flags = flags_after_return(cpu, popped.flags, operand_size);
  if (from_64 || outer) {
    enter_code_segment(cpu, segment_of(selector, code), cpl);
    cpu.segments[kSs] = ss;
    set_stack_pointer(cpu, popped.rsp);
    if (outer) {
      drop_inner_segments(cpu, cpl);
    }
  } else {
    add_to_sp(cpu, 3 * std::int64_t{operand_size});
    enter_code_segment(cpu, segment_of(selector, code), cpl);
  }
  cpu.rip = popped.rip;
  cpu.set_rflags(flags);
  return Outcome::kJump;
}

Outcome far_return(Core& core, std::uint32_t operand_size, std::uint32_t drop_bytes) {
  Cpu& cpu = core.cpu;
  std::array<std::uint64_t, 2> values{};
  if (!pop_values(core, 0, operand_size, values.data(), 2)) {
    return core.mmu.stopped();
  }
  const std::uint64_t rip = values[0];
  const std::uint16_t selector = selector_in(values[1]);
  const std::int64_t taken = 2 * std::int64_t{operand_size} + drop_bytes;
  if (!cpu.protected_mode() || cpu.virtual_8086()) {
    const Segment cs = real_mode_segment(cpu, kCs, selector);
    if (rip > cs.limit) {
      (void)cpu.raise(vec::kGp, 0);
      return Outcome::kFault;
    }
    add_to_sp(cpu, taken);
    cpu.segments[kCs] = cs;
    cpu.rip = rip;
    return Outcome::kJump;
  }
  Descriptor code;
  if (!return_code_segment(core, selector, code)) {
    return core.mmu.stopped();
  }
  const std::uint8_t cpl = rpl_of(selector);
  const bool outer = cpl != cpu.cpl;
  Segment ss;
  std::array<std::uint64_t, 2> stack{};
  if (outer) {
    const bool to_64 = cpu.long_mode() && code.long_mode();
    if (!pop_values(core, 2 * operand_size + drop_bytes, operand_size, stack.data(), 2) ||
        !return_stack_segment(core, selector_in(stack[1]), cpl, to_64, ss)) {
      return core.mmu.stopped();
    }
  }
  if (!code_offset_valid(cpu, segment_of(selector, code), rip)) {
    return Outcome::kFault;
  }
  if (!mark_accessed(core, selector, code)) {
    return core.mmu.stopped();
  }
  if (!outer) {
    add_to_sp(cpu, taken);
  }
  enter_code_segment(cpu, segment_of(selector, code), cpl);
  if (outer) {
    cpu.segments[kSs] = ss;
    set_stack_pointer(cpu, stack[0]);
    add_to_sp(cpu, drop_bytes);
    drop_inner_segments(cpu, cpl);
  }
  cpu.rip = rip;
  return Outcome::kJump;
}

}  // namespace wisp::soft
