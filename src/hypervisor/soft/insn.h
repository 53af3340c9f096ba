// One decoded instruction, as interpreter and translator take it (SDM volume 2, chapter 2 and appendix A).
#pragma once

#include <array>
#include <cstdint>

#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

// What an instruction is to the executors. kNative ones compute on registers and at most one memory operand
// and are run by the host's own processor with their operands replaced; the others are done in C++. The order
// matters: those of an OpGroup stand together.
enum class Op : std::uint8_t {
  kUndefined,  // raises #UD, as the processor does
  kUnknown,    // a valid instruction that this CPU does not have: #UD, and a line in the log
  kNative,
  kNop,  // also prefetches, CLFLUSH, fences that need no more than order
  kLea,
  kPush,
  kPushImm,
  kPop,
  kPushSegment,
  kPopSegment,
  kPushAll,
  kPopAll,
  kPushFlags,
  kPopFlags,
  kEnter,
  kLeave,
  kCall,
  kCallIndirect,
  kCallFar,
  kCallFarIndirect,
  kReturn,
  kReturnImm,
  kReturnFar,
  kReturnFarImm,
  kJump,
  kJumpIndirect,
  kJumpFar,
  kJumpFarIndirect,
  kJumpIf,
  kLoop,
  kLoopEqual,
  kLoopNotEqual,
  kJumpRcxZero,
  kInterrupt,
  kBreakpoint,
  kOverflow,
  kIcebp,
  kInterruptReturn,
  kBound,
  kMoveFromSegment,
  kMoveToSegment,
  kLoadFarPointer,
  kMoveOffset,
  kTranslateByte,
  kMoveFromCr,
  kMoveToCr,
  kMoveFromDr,
  kMoveToDr,
  kDivide,
  kDivideSigned,
  kBitTest,
  kBitSet,
  kBitReset,
  kBitComplement,  // bit ops with a register offset on memory
  kCompareExchange16,
  kCompareExchange8,
  kAsciiAdjust,
  kDecimalAdjust,  // AAA, AAS, AAM, AAD; DAA, DAS (opcode tells)
  kIn,
  kOut,
  kInString,
  kOutString,
  kMoveString,
  kStoreString,
  kLoadString,
  kScanString,
  kCompareString,
  kClearCarry,
  kSetCarry,
  kComplementCarry,
  kClearDirection,
  kSetDirection,
  kClearInterrupt,
  kSetInterrupt,
  kSahf,
  kLahf,
  kSalc,
  kHalt,
  kPause,
  kCpuid,
  kReadTsc,
  kReadTscp,
  kReadPmc,
  kReadMsr,
  kWriteMsr,
  kReadPid,
  kSyscall,
  kSysret,
  kSysenter,
  kSysexit,
  kSwapGs,
  kHypercall,
  kLoadGdt,
  kLoadIdt,
  kStoreGdt,
  kStoreIdt,
  kLoadLdt,
  kStoreLdt,
  kLoadTask,
  kStoreTask,
  kLoadStatusWord,
  kStoreStatusWord,
  kClearTaskSwitched,
  kLoadAccess,
  kLoadLimit,
  kVerifyRead,
  kVerifyWrite,
  kArpl,
  kInvalidatePage,
  kInvalidatePcid,
  kInvalidateCaches,
  kMonitor,
  kMwait,
  kReadFsBase,
  kReadGsBase,
  kWriteFsBase,
  kWriteGsBase,
  kSetAc,
  kClearAc,
  kGetXcr,
  kSetXcr,
  kXsave,
  kXsaveOpt,
  kXrstor,
  kFxsave,
  kFxrstor,
  kLoadMxcsr,
  kStoreMxcsr,
  kFpuEnvironment,  // FLDENV, FNSTENV, FRSTOR, FNSAVE (memory forms, opcode tells)
  kFpuWait,
  kRandom,
  kSerialize,
  kGather,
  kMaskMove,
  kMaskMoveBytes,
  kVectorZeroAll,
};

// Who runs an instruction that is done in C++ (executor.h).
enum class OpGroup : std::uint8_t {
  kNone,           // nobody: #UD, nothing at all, or the host's processor
  kInteger,        // divide, bit strings, BCD, LEA, moves of segment registers
  kControl,        // jumps, calls, stack, flags
  kString,         // and ports
  kExtendedState,  // XSAVE and its kin, FPU environment
  kVector,
  kSystem,
};

[[nodiscard]] constexpr OpGroup group_of(Op op) {
  const auto within = [op](Op first, Op last) { return op >= first && op <= last; };
  if (op <= Op::kNop) {
    return OpGroup::kNone;
  }
  if (op == Op::kLea || within(Op::kMoveFromSegment, Op::kTranslateByte) ||
      within(Op::kDivide, Op::kDecimalAdjust)) {
    return OpGroup::kInteger;
  }
  if (within(Op::kPush, Op::kBound) || within(Op::kClearCarry, Op::kSalc)) {
    return OpGroup::kControl;
  }
  if (within(Op::kIn, Op::kCompareString)) {
    return OpGroup::kString;
  }
  if (within(Op::kXsave, Op::kFpuWait)) {
    return OpGroup::kExtendedState;
  }
  return op >= Op::kGather ? OpGroup::kVector : OpGroup::kSystem;
}

