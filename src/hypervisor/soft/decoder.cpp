#include "hypervisor/soft/decoder.h"

#include <algorithm>
#include <bit>

#include "hypervisor/soft/decoder_tables.h"

namespace wisp::soft {
namespace {

using tables::Imm;
using tables::Spec;

// The bytes of the instruction, taken one by one.
class Bytes final {
 public:
  explicit Bytes(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}
  [[nodiscard]] bool ended() const { return ended_; }
  [[nodiscard]] std::size_t taken() const { return at_; }
  [[nodiscard]] std::uint8_t peek() {
    if (at_ >= bytes_.size()) {
      ended_ = true;
      return 0;
    }
    return bytes_[at_];
  }
  std::uint8_t take() {
    const std::uint8_t byte = peek();
    ++at_;
    return byte;
  }
  // Little-endian, 1 to 8 bytes.
  std::uint64_t number(std::size_t size) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < size; ++i) {
      value |= std::uint64_t{take()} << (8 * i);
    }
    return value;
  }
  std::int64_t signed_number(std::size_t size) {
    const auto shift = static_cast<int>(64 - 8 * size);
    return static_cast<std::int64_t>(number(size) << shift) >> shift;
  }

 private:
  std::span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
  bool ended_ = false;
};

struct Prefixes {
  bool operand = false;
  bool address = false;
  bool lock = false;
  std::uint8_t repeat = 0;
  std::uint8_t segment = 0xff;
};

class Decoder final {
 public:
  Decoder(std::span<const std::uint8_t> bytes, CodeSize code, Insn& insn)
      : bytes_(bytes), code_(code), insn_(insn) {}

  DecodeResult run(std::span<const std::uint8_t> all) {
    insn_ = Insn{};
    parse();
    if (bytes_.ended()) {
      return all.size() >= kMaxInsnLength ? DecodeResult::kTooLong : DecodeResult::kTruncated;
    }
    insn_.length = static_cast<std::uint8_t>(bytes_.taken());
    std::copy_n(all.begin(), insn_.length, insn_.bytes.begin());
    return DecodeResult::kDone;
  }

 private:
  [[nodiscard]] bool is64() const { return code_ == CodeSize::k64; }

  void undefined() { insn_.op = Op::kUndefined; }

  void take_prefixes() {
    for (int i = 0; i < 16; ++i) {
      const std::uint8_t byte = bytes_.peek();
      switch (byte) {
        case 0x26:
        case 0x2e:
        case 0x36:
        case 0x3e:
          // In 64-bit mode these are ignored, and do not undo an FS or GS before them.
          if (!is64()) {
            prefixes_.segment = (byte >> 3) & 3;
          }
          break;
        case 0x64:
        case 0x65:
          prefixes_.segment = byte - 0x60;
          break;
        case 0x66:
          prefixes_.operand = true;
          break;
        case 0x67:
          prefixes_.address = true;
          break;
        case 0xf0:
          prefixes_.lock = true;
          break;
        case 0xf2:
        case 0xf3:
          prefixes_.repeat = byte;
          break;
        default:
          if (is64() && (byte & 0xf0) == 0x40) {
            insn_.rex = byte;
            bytes_.take();
            const std::uint8_t next = bytes_.peek();
            // Only the REX right before the opcode counts.
            if (is_prefix(next)) {
              insn_.rex = 0;
              continue;
            }
            if ((next & 0xf0) == 0x40) {
              insn_.rex = 0;
              continue;
            }
          }
          return;
      }
      bytes_.take();
    }
  }

  static bool is_prefix(std::uint8_t byte) {
    switch (byte) {
      case 0x26:
      case 0x2e:
      case 0x36:
      case 0x3e:
      case 0x64:
      case 0x65:
      case 0x66:
      case 0x67:
      case 0xf0:
      case 0xf2:
      case 0xf3:
        return true;
      default:
        return false;
    }
  }

  void set_address_size() {
    switch (code_) {
      case CodeSize::k64:
        insn_.address_size = prefixes_.address ? 4 : 8;
        break;
      case CodeSize::k32:
        insn_.address_size = prefixes_.address ? 2 : 4;
        break;
      case CodeSize::k16:
        insn_.address_size = prefixes_.address ? 4 : 2;
        break;
    }
  }

  [[nodiscard]] std::uint8_t general_operand_size(std::uint32_t bits) const {
    if ((bits & tables::kByteSize) != 0) {
      return 1;
    }
    if (is64()) {
      if ((bits & tables::kForce64) != 0 || insn_.rex_w()) {
        return 8;
      }
      if (prefixes_.operand && insn_.mandatory != 0x66) {
        return 2;
      }
      return (bits & tables::kDefault64) != 0 ? 8 : 4;
    }
    const bool small = (code_ == CodeSize::k16) != (prefixes_.operand && insn_.mandatory != 0x66);
    return small ? 2 : 4;
  }

