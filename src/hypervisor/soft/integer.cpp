#include <array>
#include <bit>
#include <cstring>

#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/operand.h"

namespace wisp::soft {
namespace {

using operand::fault;
__extension__ using Wide = unsigned __int128;
__extension__ using SignedWide = __int128;

// A byte register: without REX, 4 to 7 are AH to BH.
std::uint8_t read_byte(const Cpu& cpu, const Insn& insn, std::uint8_t reg) {
  const bool high = insn.rex == 0 && reg >= 4 && reg < 8;
  return static_cast<std::uint8_t>(high ? cpu.gpr[reg - 4U] >> 8 : cpu.gpr[reg]);
}

Outcome lea(Core& core, const Insn& insn) {
  operand::write_register(core.cpu, insn.reg, insn.operand_size, effective_address(core.cpu, insn));
  return Outcome::kNext;
}

bool divisor(Core& core, const Insn& insn, std::uint64_t& value) {
  value = 0;
  if (insn.operand_size != 1) {
    return operand::load(core, insn, insn.operand_size, value);
  }
  if (!insn.memory) {
    value = read_byte(core.cpu, insn, insn.rm);
    return true;
  }
  std::uint64_t linear = 0;
  return operand::locate(core, insn, 1, Access::kRead, linear) && core.mmu.read(linear, &value, 1);
}

// The dividend: AX, or rDX:rAX; and where quotient and remainder go.
Wide dividend(const Cpu& cpu, std::uint32_t size) {
  if (size == 1) {
    return cpu.gpr[kRax] & 0xffff;
  }
  return Wide{operand::read_register(cpu, kRdx, size)} << (8 * size) |
         operand::read_register(cpu, kRax, size);
}
void put_result(Cpu& cpu, std::uint32_t size, std::uint64_t quotient, std::uint64_t remainder) {
  if (size == 1) {
    cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffffULL) | (quotient & 0xff) | (remainder & 0xff) << 8;
    return;
  }
  operand::write_register(cpu, kRax, size, quotient);
  operand::write_register(cpu, kRdx, size, remainder);
}

Outcome divide(Core& core, const Insn& insn) {
  std::uint64_t by = 0;
  if (!divisor(core, insn, by)) {
    return core.mmu.stopped();
  }
  const std::uint32_t size = insn.operand_size;
  const Wide number = dividend(core.cpu, size);
  if (by == 0 || number / by >> (8 * size) != 0) {
    return fault(core, vec::kDe);
  }
  put_result(core.cpu, size, static_cast<std::uint64_t>(number / by),
             static_cast<std::uint64_t>(number % by));
  return Outcome::kNext;
}

Outcome divide_signed(Core& core, const Insn& insn) {
  std::uint64_t raw = 0;
  if (!divisor(core, insn, raw)) {
    return core.mmu.stopped();
  }
  const std::uint32_t size = insn.operand_size;
  const unsigned bits = 8 * size;
  const auto by = static_cast<std::int64_t>(raw << (64 - bits)) >> (64 - bits);
  const Wide unsigned_number = dividend(core.cpu, size);
  const auto number = static_cast<SignedWide>(unsigned_number << (128 - 2 * bits)) >> (128 - 2 * bits);
  // The most negative dividend by -1 does not fit 128 bits: judged before it is computed.
  if (by == 0 || (by == -1 && number == static_cast<SignedWide>(Wide{1} << 127))) {
    return fault(core, vec::kDe);
  }
  const SignedWide quotient = number / by;
  const SignedWide limit = SignedWide{1} << (bits - 1);
  if (quotient >= limit || quotient < -limit) {
    return fault(core, vec::kDe);
  }
  put_result(core.cpu, size, static_cast<std::uint64_t>(quotient), static_cast<std::uint64_t>(number % by));
  return Outcome::kNext;
}

// BT, BTS, BTR, BTC on memory with a bit offset in a register, which may lead anywhere.
Outcome bit_string(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = insn.operand_size;
  const unsigned bits = 8 * size;
  const std::uint64_t raw = operand::read_register(cpu, insn.reg, size);
  const auto offset = static_cast<std::int64_t>(raw << (64 - bits)) >> (64 - bits);
  const std::int64_t item = offset >> std::countr_zero(bits);  // towards minus infinity
  const std::uint64_t mask = insn.address_size == 8   ? ~0ULL
                             : insn.address_size == 4 ? 0xffffffffULL
                                                      : 0xffffULL;
  const std::uint64_t address =
      (effective_address(cpu, insn) + static_cast<std::uint64_t>(item) * size) & mask;
  const std::uint64_t bit = 1ULL << (static_cast<std::uint64_t>(offset) & (bits - 1));
  const bool writes = insn.op != Op::kBitTest;
  const Access access = writes ? Access::kWrite : Access::kRead;
  std::uint64_t linear = 0;
  if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), address, size, access, linear)) {
    return Outcome::kFault;
  }
  const auto changed = [&insn, bit](std::uint64_t value) {
    return insn.op == Op::kBitSet ? value | bit : insn.op == Op::kBitReset ? value & ~bit : value ^ bit;
  };
  std::uint64_t before = 0;
  std::uint8_t* host = writes && insn.lock ? core.mmu.pin(linear, size, Access::kWrite) : nullptr;
  if (host != nullptr) {
    // The byte that holds the bit decides it.
    std::uint8_t* byte = host + (std::countr_zero(bit) >> 3);
    const auto byte_bit = static_cast<std::uint8_t>(1U << (std::countr_zero(bit) & 7));
    std::uint8_t old = 0;
    if (insn.op == Op::kBitSet) {
      old = __atomic_fetch_or(byte, byte_bit, __ATOMIC_SEQ_CST);
    } else if (insn.op == Op::kBitReset) {
      old = __atomic_fetch_and(byte, static_cast<std::uint8_t>(~byte_bit), __ATOMIC_SEQ_CST);
    } else {
      old = __atomic_fetch_xor(byte, byte_bit, __ATOMIC_SEQ_CST);
    }
    core.mmu.wrote(linear, size);
    before = (old & byte_bit) != 0 ? bit : 0;
  } else {
    if ((writes && !core.mmu.probe(linear, size, Access::kWrite)) || !core.mmu.read(linear, &before, size)) {
      return core.mmu.stopped();
    }
    if (writes) {
      const std::uint64_t after = changed(before);
      if (!core.mmu.write(linear, &after, size)) {
        return core.mmu.stopped();
      }
    }
  }
  cpu.arithmetic_flags = (cpu.arithmetic_flags & ~flag::kCf) | ((before & bit) != 0 ? flag::kCf : 0);
  return Outcome::kNext;
}

