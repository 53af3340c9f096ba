// Integer instructions that the host's processor does not run for the guest: those that touch segments, may
// fault on their operands, or address memory in their own way (SDM volume 2).
#include <array>
#include <cstring>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/operand.h"

namespace wisp::soft {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr std::uint64_t kLow8 = 0xff;
constexpr std::uint64_t kLow32 = 0xffffffff;

// --- moves

Outcome move_from_segment(Core& core, const Insn& insn) {
  const std::uint16_t selector = core.cpu.segments[insn.reg_field()].selector;
  return operand::store(core, insn, insn.operand_size, 2, selector) ? Outcome::kNext : core.mmu.stopped();
}

Outcome move_to_segment(Core& core, const Insn& insn) {
  const auto segment = static_cast<SegmentId>(insn.reg_field());
  std::uint64_t selector = 0;
  if (!operand::load(core, insn, 2, selector) ||
      !load_segment(core, segment, static_cast<std::uint16_t>(selector))) {
    return core.mmu.stopped();
  }
  if (segment == kSs) {
    core.cpu.interrupt_shadow |= 2;
  }
  return Outcome::kNext;
}

// LES, LDS, LSS, LFS, LGS.
Outcome load_far_pointer(Core& core, const Insn& insn) {
  const std::uint32_t size = insn.operand_size;
  SegmentId segment = kEs;
  if (insn.map == 0) {
    segment = insn.opcode == 0xc4 ? kEs : kDs;
  } else {
    segment = static_cast<SegmentId>(insn.opcode & 7);  // B2, B4, B5
  }
  std::array<std::uint8_t, 10> bytes{};
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size + 2, Access::kRead, linear) ||
      !core.mmu.read(linear, bytes.data(), size + 2)) {
    return core.mmu.stopped();
  }
  std::uint16_t selector = 0;
  std::uint64_t offset = 0;
  std::memcpy(&offset, bytes.data(), size);
  std::memcpy(&selector, bytes.data() + size, sizeof selector);
  if (!load_segment(core, segment, selector)) {
    return core.mmu.stopped();
  }
  set_sized(core.cpu, insn.reg, size, offset);
  return Outcome::kNext;
}

// A register of 1 to 8 bytes whose number means AL, CL and so on where it is a byte.
void write_accumulator(Cpu& cpu, std::uint32_t size, std::uint64_t value) {
  std::uint64_t& rax = cpu.gpr[kRax];
  rax = size >= 4 ? value & size_mask(size) : (rax & ~size_mask(size)) | (value & size_mask(size));
}

// A0 to A3.
Outcome move_offset(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = insn.operand_size;
  const bool store = (insn.opcode & 2) != 0;
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, store ? Access::kWrite : Access::kRead, linear)) {
    return core.mmu.stopped();
  }
  if (store) {
    return core.mmu.write(linear, &cpu.gpr[kRax], size) ? Outcome::kNext : core.mmu.stopped();
  }
  std::uint64_t value = 0;
  if (!core.mmu.read(linear, &value, size)) {
    return core.mmu.stopped();
  }
  write_accumulator(cpu, size, value);
  return Outcome::kNext;
}

// XLAT.
Outcome translate_byte(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint64_t offset = (cpu.gpr[kRbx] + (cpu.gpr[kRax] & kLow8)) & size_mask(insn.address_size);
  std::uint64_t linear = 0;
  std::uint8_t value = 0;
  if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), offset, 1, Access::kRead, linear) ||
      !core.mmu.load(linear, value)) {
    return core.mmu.stopped();
  }
  write_accumulator(cpu, 1, value);
  return Outcome::kNext;
}

// --- division

bool load_divisor(Core& core, const Insn& insn, std::uint64_t& value) {
  const bool high_byte = insn.operand_size == 1 && insn.rex == 0 && insn.rm >= 4;
  if (!insn.memory && insn.operand_size == 1) {
    const Cpu& cpu = core.cpu;
    value = high_byte ? cpu.gpr[insn.rm - 4U] >> 8 & kLow8 : cpu.gpr[insn.rm] & kLow8;
    return true;
  }
  return operand::load(core, insn, insn.operand_size, value);
}

std::int64_t sign_extend(std::uint64_t value, std::uint32_t bytes) {
  const auto shift = static_cast<int>(64 - 8 * bytes);
  return static_cast<std::int64_t>(value << shift) >> shift;
}

// What a division that does not fault leaves in the arithmetic flags. They are undefined: most processors
// leave them alone, others (AMD's family 26) do not. Here as on the host, whose own instruction translated
// code uses.
#define WISP_HOST_DIVIDE(instruction)                                              \
  asm volatile("lea -128(%%rsp), %%rsp\n\tpushq %[flags]\n\tpopfq\n\t" instruction \
               " %[divisor]\n\tpushfq\n\tpopq %[flags]\n\tlea 128(%%rsp), %%rsp"   \
               : [flags] "+r"(flags), "+a"(low), "+d"(high)                        \
               : [divisor] "r"(divisor)                                            \
               : "cc", "memory")