  void take_modrm() {
    insn_.has_modrm = true;
    insn_.modrm = bytes_.take();
    if (insn_.map == 1 && insn_.opcode >= 0x20 && insn_.opcode < 0x24) {
      insn_.modrm |= 0xc0;  // moves of control and debug registers: always a register, whatever mod says
    }
    insn_.reg = static_cast<std::uint8_t>(insn_.reg_field() | ((insn_.rex & 4) << 1));
    if (insn_.mod() == 3) {
      insn_.rm = static_cast<std::uint8_t>((insn_.modrm & 7) | ((insn_.rex & 1) << 3));
      return;
    }
    insn_.memory = true;
    if (insn_.address_size == 2) {
      take_memory16();
    } else {
      take_memory();
    }
    if (prefixes_.segment != 0xff) {
      insn_.segment = prefixes_.segment;
    }
  }

  void take_memory16() {
    static constexpr std::array<std::array<std::uint8_t, 2>, 8> kForms{{{kRbx, kRsi},
                                                                        {kRbx, kRdi},
                                                                        {kRbp, kRsi},
                                                                        {kRbp, kRdi},
                                                                        {kRsi, kNoRegister},
                                                                        {kRdi, kNoRegister},
                                                                        {kRbp, kNoRegister},
                                                                        {kRbx, kNoRegister}}};
    const std::uint8_t rm = insn_.modrm & 7;
    const std::uint8_t mod = insn_.mod();
    if (mod == 0 && rm == 6) {
      insn_.displacement = static_cast<std::int64_t>(bytes_.number(2));
      return;
    }
    insn_.base = kForms[rm][0];
    insn_.index = kForms[rm][1];
    if (insn_.base == kRbp) {
      insn_.segment = kSs;
    }
    if (mod != 0) {
      insn_.displacement = bytes_.signed_number(mod == 1 ? 1 : 2);
    }
  }

  void take_memory() {
    const std::uint8_t mod = insn_.mod();
    const std::uint8_t rm = insn_.modrm & 7;
    std::size_t displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (rm == 4) {
      const std::uint8_t sib = bytes_.take();
      insn_.scale = sib >> 6;
      const auto index = static_cast<std::uint8_t>(((sib >> 3) & 7) | ((insn_.rex & 2) << 2));
      if (index != 4) {
        insn_.index = index;
      }
      const std::uint8_t base = sib & 7;
      if (base == 5 && mod == 0) {
        displacement = 4;
      } else {
        insn_.base = static_cast<std::uint8_t>(base | ((insn_.rex & 1) << 3));
      }
    } else if (rm == 5 && mod == 0) {
      displacement = 4;
      if (is64()) {
        insn_.base = kRipBase;
      }
    } else {
      insn_.base = static_cast<std::uint8_t>(rm | ((insn_.rex & 1) << 3));
    }
    if (insn_.base == kRsp || insn_.base == kRbp) {
      insn_.segment = kSs;
    }
    if (displacement != 0) {
      insn_.displacement = bytes_.signed_number(displacement);
    }
  }

  void take_immediate(Imm kind) {
    switch (kind) {
      case Imm::kNone:
        return;
      case Imm::kByte:
        insn_.immediate_size = 1;
        insn_.immediate = static_cast<std::uint64_t>(bytes_.signed_number(1));
        return;
      case Imm::kByteZero:
        insn_.immediate_size = 1;
        insn_.immediate = bytes_.number(1);
        return;
      case Imm::kWord:
        insn_.immediate_size = 2;
        insn_.immediate = bytes_.number(2);
        return;
      case Imm::kZ:
        insn_.immediate_size = insn_.operand_size == 2 ? 2 : 4;
        insn_.immediate = static_cast<std::uint64_t>(bytes_.signed_number(insn_.immediate_size));
        return;
      case Imm::kV:
        insn_.immediate_size = insn_.operand_size;
        insn_.immediate = bytes_.number(insn_.operand_size);
        return;
      case Imm::kFarPointer:
        insn_.immediate_size = insn_.operand_size == 2 ? 2 : 4;
        insn_.immediate = bytes_.number(insn_.immediate_size);
        insn_.immediate2 = static_cast<std::uint16_t>(bytes_.number(2));
        return;
      case Imm::kEnter:
        insn_.immediate_size = 2;
        insn_.immediate = bytes_.number(2);
        insn_.immediate2 = static_cast<std::uint16_t>(bytes_.number(1));
        return;
      case Imm::kOffset:
        insn_.immediate_size = insn_.address_size;
        insn_.displacement = static_cast<std::int64_t>(bytes_.number(insn_.address_size));
        insn_.memory = true;
        if (prefixes_.segment != 0xff) {
          insn_.segment = prefixes_.segment;
        }
        return;
    }
  }

