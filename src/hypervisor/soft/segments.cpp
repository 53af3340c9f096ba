// Segment registers and the addresses that come of them.
#include <array>

#include "hypervisor/soft/descriptor.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kLow32 = 0xffffffff;

std::uint64_t address_mask(std::uint8_t size) {
  return size == 8 ? ~0ULL : size == 4 ? kLow32 : 0xffff;
}

// CR0.AM and EFLAGS.AC, in ring 3 (SDM volume 3, 6.15, interrupt 17).
bool alignment_checked(const Cpu& cpu) {
  return cpu.cpl == 3 && (cpu.other_flags & flag::kAc) != 0 && (cpu.cr0 & cr0::kAm) != 0;
}

bool misaligned(std::uint64_t linear, std::uint32_t size) {
  switch (size) {
    case 2:
    case 4:
    case 8:
      return (linear & (size - 1)) != 0;
    case 10:  // an extended real
      return (linear & 7) != 0;
    default:
      return false;
  }
}

bool address_fault(Cpu& cpu, SegmentId segment) {
  return cpu.raise(segment == kSs ? vec::kSs : vec::kGp, 0);
}

// The rights of a segment in protected mode.
bool access_allowed(const Segment& segment, Access access) {
  if (!segment.present()) {
    return false;  // a null selector
  }
  const std::uint8_t type = segment.type();
  const bool code = (type & 8) != 0;
  switch (access) {
    case Access::kRead:
      return !code || (type & 2) != 0;
    case Access::kWrite:
      return !code && (type & 2) != 0;
    case Access::kExecute:
      return code;
  }
  return false;
}

std::uint64_t table_entry(const Cpu& cpu, std::uint16_t selector) {
  return ((selector & 4) != 0 ? cpu.ldtr.base : cpu.gdt.base) + (selector & 0xfff8U);
}

bool load_stack_segment(Core& core, std::uint16_t selector) {
  Cpu& cpu = core.cpu;
  if (null_selector(selector)) {
    if (!cpu.code64() || cpu.cpl == 3 || rpl_of(selector) != cpu.cpl) {
      return cpu.raise(vec::kGp, 0);
    }
    cpu.segments[kSs] = null_stack(cpu.cpl);
    return true;
  }
  Descriptor descriptor;
  if (!need_descriptor(core, selector, false, vec::kGp, 0, descriptor)) {
    return false;
  }
  if (rpl_of(selector) != cpu.cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpu.cpl) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  if (!descriptor.present()) {
    return selector_fault(cpu, vec::kSs, selector);
  }
  if (!mark_accessed(core, selector, descriptor)) {
    return false;
  }
  cpu.segments[kSs] = segment_of(selector, descriptor);
  return true;
}

// Reads a field of the TSS; #TS with TR's selector where it lies outside.
bool read_tss(Core& core, std::uint32_t offset, void* out, std::uint32_t size, std::uint32_t external) {
  Cpu& cpu = core.cpu;
  if (offset + size - 1 > cpu.tr.limit || !cpu.tr.present()) {
    return selector_fault(cpu, vec::kTs, cpu.tr.selector, external);
  }
  return core.mmu.read(cpu.tr.base + offset, out, size, As::kSystem);
}

bool load_inner_stack_segment(Core& core, std::uint16_t selector, std::uint8_t ring, std::uint32_t external,
                              Segment& ss) {
  Cpu& cpu = core.cpu;
  if (null_selector(selector)) {
    return cpu.raise(vec::kTs, external);
  }
  Descriptor descriptor;
  if (!need_descriptor(core, selector, false, vec::kTs, external, descriptor)) {
    return false;
  }
  if (rpl_of(selector) != ring || descriptor.dpl() != ring || !descriptor.is_writable_data()) {
    return selector_fault(cpu, vec::kTs, selector, external);
  }
  if (!descriptor.present()) {
    return selector_fault(cpu, vec::kSs, selector, external);
  }
  if (!mark_accessed(core, selector, descriptor)) {
    return false;
  }
  ss = segment_of(selector, descriptor);
  return true;
}

}  // namespace

