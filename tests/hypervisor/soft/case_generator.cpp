#include "hypervisor/soft/case_generator.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "hypervisor/soft/decoder.h"

namespace wisp::soft {
namespace {

constexpr std::array<std::uint64_t, 22> kIntegers{
    0,  1,    2,    3,    7,      8,      15,     16,         31,         32,         63,
    64, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000};
constexpr std::array<std::uint32_t, 12> kFloats{0x00000000, 0x80000000, 0x3f800000, 0xbf800000,
                                                0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001,
                                                0x00000001, 0x807fffff, 0x7f7fffff, 0x4b000001};
constexpr std::array<std::uint64_t, 10> kDoubles{
    0x0000000000000000, 0x8000000000000000, 0x3ff0000000000000, 0xbff8000000000000, 0x7ff0000000000000,
    0x7ff8000000000000, 0x7ff0000000000001, 0x0000000000000001, 0x7fefffffffffffff, 0x41dfffffffc00000};

}  // namespace

std::uint64_t CaseGenerator::value() {
  switch (below(8)) {
    case 0:
      return kIntegers[below(kIntegers.size())];
    case 1:
      return 0 - kIntegers[below(kIntegers.size())];
    case 2:
      return 1ULL << below(64);
    case 3:
      return window();
    case 4:
      return random_() >> below(64);
    default:
      return random_();
  }
}

// Around the boundary of the two data pages.
std::uint64_t CaseGenerator::window() {
  const std::uint64_t at = kCaseData + 0x1000 - 512 + below(1024);
  switch (below(4)) {
    case 0:
      return at & ~63ULL;
    case 1:
      return at & ~15ULL;
    default:
      return at;
  }
}

// For an operand of `size` bytes.
std::uint64_t CaseGenerator::address(std::uint32_t size) {
  const std::uint64_t before = below(std::max(size, 1U)) + 1;
  const std::uint64_t kind = below(100);
  if (kind < 72) {
    return window();
  }
  if (kind < 80) {
    return kCaseData + 0x1000 - before;  // across the pages
  }
  if (kind < 84) {
    return kCaseReadOnly + below(0x1000 - 64);
  }
  if (kind < 87) {
    return kCaseReadOnly - before;
  }
  if (kind < 90) {
    return kCaseReadOnly + 0x1000 - before;
  }
  if (kind < 92) {
    return kCaseReadOnly + 0x1000 + below(0x1000);
  }
  if (kind < 94) {
    return kCaseData - before;
  }
  if (kind < 96) {
    return kCaseCode + below(kCaseCodeSize - 64);
  }
  if (kind < 98) {
    return random_() | 0x4000000000000000;  // hardly ever canonical
  }
  return 0x8000000000000000 >> below(17);
}

std::uint64_t CaseGenerator::code_address() {
  if (chance(85)) {
    return kCaseCode + below(kCaseCodeSize);
  }
  return chance(50) ? address(1) : value();
}

void CaseGenerator::make_data(CaseData& data) {
  for (std::size_t i = 0; i < data.size(); i += 8) {
    std::uint64_t word = random_();
    switch (below(6)) {
      case 0:
        word = value();
        break;
      case 1:
        word = kFloats[below(kFloats.size())] | std::uint64_t{kFloats[below(kFloats.size())]} << 32;
        break;
      case 2:
        word = kDoubles[below(kDoubles.size())];
        break;
      case 3:
        word = kCaseCode + below(kCaseCodeSize);  // for returns
        break;
      default:
        break;
    }
    std::memcpy(data.data() + i, &word, sizeof word);
  }
}

void CaseGenerator::make_bytes() {
  std::size_t at = 0;
  const auto put = [&](std::uint64_t byte) { case_.bytes[at++] = static_cast<std::uint8_t>(byte); };
  for (std::size_t i = 0; i < kMaxInsnLength; ++i) {
    case_.bytes[i] = static_cast<std::uint8_t>(random_());
  }
  if (chance(4)) {
    return;  // anything
  }
  if (chance(4)) {
    put(0x67);
  }
  if (chance(4)) {
    put(chance(50) ? 0x64 : 0x65);
  }
  if (chance(2)) {
    constexpr std::array<std::uint8_t, 4> kIgnored{0x26, 0x2e, 0x36, 0x3e};
    put(kIgnored[below(kIgnored.size())]);
  }
  if (chance(35)) {  // VEX
    const std::uint64_t map = 1 + below(3);
    if (map == 1 && chance(50)) {
      put(0xc5);
      put(random_());
    } else {
      put(0xc4);
      put((random_() & 0xe0) | map);
      put(random_());
    }
    if (chance(50)) {
      case_.bytes[at - 1] |= 0x78;  // no register in vvvv
    }
    return;
  }
  if (chance(4)) {
    put(0xf0);
  }
  if (chance(20)) {
    put(0x66);
  }
  if (chance(20)) {
    put(chance(50) ? 0xf2 : 0xf3);
  }
  if (chance(55)) {
    put(0x40 | (random_() & 15));
  }
  const std::uint64_t kind = below(100);
  if (kind >= 40) {
    put(0x0f);
  }
  if (kind >= 80) {
    put(kind < 92 ? 0x38 : 0x3a);
  }
}

// Whether an instruction can be compared: it must touch nothing but registers and the case's own memory, and
// give the same each time.
bool CaseGenerator::suits() const {
  switch (insn_.op) {
    case Op::kUndefined:
    case Op::kUnknown:
    // Leave the process, or reach the host's kernel.
    case Op::kInterrupt:
    case Op::kIcebp:
    case Op::kSyscall:
    case Op::kSysenter:
    case Op::kHypercall:
    // Depend on the host's descriptor tables.
    case Op::kCallFar:
    case Op::kCallFarIndirect:
    case Op::kJumpFar:
    case Op::kJumpFarIndirect:
    case Op::kReturnFar:
    case Op::kReturnFarImm:
    case Op::kInterruptReturn:
    case Op::kMoveToSegment:
    case Op::kPopSegment:
    case Op::kLoadFarPointer:
    case Op::kLoadAccess:
    case Op::kLoadLimit:
    case Op::kVerifyRead:
    case Op::kVerifyWrite:
    // Are emulated by the host's kernel (UMIP).
    case Op::kStoreGdt:
    case Op::kStoreIdt:
    case Op::kStoreLdt:
    case Op::kStoreTask:
    case Op::kStoreStatusWord:
    // Differ each time, or by processor.
    case Op::kCpuid:
    case Op::kReadTsc:
    case Op::kReadTscp:
    case Op::kReadPmc:
    case Op::kReadPid:
    case Op::kRandom:
    case Op::kGetXcr:
    // Would take the child's thread-local storage away.
    case Op::kReadFsBase:
    case Op::kReadGsBase:
    case Op::kWriteFsBase:
    case Op::kWriteGsBase:
    // The host has more state than the model.
    case Op::kXsave:
    case Op::kXsaveOpt:
    case Op::kXrstor:
    case Op::kFxsave:
    case Op::kFxrstor:
      return false;
    // CLFLUSH and its like: see the processor's own test of them.
    case Op::kNop:
      if (insn_.opcode == 0xae) {
        return false;
      }
      break;
    default:
      break;
  }
  return filter_ == nullptr || filter_(insn_);
}

// Whether it can stand among others: what it leaves undefined, or what the host does in its own way where it
// faults, must not show.
bool CaseGenerator::suits_sequence() const {
  switch (insn_.op) {
    case Op::kNative:
      return insn_.segment != kFs && !(insn_.vector_use == VectorUse::kX87 && insn_.memory_size == 10);
    case Op::kNop:
    case Op::kLea:
    case Op::kPush:
    case Op::kPushImm:
    case Op::kPop:
    case Op::kPushFlags:
    case Op::kLeave:
    case Op::kMoveOffset:
    case Op::kTranslateByte:
    case Op::kCompareExchange8:
    case Op::kCompareExchange16:
    case Op::kClearCarry:
    case Op::kSetCarry:
    case Op::kComplementCarry:
    case Op::kClearDirection:
    case Op::kSetDirection:
    case Op::kSahf:
    case Op::kLahf:
    case Op::kLoadMxcsr:
    case Op::kStoreMxcsr:
    case Op::kVectorZeroAll:
    case Op::kMaskMove:
      return insn_.segment != kFs;
    case Op::kMoveString:
    case Op::kStoreString:
    case Op::kLoadString:
    case Op::kScanString:
    case Op::kCompareString:
      return insn_.segment != kFs && insn_.address_size == 8;
    default:
      return false;
  }
}

void CaseGenerator::place_code() {
  const std::uint64_t kind = below(20);
  if (kind == 0) {
    case_.rip = kCaseCode + 0x1000 - 1 - below(case_.length);  // across the pages
  } else if (kind == 1) {
    case_.rip = kCaseCode + kCaseCodeSize - case_.length;  // up to the end
  } else if (kind == 2) {
    case_.rip = kCaseCode + kCaseCodeSize - 1 - below(case_.length);  // beyond the end
  } else {
    case_.rip = kCaseCode + 32 + below(kCaseCodeSize - 64);
  }
}

void CaseGenerator::make_vectors() {
  case_.vectors.fill(0);
  const auto put = [&](std::size_t at, auto number) {
    std::memcpy(case_.vectors.data() + at, &number, sizeof number);
  };
  const std::uint64_t words = (kXsaveSize - 576) / 8 + 32;
  const std::uint64_t style = below(4);
  for (std::uint64_t i = 0; i < words; ++i) {
    std::uint64_t word = random_();
    switch (style == 3 ? below(3) : style) {
      case 0:
        word = chance(60) ? kFloats[below(kFloats.size())] | (random_() << 32) : word;
        break;
      case 1:
        word = chance(60) ? kDoubles[below(kDoubles.size())] : word;
        break;
      default:
        word = chance(50) ? value() : word;
        break;
    }
    put(i < 32 ? 160 + 8 * i : 576 + 8 * (i - 32), word);
  }
  // x87: mostly an empty or a nearly full stack, exceptions masked.
  put(0, static_cast<std::uint16_t>(chance(80) ? 0x37f : 0x40 | (random_() & 0xf3f)));
  std::uint64_t status = below(8) << 11 | (random_() & 0x4700);
  if (chance(15)) {
    status |= random_() & 0x7f;
  }
  const bool pending = (status & ~std::uint64_t{case_.vectors[0]} & 0x3f) != 0;
  put(2, static_cast<std::uint16_t>(pending ? status | 0x8080 : status));
  case_.vectors[4] = static_cast<std::uint8_t>(chance(50) ? 0xff : random_());
  for (std::size_t i = 0; i < 8; ++i) {
    put(32 + 16 * i, chance(60) ? random_() | 1ULL << 63 : value());
    constexpr std::array<std::uint16_t, 8> kExponents{0x3fff, 0xbffe, 0,      0x7fff,
                                                      0xffff, 0x8000, 0x403e, 0x3fc0};
    put(32 + 16 * i + 8, static_cast<std::uint16_t>(chance(70) ? kExponents[below(8)] : random_()));
  }
  std::uint32_t mxcsr = 0x1f80;
  if (chance(40)) {
    mxcsr = static_cast<std::uint32_t>(random_() & 0xffff) | (chance(50) ? 0x1f80 : 0);
  }
  put(24, mxcsr);
  put(28, 0x0000ffffU);
  case_.vectors[512] = 7;
}

void CaseGenerator::patch(std::size_t at, std::uint64_t value, std::size_t size) {
  std::memcpy(case_.bytes.data() + at, &value, size);
}

// Registers that the operation takes without naming them.
void CaseGenerator::prepare_operation() {
  auto& gpr = case_.gpr;
  switch (insn_.op) {
    case Op::kMoveString:
    case Op::kStoreString:
    case Op::kLoadString:
    case Op::kScanString:
    case Op::kCompareString:
      gpr[kRsi] = address(insn_.operand_size) - (insn_.segment == kGs ? kCaseGsBase : 0);
      gpr[kRdi] = address(insn_.operand_size);
      if (insn_.repeat != 0 || chance(50)) {
        gpr[kRcx] = below(48) | (insn_.address_size == 4 ? random_() << 32 : 0);
      }
      break;
    case Op::kMaskMoveBytes:
      gpr[kRdi] = address(16) - (insn_.segment == kGs ? kCaseGsBase : 0);
      break;
    case Op::kTranslateByte:
      gpr[kRbx] = address(1) - (gpr[kRax] & 0xff) - (insn_.segment == kGs ? kCaseGsBase : 0);
      break;
    case Op::kDivide:
    case Op::kDivideSigned:
      if (chance(60)) {
        const bool negative = insn_.op == Op::kDivideSigned && chance(50);
        gpr[kRdx] = negative ? ~0ULL : chance(70) ? 0 : below(4);
      }
      break;
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
      if (chance(90)) {
        gpr[insn_.reg] = below(2048) - 1024;
      }
      break;
    case Op::kPush:
    case Op::kPushImm:
    case Op::kPop:
    case Op::kPushFlags:
    case Op::kPopFlags:
    case Op::kPushSegment:
    case Op::kCall:
    case Op::kCallIndirect:
    case Op::kReturn:
    case Op::kReturnImm:
    case Op::kEnter:
      gpr[kRsp] = address(8);
      break;
    case Op::kLeave:
      gpr[kRbp] = address(8);
      break;
    case Op::kLoop:
    case Op::kLoopEqual:
    case Op::kLoopNotEqual:
    case Op::kJumpRcxZero:
      gpr[kRcx] = chance(70) ? below(3) : value();
      break;
    default:
      break;
  }
  if (insn_.op == Op::kEnter) {
    gpr[kRbp] = address(8);
  }
  const bool indirect = insn_.op == Op::kCallIndirect || insn_.op == Op::kJumpIndirect;
  if (indirect && !insn_.memory) {
    gpr[insn_.rm] = code_address();
  }
  if (insn_.op == Op::kReturn || (insn_.op == Op::kReturnImm && chance(80))) {
    gpr[kRsp] = chance(80) ? window() & ~7ULL : gpr[kRsp];
  }
}

// Makes the memory operand lie at an address of our choice.
bool CaseGenerator::aim() {
  std::uint64_t target = address(insn_.memory_size != 0 ? insn_.memory_size : 8U);
  if (insn_.op == Op::kGather) {
    // Indices small enough to stay in the data pages, mostly.
    const std::size_t index = insn_.index == kNoRegister ? 4 : insn_.index;
    for (std::size_t half = 0; half < 2; ++half) {
      for (std::size_t i = 0; i < 16; i += 4) {
        const auto near = static_cast<std::int32_t>(below(128)) - 64;
        const std::int32_t element = i % 8 != 0 && chance(50) ? (near < 0 ? -1 : 0) : near;
        std::memcpy(case_.vectors.data() + (half == 0 ? 160 : 576) + 16 * index + i, &element, 4);
      }
    }
  }
  if (aim_at(target)) {
    return true;
  }
  target = window();
  return aim_at(target);
}

bool CaseGenerator::aim_at(std::uint64_t target) {
  const std::uint64_t base = insn_.segment == kFs ? fs_base_ : insn_.segment == kGs ? kCaseGsBase : 0;
  const std::uint64_t offset = target - base;
  const bool narrow = insn_.address_size == 4;
  if (narrow && offset >> 32 != 0) {
    return false;
  }
  case_.target = target;
  const std::size_t tail = insn_.op == Op::kEnter ? 3 : insn_.immediate_size;
  if (insn_.op == Op::kMoveOffset) {
    patch(case_.length - insn_.address_size, offset, insn_.address_size);
    return true;
  }
  const bool vector_index = insn_.op == Op::kGather;
  const bool indexed = insn_.index != kNoRegister && !vector_index;
  auto& gpr = case_.gpr;
  const auto displacement = static_cast<std::uint64_t>(insn_.displacement);
  if (insn_.base == kRipBase || insn_.base == kNoRegister) {
    const std::uint64_t origin = insn_.base == kRipBase ? case_.rip + case_.length : 0;
    if (indexed) {
      gpr[insn_.index] = (offset - displacement) >> insn_.scale;
      case_.target = base + displacement + (gpr[insn_.index] << insn_.scale);
      if (narrow) {
        case_.target &= 0xffffffff;
      }
      return !narrow || base == 0;
    }
    const std::uint64_t wanted = offset - origin;
    if (static_cast<std::uint64_t>(static_cast<std::int32_t>(wanted)) != wanted) {
      return false;
    }
    patch(case_.length - tail - 4, wanted, 4);
    return true;
  }
  if (!indexed) {
    gpr[insn_.base] = offset - displacement;
  } else if (insn_.index == insn_.base) {
    if (insn_.scale != 0) {
      return false;
    }
    gpr[insn_.base] = (offset - displacement) >> 1;
  } else {
    gpr[insn_.base] = offset - displacement - (gpr[insn_.index] << insn_.scale);
  }
  if (narrow && chance(50)) {
    gpr[insn_.base] ^= random_() << 32;  // which is not used
  }
  return true;
}

// Targets in the code pages, mostly; where it could be the branch itself, one step only.
void CaseGenerator::relative_branch() {
  if (insn_.immediate_size >= 4 && chance(85)) {
    const std::uint64_t to = kCaseCode + below(kCaseCodeSize);
    patch(case_.length - 4U, to - case_.rip - case_.length, 4);
  }
}

// Makes bytes of an instruction that lies at case_.rip; false: not this one.
bool CaseGenerator::next_of_sequence(bool first) {
  make_bytes();
  if (decode(case_.bytes, CodeSize::k64, insn_) != DecodeResult::kDone || !suits() || !suits_sequence()) {
    return false;
  }
  case_.length = insn_.length;
  const bool accesses = insn_.memory && insn_.op != Op::kLea && insn_.op != Op::kNop;
  if (!accesses) {
    return true;
  }
  if (!first && insn_.index == kNoRegister && insn_.base < 16 &&
      insn_.displacement == static_cast<std::int8_t>(insn_.displacement) && chance(50)) {
    return true;  // off what the register holds
  }
  const bool fixed = insn_.base == kRipBase || insn_.op == Op::kMoveOffset;
  if (!fixed && !first && !chance(15)) {
    return false;
  }
  // Registers are changed for the first one only; later ones find what is there.
  const auto registers = case_.gpr;
  const std::uint32_t size = insn_.memory_size != 0 ? insn_.memory_size : 8U;
  if (!aim_at(chance(97) ? window() & ~std::uint64_t{chance(80) ? 31U : 0U} : address(size))) {
    return false;
  }
  if (!first) {
    case_.gpr = registers;
  }
  return decode(case_.bytes, CodeSize::k64, insn_) == DecodeResult::kDone && insn_.length == case_.length;
}

void CaseGenerator::make_sequence(Case& out) {
  make_registers();
  make_vectors();
  case_.gpr[kRsp] = window() & ~7ULL;
  case_.gpr[kRsi] = chance(80) ? window() : case_.gpr[kRsi];
  case_.gpr[kRdi] = chance(80) ? window() : case_.gpr[kRdi];
  case_.gpr[kRcx] = chance(60) ? below(24) : case_.gpr[kRcx];
  case_.single_step = false;
  case_.sequence = true;
  // Often most accesses are off one register, as in code that was compiled: the translator looks them up
  // together.
  constexpr std::array<std::uint8_t, 8> kBases{kRbx, kRsp, kRbp, kRsi, kR8, kR10, kR12, kR15};
  const std::uint8_t favourite = chance(60) ? kBases.at(below(kBases.size())) : kNoRegister;
  if (favourite != kNoRegister && favourite != kRsp) {
    case_.gpr[favourite] = window();
  }
  const std::uint64_t start =
      chance(10) ? kCaseCode + 0x1000 - below(60) : kCaseCode + 32 + below(kCaseCodeSize - 256);
  std::array<std::uint8_t, Case::kMostBytes> code{};
  std::array<std::size_t, 16> starts{};
  std::size_t count = 2 + below(10);
  std::size_t at = 0;
  for (std::size_t i = 0; i < count; ++i) {
    starts[i] = at;
    if (at + kMaxInsnLength > code.size()) {
      count = i;
      break;
    }
    case_.rip = start + at;
    if (i + 1 < count && chance(12)) {
      code[at] = chance(85) ? static_cast<std::uint8_t>(0x70 | (random_() & 15)) : 0xeb;
      at += 2;  // the distance comes below
      continue;
    }
    do {
      while (!next_of_sequence(i == 0 && favourite == kNoRegister)) {
      }
    } while (favourite != kNoRegister && insn_.memory &&
             (insn_.base != favourite || insn_.index != kNoRegister ||
              insn_.displacement != static_cast<std::int8_t>(insn_.displacement)));
    std::copy_n(case_.bytes.begin(), case_.length, code.begin() + static_cast<std::ptrdiff_t>(at));
    at += case_.length;
  }
  starts[count] = at;
  for (std::size_t i = 0; i < count; ++i) {
    const bool jump =
        starts[i + 1] == starts[i] + 2 && ((code[starts[i]] & 0xf0) == 0x70 || code[starts[i]] == 0xeb);
    if (jump) {
      const std::size_t to = i + 1 + below(count - i);
      code[starts[i] + 1] = static_cast<std::uint8_t>(starts[to] - starts[i] - 2);
    }
  }
  case_.bytes = code;
  case_.length = static_cast<std::uint8_t>(at);
  case_.rip = start;
  out = case_;
}

void CaseGenerator::make_registers() {
  for (std::uint64_t& reg : case_.gpr) {
    reg = value();
  }
  case_.rflags = 0x202 | (random_() & flag::kArithmetic) | (chance(20) ? flag::kDf : 0);
}

void CaseGenerator::make_case(Case& out, Insn& insn) {
  case_.sequence = false;
  for (;;) {
    make_bytes();
    if (decode(case_.bytes, CodeSize::k64, insn_) != DecodeResult::kDone || !suits()) {
      continue;
    }
    case_.length = insn_.length;
    make_registers();
    case_.gpr[kRsp] = chance(50) ? window() & ~7ULL : case_.gpr[kRsp];
    case_.target = 0;
    place_code();
    make_vectors();
    prepare_operation();
    if (insn_.memory && insn_.op != Op::kLea && insn_.op != Op::kNop && !aim()) {
      continue;
    }
    if (insn_.segment == kFs && (!insn_.memory || insn_.address_size == 4)) {
      continue;  // could reach the child's own memory
    }
    const bool compares = insn_.op == Op::kCompareExchange8 || insn_.op == Op::kCompareExchange16;
    if (compares && chance(50)) {
      case_.gpr[kRdx] = case_.gpr[kRax] = 0;
    }
    if (insn_.op >= Op::kCall && insn_.op <= Op::kJumpRcxZero) {
      relative_branch();
      case_.single_step = true;
    } else {
      case_.single_step = chance(3);
    }
    if (insn_.op == Op::kCall || insn_.op == Op::kJump || insn_.op == Op::kJumpIf) {
      const bool far_away = insn_.immediate_size == 1 || chance(50);
      case_.single_step = far_away && chance(30);
    }
    // The displacement or target may have changed.
    if (decode(case_.bytes, CodeSize::k64, insn_) != DecodeResult::kDone || insn_.length != case_.length ||
        !suits()) {
      continue;
    }
    const std::uint64_t branch = case_.rip + case_.length + insn_.immediate;
    if (branch >= case_.rip && branch < case_.rip + case_.length) {
      case_.single_step = true;
    }
    out = case_;
    insn = insn_;
    return;
  }
}

}  // namespace wisp::soft