bool exchange16(std::uint8_t* host, std::array<std::uint64_t, 2>& expected,
                const std::array<std::uint64_t, 2>& wanted) {
  bool equal = false;
  asm volatile("lock cmpxchg16b %1"
               : "=@ccz"(equal), "+m"(*reinterpret_cast<Wide*>(host)), "+a"(expected[0]), "+d"(expected[1])
               : "b"(wanted[0]), "c"(wanted[1])
               : "memory");
  return equal;
}

// CMPXCHG8B and CMPXCHG16B, always as if locked.
Outcome compare_exchange(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const bool wide = insn.op == Op::kCompareExchange16;
  const std::uint32_t size = wide ? 16 : 8;
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, Access::kWrite, linear)) {
    return Outcome::kFault;
  }
  if (wide && linear % 16 != 0) {
    return operand::general_protection(core);
  }
  cpu.fault.vector = 0xff;
  std::uint8_t* host = core.mmu.pin(linear, size, Access::kWrite);
  bool equal = false;
  std::array<std::uint64_t, 2> found{};
  if (wide) {
    if (host == nullptr) {
      // A device: nothing there answers 16 bytes at once.
      if (cpu.fault.vector != 0xff) {
        return Outcome::kFault;
      }
      return operand::general_protection(core);
    }
    found = {cpu.gpr[kRax], cpu.gpr[kRdx]};
    equal = exchange16(host, found, {cpu.gpr[kRbx], cpu.gpr[kRcx]});
  } else {
    const std::uint64_t expected = (cpu.gpr[kRdx] & 0xffffffff) << 32 | (cpu.gpr[kRax] & 0xffffffff);
    const std::uint64_t wanted = (cpu.gpr[kRcx] & 0xffffffff) << 32 | (cpu.gpr[kRbx] & 0xffffffff);
    if (host != nullptr) {
      std::uint64_t old = expected;
      asm volatile("lock cmpxchgq %3, %1"
                   : "=@ccz"(equal), "+m"(*reinterpret_cast<std::uint64_t*>(host)), "+a"(old)
                   : "r"(wanted)
                   : "memory");
      found = {old & 0xffffffff, old >> 32};
    } else {
      if (cpu.fault.vector != 0xff || !core.mmu.probe(linear, size, Access::kWrite)) {
        return Outcome::kFault;
      }
      std::uint64_t old = 0;
      if (!core.mmu.load(linear, old)) {
        return core.mmu.stopped();
      }
      equal = old == expected;
      if (!core.mmu.store(linear, equal ? wanted : old)) {
        return core.mmu.stopped();
      }
      found = {old & 0xffffffff, old >> 32};
    }
  }
  if (host != nullptr) {
    core.mmu.wrote(linear, size);
  }
  cpu.arithmetic_flags = (cpu.arithmetic_flags & ~flag::kZf) | (equal ? flag::kZf : 0);
  if (!equal) {
    cpu.gpr[kRax] = found[0];
    cpu.gpr[kRdx] = found[1];
  }
  return Outcome::kNext;
}

