// Vector instructions that touch memory element by element: gathers and masked moves. Elements that the mask
// leaves out are not touched and cannot fault (SDM volume 2, VPGATHERDD, VMASKMOV, MASKMOVDQU).
#include <algorithm>
#include <array>
#include <cstring>

#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/operand.h"

namespace wisp::soft {
namespace {

constexpr std::size_t kXmm = 160;
constexpr std::size_t kYmmHigh = 576;
constexpr std::size_t kHeader = 512;

using Vector = std::array<std::uint8_t, 32>;

// A component that its bit in the header calls initial is zero, whatever lies in its place.
Vector read_vector(const Cpu& cpu, std::uint8_t reg) {
  Vector value{};
  if ((cpu.vectors[kHeader] & 2) != 0) {
    std::copy_n(cpu.vectors.begin() + static_cast<std::ptrdiff_t>(kXmm + 16U * reg), 16, value.begin());
  }
  if ((cpu.vectors[kHeader] & 4) != 0) {
    std::copy_n(cpu.vectors.begin() + static_cast<std::ptrdiff_t>(kYmmHigh + 16U * reg), 16,
                value.begin() + 16);
  }
  return value;
}

void write_vector(Cpu& cpu, std::uint8_t reg, const Vector& value) {
  if ((cpu.vectors[kHeader] & 2) == 0) {
    std::fill_n(cpu.vectors.begin() + kXmm, 256, std::uint8_t{0});
  }
  if ((cpu.vectors[kHeader] & 4) == 0) {
    std::fill_n(cpu.vectors.begin() + kYmmHigh, 256, std::uint8_t{0});
  }
  std::copy_n(value.begin(), 16, cpu.vectors.begin() + static_cast<std::ptrdiff_t>(kXmm + 16U * reg));
  std::copy_n(value.begin() + 16, 16,
              cpu.vectors.begin() + static_cast<std::ptrdiff_t>(kYmmHigh + 16U * reg));
  cpu.vectors[kHeader] |= 6;
}

constexpr std::size_t kStatusWord = 2;
constexpr std::size_t kTagByte = 4;
constexpr std::size_t kFpuRegisters = 32;
constexpr std::size_t kFpuRegisterSize = 16;

// What every MMX instruction begins with: #MF where an exception of the x87 unit is pending; then all
// registers are in use and the top of their stack is 0, so that MM0 lies first (SDM volume 1, 9.5 and 9.6).
bool enter_mmx(Cpu& cpu) {
  auto& area = cpu.vectors;
  if ((area[kHeader] & 1) == 0) {
    std::fill_n(area.begin(), 24, std::uint8_t{0});
    std::fill_n(area.begin() + kFpuRegisters, 8 * kFpuRegisterSize, std::uint8_t{0});
    area[0] = 0x7f;  // control word 37F
    area[1] = 0x03;
    area[kHeader] |= 1;
  }
  if ((area[kStatusWord] & 0x80) != 0) {
    return cpu.raise(vec::kMf);
  }
  const std::size_t top = area[kStatusWord + 1] >> 3 & 7;
  const auto registers = area.begin() + kFpuRegisters;
  // They are stored from the top on: register 0 stands (8 - top) places behind.
  std::rotate(registers, registers + static_cast<std::ptrdiff_t>((8 - top) % 8 * kFpuRegisterSize),
              registers + 8 * kFpuRegisterSize);
  area[kStatusWord + 1] &= 0xc7;
  area[kTagByte] = 0xff;
  return true;
}

bool element_wanted(const Vector& mask, std::size_t index, std::size_t size) {
  return (mask[(index + 1) * size - 1] & 0x80) != 0;
}

// VPGATHERDD and its kin: opcode bit 0 tells the index size, W the data size; the index register is the
// SIB's.
Outcome gather(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::size_t data = insn.rex_w() ? 8 : 4;
  const std::size_t index_size = (insn.opcode & 1) != 0 ? 8 : 4;
  const std::size_t length = insn.vex_256 ? 32 : 16;
  const std::size_t count = length / std::max(data, index_size);
  // SIB index 4 is XMM4 here, not "none".
  const auto index_register = static_cast<std::uint8_t>(insn.index == kNoRegister ? 4 : insn.index);
  if ((insn.modrm & 7) != 4 || insn.reg == insn.vvvv || insn.reg == index_register ||
      insn.vvvv == index_register) {
    return operand::fault(core, vec::kUd);
  }
  const Vector indexes = read_vector(cpu, index_register);
  Vector result = read_vector(cpu, insn.reg);
  Vector mask = read_vector(cpu, insn.vvvv);
  Insn base = insn;
  base.index = kNoRegister;
  const std::uint64_t start = effective_address(cpu, base);
  const std::uint64_t address_mask = insn.address_size == 8 ? ~0ULL : 0xffffffffULL;
  // From here on the mask says of each whole element whether it is still to be gathered.
  for (std::size_t i = 0; i < length / data; ++i) {
    const std::uint8_t wanted = element_wanted(mask, i, data) ? 0xff : 0;
    std::fill_n(mask.begin() + static_cast<std::ptrdiff_t>(i * data), data, wanted);
  }
  std::fill(mask.begin() + static_cast<std::ptrdiff_t>(length), mask.end(), std::uint8_t{0});
  const auto finish = [&](bool whole) {
    // On a fault, what was gathered before stays, with its mask cleared.
    if (whole) {
      mask.fill(0);
      std::fill(result.begin() + static_cast<std::ptrdiff_t>(count * data), result.end(), std::uint8_t{0});
    }
    write_vector(cpu, insn.reg, result);
    write_vector(cpu, insn.vvvv, mask);
  };
  for (std::size_t i = 0; i < count; ++i) {
    if (!element_wanted(mask, i, data)) {
      continue;
    }
    std::int64_t index = 0;
    if (index_size == 8) {
      std::memcpy(&index, &indexes[i * 8], 8);
    } else {
      std::int32_t narrow = 0;
      std::memcpy(&narrow, &indexes[i * 4], 4);
      index = narrow;
    }
    const std::uint64_t offset = (start + (static_cast<std::uint64_t>(index) << insn.scale)) & address_mask;
    std::uint64_t linear = 0;
    if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), offset, static_cast<std::uint32_t>(data),
                        Access::kRead, linear) ||
        !core.mmu.read(linear, &result[i * data], static_cast<std::uint32_t>(data))) {
      if (!core.mmu.stopped_for_io()) {
        finish(false);
      }
      return core.mmu.stopped();
    }
    std::fill_n(mask.begin() + static_cast<std::ptrdiff_t>(i * data), data, std::uint8_t{0});
  }
  finish(true);
  return Outcome::kNext;
}

