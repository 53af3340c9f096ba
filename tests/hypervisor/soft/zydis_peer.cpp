#include "hypervisor/soft/zydis_peer.h"

#include <fmt/format.h>

#include <algorithm>

namespace wisp::soft {
namespace {

// A register operand as both decoders can be brought to name it.
struct Named {
  OperandClass cls = OperandClass::kNone;
  unsigned number = 0;
  unsigned size = 0;  // bytes; general registers only
  bool operator==(const Named&) const = default;
};

Named named(ZydisRegister reg) {
  const auto in = [reg](ZydisRegister first, ZydisRegister last) { return reg >= first && reg <= last; };
  const auto from = [reg](ZydisRegister first) {
    return static_cast<unsigned>(reg) - static_cast<unsigned>(first);
  };
  if (in(ZYDIS_REGISTER_AL, ZYDIS_REGISTER_BL)) {
    return {OperandClass::kGpr, from(ZYDIS_REGISTER_AL), 1};
  }
  if (in(ZYDIS_REGISTER_AH, ZYDIS_REGISTER_BH)) {
    return {OperandClass::kGpr, from(ZYDIS_REGISTER_AH), 1};
  }
  if (in(ZYDIS_REGISTER_SPL, ZYDIS_REGISTER_R15B)) {
    return {OperandClass::kGpr, from(ZYDIS_REGISTER_SPL) + 4, 1};
  }
  if (in(ZYDIS_REGISTER_AX, ZYDIS_REGISTER_R15W)) {
    return {OperandClass::kGpr, from(ZYDIS_REGISTER_AX), 2};
  }
  if (in(ZYDIS_REGISTER_EAX, ZYDIS_REGISTER_R15D)) {
    return {OperandClass::kGpr, from(ZYDIS_REGISTER_EAX), 4};
  }
  if (in(ZYDIS_REGISTER_RAX, ZYDIS_REGISTER_R15)) {
    return {OperandClass::kGpr, from(ZYDIS_REGISTER_RAX), 8};
  }
  if (in(ZYDIS_REGISTER_ST0, ZYDIS_REGISTER_ST7)) {
    return {OperandClass::kFpuStack, from(ZYDIS_REGISTER_ST0), 0};
  }
  if (in(ZYDIS_REGISTER_MM0, ZYDIS_REGISTER_MM7)) {
    return {OperandClass::kMmx, from(ZYDIS_REGISTER_MM0), 0};
  }
  if (in(ZYDIS_REGISTER_XMM0, ZYDIS_REGISTER_XMM15)) {
    return {OperandClass::kVector, from(ZYDIS_REGISTER_XMM0), 0};
  }
  if (in(ZYDIS_REGISTER_YMM0, ZYDIS_REGISTER_YMM15)) {
    return {OperandClass::kVector, from(ZYDIS_REGISTER_YMM0), 0};
  }
  return {};
}

bool is_high_byte(ZydisRegister reg) {
  return reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH;
}

Named ours_named(const Insn& insn, OperandClass cls, std::uint8_t number, std::uint8_t size) {
  if (cls == OperandClass::kGpr) {
    const bool high = size == 1 && insn.rex == 0 && number >= 4;
    return {cls, number & (high ? 3U : 15U), size};
  }
  return {cls, number, 0};
}

std::string show(const Named& named) {
  static constexpr std::array<const char*, 7> kNames{"none", "gpr", "vec", "mm", "seg", "ctl", "st"};
  return fmt::format("{}{}:{}", kNames[static_cast<std::size_t>(named.cls)], named.number, named.size);
}

// What an operand's register is read and written for, as Insn says it.
std::uint8_t access(const ZydisDecodedOperand& operand) {
  const bool reads = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0 ||
                     (operand.actions & ZYDIS_OPERAND_ACTION_CONDWRITE) != 0;  // what is kept is read
  const bool writes = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
  return static_cast<std::uint8_t>((reads ? kReads : 0) | (writes ? kWrites : 0));
}

std::uint8_t base_number(ZydisRegister reg) {
  if (reg == ZYDIS_REGISTER_NONE) {
    return kNoRegister;
  }
  if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP) {
    return kRipBase;
  }
  return static_cast<std::uint8_t>(named(reg).number);
}

std::uint64_t masked(std::int64_t value, unsigned bytes) {
  return bytes >= 8 ? static_cast<std::uint64_t>(value)
                    : static_cast<std::uint64_t>(value) & ((1ULL << (8 * bytes)) - 1);
}

class Comparison final {
 public:
  Comparison(const Insn& ours, const PeerInsn& peer, CodeSize code) : ours_(ours), peer_(peer), code_(code) {}