Outcome translate_byte(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint64_t mask = insn.address_size == 8   ? ~0ULL
                             : insn.address_size == 4 ? 0xffffffffULL
                                                      : 0xffffULL;
  const std::uint64_t offset = (cpu.gpr[kRbx] + (cpu.gpr[kRax] & 0xff)) & mask;
  std::uint64_t linear = 0;
  std::uint8_t value = 0;
  if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), offset, 1, Access::kRead, linear) ||
      !core.mmu.load(linear, value)) {
    return core.mmu.stopped();
  }
  cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffULL) | value;
  return Outcome::kNext;
}

// MOV between rAX and an absolute offset.
Outcome move_offset(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const bool stores = (insn.opcode & 2) != 0;
  const std::uint32_t size = insn.operand_size;
  std::uint64_t linear = 0;
  if (!linear_address(cpu, static_cast<SegmentId>(insn.segment),
                      static_cast<std::uint64_t>(insn.displacement), size,
                      stores ? Access::kWrite : Access::kRead, linear)) {
    return Outcome::kFault;
  }
  if (stores) {
    return core.mmu.write(linear, &cpu.gpr[kRax], size) ? Outcome::kNext : core.mmu.stopped();
  }
  std::uint64_t value = 0;
  if (!core.mmu.read(linear, &value, size)) {
    return core.mmu.stopped();
  }
  if (size == 1) {
    cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffULL) | value;
  } else {
    operand::write_register(cpu, kRax, size, value);
  }
  return Outcome::kNext;
}

Outcome move_from_segment(Core& core, const Insn& insn) {
  const std::uint64_t selector = core.cpu.segments[insn.reg_field()].selector;
  return operand::store(core, insn, insn.operand_size, 2, selector) ? Outcome::kNext : core.mmu.stopped();
}

Outcome move_to_segment(Core& core, const Insn& insn) {
  std::uint64_t selector = 0;
  if (!operand::load(core, insn, 2, selector)) {
    return core.mmu.stopped();
  }
  const auto segment = static_cast<SegmentId>(insn.reg_field());
  if (!load_segment(core, segment, static_cast<std::uint16_t>(selector))) {
    return core.mmu.stopped();
  }
  if (segment == kSs) {
    core.cpu.interrupt_shadow = 2;
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
    segment = insn.opcode == 0xb2 ? kSs : insn.opcode == 0xb4 ? kFs : kGs;
  }
  std::uint64_t linear = 0;
  std::uint64_t offset = 0;
  std::uint16_t selector = 0;
  if (!operand::locate(core, insn, size + 2, Access::kRead, linear) ||
      !core.mmu.read(linear, &offset, size) || !core.mmu.load(linear + size, selector) ||
      !load_segment(core, segment, selector)) {
    return core.mmu.stopped();
  }
  operand::write_register(core.cpu, insn.reg, size, offset);
  return Outcome::kNext;
}