std::uint64_t effective_address(const Cpu& cpu, const Insn& insn) {
  auto address = static_cast<std::uint64_t>(insn.displacement);
  if (insn.base < 16) {
    address += cpu.gpr[insn.base];
  } else if (insn.base == kRipBase) {
    address += cpu.rip + insn.length;
  }
  if (insn.index < 16) {
    address += cpu.gpr[insn.index] << insn.scale;
  }
  return address & address_mask(insn.address_size);
}

bool inside_limit(const Segment& segment, std::uint64_t offset, std::uint32_t size) {
  const std::uint64_t last = offset + size - 1;
  const bool expand_down = (segment.type() & 0xc) == 4 && segment.is_code_or_data();
  if (expand_down) {
    return offset > segment.limit && last <= (segment.big() ? kLow32 : 0xffff);
  }
  return last <= segment.limit;
}

bool linear_address(Cpu& cpu, SegmentId segment, std::uint64_t offset, std::uint32_t size, Access access,
                    std::uint64_t& linear) {
  const Segment& used = cpu.segments[segment];
  if (cpu.code64()) {
    linear = segment >= kFs ? used.base + offset : offset;
    if (!canonical(linear) || !canonical(linear + size - 1)) {
      return address_fault(cpu, segment);
    }
  } else {
    // Real mode asks for the limit only; virtual-8086 mode sets segments up so that nothing else can fail.
    if (cpu.protected_mode() && !access_allowed(used, access)) {
      return address_fault(cpu, segment);
    }
    if (!inside_limit(used, offset, size)) {
      return address_fault(cpu, segment);
    }
    linear = (used.base + offset) & kLow32;
  }
  if (alignment_checked(cpu) && access != Access::kExecute && misaligned(linear, size)) [[unlikely]] {
    return cpu.raise(vec::kAc, 0);
  }
  return true;
}

Lookup read_descriptor(Core& core, std::uint16_t selector, bool wide, Descriptor& out) {
  const Cpu& cpu = core.cpu;
  const std::uint32_t size = wide ? 16 : 8;
  const std::uint32_t last = (selector & 0xfff8U) + size - 1;
  const bool local = (selector & 4) != 0;
  const std::uint32_t limit = local ? cpu.ldtr.limit : cpu.gdt.limit;
  if (last > limit || (local && !cpu.ldtr.present())) {
    return Lookup::kOutside;
  }
  std::array<std::uint64_t, 2> bytes{};
  if (!core.mmu.read(table_entry(cpu, selector), bytes.data(), size, system_access(cpu))) {
    return Lookup::kStopped;
  }
  out = {.low = bytes[0], .high = bytes[1]};
  return Lookup::kFound;
}

bool need_descriptor(Core& core, std::uint16_t selector, bool wide, std::uint8_t vector,
                     std::uint32_t external, Descriptor& out) {
  switch (read_descriptor(core, selector, wide, out)) {
    case Lookup::kFound:
      return true;
    case Lookup::kOutside:
      return selector_fault(core.cpu, vector, selector, external);
    case Lookup::kStopped:
      break;
  }
  return false;
}

bool set_type_bits(Core& core, std::uint16_t selector, std::uint8_t bits, Descriptor& descriptor) {
  descriptor.low |= std::uint64_t{bits} << 40;
  const auto byte = static_cast<std::uint8_t>(descriptor.low >> 40);
  return core.mmu.store(table_entry(core.cpu, selector) + 5, byte, As::kSystem);
}

Segment segment_of(std::uint16_t selector, const Descriptor& descriptor) {
  return {.base = descriptor.base(),
          .limit = descriptor.limit(),
          .selector = selector,
          .attributes = descriptor.attributes()};
}

