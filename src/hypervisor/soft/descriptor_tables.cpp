// Table registers (LGDT ... STR), and instructions that look at descriptors (LAR ... ARPL).
#include <array>
#include <cstring>

#include "hypervisor/soft/descriptor.h"
#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/system_groups.h"

namespace wisp::soft {
namespace {

bool segmented(const Cpu& cpu) {
  return cpu.protected_mode() && !cpu.virtual_8086();
}

Outcome load_table(Core& core, const Insn& insn, TableRegister& target) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  const bool wide = cpu.code64();
  const std::uint32_t size = wide ? 10 : 6;
  std::array<std::uint8_t, 10> bytes{};
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, Access::kRead, linear) ||
      !core.mmu.read(linear, bytes.data(), size)) {
    return core.mmu.stopped();
  }
  TableRegister table;
  std::memcpy(&table.limit, bytes.data(), 2);
  std::memcpy(&table.base, bytes.data() + 2, size - 2);
  if (!wide && insn.operand_size == 2) {
    table.base &= 0xffffff;
  }
  if (wide && !canonical(table.base)) {
    return operand::general_protection(core);
  }
  target = table;
  return Outcome::kNext;
}

Outcome store_table(Core& core, const Insn& insn, const TableRegister& source) {
  if (!umip_allows(core.cpu)) {
    return Outcome::kFault;
  }
  const std::uint32_t size = core.cpu.code64() ? 10 : 6;
  std::array<std::uint8_t, 10> bytes{};
  std::memcpy(bytes.data(), &source.limit, 2);
  std::memcpy(bytes.data() + 2, &source.base, 8);
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, Access::kWrite, linear) ||
      !core.mmu.write(linear, bytes.data(), size)) {
    return core.mmu.stopped();
  }
  return Outcome::kNext;
}

// The system descriptor for LLDT or LTR, which must lie in the GDT.
bool system_descriptor(Core& core, std::uint16_t selector, Descriptor& descriptor) {
  Cpu& cpu = core.cpu;
  if ((selector & 4) != 0) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  if (!need_descriptor(core, selector, cpu.long_mode(), vec::kGp, 0, descriptor)) {
    return false;
  }
  if (descriptor.is_code_or_data() || descriptor.high_type() != 0) {
    return selector_fault(cpu, vec::kGp, selector);
  }
  return true;
}

Segment system_segment(std::uint16_t selector, const Descriptor& descriptor) {
  Segment out = segment_of(selector, descriptor);
  out.base = descriptor.wide_base();  // the upper half is 0 outside of IA-32e mode
  return out;
}