  // One operand's class and size from its table entry.
  void operand(std::uint8_t code, OperandClass& cls, std::uint8_t& access, std::uint8_t& size) const {
    access = code & 3;
    switch (code & ~3U) {
      case tables::kNone:
        cls = OperandClass::kNone;
        break;
      case tables::kGb:
        cls = OperandClass::kGpr;
        size = 1;
        break;
      case tables::kGv:
        cls = OperandClass::kGpr;
        size = insn_.operand_size;
        break;
      case tables::kGw:
        cls = OperandClass::kGpr;
        size = 2;
        break;
      case tables::kGd:
        cls = OperandClass::kGpr;
        size = 4;
        break;
      case tables::kGz:
        cls = OperandClass::kGpr;
        size = std::min<std::uint8_t>(insn_.operand_size, 4);
        break;
      case tables::kGy:
        cls = OperandClass::kGpr;
        size = is64() && insn_.rex_w() ? 8 : 4;
        break;
      case tables::kVr:
        cls = OperandClass::kVector;
        break;
      case tables::kMm:
        cls = OperandClass::kMmx;
        break;
      default:
        cls = OperandClass::kFpuStack;
        break;
    }
  }

  void set_operands(const Spec& spec) {
    operand(spec.reg, insn_.reg_class, insn_.reg_access, insn_.reg_size);
    operand(spec.rm, insn_.rm_class, insn_.rm_access, insn_.rm_size);
    if (insn_.memory) {
      switch (spec.memory) {
        case tables::kBySize:
          insn_.memory_size = insn_.rm_size;
          break;
        case tables::kFull:
          insn_.memory_size = insn_.vex_256 ? 32 : 16;
          break;
        case tables::kHalf:
          insn_.memory_size = insn_.vex_256 ? 16 : 8;
          break;
        case tables::kQuarter:
          insn_.memory_size = insn_.vex_256 ? 8 : 4;
          break;
        case tables::kEighth:
          insn_.memory_size = insn_.vex_256 ? 4 : 2;
          break;
        default:
          insn_.memory_size = spec.memory;
          break;
      }
    }
    const std::uint32_t bits = spec.bits;
    insn_.writes_flags = (bits & tables::kFlags) != 0;
    const auto bit = [bits](std::uint32_t which, Gpr reg) -> std::uint16_t {
      return (bits & which) != 0 ? static_cast<std::uint16_t>(1U << reg) : std::uint16_t{0};
    };
    insn_.implicit_reads = static_cast<std::uint16_t>(
        bit(tables::kReadsCl, kRcx) | bit(tables::kReadsRax, kRax) | bit(tables::kReadsRdx, kRdx));
    insn_.implicit_writes = static_cast<std::uint16_t>(
        bit(tables::kWritesRax, kRax) | bit(tables::kWritesRdx, kRdx) | bit(tables::kWritesRcx, kRcx));
  }

  // What every instruction has in common after its table entry is known.
  void common(const Spec& spec) {
    if (((spec.bits & tables::kNot64) != 0 && is64()) || ((spec.bits & tables::kOnly64) != 0 && !is64())) {
      undefined();
      return;
    }
    insn_.op = spec.op;
    insn_.feature = spec.feature;
    insn_.operand_size = general_operand_size(spec.bits);
    if ((spec.bits & tables::kModrm) != 0) {
      take_modrm();
    } else if ((spec.bits & tables::kOpcodeRegister) != 0) {
      insn_.register_in_opcode = true;
      insn_.rm = static_cast<std::uint8_t>((insn_.opcode & 7) | ((insn_.rex & 1) << 3));
    }
    lockable_ = (spec.bits & tables::kLockable) != 0;
    set_operands(spec);
    imm_ = spec.imm;
    if (((spec.bits & tables::kMemoryOnly) != 0 && !insn_.memory) ||
        ((spec.bits & tables::kRegisterOnly) != 0 && insn_.memory)) {
      undefined();
    }
  }

  void finish() {
    take_immediate(imm_);
    if (insn_.lock && (!insn_.memory || !lockable_)) {
      undefined();
    }
  }

  void parse() {
    take_prefixes();
    insn_.lock = prefixes_.lock;
    insn_.operand_prefix = prefixes_.operand;
    insn_.repeat = prefixes_.repeat;
    set_address_size();
    if (prefixes_.segment != 0xff) {
      insn_.segment = prefixes_.segment;  // for strings; memory operands set it again
    }
    insn_.opcode = bytes_.take();
    if ((insn_.opcode == 0xc4 || insn_.opcode == 0xc5) && (is64() || (bytes_.peek() & 0xc0) == 0xc0)) {
      parse_vex();
      return;
    }
    if (insn_.opcode == 0x62 && (is64() || (bytes_.peek() & 0xc0) == 0xc0)) {
      insn_.op = Op::kUnknown;  // EVEX; its length does not matter, it faults
      bytes_.take();
      return;
    }
    if (insn_.opcode != 0x0f) {
      parse_one_byte();
      finish();
      return;
    }
    insn_.opcode = bytes_.take();
    if (insn_.opcode == 0x38 || insn_.opcode == 0x3a) {
      insn_.map = insn_.opcode == 0x38 ? 2 : 3;
      insn_.opcode = bytes_.take();
      parse_legacy_vector();
      finish();
      return;
    }
    insn_.map = 1;
    parse_two_byte();
    finish();
  }

