// The opcode maps as data (SDM volume 2, appendix A). Private to the decoder.
#pragma once

#include <array>
#include <cstdint>

#include "hypervisor/soft/insn.h"

namespace wisp::soft::tables {

// An operand: its kind and what is done with it.
enum Kind : std::uint8_t {
  kNone = 0,
  kGb = 1 << 2,  // byte register
  kGv = 2 << 2,  // by operand size
  kGw = 3 << 2,  // 16 bits
  kGd = 4 << 2,  // 32 bits
  kGy = 5 << 2,  // 64 bits with REX.W, else 32
  kVr = 6 << 2,  // XMM or YMM
  kMm = 7 << 2,  // MMX
  kSt = 8 << 2,  // x87
  kGz = 9 << 2,  // by operand size, but 32 bits where that is 64 (MOVSXD's source and the like)
};
inline constexpr std::uint8_t kR = 1, kW = 2, kX = 3;  // reads, writes, both

enum class Imm : std::uint8_t {
  kNone,
  kByte,        // sign-extended
  kByteZero,    // zero-extended
  kWord,        // zero-extended
  kZ,           // 16 or 32 bits by operand size, sign-extended
  kV,           // 16, 32 or 64 bits
  kFarPointer,  // 16 or 32 bits of offset, and a selector
  kEnter,       // a word and a byte
  kOffset,      // by address size
};

// What is touched in memory, for vector operands that follow the vector's length.
inline constexpr std::uint8_t kFull = 0x80, kHalf = 0x81, kQuarter = 0x82, kEighth = 0x83, kBySize = 0x84;

inline constexpr std::uint32_t kModrm = 1U << 0;
inline constexpr std::uint32_t kOpcodeRegister = 1U << 1;
inline constexpr std::uint32_t kNot64 = 1U << 2;
inline constexpr std::uint32_t kOnly64 = 1U << 3;
inline constexpr std::uint32_t kDefault64 = 1U << 4;  // 64-bit operands in 64-bit mode, 66 makes 16
inline constexpr std::uint32_t kForce64 = 1U << 5;    // near branches: 64-bit whatever the prefix says
inline constexpr std::uint32_t kLockable = 1U << 6;
inline constexpr std::uint32_t kMemoryOnly = 1U << 7;
inline constexpr std::uint32_t kRegisterOnly = 1U << 8;
inline constexpr std::uint32_t kAligned = 1U << 9;      // legacy SSE: 16-byte operands must be aligned
inline constexpr std::uint32_t kAlignedVex = 1U << 10;  // with VEX as well
inline constexpr std::uint32_t kReadsCl = 1U << 11;
inline constexpr std::uint32_t kReadsRax = 1U << 12;
inline constexpr std::uint32_t kWritesRax = 1U << 13;
inline constexpr std::uint32_t kReadsRdx = 1U << 14;
inline constexpr std::uint32_t kWritesRdx = 1U << 15;
inline constexpr std::uint32_t kWritesRcx = 1U << 16;
inline constexpr std::uint32_t kByteSize = 1U << 17;  // operand size is 1
inline constexpr std::uint32_t kFlags = 1U << 18;     // writes arithmetic flags
inline constexpr std::uint32_t kLegacy = 1U << 19;    // not with VEX
inline constexpr std::uint32_t kVexOnly = 1U << 20;
inline constexpr std::uint32_t kVvvv = 1U << 21;            // VEX.vvvv is a vector source
inline constexpr std::uint32_t kVvvvRead = 1U << 22;        // ... a general register that is read
inline constexpr std::uint32_t kVvvvWrite = 1U << 23;       // ... that is written
inline constexpr std::uint32_t kVvvvOnRegister = 1U << 24;  // a vector source only where rm is a register
inline constexpr std::uint32_t kL0 = 1U << 25;              // 128 bits only
inline constexpr std::uint32_t kL1 = 1U << 26;              // 256 bits only
inline constexpr std::uint32_t kL1Avx2 = 1U << 27;          // 256 bits is AVX2
inline constexpr std::uint32_t kMmxToo = 1U << 28;          // without prefix the MMX form of the same
inline constexpr std::uint32_t kW0 = 1U << 29;
inline constexpr std::uint32_t kW1 = 1U << 30;

struct Spec {
  Op op = Op::kUndefined;
  std::uint8_t reg = 0;
  std::uint8_t rm = 0;
  Imm imm = Imm::kNone;
  std::uint8_t memory = kBySize;
  std::uint32_t bits = 0;
  Feature feature = Feature::kBase;
};

using Map = std::array<Spec, 256>;

extern const Map kOneByte;
extern const Map kTwoByte;  // integer and system part of 0F; vector opcodes are in vector_spec()

// The vector instruction (SSE, AVX, BMI, ...) of a map (1: 0F, 2: 0F38, 3: 0F3A), mandatory prefix (0, 0x66,
// 0xf3, 0xf2) and opcode; null where there is none.
[[nodiscard]] const Spec* vector_spec(std::uint8_t map, std::uint8_t prefix, std::uint8_t opcode, bool vex);

}  // namespace wisp::soft::tables