  std::string run() {
    expect("length", ours_.length, peer_.insn.length);
    immediates();
    const ZydisDecodedOperand* memory = nullptr;
    for (unsigned i = 0; i < peer_.insn.operand_count; ++i) {
      const ZydisDecodedOperand& operand = peer_.operands[i];
      const bool encoded = operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ||
                           operand.encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64;
      if (operand.type == ZYDIS_OPERAND_TYPE_MEMORY && encoded) {
        memory = &operand;
      }
    }
    expect("memory", ours_.memory, memory != nullptr);
    if (memory != nullptr && ours_.memory) {
      compare_memory(*memory);
    }
    sizes();
    if (ours_.op == Op::kNative) {
      registers();
      flags();
    }
    return text_;
  }

 private:
  template <typename A, typename B>
  void expect(const char* what, const A& ours, const B& theirs) {
    if (static_cast<std::int64_t>(ours) != static_cast<std::int64_t>(theirs)) {
      text_ += fmt::format(" {}: {:#x}, Zydis {:#x};", what, static_cast<std::int64_t>(ours),
                           static_cast<std::int64_t>(theirs));
    }
  }

  void immediates() {
    const auto& imm = peer_.insn.raw.imm;
    if (ours_.op == Op::kMoveOffset) {
      return;  // Zydis takes the offset as a displacement
    }
    if (ours_.op == Op::kCallFar || ours_.op == Op::kJumpFar) {
      for (unsigned i = 0; i < peer_.insn.operand_count; ++i) {
        if (peer_.operands[i].type == ZYDIS_OPERAND_TYPE_POINTER) {
          expect("offset", ours_.immediate, peer_.operands[i].ptr.offset);
          expect("selector", ours_.immediate2, peer_.operands[i].ptr.segment);
        }
      }
      return;
    }
    expect("immediate size", ours_.immediate_size * 8U, imm[0].size);
    if (ours_.immediate_size == imm[0].size / 8 && imm[0].size != 0) {
      // VBLENDVPS and its like in 32-bit code: bit 7 is not there.
      const bool register_in_immediate =
          ours_.vex && ours_.map == 3 && ours_.opcode >= 0x4a && ours_.opcode <= 0x4c;
      const std::uint64_t keep = register_in_immediate && code_ != CodeSize::k64 ? 0x7f : ~0ULL;
      expect("immediate", masked(static_cast<std::int64_t>(ours_.immediate), ours_.immediate_size),
             masked(imm[0].value.s, ours_.immediate_size) & keep);
    }
    if (ours_.op == Op::kEnter) {
      expect("second immediate", ours_.immediate2, imm[1].value.u);
    }
  }