std::uint64_t byte_flags(std::uint8_t value) {
  return (value == 0 ? flag::kZf : 0) | ((value & 0x80) != 0 ? flag::kSf : 0) |
         (__builtin_parity(value) == 0 ? flag::kPf : 0);
}

void set_al_ah(Cpu& cpu, std::uint8_t al, std::uint8_t ah) {
  cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffffULL) | al | static_cast<std::uint64_t>(ah) << 8;
}

// AAA, AAS, AAM, AAD (SDM volume 2).
Outcome ascii_adjust(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  auto al = static_cast<std::uint8_t>(cpu.gpr[kRax]);
  auto ah = static_cast<std::uint8_t>(cpu.gpr[kRax] >> 8);
  const auto by = static_cast<std::uint8_t>(insn.immediate);
  std::uint64_t flags = cpu.arithmetic_flags;
  switch (insn.opcode) {
    case 0x37:
    case 0x3f: {
      const bool adjust = (al & 0xf) > 9 || (flags & flag::kAf) != 0;
      std::uint16_t ax = static_cast<std::uint16_t>(cpu.gpr[kRax]);
      if (adjust) {
        ax = static_cast<std::uint16_t>(insn.opcode == 0x37 ? ax + 0x106 : ax - 0x106);
      }
      al = static_cast<std::uint8_t>(ax & 0xf);
      ah = static_cast<std::uint8_t>(ax >> 8);
      flags = (adjust ? flag::kAf | flag::kCf : 0) | byte_flags(al);
      break;
    }
    case 0xd4:
      if (by == 0) {
        return fault(core, vec::kDe);
      }
      ah = al / by;
      al = al % by;
      flags = byte_flags(al);
      break;
    default:
      al = static_cast<std::uint8_t>(al + ah * by);
      ah = 0;
      flags = byte_flags(al);
      break;
  }
  set_al_ah(cpu, al, ah);
  cpu.arithmetic_flags = flags;
  return Outcome::kNext;
}

// DAA and DAS (SDM volume 2).
Outcome decimal_adjust(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const auto before = static_cast<std::uint8_t>(cpu.gpr[kRax]);
  const bool adds = insn.opcode == 0x27;
  const bool carry = (cpu.arithmetic_flags & flag::kCf) != 0;
  int al = before;
  std::uint64_t flags = 0;
  if ((before & 0xf) > 9 || (cpu.arithmetic_flags & flag::kAf) != 0) {
    al = adds ? al + 6 : al - 6;
    flags |= flag::kAf | (carry || al > 0xff || al < 0 ? flag::kCf : 0);
  }
  if (before > 0x99 || carry) {
    al = adds ? al + 0x60 : al - 0x60;
    flags |= flag::kCf;
  }
  const auto result = static_cast<std::uint8_t>(al);
  cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffULL) | result;
  cpu.arithmetic_flags = flags | byte_flags(result);
  return Outcome::kNext;
}

}  // namespace

Outcome execute_integer(Core& core, const Insn& insn) {
  switch (insn.op) {
    case Op::kLea:
      return lea(core, insn);
    case Op::kDivide:
      return divide(core, insn);
    case Op::kDivideSigned:
      return divide_signed(core, insn);
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
      return bit_string(core, insn);
    case Op::kCompareExchange16:
    case Op::kCompareExchange8:
      return compare_exchange(core, insn);
    case Op::kTranslateByte:
      return translate_byte(core, insn);
    case Op::kMoveOffset:
      return move_offset(core, insn);
    case Op::kMoveFromSegment:
      return move_from_segment(core, insn);
    case Op::kMoveToSegment:
      return move_to_segment(core, insn);
    case Op::kLoadFarPointer:
      return load_far_pointer(core, insn);
    case Op::kAsciiAdjust:
      return ascii_adjust(core, insn);
    default:
      return decimal_adjust(core, insn);
  }
}

}  // namespace wisp::soft