template <typename Half, typename Divisor>
std::uint64_t flags_after_host_divide(std::uint64_t flags, bool is_signed, Half low, Half high,
                                      Divisor divisor) {
  flags = (flags & flag::kArithmetic) | flag::kFixed;
  if (is_signed) {
    WISP_HOST_DIVIDE("idiv");
  } else {
    WISP_HOST_DIVIDE("div");
  }
  return flags & flag::kArithmetic;
}
#undef WISP_HOST_DIVIDE

std::uint64_t flags_after_divide(const Cpu& cpu, const Insn& insn, std::uint64_t low, std::uint64_t high,
                                 std::uint64_t divisor) {
  const auto by = [&]<typename Half, typename Divisor>(Half, Divisor, std::uint64_t lower) {
    return flags_after_host_divide(cpu.arithmetic_flags, insn.op == Op::kDivideSigned,
                                   static_cast<Half>(lower), static_cast<Half>(high),
                                   static_cast<Divisor>(divisor));
  };
  switch (insn.operand_size) {
    case 1:  // the dividend is AX
      return by(std::uint16_t{}, std::uint8_t{}, high << 8 | low);
    case 2:
      return by(std::uint16_t{}, std::uint16_t{}, low);
    case 4:
      return by(std::uint32_t{}, std::uint32_t{}, low);
    default:
      return by(std::uint64_t{}, std::uint64_t{}, low);
  }
}

// DIV and IDIV: rDX:rAX, or AX, by the operand.
Outcome divide(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = insn.operand_size;
  const unsigned bits = size * 8;
  std::uint64_t divisor = 0;
  if (!load_divisor(core, insn, divisor)) {
    return core.mmu.stopped();
  }
  const std::uint64_t low = cpu.gpr[kRax] & size_mask(size);
  const std::uint64_t high = (size == 1 ? cpu.gpr[kRax] >> 8 : cpu.gpr[kRdx]) & size_mask(size);
  const Wide all_bits = ~Wide{0} >> (128 - 2 * bits);
  Wide dividend = Wide{high} << bits | low;
  const std::uint64_t divisor_given = divisor;
  const bool is_signed = insn.op == Op::kDivideSigned;
  const bool dividend_negative = is_signed && high >> (bits - 1) != 0;
  const bool divisor_negative = is_signed && sign_extend(divisor, size) < 0;
  if (dividend_negative) {
    dividend = -dividend & all_bits;
  }
  if (divisor_negative) {
    divisor = -divisor & size_mask(size);
  }
  if (divisor == 0) {
    return operand::fault(core, vec::kDe);
  }
  const Wide magnitude = dividend / divisor;
  const auto rest = static_cast<std::uint64_t>(dividend % divisor);
  const bool negative = dividend_negative != divisor_negative;
  const Wide most = is_signed ? (Wide{1} << (bits - 1)) - (negative ? 0 : 1) : Wide{size_mask(size)};
  if (magnitude > most) {
    return operand::fault(core, vec::kDe);
  }
  const auto quotient = static_cast<std::uint64_t>(negative ? -magnitude : magnitude) & size_mask(size);
  const std::uint64_t remainder = (dividend_negative ? -rest : rest) & size_mask(size);
  cpu.arithmetic_flags = flags_after_divide(cpu, insn, low, high, divisor_given);
  if (size == 1) {
    cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffffULL) | remainder << 8 | quotient;
  } else {
    set_sized(cpu, kRax, size, quotient);
    set_sized(cpu, kRdx, size, remainder);
  }
  return Outcome::kNext;
}

// --- bits of memory, by a register

template <typename T>
T change_bit(std::uint8_t* host, Op op, T bit) {
  // Cells are aligned in the operand's size only where the compiler says so: one instruction, whatever the
  // address, as the guest's is.
  T* cell = reinterpret_cast<T*>(host);
  switch (op) {
    case Op::kBitSet:
      return __atomic_fetch_or(cell, bit, __ATOMIC_SEQ_CST);
    case Op::kBitReset:
      return __atomic_fetch_and(cell, static_cast<T>(~bit), __ATOMIC_SEQ_CST);
    default:
      return __atomic_fetch_xor(cell, bit, __ATOMIC_SEQ_CST);
  }
}

std::uint64_t change_bit_locked(std::uint8_t* host, Op op, std::uint64_t bit, std::uint32_t size) {
  switch (size) {
    case 2:
      return change_bit(host, op, static_cast<std::uint16_t>(bit));
    case 4:
      return change_bit(host, op, static_cast<std::uint32_t>(bit));
    default:
      return change_bit(host, op, bit);
  }
}