  void parse_one_byte() {
    const std::uint8_t opcode = insn_.opcode;
    const Spec& spec = tables::kOneByte[opcode];
    if (opcode == 0x63 && !is64()) {
      common({.op = Op::kArpl, .bits = tables::kModrm});
      insn_.operand_size = 2;
      return;
    }
    if (opcode == 0x90 && ((insn_.rex & 1) == 0 || insn_.repeat == 0xf3)) {
      insn_.op = insn_.repeat == 0xf3 ? Op::kPause : Op::kNop;  // PAUSE with REX.B, too
      return;
    }
    common(spec);
    if (insn_.op == Op::kUndefined) {
      return;
    }
    if (opcode >= 0x40 && opcode < 0x50) {  // INC and DEC as FF /0 and /1
      rewrite(0xff, static_cast<std::uint8_t>(opcode < 0x48 ? 0 : 1), insn_.rm);
    } else if (opcode >= 0x90 && opcode < 0x98) {
      exchange_rax();
    } else if ((opcode >= 0x6c && opcode < 0x70) || (opcode >= 0xe4 && opcode < 0xe8) ||
               (opcode >= 0xec && opcode < 0xf0)) {
      insn_.operand_size = std::min<std::uint8_t>(insn_.operand_size, 4);  // ports have 32 bits at most
    } else if (opcode == 0x8f || (opcode == 0xc6 || opcode == 0xc7)) {
      if (insn_.reg_field() != 0) {
        undefined();
      }
    } else if (opcode == 0x80 || opcode == 0x81 || opcode == 0x82 || opcode == 0x83) {
      if (opcode == 0x82) {
        insn_.opcode = 0x80;
      }
      if (insn_.reg_field() == 7) {  // CMP
        insn_.rm_access = kReads;
        lockable_ = false;
      }
    } else if ((opcode == 0x8e && insn_.reg_field() == kCs) ||
               ((opcode == 0x8e || opcode == 0x8c) && insn_.reg_field() > kGs)) {
      undefined();
    } else if (opcode == 0xf6 || opcode == 0xf7) {
      group3();
    } else if (opcode == 0xfe) {
      if (insn_.reg_field() > 1) {
        undefined();
      }
    } else if (opcode == 0xff) {
      group5();
    } else if (opcode >= 0xd8 && opcode < 0xe0) {
      fpu();
    } else if (opcode == 0x87 || opcode == 0x86) {
      insn_.lock = false;  // always locked on memory, with or without the prefix
      if (prefixes_.lock && !insn_.memory) {
        undefined();
      }
    }
  }

  // Gives the instruction another opcode with a ModRM that names a register.
  void rewrite(std::uint8_t opcode, std::uint8_t reg_field, std::uint8_t rm) {
    insn_.opcode = opcode;
    insn_.register_in_opcode = false;
    insn_.has_modrm = true;
    insn_.modrm = static_cast<std::uint8_t>(0xc0 | ((reg_field & 7) << 3) | (rm & 7));
    insn_.reg = reg_field;
    insn_.rm = rm;
  }

  void exchange_rax() {
    rewrite(0x87, kRax, insn_.rm);
    insn_.reg_class = OperandClass::kGpr;
    insn_.reg_access = kReads | kWrites;
    insn_.reg_size = insn_.operand_size;
    insn_.implicit_reads = 0;
    insn_.implicit_writes = 0;
  }

  void group3() {
    static constexpr std::uint16_t kRaxBit = 1U << kRax;
    static constexpr std::uint16_t kRdxBit = 1U << kRdx;
    const std::uint16_t both = insn_.operand_size == 1 ? kRaxBit : kRaxBit | kRdxBit;
    switch (insn_.reg_field()) {
      case 0:
      case 1:  // TEST
        insn_.rm_access = kReads;
        imm_ = insn_.operand_size == 1 ? Imm::kByte : Imm::kZ;
        break;
      case 2:  // NOT
        insn_.writes_flags = false;
        lockable_ = true;
        break;
      case 3:  // NEG
        lockable_ = true;
        break;
      case 4:
      case 5:  // MUL, IMUL
        insn_.rm_access = kReads;
        insn_.implicit_reads = kRaxBit;
        insn_.implicit_writes = both;
        break;
      default:
        insn_.op = insn_.reg_field() == 6 ? Op::kDivide : Op::kDivideSigned;
        insn_.rm_access = kReads;
        insn_.implicit_reads = both;
        insn_.implicit_writes = both;
        break;
    }
  }

  void group5() {
    const std::uint8_t which = insn_.reg_field();
    if (which < 2) {
      return;
    }
    lockable_ = false;
    insn_.rm_access = kReads;
    insn_.writes_flags = false;
    switch (which) {
      case 2:
      case 4:
        insn_.op = which == 2 ? Op::kCallIndirect : Op::kJumpIndirect;
        insn_.operand_size = general_operand_size(tables::kForce64);
        break;
      case 3:
      case 5:
        insn_.op = which == 3 ? Op::kCallFarIndirect : Op::kJumpFarIndirect;
        if (!insn_.memory) {
          undefined();
        }
        break;
      case 6:
        insn_.op = Op::kPush;
        insn_.operand_size = general_operand_size(tables::kDefault64);
        break;
      default:
        undefined();
        break;
    }
    insn_.rm_size = insn_.operand_size;
    if (insn_.memory) {
      insn_.memory_size = insn_.operand_size;
    }
  }