Outcome load_ldt(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!segmented(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  std::uint64_t value = 0;
  if (!operand::load(core, insn, 2, value)) {
    return core.mmu.stopped();
  }
  const auto selector = static_cast<std::uint16_t>(value);
  if (null_selector(selector)) {
    cpu.ldtr = {.selector = selector};
    return Outcome::kNext;
  }
  Descriptor descriptor;
  if (!system_descriptor(core, selector, descriptor)) {
    return core.mmu.stopped();
  }
  if (descriptor.type() != system_type::kLdt || !canonical(descriptor.wide_base())) {
    (void)selector_fault(cpu, vec::kGp, selector);
    return Outcome::kFault;
  }
  if (!descriptor.present()) {
    (void)selector_fault(cpu, vec::kNp, selector);
    return Outcome::kFault;
  }
  cpu.ldtr = system_segment(selector, descriptor);
  return Outcome::kNext;
}

Outcome load_task(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!segmented(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  std::uint64_t value = 0;
  if (!operand::load(core, insn, 2, value)) {
    return core.mmu.stopped();
  }
  const auto selector = static_cast<std::uint16_t>(value);
  if (null_selector(selector)) {
    return operand::general_protection(core);
  }
  Descriptor descriptor;
  if (!system_descriptor(core, selector, descriptor)) {
    return core.mmu.stopped();
  }
  const std::uint8_t type = descriptor.type();
  const bool available = type == system_type::kTss || (type == system_type::kTss16 && !cpu.long_mode());
  if (!available || !canonical(descriptor.wide_base())) {
    (void)selector_fault(cpu, vec::kGp, selector);
    return Outcome::kFault;
  }
  if (!descriptor.present()) {
    (void)selector_fault(cpu, vec::kNp, selector);
    return Outcome::kFault;
  }
  if (!set_type_bits(core, selector, 2, descriptor)) {
    return core.mmu.stopped();
  }
  cpu.tr = system_segment(selector, descriptor);
  return Outcome::kNext;
}

Outcome store_selector(Core& core, const Insn& insn, const Segment& source) {
  if (!segmented(core.cpu)) {
    return operand::fault(core, vec::kUd);
  }
  if (!umip_allows(core.cpu)) {
    return Outcome::kFault;
  }
  return operand::store(core, insn, insn.operand_size, 2, source.selector) ? Outcome::kNext
                                                                           : core.mmu.stopped();
}

void set_zero_flag(Cpu& cpu, bool on) {
  cpu.arithmetic_flags = on ? cpu.arithmetic_flags | flag::kZf : cpu.arithmetic_flags & ~flag::kZf;
}

constexpr std::uint32_t types(std::initializer_list<std::uint8_t> list) {
  std::uint32_t bits = 0;
  for (const std::uint8_t type : list) {
    bits |= 1U << type;
  }
  return bits;
}

// System descriptors that LAR and LSL know (SDM volume 2, tables of LAR and LSL).
bool known_system_type(const Cpu& cpu, const Descriptor& descriptor, bool with_limit) {
  using namespace system_type;
  constexpr std::uint32_t kLimitsLong = types({kLdt, kTss, kTssBusy});
  constexpr std::uint32_t kLimits = kLimitsLong | types({kTss16, kTss16Busy});
  constexpr std::uint32_t kRightsLong = kLimitsLong | types({kCallGate});
  constexpr std::uint32_t kRights = kLimits | types({kCallGate16, kTaskGate, kCallGate});
  const std::uint32_t known =
      cpu.long_mode() ? (with_limit ? kLimitsLong : kRightsLong) : (with_limit ? kLimits : kRights);
  return (known >> descriptor.type() & 1) != 0;
}

// The descriptor that LAR, LSL, VERR or VERW asks about. `visible` where this ring may know of it.
bool look_up(Core& core, std::uint16_t selector, Descriptor& descriptor, bool& visible) {
  Cpu& cpu = core.cpu;
  visible = false;
  if (null_selector(selector)) {
    return true;
  }
  switch (read_descriptor(core, selector, false, descriptor)) {
    case Lookup::kFound:
      break;
    case Lookup::kOutside:
      return true;
    case Lookup::kStopped:
      return false;
  }
  const bool any_ring = descriptor.is_code() && descriptor.conforming();
  visible = any_ring || (descriptor.dpl() >= cpu.cpl && descriptor.dpl() >= rpl_of(selector));
  return true;
}

Outcome load_access_or_limit(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!segmented(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  std::uint64_t value = 0;
  Descriptor descriptor;
  bool visible = false;
  if (!operand::load(core, insn, 2, value) ||
      !look_up(core, static_cast<std::uint16_t>(value), descriptor, visible)) {
    return core.mmu.stopped();
  }
  const bool limit = insn.op == Op::kLoadLimit;
  if (visible && !descriptor.is_code_or_data()) {
    visible = known_system_type(cpu, descriptor, limit);
  }
  set_zero_flag(cpu, visible);
  if (visible) {
    const std::uint64_t rights = descriptor.low >> 32 & (insn.operand_size == 2 ? 0xff00 : 0xf0ff00);
    set_sized(cpu, insn.reg, insn.operand_size, limit ? descriptor.limit() : rights);
  }
  return Outcome::kNext;
}

Outcome verify(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!segmented(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  std::uint64_t value = 0;
  Descriptor descriptor;
  bool visible = false;
  if (!operand::load(core, insn, 2, value) ||
      !look_up(core, static_cast<std::uint16_t>(value), descriptor, visible)) {
    return core.mmu.stopped();
  }
  const bool usable = insn.op == Op::kVerifyRead ? descriptor.is_readable() : descriptor.is_writable_data();
  set_zero_flag(cpu, visible && usable);
  return Outcome::kNext;
}

Outcome adjust_rpl(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!segmented(cpu)) {
    return operand::fault(core, vec::kUd);
  }
  const std::uint64_t source = sized(cpu, insn.reg, 2);
  std::uint64_t linear = 0;
  std::uint64_t value = 0;
  if (insn.memory) {
    if (!operand::locate(core, insn, 2, Access::kWrite, linear) || !core.mmu.read(linear, &value, 2)) {
      return core.mmu.stopped();
    }
  } else {
    value = sized(cpu, insn.rm, 2);
  }
  const bool raises = (value & 3) < (source & 3);
  if (raises) {
    value = (value & ~3ULL) | (source & 3);
    if (!insn.memory) {
      set_sized(cpu, insn.rm, 2, value);
    } else if (!core.mmu.write(linear, &value, 2)) {
      return core.mmu.stopped();
    }
  }
  set_zero_flag(cpu, raises);
  return Outcome::kNext;
}

}  // namespace

Outcome table_instruction(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  switch (insn.op) {
    case Op::kLoadGdt:
      return load_table(core, insn, cpu.gdt);
    case Op::kLoadIdt:
      return load_table(core, insn, cpu.idt);
    case Op::kStoreGdt:
      return store_table(core, insn, cpu.gdt);
    case Op::kStoreIdt:
      return store_table(core, insn, cpu.idt);
    case Op::kLoadLdt:
      return load_ldt(core, insn);
    case Op::kLoadTask:
      return load_task(core, insn);
    case Op::kStoreLdt:
      return store_selector(core, insn, cpu.ldtr);
    case Op::kStoreTask:
      return store_selector(core, insn, cpu.tr);
    case Op::kLoadAccess:
    case Op::kLoadLimit:
      return load_access_or_limit(core, insn);
    case Op::kVerifyRead:
    case Op::kVerifyWrite:
      return verify(core, insn);
    case Op::kArpl:
      return adjust_rpl(core, insn);
    default:
      return operand::fault(core, vec::kUd);
  }
}

}  // namespace wisp::soft
