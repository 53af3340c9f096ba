// Instructions that save and load floating-point and vector registers as a whole (SDM volume 1, 13.7 to 13.9;
// volume 2, XSAVE, XRSTOR, FXSAVE, FXRSTOR), and the checks before any use of these registers.
#include <algorithm>
#include <array>
#include <cstring>

#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/fpu_environment.h"
#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/xsave_area.h"

namespace wisp::soft {
namespace {

// XMM registers that the present mode has.
std::uint32_t register_count(const Cpu& cpu) {
  return cpu.code64() ? 16 : 8;
}

bool all_zero(const Cpu& cpu, std::uint32_t from, std::uint32_t end) {
  return std::all_of(cpu.vectors.begin() + from, cpu.vectors.begin() + end,
                     [](std::uint8_t byte) { return byte == 0; });
}

// XINUSE: components that are not in their initial state. The area is settled.
std::uint64_t in_use(const Cpu& cpu) {
  std::uint64_t used = 0;
  if (vectors_get<std::uint16_t>(cpu, xsave::kControl) != xsave::kControlInit ||
      !all_zero(cpu, xsave::kStatus, xsave::kMxcsr) || !all_zero(cpu, xsave::kStack, xsave::kStackEnd)) {
    used |= xsave::kX87;
  }
  if (!all_zero(cpu, xsave::kXmm, xsave::kXmmEnd)) {
    used |= xsave::kSse;
  }
  if ((cpu.xcr0 & xsave::kAvx) != 0 && !all_zero(cpu, xsave::kYmm, kXsaveSize)) {
    used |= xsave::kAvx;
  }
  return used;
}

// The components that XSAVE and its like are asked for.
std::uint64_t requested(const Cpu& cpu) {
  return cpu.xcr0 & ((cpu.gpr[kRdx] << 32) | (cpu.gpr[kRax] & 0xffffffff));
}

bool xsave_allowed(Cpu& cpu) {
  if ((cpu.cr4 & cr4::kOsxsave) == 0) {
    return cpu.raise(vec::kUd);
  }
  return (cpu.cr0 & cr0::kTs) == 0 || cpu.raise(vec::kNm);
}

bool fxsave_allowed(Cpu& cpu) {
  return (cpu.cr0 & (cr0::kTs | cr0::kEm)) == 0 || cpu.raise(vec::kNm);
}

bool locate_aligned(Core& core, const Insn& insn, std::uint32_t size, Access access, std::uint32_t alignment,
                    std::uint64_t& linear) {
  if (!operand::locate(core, insn, size, access, linear)) {
    return false;
  }
  return linear % alignment == 0 || core.cpu.raise(vec::kGp, 0);
}

std::uint32_t area_size(std::uint64_t components) {
  return (components & xsave::kAvx) != 0 ? std::uint32_t{kXsaveSize} : xsave::kHeader + xsave::kHeaderSize;
}

Outcome save(Core& core, const Insn& insn, bool optimized) {
  Cpu& cpu = core.cpu;
  std::uint64_t linear = 0;
  if (!xsave_allowed(cpu)) {
    return Outcome::kFault;
  }
  const std::uint64_t wanted = requested(cpu);
  if (!locate_aligned(core, insn, area_size(wanted), Access::kWrite, xsave::kHeaderSize, linear)) {
    return Outcome::kFault;
  }
  std::uint64_t present = 0;
  if (!operand::probe_area(core, linear, area_size(wanted)) ||
      !core.mmu.load(linear + xsave::kHeader, present)) {
    return core.mmu.stopped();
  }
  settle_xsave_area(cpu);
  const std::uint64_t used = in_use(cpu);
  const std::uint64_t stored = optimized ? wanted & used : wanted;
  const auto put = [&core, linear](std::uint32_t from, std::uint32_t end) {
    return operand::write_area(core, linear + from, core.cpu.vectors.data() + from, end - from);
  };
  const std::uint32_t registers = register_count(cpu) * 16;
  bool done = true;
  if ((stored & xsave::kX87) != 0) {
    done = put(xsave::kControl, xsave::kMxcsr) && put(xsave::kStack, xsave::kStackEnd);
  }
  if ((wanted & (xsave::kSse | xsave::kAvx)) != 0) {
    done = done && put(xsave::kMxcsr, xsave::kStack);
  }
  if ((stored & xsave::kSse) != 0) {
    done = done && put(xsave::kXmm, xsave::kXmm + registers);
  }
  if ((stored & xsave::kAvx) != 0) {
    done = done && put(xsave::kYmm, xsave::kYmm + registers);
  }
  present = (present & ~wanted) | (used & wanted);
  done = done && core.mmu.store(linear + xsave::kHeader, present);
  return done ? Outcome::kNext : core.mmu.stopped();
}

using Area = std::array<std::uint8_t, kXsaveSize>;

template <typename T>
T get(const Area& area, std::uint32_t offset) {
  T value;
  std::memcpy(&value, area.data() + offset, sizeof value);
  return value;
}

// The components of an area that the guest wrote, into the settled registers.
void take_x87(Cpu& cpu, const Area& area) {
  put_x87_words(cpu, get<std::uint16_t>(area, xsave::kControl), get<std::uint16_t>(area, xsave::kStatus),
                get<std::uint8_t>(area, xsave::kTag));
  for (std::uint32_t i = 0; i < 8; ++i) {
    const std::uint32_t at = xsave::kStack + i * 16;
    std::copy_n(area.begin() + at, 10, cpu.vectors.begin() + at);
    std::fill_n(cpu.vectors.begin() + at + 10, 6, std::uint8_t{0});
  }
}

void take_registers(Cpu& cpu, const Area& area, std::uint32_t from) {
  std::copy_n(area.begin() + from, register_count(cpu) * 16, cpu.vectors.begin() + from);
}

void clear_registers(Cpu& cpu, std::uint32_t from) {
  std::fill_n(cpu.vectors.begin() + from, register_count(cpu) * 16, std::uint8_t{0});
}

bool mxcsr_valid(Cpu& cpu, std::uint32_t mxcsr) {
  return (mxcsr & ~xsave::kMxcsrBits) == 0 || cpu.raise(vec::kGp, 0);
}

// The header of an area in standard format; the compacted one is not offered.
bool header_valid(Cpu& cpu, const Area& area) {
  const bool plain =
      get<std::uint64_t>(area, xsave::kHeader + 8) == 0 && get<std::uint64_t>(area, xsave::kHeader + 16) == 0;
  const bool known = (get<std::uint64_t>(area, xsave::kHeader) & ~cpu.xcr0) == 0;
  return (plain && known) || cpu.raise(vec::kGp, 0);
}

Outcome restore(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t linear = 0;
  if (!xsave_allowed(cpu)) {
    return Outcome::kFault;
  }
  const std::uint64_t wanted = requested(cpu);
  if (!locate_aligned(core, insn, area_size(wanted), Access::kRead, xsave::kHeaderSize, linear)) {
    return Outcome::kFault;
  }
  Area area;
  if (!operand::read_area(core, linear + xsave::kHeader, area.data() + xsave::kHeader, xsave::kHeaderSize)) {
    return core.mmu.stopped();
  }
  if (!header_valid(cpu, area)) {
    return Outcome::kFault;
  }
  const auto present = get<std::uint64_t>(area, xsave::kHeader);
  const bool avx = (wanted & present & xsave::kAvx) != 0;
  if (!operand::read_area(core, linear, area.data(), xsave::kXmmEnd) ||
      (avx && !operand::read_area(core, linear + xsave::kYmm, area.data() + xsave::kYmm,
                                  register_count(cpu) * 16))) {
    return core.mmu.stopped();
  }
  const bool mxcsr = (wanted & (xsave::kSse | xsave::kAvx)) != 0;
  if (mxcsr && !mxcsr_valid(cpu, get<std::uint32_t>(area, xsave::kMxcsr))) {
    return Outcome::kFault;
  }
  settle_xsave_area(cpu);
  if ((wanted & present & xsave::kX87) != 0) {
    take_x87(cpu, area);
  } else if ((wanted & xsave::kX87) != 0) {
    put_x87_words(cpu, xsave::kControlInit, 0, 0);
    std::fill(cpu.vectors.begin() + xsave::kStack, cpu.vectors.begin() + xsave::kStackEnd, std::uint8_t{0});
  }
  if (mxcsr) {
    vectors_put(cpu, xsave::kMxcsr, get<std::uint32_t>(area, xsave::kMxcsr));
  }
  if ((wanted & present & xsave::kSse) != 0) {
    take_registers(cpu, area, xsave::kXmm);
  } else if ((wanted & xsave::kSse) != 0) {
    clear_registers(cpu, xsave::kXmm);
  }
  if (avx) {
    take_registers(cpu, area, xsave::kYmm);
  } else if ((wanted & xsave::kAvx) != 0) {
    clear_registers(cpu, xsave::kYmm);
  }
  return Outcome::kNext;
}

constexpr std::uint32_t kFxsaveSize = 512;

Outcome fxsave(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t linear = 0;
  if (!fxsave_allowed(cpu) || !locate_aligned(core, insn, kFxsaveSize, Access::kWrite, 16, linear)) {
    return Outcome::kFault;
  }
  if (!operand::probe_area(core, linear, kFxsaveSize)) {
    return core.mmu.stopped();
  }
  settle_xsave_area(cpu);
  const std::uint32_t end = xsave::kXmm + register_count(cpu) * 16;
  return operand::write_area(core, linear, cpu.vectors.data(), end) ? Outcome::kNext : core.mmu.stopped();
}

Outcome fxrstor(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t linear = 0;
  if (!fxsave_allowed(cpu) || !locate_aligned(core, insn, kFxsaveSize, Access::kRead, 16, linear)) {
    return Outcome::kFault;
  }
  Area area;
  if (!operand::read_area(core, linear, area.data(), kFxsaveSize)) {
    return core.mmu.stopped();
  }
  const auto mxcsr = get<std::uint32_t>(area, xsave::kMxcsr);
  if (!mxcsr_valid(cpu, mxcsr)) {
    return Outcome::kFault;
  }
  settle_xsave_area(cpu);
  take_x87(cpu, area);
  vectors_put(cpu, xsave::kMxcsr, mxcsr);
  take_registers(cpu, area, xsave::kXmm);
  return Outcome::kNext;
}

Outcome load_mxcsr(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!vector_allowed(cpu, insn.vex ? VectorUse::kAvx : VectorUse::kSse)) {
    return Outcome::kFault;
  }
  std::uint64_t value = 0;
  if (!operand::load(core, insn, 4, value)) {
    return core.mmu.stopped();
  }
  const auto mxcsr = static_cast<std::uint32_t>(value);
  if (!mxcsr_valid(cpu, mxcsr)) {
    return Outcome::kFault;
  }
  vectors_put(cpu, xsave::kMxcsr, mxcsr);
  return Outcome::kNext;
}

Outcome store_mxcsr(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!vector_allowed(cpu, insn.vex ? VectorUse::kAvx : VectorUse::kSse)) {
    return Outcome::kFault;
  }
  const auto value = vectors_get<std::uint32_t>(cpu, xsave::kMxcsr);
  return operand::store(core, insn, 4, 4, value) ? Outcome::kNext : core.mmu.stopped();
}

