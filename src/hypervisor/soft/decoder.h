// Instruction bytes to Insn: every instruction of x86-64-v3 and of the protected and real modes that lead
// there (SDM volume 2). What is not known is Op::kUndefined or kUnknown, never something else.
#pragma once

#include <cstdint>
#include <span>

#include "hypervisor/soft/insn.h"

namespace wisp::soft {

enum class CodeSize : std::uint8_t { k16, k32, k64 };  // default operand and address size of the code segment

inline constexpr std::size_t kMaxInsnLength = 15;

enum class DecodeResult : std::uint8_t {
  kDone,
  kTruncated,  // more bytes are needed than were given
  kTooLong,    // longer than 15 bytes: #GP
};

// Decodes the instruction at the start of `bytes` (1 to 15 of them). `insn` is whole only after kDone.
[[nodiscard]] DecodeResult decode(std::span<const std::uint8_t> bytes, CodeSize code, Insn& insn);

}  // namespace wisp::soft