// VMASKMOVPS/PD and VPMASKMOVD/Q.
Outcome mask_move(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const bool integer = insn.opcode >= 0x8c;
  const std::size_t size = integer ? (insn.rex_w() ? 8 : 4) : ((insn.opcode & 1) != 0 ? 8 : 4);
  const bool stores = integer ? insn.opcode == 0x8e : insn.opcode >= 0x2e;
  const std::size_t length = insn.vex_256 ? 32 : 16;
  const Vector mask = read_vector(cpu, insn.vvvv);
  const Vector source = read_vector(cpu, insn.reg);
  Vector result{};
  const std::uint64_t start = effective_address(cpu, insn);
  const auto width = static_cast<std::uint32_t>(size);
  const auto address = [&](std::size_t i, Access access, std::uint64_t& linear) {
    return linear_address(cpu, static_cast<SegmentId>(insn.segment), start + i * size, width, access, linear);
  };
  std::uint64_t linear = 0;
  for (std::size_t i = 0; i < length / size; ++i) {
    if (!element_wanted(mask, i, size)) {
      continue;
    }
    const bool done =
        stores ? address(i, Access::kWrite, linear) && core.mmu.probe(linear, width, Access::kWrite)
               : address(i, Access::kRead, linear) && core.mmu.read(linear, &result[i * size], width);
    if (!done) {
      return core.mmu.stopped();
    }
  }
  if (!stores) {
    write_vector(cpu, insn.reg, result);
    return Outcome::kNext;
  }
  for (std::size_t i = 0; i < length / size; ++i) {
    if (element_wanted(mask, i, size) &&
        (!address(i, Access::kWrite, linear) || !core.mmu.write(linear, &source[i * size], width))) {
      return core.mmu.stopped();
    }
  }
  return Outcome::kNext;
}

// MASKMOVDQU and MASKMOVQ: bytes to DS:rDI.
Outcome mask_move_bytes(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const bool mmx = insn.reg_class == OperandClass::kMmx;
  const std::size_t length = mmx ? 8 : 16;
  Vector source{};
  Vector mask{};
  if (mmx) {
    if (!enter_mmx(cpu)) {
      return Outcome::kFault;
    }
    const auto slot = [&cpu](std::uint8_t reg) {
      return cpu.vectors.begin() + static_cast<std::ptrdiff_t>(kFpuRegisters + kFpuRegisterSize * reg);
    };
    std::copy_n(slot(insn.reg), 8, source.begin());
    std::copy_n(slot(insn.rm), 8, mask.begin());
  } else {
    source = read_vector(cpu, insn.reg);
    mask = read_vector(cpu, insn.rm);
  }
  const std::uint64_t address_mask = insn.address_size == 8   ? ~0ULL
                                     : insn.address_size == 4 ? 0xffffffffULL
                                                              : 0xffffULL;
  std::uint64_t linear = 0;
  for (const bool probing : {true, false}) {
    for (std::size_t i = 0; i < length; ++i) {
      if ((mask[i] & 0x80) == 0) {
        continue;
      }
      const std::uint64_t offset = (cpu.gpr[kRdi] + i) & address_mask;
      if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), offset, 1, Access::kWrite, linear) ||
          !(probing ? core.mmu.probe(linear, 1, Access::kWrite) : core.mmu.write(linear, &source[i], 1))) {
        return core.mmu.stopped();
      }
    }
  }
  return Outcome::kNext;
}

}  // namespace

Outcome execute_vector(Core& core, const Insn& insn) {
  const VectorUse use = insn.op != Op::kMaskMoveBytes          ? VectorUse::kAvx
                        : insn.reg_class == OperandClass::kMmx ? VectorUse::kMmx
                        : insn.vex                             ? VectorUse::kAvx
                                                               : VectorUse::kSse;
  if (!vector_allowed(core.cpu, use)) {
    return Outcome::kFault;
  }
  switch (insn.op) {
    case Op::kGather:
      return gather(core, insn);
    case Op::kMaskMove:
      return mask_move(core, insn);
    default:
      return mask_move_bytes(core, insn);
  }
}

}  // namespace wisp::soft
