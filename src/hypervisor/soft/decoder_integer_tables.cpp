#include "hypervisor/soft/decoder_tables.h"

namespace wisp::soft::tables {
namespace {

constexpr Spec modrm(Op op, std::uint32_t bits = 0, Imm imm = Imm::kNone) {
  return {.op = op, .imm = imm, .bits = bits | kModrm};
}
constexpr Spec plain(Op op, std::uint32_t bits = 0, Imm imm = Imm::kNone) {
  return {.op = op, .imm = imm, .bits = bits};
}
// A native instruction on rm and reg.
constexpr Spec native(std::uint8_t reg, std::uint8_t rm, std::uint32_t bits, Imm imm = Imm::kNone) {
  return {.op = Op::kNative, .reg = reg, .rm = rm, .imm = imm, .bits = bits | kModrm};
}
constexpr Spec implicit(std::uint32_t bits, Imm imm = Imm::kNone) {
  return {.op = Op::kNative, .imm = imm, .bits = bits};
}

constexpr Map one_byte() {
  Map map{};
  // ADD OR ADC SBB AND SUB XOR CMP
  for (std::size_t i = 0; i < 8; ++i) {
    const std::size_t at = i * 8;
    const bool compare = i == 7;
    const std::uint8_t change = compare ? kR : kX;
    const std::uint32_t lockable = compare ? 0 : kLockable;
    map[at + 0] = native(kGb | kR, static_cast<std::uint8_t>(kGb | change), kByteSize | kFlags | lockable);
    map[at + 1] = native(kGv | kR, static_cast<std::uint8_t>(kGv | change), kFlags | lockable);
    map[at + 2] = native(static_cast<std::uint8_t>(kGb | change), kGb | kR, kByteSize | kFlags);
    map[at + 3] = native(static_cast<std::uint8_t>(kGv | change), kGv | kR, kFlags);
    const std::uint32_t rax = kReadsRax | (compare ? 0 : kWritesRax) | kFlags;
    map[at + 4] = implicit(rax | kByteSize, Imm::kByte);
    map[at + 5] = implicit(rax, Imm::kZ);
  }
  for (const std::size_t at : {0x06U, 0x0eU, 0x16U, 0x1eU}) {
    map[at] = plain(Op::kPushSegment, kNot64);
  }
  for (const std::size_t at : {0x07U, 0x17U, 0x1fU}) {
    map[at] = plain(Op::kPopSegment, kNot64);
  }
  map[0x27] = map[0x2f] = plain(Op::kDecimalAdjust, kNot64);
  map[0x37] = map[0x3f] = plain(Op::kAsciiAdjust, kNot64);
  for (std::size_t i = 0x40; i < 0x50; ++i) {  // INC and DEC outside 64-bit mode; the decoder rewrites them
    map[i] = {.op = Op::kNative, .rm = kGv | kX, .bits = kNot64 | kOpcodeRegister | kFlags};
  }
  for (std::size_t i = 0x50; i < 0x58; ++i) {
    map[i] = {.op = Op::kPush, .rm = kGv | kR, .bits = kOpcodeRegister | kDefault64};
  }
  for (std::size_t i = 0x58; i < 0x60; ++i) {
    map[i] = {.op = Op::kPop, .rm = kGv | kW, .bits = kOpcodeRegister | kDefault64};
  }
  map[0x60] = plain(Op::kPushAll, kNot64);
  map[0x61] = plain(Op::kPopAll, kNot64);
  map[0x62] = modrm(Op::kBound, kNot64 | kMemoryOnly);
  map[0x63] = native(kGv | kW, kGz | kR, 0);  // MOVSXD; ARPL outside 64-bit mode
  map[0x68] = plain(Op::kPushImm, kDefault64, Imm::kZ);
  map[0x69] = native(kGv | kW, kGv | kR, kFlags, Imm::kZ);
  map[0x6a] = plain(Op::kPushImm, kDefault64, Imm::kByte);
  map[0x6b] = native(kGv | kW, kGv | kR, kFlags, Imm::kByte);
  map[0x6c] = plain(Op::kInString, kByteSize);
  map[0x6d] = plain(Op::kInString);
  map[0x6e] = plain(Op::kOutString, kByteSize);
  map[0x6f] = plain(Op::kOutString);
  for (std::size_t i = 0x70; i < 0x80; ++i) {
    map[i] = plain(Op::kJumpIf, kForce64, Imm::kByte);
  }
  map[0x80] = native(0, kGb | kX, kByteSize | kFlags | kLockable, Imm::kByte);
  map[0x81] = native(0, kGv | kX, kFlags | kLockable, Imm::kZ);
  map[0x82] = native(0, kGb | kX, kByteSize | kFlags | kLockable | kNot64, Imm::kByte);
  map[0x83] = native(0, kGv | kX, kFlags | kLockable, Imm::kByte);
  map[0x84] = native(kGb | kR, kGb | kR, kByteSize | kFlags);
  map[0x85] = native(kGv | kR, kGv | kR, kFlags);
  map[0x86] = native(kGb | kX, kGb | kX, kByteSize | kLockable);
  map[0x87] = native(kGv | kX, kGv | kX, kLockable);
  map[0x88] = native(kGb | kR, kGb | kW, kByteSize);
  map[0x89] = native(kGv | kR, kGv | kW, 0);
  map[0x8a] = native(kGb | kW, kGb | kR, kByteSize);
  map[0x8b] = native(kGv | kW, kGv | kR, 0);
  map[0x8c] = modrm(Op::kMoveFromSegment);
  map[0x8d] = modrm(Op::kLea, kMemoryOnly);
  map[0x8e] = modrm(Op::kMoveToSegment);
  map[0x8f] = {.op = Op::kPop, .rm = kGv | kW, .bits = kModrm | kDefault64};
  for (std::size_t i = 0x90; i < 0x98; ++i) {  // XCHG with rAX; the decoder rewrites them
    map[i] = {.op = Op::kNative, .rm = kGv | kX, .bits = kOpcodeRegister | kReadsRax | kWritesRax};
  }
  map[0x98] = implicit(kReadsRax | kWritesRax);
  map[0x99] = implicit(kReadsRax | kWritesRdx);
  map[0x9a] = plain(Op::kCallFar, kNot64, Imm::kFarPointer);
  map[0x9b] = plain(Op::kFpuWait);
  map[0x9c] = plain(Op::kPushFlags, kDefault64);
  map[0x9d] = plain(Op::kPopFlags, kDefault64);
  map[0x9e] = implicit(kReadsRax | kFlags);
  map[0x9f] = implicit(kReadsRax | kWritesRax);
  map[0xa0] = map[0xa2] = plain(Op::kMoveOffset, kByteSize, Imm::kOffset);
  map[0xa1] = map[0xa3] = plain(Op::kMoveOffset, 0, Imm::kOffset);
  map[0xa4] = plain(Op::kMoveString, kByteSize);
  map[0xa5] = plain(Op::kMoveString);
  map[0xa6] = plain(Op::kCompareString, kByteSize);
  map[0xa7] = plain(Op::kCompareString);
  map[0xa8] = implicit(kReadsRax | kByteSize | kFlags, Imm::kByte);
  map[0xa9] = implicit(kReadsRax | kFlags, Imm::kZ);
  map[0xaa] = plain(Op::kStoreString, kByteSize);
  map[0xab] = plain(Op::kStoreString);
  map[0xac] = plain(Op::kLoadString, kByteSize);
  map[0xad] = plain(Op::kLoadString);
  map[0xae] = plain(Op::kScanString, kByteSize);
  map[0xaf] = plain(Op::kScanString);
  for (std::size_t i = 0xb0; i < 0xb8; ++i) {
    map[i] = {.op = Op::kNative, .rm = kGb | kW, .imm = Imm::kByte, .bits = kOpcodeRegister | kByteSize};
    map[i + 8] = {.op = Op::kNative, .rm = kGv | kW, .imm = Imm::kV, .bits = kOpcodeRegister};
  }
  map[0xc0] = native(0, kGb | kX, kByteSize | kFlags, Imm::kByte);
  map[0xc1] = native(0, kGv | kX, kFlags, Imm::kByte);
  map[0xc2] = plain(Op::kReturnImm, kForce64, Imm::kWord);
  map[0xc3] = plain(Op::kReturn, kForce64);
  map[0xc4] = map[0xc5] = modrm(Op::kLoadFarPointer, kNot64 | kMemoryOnly);
  map[0xc6] = native(0, kGb | kW, kByteSize, Imm::kByte);
  map[0xc7] = native(0, kGv | kW, 0, Imm::kZ);
  map[0xc8] = plain(Op::kEnter, kDefault64, Imm::kEnter);
  map[0xc9] = plain(Op::kLeave, kDefault64);
  map[0xca] = plain(Op::kReturnFarImm, 0, Imm::kWord);
  map[0xcb] = plain(Op::kReturnFar);
  map[0xcc] = plain(Op::kBreakpoint);
  map[0xcd] = plain(Op::kInterrupt, 0, Imm::kByteZero);
  map[0xce] = plain(Op::kOverflow, kNot64);
  map[0xcf] = plain(Op::kInterruptReturn);
  map[0xd0] = native(0, kGb | kX, kByteSize | kFlags);
  map[0xd1] = native(0, kGv | kX, kFlags);
  map[0xd2] = native(0, kGb | kX, kByteSize | kFlags | kReadsCl);
  map[0xd3] = native(0, kGv | kX, kFlags | kReadsCl);
  map[0xd4] = map[0xd5] = plain(Op::kAsciiAdjust, kNot64, Imm::kByteZero);
  map[0xd6] = plain(Op::kSalc, kNot64);
  map[0xd7] = plain(Op::kTranslateByte);
  for (std::size_t i = 0xd8; i < 0xe0; ++i) {
    map[i] = modrm(Op::kNative);  // x87: completed by the decoder
  }
  map[0xe0] = plain(Op::kLoopNotEqual, kForce64, Imm::kByte);
  map[0xe1] = plain(Op::kLoopEqual, kForce64, Imm::kByte);
  map[0xe2] = plain(Op::kLoop, kForce64, Imm::kByte);
  map[0xe3] = plain(Op::kJumpRcxZero, kForce64, Imm::kByte);
  map[0xe4] = plain(Op::kIn, kByteSize, Imm::kByteZero);
  map[0xe5] = plain(Op::kIn, 0, Imm::kByteZero);
  map[0xe6] = plain(Op::kOut, kByteSize, Imm::kByteZero);
  map[0xe7] = plain(Op::kOut, 0, Imm::kByteZero);
  map[0xe8] = plain(Op::kCall, kForce64, Imm::kZ);
  map[0xe9] = plain(Op::kJump, kForce64, Imm::kZ);
  map[0xea] = plain(Op::kJumpFar, kNot64, Imm::kFarPointer);
  map[0xeb] = plain(Op::kJump, kForce64, Imm::kByte);
  map[0xec] = plain(Op::kIn, kByteSize);
  map[0xed] = plain(Op::kIn);
  map[0xee] = plain(Op::kOut, kByteSize);
  map[0xef] = plain(Op::kOut);
  map[0xf1] = plain(Op::kIcebp);
  map[0xf4] = plain(Op::kHalt);
  map[0xf5] = implicit(kFlags);
  map[0xf6] = native(0, kGb | kX, kByteSize | kFlags);  // group 3: completed by the decoder
  map[0xf7] = native(0, kGv | kX, kFlags);
  map[0xf8] = implicit(kFlags);
  map[0xf9] = implicit(kFlags);
  map[0xfa] = plain(Op::kClearInterrupt);
  map[0xfb] = plain(Op::kSetInterrupt);
  map[0xfc] = plain(Op::kClearDirection);
  map[0xfd] = plain(Op::kSetDirection);
  map[0xfe] = native(0, kGb | kX, kByteSize | kFlags | kLockable);  // groups 4 and 5: by the decoder
  map[0xff] = native(0, kGv | kX, kFlags | kLockable);
  return map;
}

constexpr Map two_byte() {
  Map map{};
  map[0x00] = modrm(Op::kUndefined);  // groups: by the decoder
  map[0x01] = modrm(Op::kUndefined);
  map[0x02] = modrm(Op::kLoadAccess);
  map[0x03] = modrm(Op::kLoadLimit);
  map[0x05] = plain(Op::kSyscall, kOnly64);
  map[0x06] = plain(Op::kClearTaskSwitched);
  map[0x07] = plain(Op::kSysret, kOnly64);
  map[0x08] = map[0x09] = plain(Op::kInvalidateCaches);
  map[0x0b] = plain(Op::kUndefined);  // UD2
  map[0x0d] = modrm(Op::kNop);
  for (std::size_t i = 0x18; i < 0x20; ++i) {
    map[i] = modrm(Op::kNop);
  }
  map[0x20] = modrm(Op::kMoveFromCr);
  map[0x21] = modrm(Op::kMoveFromDr);
  map[0x22] = modrm(Op::kMoveToCr);
  map[0x23] = modrm(Op::kMoveToDr);
  map[0x30] = plain(Op::kWriteMsr);
  map[0x31] = plain(Op::kReadTsc);
  map[0x32] = plain(Op::kReadMsr);
  map[0x33] = plain(Op::kReadPmc);
  map[0x34] = plain(Op::kSysenter);
  map[0x35] = plain(Op::kSysexit);
  for (std::size_t i = 0x40; i < 0x50; ++i) {
    map[i] = native(kGv | kX, kGv | kR, 0);
  }
  for (std::size_t i = 0x80; i < 0x90; ++i) {
    map[i] = plain(Op::kJumpIf, kForce64, Imm::kZ);
    map[i + 0x10] = native(0, kGb | kW, kByteSize);
  }
  map[0xa0] = map[0xa8] = plain(Op::kPushSegment, kDefault64);
  map[0xa1] = map[0xa9] = plain(Op::kPopSegment, kDefault64);
  map[0xa2] = plain(Op::kCpuid);
  map[0xa3] = native(kGv | kR, kGv | kR, kFlags);  // on memory: kBitTest
  map[0xa4] = native(kGv | kR, kGv | kX, kFlags, Imm::kByte);
  map[0xa5] = native(kGv | kR, kGv | kX, kFlags | kReadsCl);
  map[0xab] = native(kGv | kR, kGv | kX, kFlags | kLockable);
  map[0xac] = native(kGv | kR, kGv | kX, kFlags, Imm::kByte);
  map[0xad] = native(kGv | kR, kGv | kX, kFlags | kReadsCl);
  map[0xae] = modrm(Op::kUndefined);
  map[0xaf] = native(kGv | kX, kGv | kR, kFlags);
  map[0xb0] = native(kGb | kR, kGb | kX, kByteSize | kFlags | kLockable | kReadsRax | kWritesRax);
  map[0xb1] = native(kGv | kR, kGv | kX, kFlags | kLockable | kReadsRax | kWritesRax);
  map[0xb2] = map[0xb4] = map[0xb5] = modrm(Op::kLoadFarPointer, kMemoryOnly);
  map[0xb3] = native(kGv | kR, kGv | kX, kFlags | kLockable);
  map[0xb6] = {.op = Op::kNative, .reg = kGv | kW, .rm = kGb | kR, .memory = 1, .bits = kModrm};
  map[0xb7] = {.op = Op::kNative, .reg = kGv | kW, .rm = kGw | kR, .memory = 2, .bits = kModrm};
  map[0xb9] = modrm(Op::kUndefined);                                // UD1
  map[0xba] = native(0, kGv | kX, kFlags | kLockable, Imm::kByte);  // group 8: by the decoder
  map[0xbb] = native(kGv | kR, kGv | kX, kFlags | kLockable);
  map[0xbc] = native(kGv | kX, kGv | kR, kFlags);
  map[0xbd] = native(kGv | kX, kGv | kR, kFlags);
  map[0xbe] = {.op = Op::kNative, .reg = kGv | kW, .rm = kGb | kR, .memory = 1, .bits = kModrm};
  map[0xbf] = {.op = Op::kNative, .reg = kGv | kW, .rm = kGw | kR, .memory = 2, .bits = kModrm};
  map[0xc0] = native(kGb | kX, kGb | kX, kByteSize | kFlags | kLockable);
  map[0xc1] = native(kGv | kX, kGv | kX, kFlags | kLockable);
  map[0xc3] = native(kGy | kR, kGy | kW, kMemoryOnly);  // MOVNTI
  map[0xc7] = modrm(Op::kUndefined);                    // group 9: by the decoder
  for (std::size_t i = 0xc8; i < 0xd0; ++i) {
    map[i] = {.op = Op::kNative, .rm = kGv | kX, .bits = kOpcodeRegister};  // BSWAP
  }
  map[0xff] = modrm(Op::kUndefined);  // UD0
  return map;
}

}  // namespace

constinit const Map kOneByte = one_byte();
constinit const Map kTwoByte = two_byte();

}  // namespace wisp::soft::tables