  void fpu() {
    insn_.vector_use = VectorUse::kX87;
    const std::uint8_t escape = insn_.opcode & 7;
    const std::uint8_t which = insn_.reg_field();
    if (insn_.memory) {
      // Bytes touched, and 0x80 where they are written, by escape and /digit. 0: not an instruction,
      // 0x7f: environment.
      static constexpr std::uint8_t kStore = 0x80;
      static constexpr std::uint8_t kEnvironment = 0x7f;
      static constexpr std::array<std::array<std::uint8_t, 8>, 8> kSizes{{
          {4, 4, 4, 4, 4, 4, 4, 4},
          {4, 0, 4 | kStore, 4 | kStore, kEnvironment, 2, kEnvironment, 2 | kStore},
          {4, 4, 4, 4, 4, 4, 4, 4},
          {4, 4 | kStore, 4 | kStore, 4 | kStore, 0, 10, 0, 10 | kStore},
          {8, 8, 8, 8, 8, 8, 8, 8},
          {8, 8 | kStore, 8 | kStore, 8 | kStore, kEnvironment, 0, kEnvironment, 2 | kStore},
          {2, 2, 2, 2, 2, 2, 2, 2},
          {2, 2 | kStore, 2 | kStore, 2 | kStore, 10, 8, 10 | kStore, 8 | kStore},
      }};
      const std::uint8_t size = kSizes[escape][which];
      if (size == 0) {
        undefined();
      } else if (size == kEnvironment) {
        insn_.op = Op::kFpuEnvironment;
      } else {
        insn_.memory_size = size & 0x7f;
        insn_.rm_access = (size & kStore) != 0 ? kWrites : kReads;
      }
      return;
    }
    const std::uint8_t low = insn_.modrm & 0x3f;
    bool valid = true;
    switch (escape) {
      case 1:  // D9
        valid = low < 0x11 || (low >= 0x18 && low < 0x20) ||
                (low >= 0x20 && low != 0x22 && low != 0x23 && low != 0x26 && low != 0x27 && low != 0x2f);
        break;
      case 2:  // DA
        valid = low < 0x20 || low == 0x29;
        break;
      case 3:  // DB
        valid = low < 0x20 || (low >= 0x20 && low <= 0x24) || (low >= 0x28 && low < 0x38);
        insn_.writes_flags = low >= 0x28 && low < 0x38;
        break;
      case 5:  // DD
        valid = low < 0x30;
        break;
      case 6:  // DE
        valid = low < 0x18 || low == 0x19 || low >= 0x20;
        break;
      case 7:  // DF
        valid = low <= 0x20 || (low >= 0x28 && low < 0x38);
        insn_.writes_flags = low >= 0x28;
        if (low == 0x20) {  // FNSTSW AX
          insn_.implicit_reads = 1U << kRax;
          insn_.implicit_writes = 1U << kRax;
        }
        break;
      default:
        break;
    }
    if (!valid) {
      undefined();
    }
  }

  void parse_two_byte() {
    const std::uint8_t opcode = insn_.opcode;
    if (opcode == 0x78 || opcode == 0x79) {  // VMREAD, VMWRITE
      take_modrm();
      undefined();
      return;
    }
    const bool vector = (opcode >= 0x10 && opcode < 0x18) || (opcode >= 0x28 && opcode < 0x30) ||
                        (opcode >= 0x50 && opcode < 0x80) || opcode == 0xb8 || opcode == 0xc2 ||
                        (opcode >= 0xc4 && opcode < 0xc7) || (opcode >= 0xd0 && opcode != 0xff);
    if (vector) {
      parse_legacy_vector();
      return;
    }
    common(tables::kTwoByte[opcode]);
    switch (opcode) {
      case 0x00:
        group6();
        break;
      case 0x01:
        group7();
        break;
      case 0x20:
      case 0x21:
      case 0x22:
      case 0x23:
        control_move();
        break;
      case 0xa3:
      case 0xab:
      case 0xb3:
      case 0xbb:
        if (insn_.memory) {
          insn_.op = opcode == 0xa3   ? Op::kBitTest
                     : opcode == 0xab ? Op::kBitSet
                     : opcode == 0xb3 ? Op::kBitReset
                                      : Op::kBitComplement;
        }
        break;
      case 0xae:
        group15();
        break;
      case 0xba:
        if (insn_.reg_field() < 4) {
          undefined();
        } else if (insn_.reg_field() == 4) {
          insn_.rm_access = kReads;
          lockable_ = false;
        }
        break;
      case 0xbc:
      case 0xbd:
        if (insn_.repeat == 0xf3) {
          insn_.mandatory = 0xf3;
          insn_.feature = opcode == 0xbc ? Feature::kBmi1 : Feature::kLzcnt;
        }
        break;
      case 0xc3:
        if (insn_.operand_prefix || insn_.repeat != 0) {
          undefined();
        }
        insn_.operand_size = insn_.rm_size;  // MOVNTI has no 16-bit form
        break;
      case 0xc7:
        group9();
        break;
      default:
        break;
    }
  }