  void compare_memory(const ZydisDecodedOperand& memory) {
    const unsigned address = ours_.address_size;
    if (memory.encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64) {
      expect("address", masked(ours_.displacement, address), masked(memory.mem.disp.value, address));
    } else {
      const bool vsib = memory.mem.type == ZYDIS_MEMOP_TYPE_VSIB;
      // Zydis 4.0 takes SIB base 101 with mod 00, address size 32 and REX.B for R13; the processor for none.
      const bool no_base = peer_.insn.raw.sib.base == 5 && peer_.insn.raw.modrm.mod == 0 &&
                           peer_.insn.raw.modrm.rm == 4 && memory.mem.base == ZYDIS_REGISTER_R13D;
      if (!no_base) {
        expect("base", ours_.base, base_number(memory.mem.base));
      }
      expect("index", vsib && ours_.index == kNoRegister ? 4 : ours_.index, base_number(memory.mem.index));
      if (memory.mem.index != ZYDIS_REGISTER_NONE) {
        expect("scale", 1U << ours_.scale, memory.mem.scale);
      }
      if (no_base) {
        expect("base", ours_.base, kNoRegister);
        return;
      }
      const std::int64_t displacement = memory.mem.disp.has_displacement ? memory.mem.disp.value : 0;
      expect("displacement", masked(ours_.displacement, address), masked(displacement, address));
    }
    if (ours_.op != Op::kLea && ours_.op != Op::kNop) {
      expect("segment", ours_.segment,
             static_cast<unsigned>(memory.mem.segment) - static_cast<unsigned>(ZYDIS_REGISTER_ES));
    }
    const bool sized = ours_.op == Op::kNative || ours_.op == Op::kPush || ours_.op == Op::kPop ||
                       ours_.op == Op::kCompareExchange8 || ours_.op == Op::kCompareExchange16 ||
                       ours_.op == Op::kCallIndirect || ours_.op == Op::kJumpIndirect ||
                       ours_.op == Op::kDivide || ours_.op == Op::kDivideSigned ||
                       ours_.op == Op::kMaskMove || ours_.op == Op::kInvalidatePcid;
    // MOVSXD r16, r/m16: Zydis has it read 32 bits, the SDM and the processor 16.
    const bool movsxd16 = ours_.map == 0 && ours_.opcode == 0x63 && ours_.operand_size == 2;
    if (sized && !movsxd16) {
      expect("memory size", ours_.memory_size, memory.size / 8);
    }
    if (ours_.op == Op::kNative && memory.mem.type != ZYDIS_MEMOP_TYPE_AGEN) {
      expect("memory written", (ours_.rm_access & kWrites) != 0,
             (memory.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0);
      const bool reads = (memory.actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0;
      if (reads) {
        expect("memory read", (ours_.rm_access & kReads) != 0, true);
      }
    }
  }

  void sizes() {
    expect("address size", ours_.address_size * 8U, peer_.insn.address_width);
    // Where the operand size says how much is moved.
    const bool general = ours_.vector_use == VectorUse::kNone && !ours_.vex && ours_.op != Op::kNop &&
                         ours_.op != Op::kLoadMxcsr && ours_.op != Op::kStoreMxcsr &&
                         ours_.op < Op::kReadMsr && ours_.op != Op::kHalt && ours_.op != Op::kPause &&
                         ours_.op != Op::kCpuid;
    if (general && peer_.insn.operand_width != 0 && !fixed_size()) {
      const bool port =
          ours_.op >= Op::kIn && ours_.op <= Op::kOutString;  // 32 bits at most, whatever REX.W says
      expect("operand size", ours_.operand_size * 8U,
             std::min<unsigned>(peer_.insn.operand_width, port ? 32 : 64));
    }
  }

  // Instructions to which the operand size means nothing; what stands there for them is not used.
  [[nodiscard]] bool fixed_size() const {
    switch (ours_.op) {
      case Op::kMoveFromSegment:
      case Op::kMoveToSegment:
      case Op::kMoveFromCr:
      case Op::kMoveToCr:
      case Op::kMoveFromDr:
      case Op::kMoveToDr:
      case Op::kInterrupt:
      case Op::kBreakpoint:
      case Op::kIcebp:
      case Op::kOverflow:
      case Op::kAsciiAdjust:
      case Op::kDecimalAdjust:
      case Op::kTranslateByte:
      case Op::kSalc:
      case Op::kArpl:
      case Op::kReadTsc:
      case Op::kReadTscp:
      case Op::kReadPmc:
      case Op::kCompareExchange8:
      case Op::kCompareExchange16:
        return true;
      default:
        return (ours_.op >= Op::kClearCarry && ours_.op <= Op::kSetInterrupt) ||
               (ours_.map == 1 && (ours_.opcode == 0xc3 || ours_.opcode == 0xae));  // MOVNTI, fences
    }
  }

  void registers() {
    std::uint16_t reads = 0;
    std::uint16_t writes = 0;
    const auto use = [&](unsigned number, std::uint8_t what) {
      reads |= static_cast<std::uint16_t>((what & kReads) != 0 ? 1U << number : 0U);
      writes |= static_cast<std::uint16_t>((what & kWrites) != 0 ? 1U << number : 0U);
    };
    for (unsigned i = 0; i < peer_.insn.operand_count; ++i) {
      const ZydisDecodedOperand& operand = peer_.operands[i];
      if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) {
        continue;
      }
      const Named theirs = named(operand.reg.value);
      if (theirs.cls == OperandClass::kGpr) {
        use(theirs.number, access(operand));
      }
      one_register(operand, theirs);
    }
    std::uint16_t our_reads = ours_.implicit_reads;
    std::uint16_t our_writes = ours_.implicit_writes;
    const auto ours_use = [&](OperandClass cls, unsigned number, unsigned size, std::uint8_t what) {
      if (cls == OperandClass::kGpr) {
        const unsigned real = size == 1 && ours_.rex == 0 && number >= 4 ? number - 4 : number;
        our_reads |= static_cast<std::uint16_t>((what & kReads) != 0 ? 1U << real : 0U);
        our_writes |= static_cast<std::uint16_t>((what & kWrites) != 0 ? 1U << real : 0U);
      }
    };
    ours_use(ours_.reg_class, ours_.reg, ours_.reg_size, ours_.reg_access);
    if (!ours_.memory) {
      ours_use(ours_.rm_class, ours_.rm, ours_.rm_size, ours_.rm_access);
    }
    ours_use(ours_.vvvv_class, ours_.vvvv, ours_.reg_size, ours_.vvvv_access);
    expect("registers read but not known", reads & ~our_reads, 0);
    expect("registers written", our_writes, writes);
  }

  void one_register(const ZydisDecodedOperand& operand, const Named& theirs) {
    if (theirs.cls == OperandClass::kNone || theirs.cls == OperandClass::kFpuStack) {
      return;
    }
    Named ours;
    const bool opcode_rewritten = peer_.insn.opcode != ours_.opcode;
    switch (operand.encoding) {
      case ZYDIS_OPERAND_ENCODING_MODRM_REG:
        ours = ours_named(ours_, ours_.reg_class, ours_.reg, ours_.reg_size);
        break;
      case ZYDIS_OPERAND_ENCODING_MODRM_RM:
        ours = ours_named(ours_, ours_.rm_class, ours_.rm, ours_.rm_size);
        break;
      case ZYDIS_OPERAND_ENCODING_OPCODE:
        ours = ours_named(ours_, ours_.rm_class, ours_.rm, ours_.rm_size);
        expect("register in opcode", ours_.register_in_opcode, !opcode_rewritten);
        break;
      case ZYDIS_OPERAND_ENCODING_NDSNDD:
        ours = ours_named(ours_, ours_.vvvv_class, ours_.vvvv, ours_.reg_size);
        if (ours_.map == 2 && ours_.opcode == 0xf3 && ours_.vvvv_class == OperandClass::kGpr) {
          ours.size = ours_.rm_size;  // BLSR and its like name no register in reg
        }
        break;
      case ZYDIS_OPERAND_ENCODING_IS4:
        expect("register in immediate", ours_.immediate >> 4 & 15, theirs.number);
        return;
      default:
        return;
    }
    // PMOVMSKB and its like clear the upper half whether it is named or not.
    if (ours_.vector_use != VectorUse::kNone && ours.size == 4 && theirs.size == 8 && !moves_by_width()) {
      ours.size = 8;
    }
    if (ours != theirs) {
      text_ += fmt::format(" register: {}, Zydis {};", show(ours), show(theirs));
    }
    if (is_high_byte(operand.reg.value)) {
      expect("REX beside a high byte", ours_.rex != 0, false);
    }
  }

  // Vector instructions whose general register is 32 or 64 bits wide, and where that matters.
  [[nodiscard]] bool moves_by_width() const {
    return (ours_.map == 1 &&
            (ours_.opcode == 0x6e || ours_.opcode == 0x7e || (ours_.opcode & 0xf8) == 0x28)) ||
           (ours_.map == 3 && (ours_.opcode == 0x16 || ours_.opcode == 0x22));
  }

  void flags() {
    if (peer_.insn.cpu_flags == nullptr || (peer_.insn.attributes & ZYDIS_ATTRIB_CPUFLAG_ACCESS) == 0) {
      return;
    }
    const ZydisAccessedFlags& their = *peer_.insn.cpu_flags;
    const std::uint64_t changed = their.modified | their.set_0 | their.set_1 | their.undefined;
    if ((changed & flag::kArithmetic) != 0) {
      expect("flags written", ours_.writes_flags, true);
    }
  }

  const Insn& ours_;
  const PeerInsn& peer_;
  const CodeSize code_;
  std::string text_{};
};

}  // namespace

ZydisPeer::ZydisPeer() {
  ZydisDecoderInit(&decoders_[0], ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16);
  ZydisDecoderInit(&decoders_[1], ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
  ZydisDecoderInit(&decoders_[2], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
  for (ZydisDecoder& decoder : decoders_) {
    // Where these are not there, their encodings are no-ops.
    for (const ZydisDecoderMode mode : {ZYDIS_DECODER_MODE_MPX, ZYDIS_DECODER_MODE_CET,
                                        ZYDIS_DECODER_MODE_WBNOINVD, ZYDIS_DECODER_MODE_CLDEMOTE}) {
      ZydisDecoderEnableMode(&decoder, mode, ZYAN_FALSE);
    }
  }
}

void ZydisPeer::decode(std::span<const std::uint8_t> bytes, CodeSize code, PeerInsn& out) const {
  const ZydisDecoder& decoder = decoders_[static_cast<std::size_t>(code)];
  out = {};
  const ZyanStatus status =
      ZydisDecoderDecodeFull(&decoder, bytes.data(), bytes.size(), &out.insn, out.operands.data());
  out.valid = ZYAN_SUCCESS(status);
  out.truncated = status == ZYDIS_STATUS_NO_MORE_DATA;
  out.too_long = status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG;
}

bool in_model(const PeerInsn& peer) {
  const ZydisDecodedInstruction& insn = peer.insn;
  switch (insn.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_LEGACY:
    case ZYDIS_INSTRUCTION_ENCODING_VEX:
      break;
    default:  // EVEX and MVEX (AVX-512), XOP and 3DNow! (AMD, gone)
      return false;
  }
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_RSM:  // outside of system management mode
      return false;           // raise #UD: to our decoder they are undefined
    case ZYDIS_MNEMONIC_VMCALL:
    case ZYDIS_MNEMONIC_VMMCALL:
      return true;  // KVM's hypercalls
    default:
      break;
  }
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_ADOX_ADCX:
    case ZYDIS_ISA_SET_AES:
    case ZYDIS_ISA_SET_AVX:
    case ZYDIS_ISA_SET_AVX2:
    case ZYDIS_ISA_SET_AVX2GATHER:
    case ZYDIS_ISA_SET_AVXAES:
    case ZYDIS_ISA_SET_BMI1:
    case ZYDIS_ISA_SET_BMI2:
    case ZYDIS_ISA_SET_CLFLUSHOPT:
    case ZYDIS_ISA_SET_CLFSH:
    case ZYDIS_ISA_SET_CLWB:
    case ZYDIS_ISA_SET_CMOV:
    case ZYDIS_ISA_SET_CMPXCHG16B:
    case ZYDIS_ISA_SET_F16C:
    case ZYDIS_ISA_SET_FAT_NOP:
    case ZYDIS_ISA_SET_FCMOV:
    case ZYDIS_ISA_SET_FMA:
    case ZYDIS_ISA_SET_FXSAVE:
    case ZYDIS_ISA_SET_FXSAVE64:
    case ZYDIS_ISA_SET_I186:
    case ZYDIS_ISA_SET_I286PROTECTED:
    case ZYDIS_ISA_SET_I286REAL:
    case ZYDIS_ISA_SET_I386:
    case ZYDIS_ISA_SET_I486:
    case ZYDIS_ISA_SET_I486REAL:
    case ZYDIS_ISA_SET_I86:
    case ZYDIS_ISA_SET_INVPCID:
    case ZYDIS_ISA_SET_LAHF:
    case ZYDIS_ISA_SET_LONGMODE:
    case ZYDIS_ISA_SET_LZCNT:
    case ZYDIS_ISA_SET_MONITOR:
    case ZYDIS_ISA_SET_MOVBE:
    case ZYDIS_ISA_SET_PAUSE:
    case ZYDIS_ISA_SET_PCLMULQDQ:
    case ZYDIS_ISA_SET_PENTIUMMMX:
    case ZYDIS_ISA_SET_PENTIUMREAL:
    case ZYDIS_ISA_SET_POPCNT:
    case ZYDIS_ISA_SET_PPRO:
    case ZYDIS_ISA_SET_PREFETCHWT1:
    case ZYDIS_ISA_SET_PREFETCH_NOP:
    case ZYDIS_ISA_SET_RDPID:
    case ZYDIS_ISA_SET_RDPMC:
    case ZYDIS_ISA_SET_RDRAND:
    case ZYDIS_ISA_SET_RDSEED:
    case ZYDIS_ISA_SET_RDTSCP:
    case ZYDIS_ISA_SET_RDWRFSGS:
    case ZYDIS_ISA_SET_SMAP:
    case ZYDIS_ISA_SET_SSE:
    case ZYDIS_ISA_SET_SSE2:
    case ZYDIS_ISA_SET_SSE2MMX:
    case ZYDIS_ISA_SET_SSE3:
    case ZYDIS_ISA_SET_SSE3X87:
    case ZYDIS_ISA_SET_SSE4:
    case ZYDIS_ISA_SET_SSE42:
    case ZYDIS_ISA_SET_SSEMXCSR:
    case ZYDIS_ISA_SET_SSE_PREFETCH:
    case ZYDIS_ISA_SET_SSSE3:
    case ZYDIS_ISA_SET_SSSE3MMX:
    case ZYDIS_ISA_SET_X87:
    case ZYDIS_ISA_SET_XSAVE:
    case ZYDIS_ISA_SET_XSAVEOPT:
      return true;
    // Everything else is not in CPUID, so it must be refused: AVX-512, AMX, SHA, GFNI, VAES, VPCLMULQDQ,
    // AVX-VNNI, CET's own instructions, key locker, MPX, PKU, SGX, SMX, TDX, TSX, UINTR, VMX, SVM, WAITPKG,
    // SERIALIZE, MOVDIR, ENQCMD, HRESET, PCONFIG, PTWRITE, XSAVEC, XSAVES, and AMD's and VIA's own.
    default:
      return false;
  }
}

std::string difference(const Insn& ours, const PeerInsn& peer, CodeSize code) {
  return Comparison(ours, peer, code).run();
}

}  // namespace wisp::soft
