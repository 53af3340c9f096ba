// What instructions that are done in C++ share: conditions and the flags of a comparison, registers by their
// width. Private to them.
#pragma once

#include <bit>
#include <cstdint>

#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

[[nodiscard]] constexpr std::uint64_t size_mask(std::uint32_t bytes) {
  return bytes >= 8 ? ~0ULL : (1ULL << (bytes * 8)) - 1;
}

// 2, 4 or 8 bytes of a register; writing 4 clears the upper half, writing 2 leaves the rest.
[[nodiscard]] inline std::uint64_t sized(const Cpu& cpu, std::uint8_t reg, std::uint32_t bytes) {
  return cpu.gpr[reg] & size_mask(bytes);
}
inline void set_sized(Cpu& cpu, std::uint8_t reg, std::uint32_t bytes, std::uint64_t value) {
  std::uint64_t& target = cpu.gpr[reg];
  target = bytes == 2 ? (target & ~0xffffULL) | (value & 0xffff) : value & size_mask(bytes);
}

inline void set_flag(Cpu& cpu, std::uint64_t flag, bool on) {
  cpu.arithmetic_flags = on ? cpu.arithmetic_flags | flag : cpu.arithmetic_flags & ~flag;
}

[[nodiscard]] inline bool even_parity(std::uint64_t value) {
  return std::popcount(value & 0xff) % 2 == 0;
}

// ZF, SF and PF of a result.
[[nodiscard]] inline std::uint64_t result_flags(std::uint64_t result, std::uint32_t bytes) {
  result &= size_mask(bytes);
  return (result == 0 ? flag::kZf : 0) | ((result >> (bytes * 8 - 1)) != 0 ? flag::kSf : 0) |
         (even_parity(result) ? flag::kPf : 0);
}

// The arithmetic flags of a - b.
[[nodiscard]] inline std::uint64_t compare_flags(std::uint64_t a, std::uint64_t b, std::uint32_t bytes) {
  a &= size_mask(bytes);
  b &= size_mask(bytes);
  const std::uint64_t result = (a - b) & size_mask(bytes);
  const std::uint64_t overflow = ((a ^ b) & (a ^ result)) >> (bytes * 8 - 1);
  return result_flags(result, bytes) | (a < b ? flag::kCf : 0) |
         (((a ^ b ^ result) & 0x10) != 0 ? flag::kAf : 0) | (overflow != 0 ? flag::kOf : 0);
}

// The condition in the low four bits of an opcode (SDM volume 1, appendix B).
[[nodiscard]] inline bool condition(const Cpu& cpu, std::uint8_t code) {
  const std::uint64_t flags = cpu.arithmetic_flags;
  const bool less = ((flags & flag::kSf) != 0) != ((flags & flag::kOf) != 0);
  bool holds = false;
  switch (code >> 1 & 7) {
    case 0:
      holds = (flags & flag::kOf) != 0;
      break;
    case 1:
      holds = (flags & flag::kCf) != 0;
      break;
    case 2:
      holds = (flags & flag::kZf) != 0;
      break;
    case 3:
      holds = (flags & (flag::kCf | flag::kZf)) != 0;
      break;
    case 4:
      holds = (flags & flag::kSf) != 0;
      break;
    case 5:
      holds = (flags & flag::kPf) != 0;
      break;
    case 6:
      holds = less;
      break;
    default:
      holds = less || (flags & flag::kZf) != 0;
      break;
  }
  return holds != ((code & 1) != 0);
}

}  // namespace wisp::soft