  void control_move() {
    insn_.operand_size = is64() ? 8 : 4;
    if (insn_.opcode == 0x20 || insn_.opcode == 0x22) {
      if (insn_.reg == 1 || (insn_.reg > 4 && insn_.reg != 8)) {
        undefined();
      }
      if (insn_.lock && insn_.reg != 0) {
        undefined();
      }
    } else if (insn_.reg > 7) {
      undefined();
    }
  }

  void group6() {
    static constexpr std::array kOps{Op::kStoreLdt,   Op::kStoreTask,   Op::kLoadLdt,   Op::kLoadTask,
                                     Op::kVerifyRead, Op::kVerifyWrite, Op::kUndefined, Op::kUndefined};
    insn_.op = kOps[insn_.reg_field()];
  }

  void group7() {
    if (insn_.memory) {
      static constexpr std::array kOps{Op::kStoreGdt,       Op::kStoreIdt,        Op::kLoadGdt,
                                       Op::kLoadIdt,        Op::kStoreStatusWord, Op::kUndefined,
                                       Op::kLoadStatusWord, Op::kInvalidatePage};
      insn_.op = kOps[insn_.reg_field()];
      return;
    }
    if (insn_.modrm >= 0xc0 && insn_.modrm < 0xd8 && (insn_.operand_prefix || insn_.repeat != 0)) {
      undefined();
      return;
    }
    switch (insn_.modrm) {
      case 0xc1:
      case 0xd9:
        insn_.op = Op::kHypercall;
        return;
      case 0xc8:
        insn_.op = Op::kMonitor;
        return;
      case 0xc9:
        insn_.op = Op::kMwait;
        return;
      case 0xca:
        insn_.op = Op::kClearAc;
        return;
      case 0xcb:
        insn_.op = Op::kSetAc;
        return;
      case 0xd0:
        insn_.op = Op::kGetXcr;
        return;
      case 0xd1:
        insn_.op = Op::kSetXcr;
        return;
      case 0xf8:
        insn_.op = is64() ? Op::kSwapGs : Op::kUndefined;
        return;
      case 0xf9:
        insn_.op = Op::kReadTscp;
        return;
      default:
        break;
    }
    switch (insn_.reg_field()) {
      case 4:
        insn_.op = Op::kStoreStatusWord;
        break;
      case 6:
        insn_.op = Op::kLoadStatusWord;
        break;
      default:
        undefined();
        break;
    }
  }

  void group9() {
    const std::uint8_t which = insn_.reg_field();
    if (insn_.memory) {
      if (which == 1) {
        insn_.op = insn_.rex_w() ? Op::kCompareExchange16 : Op::kCompareExchange8;
        insn_.memory_size = insn_.rex_w() ? 16 : 8;
        lockable_ = true;
      } else {
        undefined();
      }
      return;
    }
    if (which == 7 && insn_.repeat == 0xf3) {
      insn_.op = Op::kReadPid;
    } else if ((which == 6 || which == 7) && insn_.repeat == 0) {
      insn_.op = Op::kRandom;
    } else {
      undefined();
    }
  }

  void group15() {
    const std::uint8_t which = insn_.reg_field();
    if (insn_.memory) {
      if (insn_.operand_prefix || insn_.repeat != 0) {
        // CLFLUSHOPT and CLWB do nothing here; the rest (TPAUSE, CLRSSBSY ...) is not there.
        insn_.op = insn_.repeat == 0 && (which == 6 || which == 7) ? Op::kNop : Op::kUndefined;
        return;
      }
      static constexpr std::array kOps{Op::kFxsave, Op::kFxrstor, Op::kLoadMxcsr, Op::kStoreMxcsr,
                                       Op::kXsave,  Op::kXrstor,  Op::kXsaveOpt,  Op::kNop};
      insn_.op = kOps[which];
      return;
    }
    if (insn_.repeat == 0xf3 && which < 4) {
      static constexpr std::array kOps{Op::kReadFsBase, Op::kReadGsBase, Op::kWriteFsBase, Op::kWriteGsBase};
      insn_.op = is64() ? kOps[which] : Op::kUndefined;
      return;
    }
    if (insn_.repeat == 0xf3 && which == 5) {  // INCSSP
      undefined();
      return;
    }
    if (insn_.operand_prefix || insn_.repeat != 0 || which < 5) {
      undefined();
      return;
    }
    // LFENCE, MFENCE, SFENCE: run as they are.
    insn_.op = Op::kNative;
    insn_.rm_class = OperandClass::kNone;
    insn_.modrm &= 0xf8;
    insn_.operand_size = 4;  // no prefix
  }

  [[nodiscard]] std::uint8_t legacy_prefix() const {
    if (prefixes_.repeat != 0) {
      return prefixes_.repeat;
    }
    return prefixes_.operand ? 0x66 : 0;
  }

