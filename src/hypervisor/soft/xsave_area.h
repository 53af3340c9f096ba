// Cpu::vectors: x87, SSE and AVX registers in the standard format of XSAVE (SDM volume 1, 13.4).
#pragma once

#include <cstdint>
#include <cstring>

#include "hypervisor/soft/cpu.h"
#include "hypervisor/xsave_layout.h"

namespace wisp::soft {

template <typename T>
[[nodiscard]] T vectors_get(const Cpu& cpu, std::uint32_t offset) {
  T value;
  std::memcpy(&value, cpu.vectors.data() + offset, sizeof value);
  return value;
}
template <typename T>
void vectors_put(Cpu& cpu, std::uint32_t offset, T value) {
  std::memcpy(cpu.vectors.data() + offset, &value, sizeof value);
}

// As after power-up (SDM volume 3, table 9-1).
void reset_xsave_area(Cpu& cpu);

// Writes out the components that XSTATE_BV says are in their initial state, and clears what tells of the
// host's code (the last instruction's and operand's address). After it all bytes say what is in the
// registers.
void settle_xsave_area(Cpu& cpu);

// x87 words with reserved bits as the processor has them, ES and B as the exceptions say.
void put_x87_words(Cpu& cpu, std::uint16_t control, std::uint16_t status, std::uint8_t abridged_tag);

}  // namespace wisp::soft
