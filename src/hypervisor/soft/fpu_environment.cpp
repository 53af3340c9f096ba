#include "hypervisor/soft/fpu_environment.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/xsave_area.h"

namespace wisp::soft {
namespace {

constexpr std::uint32_t kRegisterSize = 10;
constexpr std::uint32_t kMost = 28 + 8 * kRegisterSize;
using Image = std::array<std::uint8_t, kMost>;

// Where words lie in the environment; `word` counts them.
struct Layout {
  bool wide = false;         // 32-bit operands: each word takes four bytes
  bool real_format = false;  // of real and virtual-8086 mode
  [[nodiscard]] std::uint32_t size() const { return wide ? 28 : 14; }
  [[nodiscard]] std::uint32_t at(std::uint32_t word) const { return word * (wide ? 4 : 2); }
};

void put16(Image& image, std::uint32_t at, std::uint16_t value) {
  std::memcpy(image.data() + at, &value, sizeof value);
}
std::uint16_t get16(const Image& image, std::uint32_t at) {
  std::uint16_t value = 0;
  std::memcpy(&value, image.data() + at, sizeof value);
  return value;
}

std::uint32_t top_of(std::uint16_t status) {
  return (status >> 11) & 7U;
}

// The tag of a register that is not empty: 0 valid, 1 zero, 2 special.
std::uint32_t tag_of(const Cpu& cpu, std::uint32_t stack_index) {
  const std::uint32_t at = xsave::kStack + stack_index * 16;
  const auto mantissa = vectors_get<std::uint64_t>(cpu, at);
  const std::uint32_t exponent = vectors_get<std::uint16_t>(cpu, at + 8) & 0x7fffU;
  if (exponent == 0) {
    return mantissa == 0 ? 1 : 2;
  }
  return exponent == 0x7fff || mantissa >> 63 == 0 ? 2 : 0;
}

// The tag word with two bits for each register, from the one bit that XSAVE keeps.
std::uint16_t full_tag(const Cpu& cpu) {
  const auto abridged = vectors_get<std::uint8_t>(cpu, xsave::kTag);
  const std::uint32_t top = top_of(vectors_get<std::uint16_t>(cpu, xsave::kStatus));
  std::uint32_t tag = 0;
  for (std::uint32_t physical = 0; physical < 8; ++physical) {
    const bool empty = (abridged >> physical & 1) == 0;
    tag |= (empty ? 3U : tag_of(cpu, (physical - top) & 7)) << (2 * physical);
  }
  return static_cast<std::uint16_t>(tag);
}

std::uint8_t abridged_tag(std::uint16_t full) {
  std::uint32_t tag = 0;
  for (std::uint32_t i = 0; i < 8; ++i) {
    tag |= (full >> (2 * i) & 3) == 3 ? 0 : 1U << i;
  }
  return static_cast<std::uint8_t>(tag);
}

// Sets the words. XSAVE keeps the registers in the order of the stack, so another top moves them.
void load_words(Cpu& cpu, std::uint16_t control, std::uint16_t status, std::uint8_t tag) {
  const std::uint32_t before = top_of(vectors_get<std::uint16_t>(cpu, xsave::kStatus));
  const std::uint32_t turn = (top_of(status) - before) & 7;
  const auto stack = cpu.vectors.begin() + xsave::kStack;
  std::rotate(stack, stack + turn * 16, stack + 128);
  put_x87_words(cpu, control, status, tag);
}

Image environment(const Cpu& cpu, const Layout& layout) {
  Image image{};
  put16(image, layout.at(0), vectors_get<std::uint16_t>(cpu, xsave::kControl));
  put16(image, layout.at(1), vectors_get<std::uint16_t>(cpu, xsave::kStatus));
  put16(image, layout.at(2), full_tag(cpu));
  // The last instruction's and operand's addresses are 0: in the translated or copied code that ran them
  // they would be the host's. Reserved halves hold ones.
  if (layout.wide) {
    for (const std::uint32_t at : {2U, 6U, 10U}) {
      put16(image, at, 0xffff);
    }
    if (layout.real_format) {
      put16(image, 14, 0xffff);
      put16(image, 22, 0xffff);
    } else {
      put16(image, 26, 0xffff);
    }
  }
  return image;
}

Outcome store_environment(Core& core, const Insn& insn, const Layout& layout, bool with_registers) {
  Cpu& cpu = core.cpu;
  settle_xsave_area(cpu);
  Image image = environment(cpu, layout);
  std::uint32_t size = layout.size();
  if (with_registers) {
    for (std::uint32_t i = 0; i < 8; ++i) {
      std::memcpy(image.data() + size, cpu.vectors.data() + xsave::kStack + std::size_t{i} * 16,
                  kRegisterSize);
      size += kRegisterSize;
    }
  }
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, Access::kWrite, linear)) {
    return Outcome::kFault;
  }
  if (!operand::probe_area(core, linear, size) || !operand::write_area(core, linear, image.data(), size)) {
    return core.mmu.stopped();
  }
  if (with_registers) {
    load_words(cpu, xsave::kControlInit, 0, 0);  // as FNINIT
  } else {
    const auto control = vectors_get<std::uint16_t>(cpu, xsave::kControl);
    put_x87_words(cpu, control | xsave::kExceptions, vectors_get<std::uint16_t>(cpu, xsave::kStatus),
                  vectors_get<std::uint8_t>(cpu, xsave::kTag));
  }
  return Outcome::kNext;
}

Outcome load_environment(Core& core, const Insn& insn, const Layout& layout, bool with_registers) {
  Cpu& cpu = core.cpu;
  if (x87_exception_pending(cpu)) {
    return operand::fault(core, vec::kMf);
  }
  const std::uint32_t size = layout.size() + (with_registers ? 8 * kRegisterSize : 0);
  std::uint64_t linear = 0;
  if (!operand::locate(core, insn, size, Access::kRead, linear)) {
    return Outcome::kFault;
  }
  Image image{};
  if (!operand::read_area(core, linear, image.data(), size)) {
    return core.mmu.stopped();
  }
  settle_xsave_area(cpu);
  load_words(cpu, get16(image, layout.at(0)), get16(image, layout.at(1)),
             abridged_tag(get16(image, layout.at(2))));
  if (with_registers) {
    for (std::uint32_t i = 0; i < 8; ++i) {
      std::uint8_t* to = cpu.vectors.data() + xsave::kStack + std::size_t{i} * 16;
      std::memcpy(to, image.data() + layout.size() + std::size_t{i} * kRegisterSize, kRegisterSize);
      std::memset(to + kRegisterSize, 0, 16 - kRegisterSize);
    }
  }
  return Outcome::kNext;
}

}  // namespace

bool x87_exception_pending(const Cpu& cpu) {
  if ((vectors_get<std::uint64_t>(cpu, xsave::kHeader) & xsave::kX87) == 0) {
    return false;
  }
  const auto control = vectors_get<std::uint16_t>(cpu, xsave::kControl);
  const auto status = vectors_get<std::uint16_t>(cpu, xsave::kStatus);
  return (status & ~control & xsave::kExceptions) != 0;
}

Outcome fpu_environment(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (!vector_allowed(cpu, VectorUse::kX87)) {
    return Outcome::kFault;
  }
  const Layout layout{.wide = insn.operand_size != 2,
                      .real_format = !cpu.protected_mode() || cpu.virtual_8086()};
  const bool with_registers = (insn.opcode & 7) == 5;  // DD; else D9
  return insn.reg_field() == 4 ? load_environment(core, insn, layout, with_registers)
                               : store_environment(core, insn, layout, with_registers);
}

}  // namespace wisp::soft