Outcome bit_operation(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = insn.operand_size;
  const std::int64_t index = sign_extend(cpu.gpr[insn.reg], size);
  // The cell of the operand's size that holds the bit, which may be far away and below.
  const std::int64_t cell = index >> (size == 8 ? 6 : size == 4 ? 5 : 4);
  const std::uint64_t bit = 1ULL << (static_cast<std::uint64_t>(index) & (size * 8 - 1));
  const std::uint64_t offset =
      (effective_address(cpu, insn) + static_cast<std::uint64_t>(cell) * size) & size_mask(insn.address_size);
  const bool writes = insn.op != Op::kBitTest;
  const Access access = writes ? Access::kWrite : Access::kRead;
  std::uint64_t linear = 0;
  if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), offset, size, access, linear)) {
    return core.mmu.stopped();
  }
  std::uint64_t value = 0;
  if (insn.lock && linear % size == 0) {
    cpu.fault.vector = 0xff;
    if (std::uint8_t* host = core.mmu.pin(linear, size, Access::kWrite)) {
      value = change_bit_locked(host, insn.op, bit, size);
      core.mmu.wrote(linear, size);
      set_flag(cpu, flag::kCf, (value & bit) != 0);
      return Outcome::kNext;
    }
    if (cpu.fault.vector != 0xff) {
      return Outcome::kFault;
    }
  }
  if ((writes && !core.mmu.probe(linear, size, Access::kWrite)) || !core.mmu.read(linear, &value, size)) {
    return core.mmu.stopped();
  }
  std::uint64_t changed = value ^ bit;
  if (insn.op == Op::kBitSet) {
    changed = value | bit;
  } else if (insn.op == Op::kBitReset) {
    changed = value & ~bit;
  }
  if (writes && !core.mmu.write(linear, &changed, size)) {
    return core.mmu.stopped();
  }
  set_flag(cpu, flag::kCf, (value & bit) != 0);
  return Outcome::kNext;
}

// --- CMPXCHG8B and CMPXCHG16B

struct Pair {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};

// One locked instruction, at any address. True where `expected` was there; else it becomes what was.
bool exchange8(std::uint8_t* host, std::uint64_t& expected, std::uint64_t wanted) {
  using Cell = std::uint64_t __attribute__((aligned(1), may_alias));
  bool equal = false;
  asm volatile("lock cmpxchgq %3, %1"
               : "=@ccz"(equal), "+m"(*reinterpret_cast<Cell*>(host)), "+a"(expected)
               : "r"(wanted)
               : "memory");
  return equal;
}

// The same for 16 bytes, aligned.
bool exchange16(std::uint8_t* host, Pair& expected, const Pair& wanted) {
  bool equal = false;
  asm volatile("lock cmpxchg16b (%[at])"
               : "=@ccz"(equal), "+a"(expected.low), "+d"(expected.high)
               : [at] "r"(host), "b"(wanted.low), "c"(wanted.high)
               : "memory");
  return equal;
}

// Where the operand is not in one page of RAM.
bool exchange_in_parts(Core& core, std::uint64_t linear, std::uint32_t size, Pair& expected,
                       const Pair& wanted, bool& equal) {
  std::array<std::uint64_t, 2> found{};
  if (!core.mmu.probe(linear, size, Access::kWrite) || !core.mmu.read(linear, found.data(), size)) {
    return false;
  }
  equal = found[0] == expected.low && found[1] == expected.high;
  const std::array<std::uint64_t, 2> left{wanted.low, wanted.high};
  // What is not equal is written back.
  if (!core.mmu.write(linear, equal ? left.data() : found.data(), size)) {
    return false;
  }
  expected = {.low = found[0], .high = found[1]};
  return true;
}

Outcome compare_exchange(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const bool wide = insn.op == Op::kCompareExchange16;
  const std::uint32_t size = wide ? 16 : 8;
  // In 64-bit code; a misaligned operand comes before one outside of its segment.
  const std::uint64_t base = insn.segment >= kFs ? cpu.segments[insn.segment].base : 0;
  if (wide && (base + effective_address(cpu, insn)) % 16 != 0) {
    return operand::general_protection(core);
  }
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, Access::kWrite, linear)) {
    return core.mmu.stopped();
  }
  const auto pair = [&cpu, wide](Gpr low, Gpr high) {
    return wide ? Pair{.low = cpu.gpr[low], .high = cpu.gpr[high]}
                : Pair{.low = cpu.gpr[high] << 32 | (cpu.gpr[low] & kLow32)};
  };
  Pair expected = pair(kRax, kRdx);
  const Pair wanted = pair(kRbx, kRcx);
  bool equal = false;
  cpu.fault.vector = 0xff;
  if (std::uint8_t* host = core.mmu.pin(linear, size, Access::kWrite)) {
    equal = wide ? exchange16(host, expected, wanted) : exchange8(host, expected.low, wanted.low);
    core.mmu.wrote(linear, size);
  } else if (cpu.fault.vector != 0xff) {
    return Outcome::kFault;
  } else if (!exchange_in_parts(core, linear, size, expected, wanted, equal)) {
    return core.mmu.stopped();
  }
  set_flag(cpu, flag::kZf, equal);
  if (!equal) {
    cpu.gpr[kRax] = wide ? expected.low : expected.low & kLow32;
    cpu.gpr[kRdx] = wide ? expected.high : expected.low >> 32;
  }
  return Outcome::kNext;
}