  void parse_legacy_vector() {
    const std::uint8_t prefix = legacy_prefix();
    const Spec* spec = tables::vector_spec(insn_.map, prefix, insn_.opcode, false);
    // CRC32 takes 66 as its operand size; POPCNT too.
    insn_.mandatory = prefix;
    if (spec == nullptr) {
      if (has_modrm_when_unknown()) {
        take_modrm();
      }
      insn_.op = insn_.map == 1 ? Op::kUndefined : Op::kUnknown;
      return;
    }
    common(*spec);
    const bool integer = insn_.reg_class != OperandClass::kVector && insn_.reg_class != OperandClass::kMmx &&
                         insn_.rm_class != OperandClass::kVector && insn_.rm_class != OperandClass::kMmx;
    if (insn_.op != Op::kNative && insn_.op != Op::kMaskMoveBytes) {
      return;
    }
    if (insn_.map == 2 && (insn_.opcode == 0xf0 || insn_.opcode == 0xf1) && prefix != 0xf2) {
      // MOVBE: 66 is the operand size.
      insn_.mandatory = 0;
      const std::uint8_t size = general_operand_size(0);
      insn_.operand_size = size;
      insn_.reg_size = insn_.rm_size = insn_.memory_size = size;
      return;
    }
    if (insn_.map == 1 && insn_.opcode == 0x77) {
      insn_.vector_use = VectorUse::kMmx;
      return;
    }
    if (integer) {
      if ((spec->rm & ~3U) == tables::kGy) {  // ADCX, ADOX: 66 says which, not how wide
        insn_.operand_size = insn_.rm_size;
      }
      return;
    }
    const bool mmx_form = (spec->bits & tables::kMmxToo) != 0 && prefix == 0;
    if (mmx_form) {
      for (OperandClass* cls : {&insn_.reg_class, &insn_.rm_class}) {
        if (*cls == OperandClass::kVector) {
          *cls = OperandClass::kMmx;
        }
      }
      if (insn_.memory) {
        insn_.memory_size = 8;
      }
    }
    const bool mmx = insn_.reg_class == OperandClass::kMmx || insn_.rm_class == OperandClass::kMmx;
    const bool sse = insn_.reg_class == OperandClass::kVector || insn_.rm_class == OperandClass::kVector;
    insn_.vector_use = sse ? VectorUse::kSse : VectorUse::kMmx;
    if (mmx) {
      // There are eight: REX bits do not count.
      if (insn_.reg_class == OperandClass::kMmx) {
        insn_.reg &= 7;
      }
      if (insn_.rm_class == OperandClass::kMmx) {
        insn_.rm &= 7;
      }
    }
    insn_.alignment_16 =
        insn_.memory && !mmx_form && insn_.memory_size == 16 && (spec->bits & tables::kAligned) != 0;
    shift_group(mmx_form);
  }

  // PSRLW and so on with an immediate: which digits there are.
  void shift_group(bool mmx_form) {
    if (insn_.map != 1 || insn_.opcode < 0x71 || insn_.opcode > 0x73) {
      return;
    }
    const std::uint8_t which = insn_.reg_field();
    const bool bytes = insn_.opcode == 0x73 && (which == 3 || which == 7) && !mmx_form;
    const bool bits = which == 2 || which == 6 || (which == 4 && insn_.opcode != 0x73);
    if (!bits && !bytes) {
      undefined();
    }
  }

  [[nodiscard]] bool has_modrm_when_unknown() const { return insn_.map != 1 || insn_.opcode != 0x77; }

  void parse_vex() {
    if (prefixes_.operand || prefixes_.lock || prefixes_.repeat != 0 || insn_.rex != 0) {
      undefined();
      return;
    }
    insn_.vex = true;
    std::uint8_t last = 0;
    if (insn_.opcode == 0xc5) {
      last = bytes_.take();
      insn_.map = 1;
      insn_.rex = static_cast<std::uint8_t>(0x40 | (((last >> 7) ^ 1) << 2));
      last &= 0x7f;
    } else {
      insn_.three_byte_vex = true;
      const std::uint8_t first = bytes_.take();
      last = bytes_.take();
      insn_.map = first & 0x1f;
      const auto inverted = static_cast<std::uint8_t>(~first >> 5 & 7);
      insn_.rex = static_cast<std::uint8_t>(0x40 | inverted | ((last >> 7) << 3));
      last &= 0x7f;
    }
    if (!is64()) {
      insn_.rex &= 0x48;
    }
    insn_.vvvv = static_cast<std::uint8_t>((~last >> 3) & 0xf);
    const bool names_register = insn_.vvvv != 0;  // by all four bits, in every mode
    if (!is64()) {
      insn_.vvvv &= 7;
    }
    insn_.vex_256 = (last & 4) != 0;
    static constexpr std::array<std::uint8_t, 4> kPrefixes{0, 0x66, 0xf3, 0xf2};
    insn_.mandatory = kPrefixes[last & 3U];
    insn_.repeat = 0;
    insn_.opcode = bytes_.take();
    if (insn_.map < 1 || insn_.map > 3) {
      insn_.map = 0;
      take_modrm();
      undefined();
      return;
    }
    const Spec* spec = tables::vector_spec(insn_.map, insn_.mandatory, insn_.opcode, true);
    if (spec == nullptr) {
      vex_without_table(names_register);
      return;
    }
    vex_operands(*spec, names_register);
    take_immediate(imm_);
    if (!is64() && insn_.map == 3 && insn_.opcode >= 0x4a && insn_.opcode <= 0x4c) {
      insn_.immediate &= 0x7f;  // the register in its upper half is one of eight
    }
  }