Outcome fpu_wait(Core& core) {
  Cpu& cpu = core.cpu;
  constexpr std::uint64_t kBoth = cr0::kMp | cr0::kTs;
  if ((cpu.cr0 & kBoth) == kBoth) {
    return operand::fault(core, vec::kNm);
  }
  return x87_exception_pending(cpu) ? operand::fault(core, vec::kMf) : Outcome::kNext;
}

}  // namespace

bool vector_allowed(Cpu& cpu, VectorUse use) {
  switch (use) {
    case VectorUse::kNone:
      return true;
    case VectorUse::kX87:
      return (cpu.cr0 & (cr0::kEm | cr0::kTs)) == 0 || cpu.raise(vec::kNm);
    case VectorUse::kMmx:
      if ((cpu.cr0 & cr0::kEm) != 0) {
        return cpu.raise(vec::kUd);
      }
      break;
    case VectorUse::kSse:
      if ((cpu.cr0 & cr0::kEm) != 0 || (cpu.cr4 & cr4::kOsfxsr) == 0) {
        return cpu.raise(vec::kUd);
      }
      break;
    case VectorUse::kAvx: {
      constexpr std::uint64_t kBoth = xsave::kSse | xsave::kAvx;
      if ((cpu.cr4 & cr4::kOsxsave) == 0 || (cpu.xcr0 & kBoth) != kBoth || !cpu.protected_mode() ||
          cpu.virtual_8086()) {
        return cpu.raise(vec::kUd);
      }
      break;
    }
  }
  return (cpu.cr0 & cr0::kTs) == 0 || cpu.raise(vec::kNm);
}

Outcome execute_extended_state(Core& core, const Insn& insn) {
  switch (insn.op) {
    case Op::kXsave:
      return save(core, insn, false);
    case Op::kXsaveOpt:
      return save(core, insn, true);
    case Op::kXrstor:
      return restore(core, insn);
    case Op::kFxsave:
      return fxsave(core, insn);
    case Op::kFxrstor:
      return fxrstor(core, insn);
    case Op::kLoadMxcsr:
      return load_mxcsr(core, insn);
    case Op::kStoreMxcsr:
      return store_mxcsr(core, insn);
    case Op::kFpuEnvironment:
      return fpu_environment(core, insn);
    case Op::kFpuWait:
      return fpu_wait(core);
    default:
      return operand::fault(core, vec::kUd);
  }
}

}  // namespace wisp::soft