// --- decimal numbers

void set_al(Cpu& cpu, std::uint64_t value) {
  cpu.gpr[kRax] = (cpu.gpr[kRax] & ~kLow8) | (value & kLow8);
}
void set_ax(Cpu& cpu, std::uint64_t value) {
  cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffffULL) | (value & 0xffff);
}
void set_al_flags(Cpu& cpu) {
  constexpr std::uint64_t kSet = flag::kZf | flag::kSf | flag::kPf;
  cpu.arithmetic_flags = (cpu.arithmetic_flags & ~kSet) | result_flags(cpu.gpr[kRax], 1);
}

// DAA (27) and DAS (2F).
Outcome decimal_adjust(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const bool subtract = insn.opcode == 0x2f;
  const std::uint64_t before = cpu.gpr[kRax] & kLow8;
  const bool carry = (cpu.arithmetic_flags & flag::kCf) != 0;
  const bool low = (before & 0xf) > 9 || (cpu.arithmetic_flags & flag::kAf) != 0;
  const bool high = before > 0x99 || carry;
  const std::uint64_t adjust = (low ? 6U : 0U) + (high ? 0x60U : 0U);
  set_al(cpu, subtract ? before - adjust : before + adjust);
  // A borrow out of the low digit's correction counts for DAS too.
  const bool borrow = subtract && low && before < 6;
  set_flag(cpu, flag::kAf, low);
  set_flag(cpu, flag::kCf, high || borrow);
  set_al_flags(cpu);
  return Outcome::kNext;
}

// AAA (37), AAS (3F), AAM (D4), AAD (D5).
Outcome ascii_adjust(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint64_t al = cpu.gpr[kRax] & kLow8;
  const std::uint64_t ah = cpu.gpr[kRax] >> 8 & kLow8;
  const std::uint64_t base = insn.immediate & kLow8;
  if (insn.opcode == 0xd4) {
    if (base == 0) {
      return operand::fault(core, vec::kDe);
    }
    set_ax(cpu, al / base << 8 | al % base);
    set_al_flags(cpu);
    return Outcome::kNext;
  }
  if (insn.opcode == 0xd5) {
    set_ax(cpu, (al + ah * base) & kLow8);
    set_al_flags(cpu);
    return Outcome::kNext;
  }
  const bool adjust = (al & 0xf) > 9 || (cpu.arithmetic_flags & flag::kAf) != 0;
  if (adjust) {
    set_ax(cpu, insn.opcode == 0x37 ? cpu.gpr[kRax] + 0x106 : cpu.gpr[kRax] - 0x106);
  }
  set_flag(cpu, flag::kAf, adjust);
  set_flag(cpu, flag::kCf, adjust);
  set_al(cpu, cpu.gpr[kRax] & 0xf);
  return Outcome::kNext;
}

}  // namespace

Outcome execute_integer(Core& core, const Insn& insn) {
  switch (insn.op) {
    case Op::kLea:
      set_sized(core.cpu, insn.reg, insn.operand_size, effective_address(core.cpu, insn));
      return Outcome::kNext;
    case Op::kMoveFromSegment:
      return move_from_segment(core, insn);
    case Op::kMoveToSegment:
      return move_to_segment(core, insn);
    case Op::kLoadFarPointer:
      return load_far_pointer(core, insn);
    case Op::kMoveOffset:
      return move_offset(core, insn);
    case Op::kTranslateByte:
      return translate_byte(core, insn);
    case Op::kDivide:
    case Op::kDivideSigned:
      return divide(core, insn);
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
      return bit_operation(core, insn);
    case Op::kCompareExchange8:
    case Op::kCompareExchange16:
      return compare_exchange(core, insn);
    case Op::kAsciiAdjust:
      return ascii_adjust(core, insn);
    case Op::kDecimalAdjust:
      return decimal_adjust(core, insn);
    default:
      return operand::fault(core, vec::kUd);
  }
}

}  // namespace wisp::soft