  // LDMXCSR and STMXCSR are all that is left.
  void vex_without_table(bool names_register) {
    take_modrm();
    if (insn_.map == 1 && insn_.opcode == 0xae && insn_.memory && insn_.mandatory == 0 && !insn_.vex_256 &&
        !names_register && (insn_.reg_field() == 2 || insn_.reg_field() == 3)) {
      insn_.op = insn_.reg_field() == 2 ? Op::kLoadMxcsr : Op::kStoreMxcsr;
      insn_.vector_use = VectorUse::kAvx;
      return;
    }
    insn_.op = insn_.map == 1 ? Op::kUndefined : Op::kUnknown;
  }

  void vex_operands(const Spec& spec, bool names_register) {
    const std::uint32_t bits = spec.bits;
    common(spec);
    lockable_ = false;
    if (insn_.op == Op::kUndefined) {
      return;
    }
    if (((bits & tables::kL0) != 0 && insn_.vex_256) || ((bits & tables::kL1) != 0 && !insn_.vex_256) ||
        ((bits & tables::kW0) != 0 && insn_.rex_w()) || ((bits & tables::kW1) != 0 && !insn_.rex_w())) {
      undefined();
      return;
    }
    if ((bits & tables::kL1Avx2) != 0 && insn_.vex_256) {
      insn_.feature = Feature::kAvx2;
    }
    const bool general =
        (bits & (tables::kVvvvRead | tables::kVvvvWrite)) != 0 || (insn_.map == 3 && insn_.opcode == 0xf0);
    insn_.vector_use = general ? VectorUse::kNone : VectorUse::kAvx;
    const bool uses_vvvv =
        (bits & tables::kVvvv) != 0 && ((bits & tables::kVvvvOnRegister) == 0 || !insn_.memory);
    if ((bits & tables::kVvvvRead) != 0 || (bits & tables::kVvvvWrite) != 0) {
      insn_.vvvv_class = OperandClass::kGpr;
      insn_.vvvv_access = (bits & tables::kVvvvRead) != 0 ? kReads : kWrites;
    } else if (uses_vvvv) {
      insn_.vvvv_class = OperandClass::kVector;
    } else if (names_register) {
      undefined();
      return;
    }
    const bool fma = insn_.map == 2 && insn_.feature == Feature::kFma;
    if (fma && (insn_.opcode & 1) != 0 && (insn_.opcode & 0xf) >= 9 && insn_.memory) {
      insn_.memory_size = insn_.rex_w() ? 8 : 4;
    }
    if (insn_.map == 1 && insn_.mandatory == 0xf2 && insn_.opcode == 0x12 && insn_.vex_256 && insn_.memory) {
      insn_.memory_size = 32;
    }
    if (insn_.map == 2 && insn_.opcode == 0xf3 && (insn_.reg_field() < 1 || insn_.reg_field() > 3)) {
      undefined();
      return;
    }
    if (insn_.op == Op::kGather && !gather_is_valid()) {
      undefined();
      return;
    }
    // Where W is the width of a general register, 32-bit code has but one.
    const bool wide_register = (spec.reg & ~3U) == tables::kGy || (spec.rm & ~3U) == tables::kGy;
    if (wide_register && !is64()) {
      insn_.rex &= 0x47;
    }
    if (wide_register) {
      insn_.operand_size = insn_.rex_w() ? 8 : 4;
    }
    insn_.alignment_16 = insn_.memory && (bits & tables::kAlignedVex) != 0;
    shift_group(false);
  }

  // A gather needs a SIB byte, and three registers that differ (SDM volume 2, VPGATHERDD).
  [[nodiscard]] bool gather_is_valid() const {
    if ((insn_.modrm & 7) != 4 || insn_.address_size == 2) {
      return false;
    }
    const std::uint8_t index = insn_.index == kNoRegister ? 4 : insn_.index;  // here 4 is a register
    return insn_.reg != insn_.vvvv && insn_.reg != index && insn_.vvvv != index;
  }

  Bytes bytes_;
  const CodeSize code_;
  Insn& insn_;
  Prefixes prefixes_;
  bool lockable_ = false;
  Imm imm_ = Imm::kNone;
};

}  // namespace

DecodeResult decode(std::span<const std::uint8_t> bytes, CodeSize code, Insn& insn) {
  bytes = bytes.first(std::min(bytes.size(), kMaxInsnLength));
  return Decoder(bytes, code, insn).run(bytes);
}

}  // namespace wisp::soft
