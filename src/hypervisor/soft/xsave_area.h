// Cpu::vectors: x87, SSE and AVX registers in the standard format of XSAVE (SDM volume 1, 13.4).
#pragma once

#include <cstdint>
#include <cstring>

#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

namespace xsave {
// Bits of XCR0, XSTATE_BV and the like.
inline constexpr std::uint64_t kX87 = 1, kSse = 2, kAvx = 4;

inline constexpr std::uint32_t kControl = 0, kStatus = 2, kTag = 4, kOpcode = 6, kMxcsr = 24, kMxcsrMask = 28,
                               kStack = 32, kXmm = 160, kHeader = 512, kYmm = 576;
inline constexpr std::uint32_t kStackEnd = 160;
inline constexpr std::uint32_t kXmmEnd = 416;  // with 16 registers
inline constexpr std::uint32_t kHeaderSize = 64;

inline constexpr std::uint32_t kMxcsrBits = 0xffff;  // those that may be set
inline constexpr std::uint32_t kMxcsrInit = 0x1f80;
inline constexpr std::uint16_t kControlInit = 0x37f;
inline constexpr std::uint16_t kExceptions = 0x3f;      // of control and status word
inline constexpr std::uint16_t kErrorSummary = 0x8080;  // ES and B
}  // namespace xsave

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