// One that is put between two groups must be given to one of them.
[[nodiscard]] constexpr bool adjacent(Op last, Op first) {
  return static_cast<int>(last) + 1 == static_cast<int>(first);
}
static_assert(adjacent(Op::kNop, Op::kLea) && adjacent(Op::kLea, Op::kPush) &&
              adjacent(Op::kBound, Op::kMoveFromSegment) && adjacent(Op::kTranslateByte, Op::kMoveFromCr) &&
              adjacent(Op::kMoveToDr, Op::kDivide) && adjacent(Op::kDecimalAdjust, Op::kIn) &&
              adjacent(Op::kCompareString, Op::kClearCarry) && adjacent(Op::kSalc, Op::kHalt) &&
              adjacent(Op::kSetXcr, Op::kXsave) && adjacent(Op::kFpuWait, Op::kRandom) &&
              adjacent(Op::kSerialize, Op::kGather));

enum class OperandClass : std::uint8_t { kNone, kGpr, kVector, kMmx, kControl, kFpuStack };

// Bits of what an operand is to the instruction.
inline constexpr std::uint8_t kReads = 1;
inline constexpr std::uint8_t kWrites = 2;

enum class VectorUse : std::uint8_t { kNone, kX87, kMmx, kSse, kAvx };

// What the host's processor must have to run a native instruction, beyond x86-64-v2.
enum class Feature : std::uint8_t {
  kBase,
  kAvx,
  kAvx2,
  kFma,
  kF16c,
  kBmi1,
  kBmi2,
  kLzcnt,
  kMovbe,
  kAes,
  kPclmul,
  kAdx
};

inline constexpr std::uint8_t kNoRegister = 0x20;
inline constexpr std::uint8_t kRipBase = 0x21;

struct Insn {
  Op op = Op::kUndefined;
  std::uint8_t length = 0;
  std::uint8_t map = 0;  // 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A
  std::uint8_t opcode = 0;
  std::uint8_t operand_size = 4;  // bytes, of general registers and immediates: 1, 2, 4, 8
  std::uint8_t address_size = 8;  // 2, 4, 8
  std::uint8_t mandatory = 0;     // 0, 0x66, 0xf3, 0xf2 where it selects the instruction (SSE, VEX pp)
  std::uint8_t repeat = 0;        // 0, 0xf3, 0xf2 as a repeat prefix
  bool lock = false;
  bool operand_prefix = false;  // 66 was there
  std::uint8_t rex = 0;         // 0x40-0x4f or 0; with VEX: the bits it stands for, 0x40 | WRXB
  bool vex = false;
  bool vex_256 = false;
  bool three_byte_vex = false;

  bool has_modrm = false;
  std::uint8_t modrm = 0;
  std::uint8_t reg = 0;  // modrm.reg with REX.R; for opcodes with a register in their low bits: that register
  std::uint8_t rm = 0;   // modrm.rm with REX.B, where mod is 3
  std::uint8_t vvvv = 0;             // VEX register
  bool memory = false;               // rm is the memory operand below
  std::uint8_t base = kNoRegister;   // 0-15, kNoRegister, kRipBase
  std::uint8_t index = kNoRegister;  // 0-15, kNoRegister
  std::uint8_t scale = 0;            // shift, 0-3
  std::uint8_t segment = kDs;        // of the memory operand, overrides applied
  std::int64_t displacement = 0;     // kMoveOffset: the whole address

  std::uint8_t immediate_size = 0;  // bytes as encoded
  std::uint64_t immediate = 0;      // sign-extended to 64 bits where the instruction does that
  std::uint16_t immediate2 = 0;     // selector of a far pointer; second of ENTER

  // Operands of native instructions.
  OperandClass reg_class = OperandClass::kNone;
  OperandClass rm_class = OperandClass::kNone;  // of a register; of memory it tells nothing
  OperandClass vvvv_class = OperandClass::kNone;
  std::uint8_t reg_access = 0;
  std::uint8_t rm_access = 0;
  std::uint8_t vvvv_access = 0;
  std::uint8_t reg_size = 0;  // bytes, of a kGpr operand (1: byte register rules apply)
  std::uint8_t rm_size = 0;
  std::uint8_t memory_size = 0;      // bytes touched in memory
  std::uint16_t implicit_reads = 0;  // general registers used without being named, a bit each
  std::uint16_t implicit_writes = 0;
  bool alignment_16 = false;  // memory operand must be aligned to its size, else #GP
  bool writes_flags = false;  // may change arithmetic flags; false only where it surely does not
  VectorUse vector_use = VectorUse::kNone;
  Feature feature = Feature::kBase;
  bool register_in_opcode = false;  // rm is the low bits of the opcode (no ModRM)

  std::array<std::uint8_t, 15> bytes{};

  [[nodiscard]] std::uint8_t mod() const { return modrm >> 6; }
  [[nodiscard]] std::uint8_t reg_field() const { return (modrm >> 3) & 7; }
  [[nodiscard]] bool rex_w() const { return (rex & 8) != 0; }
};

}  // namespace wisp::soft