Segment real_mode_segment(const Cpu& cpu, SegmentId which, std::uint16_t selector) {
  Segment out = cpu.segments[which];
  out.base = std::uint64_t{selector} << 4;
  out.selector = selector;
  if (cpu.virtual_8086()) {
    out.limit = 0xffff;
    out.attributes = 0xf3;
  } else {
    // Limit and size stay as protected mode left them.
    out.attributes = static_cast<std::uint16_t>((out.attributes & 0xc000) | (which == kCs ? 0x9b : 0x93));
  }
  return out;
}

bool load_segment(Core& core, SegmentId segment, std::uint16_t selector) {
  Cpu& cpu = core.cpu;
  if (!cpu.protected_mode() || cpu.virtual_8086()) {
    cpu.segments[segment] = real_mode_segment(cpu, segment, selector);
    return true;
  }
  if (segment == kSs) {
    return load_stack_segment(core, selector);
  }
  if (null_selector(selector)) {
    cpu.segments[segment] = {.selector = selector};
    return true;
  }
  Descriptor descriptor;
  if (!need_descriptor(core, selector, false, vec::kGp, 0, descriptor)) {
    return false;
  }
  if (!descriptor.is_readable()) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  const bool any_ring = descriptor.is_code() && descriptor.conforming();
  if (!any_ring && (rpl_of(selector) > descriptor.dpl() || cpu.cpl > descriptor.dpl())) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  if (!descriptor.present()) {
    return selector_fault(cpu, vec::kNp, selector);
  }
  if (!mark_accessed(core, selector, descriptor)) {
    return false;
  }
  cpu.segments[segment] = segment_of(selector, descriptor);
  return true;
}

bool code_offset_valid(Cpu& cpu, const Segment& cs, std::uint64_t offset, std::uint32_t external) {
  const bool valid = cpu.long_mode() && cs.long_mode() ? canonical(offset) : offset <= cs.limit;
  return valid || cpu.raise(vec::kGp, external);
}

bool set_rip(Cpu& cpu, std::uint64_t target, std::uint32_t operand_size) {
  if (operand_size < 8) {
    target &= operand_size == 2 ? 0xffff : kLow32;
  }
  if (!code_offset_valid(cpu, cpu.segments[kCs], target)) {
    return false;
  }
  cpu.rip = target;
  return true;
}

bool inner_stack(Core& core, std::uint8_t ring, std::uint32_t external, Segment& ss, std::uint64_t& sp) {
  Cpu& cpu = core.cpu;
  if (cpu.long_mode()) {
    ss = null_stack(ring);
    return read_tss(core, 4 + ring * 8U, &sp, 8, external);
  }
  const std::uint8_t type = cpu.tr.type();
  std::uint16_t selector = 0;
  if (type == system_type::kTss16 || type == system_type::kTss16Busy) {
    std::array<std::uint16_t, 2> stack{};
    if (!read_tss(core, 2 + ring * 4U, stack.data(), 4, external)) {
      return false;
    }
    sp = stack[0];
    selector = stack[1];
  } else {
    struct {
      std::uint32_t esp;
      std::uint16_t ss;
    } stack{};
    if (!read_tss(core, 4 + ring * 8U, &stack, 6, external)) {
      return false;
    }
    sp = stack.esp;
    selector = stack.ss;
  }
  return load_inner_stack_segment(core, selector, ring, external, ss);
}

bool interrupt_stack(Core& core, std::uint8_t index, std::uint32_t external, std::uint64_t& sp) {
  return read_tss(core, 28 + index * 8U, &sp, 8, external);
}

void drop_inner_segments(Cpu& cpu, std::uint8_t cpl) {
  for (const SegmentId which : {kEs, kDs, kFs, kGs}) {
    Segment& segment = cpu.segments[which];
    if (!segment.present()) {
      segment.selector = 0;  // null already, perhaps not 0; a base that was written by itself stays
      continue;
    }
    const bool conforming = (segment.type() & 0xc) == 0xc;
    if (!conforming && segment.dpl() < cpl) {
      segment.selector = 0;
      segment.attributes = 0;
      segment.limit = 0;
    }
  }
}

}  // namespace wisp::soft
