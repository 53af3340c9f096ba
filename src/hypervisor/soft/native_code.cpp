#include "hypervisor/soft/native_code.h"

#include <bit>
#include <optional>

#include "hypervisor/soft/host_features.h"

namespace wisp::soft {
namespace {

constexpr std::int32_t kScratchBorrow = offset32(offsetof(Cpu, kept));

// A general register operand on its way into the host's encoding.
struct Operand {
  bool used = false;
  std::uint8_t guest = 0;  // general register, or the number of another kind of register
  bool general = false;
  bool high_byte = false;
  std::uint8_t size = 8;
  bool reads = false;
  bool writes = false;
  HostReg host = HostReg::kRax;
};

class NativeEmitter final {
 public:
  NativeEmitter(Emitter& out, const Insn& insn, MemoryForm form) : out_(out), insn_(insn), form_(form) {}

  void emit() {
    reg_ = operand(insn_.reg_class, insn_.reg, insn_.reg_access, insn_.reg_size, insn_.has_modrm);
    if (!insn_.memory) {
      rm_ = operand(insn_.rm_class, insn_.rm, insn_.rm_access, insn_.rm_size,
                    insn_.has_modrm || insn_.register_in_opcode);
    }
    vvvv_ = operand(insn_.vvvv_class, insn_.vvvv, insn_.vvvv_access, insn_.reg_size, insn_.vex);
    constexpr std::uint16_t kRcxBit = 1U << kRcx;
    temp_taken_ = ((insn_.implicit_reads | insn_.implicit_writes) & kRcxBit) != 0;
    if ((insn_.implicit_reads & kRcxBit) != 0) {
      out_.move(kTemp, home_of(kRcx));
    }
    if (reg_.high_byte || rm_.high_byte) {
      place_without_rex();
    } else {
      place();
    }
    if (insn_.vex) {
      encode_vex();
    } else {
      encode_legacy();
    }
    for (const Operand* operand : {&reg_, &rm_, &vvvv_}) {
      give_back(*operand);
    }
    if ((insn_.implicit_writes & kRcxBit) != 0) {
      out_.move(home_of(kRcx), kTemp);
    }
    if (borrowed_) {
      out_.load(HostReg::kRdi, kScratchBorrow);
    }
  }

 private:
  [[nodiscard]] Operand operand(OperandClass cls, std::uint8_t number, std::uint8_t access, std::uint8_t size,
                                bool there) const {
    Operand result;
    if (cls == OperandClass::kNone || !there) {
      return result;
    }
    result.used = true;
    result.guest = number;
    result.size = size;
    result.general = cls == OperandClass::kGpr;
    result.reads = (access & kReads) != 0;
    result.writes = (access & kWrites) != 0;
    if (!result.general) {
      result.host = static_cast<HostReg>(number);
    } else if (size == 1 && insn_.rex == 0 && number >= 4) {
      result.high_byte = true;
      result.guest = static_cast<std::uint8_t>(number - 4);
    }
    return result;
  }

  // Byte registers AH to BH cannot be named beside a REX prefix: everything else must do without one.
  void place_without_rex() {
    const bool rcx_high = (reg_.high_byte && reg_.guest == kRcx) || (rm_.high_byte && rm_.guest == kRcx);
    if (insn_.memory) {
      const HostReg address = rcx_high ? borrow() : kTemp;
      if (form_ == MemoryForm::kAddressAddend) {
        out_.lea(address, kAddress, kAddend, 0, 0);
      } else {
        out_.move(address, kAddress);
      }
      low_address_ = address;
      temp_taken_ = temp_taken_ || address == kTemp;
    }
    for (Operand* operand : {&reg_, &rm_}) {
      if (!operand->used) {
        continue;
      }
      const std::uint8_t guest = operand->guest;
      if (guest != kRcx && guest != kRsp) {
        operand->host = home_of(guest);
        continue;
      }
      operand->host = guest == kRcx || !rcx_high ? kTemp : borrow();
      out_.move(operand->host, home_of(guest));
    }
  }

  // RDI for a moment.
  HostReg borrow() {
    out_.store(kScratchBorrow, HostReg::kRdi);
    borrowed_ = true;
    return HostReg::kRdi;
  }

  void place() {
    std::array<HostReg, 3> free{};
    std::size_t count = 0;
    std::size_t needed = 0;
    for (const Operand* operand : {&reg_, &rm_, &vvvv_}) {
      needed += operand->used && operand->general && !has_home(operand->guest) ? 1U : 0U;
    }
    if (!temp_taken_) {
      free[count++] = kTemp;
    }
    if (!insn_.memory) {
      free[count++] = kAddend;
      free[count++] = kAddress;
    } else if (form_ == MemoryForm::kAddressOnly) {
      free[count++] = kAddend;
    } else if (needed > count) {
      out_.lea(kAddress, kAddress, kAddend, 0, 0);
      form_ = MemoryForm::kAddressOnly;
      free[count++] = kAddend;
    }
    std::size_t next = 0;
    const std::array<Operand*, 3> all{&reg_, &rm_, &vvvv_};
    for (std::size_t i = 0; i < all.size(); ++i) {
      Operand& operand = *all[i];
      if (!operand.used || !operand.general) {
        continue;
      }
      if (has_home(operand.guest)) {
        operand.host = home_of(operand.guest);
        continue;
      }
      const Operand* same = nullptr;
      for (std::size_t j = 0; j < i; ++j) {
        if (all[j]->used && all[j]->general && all[j]->guest == operand.guest) {
          same = all[j];
        }
      }
      if (same != nullptr) {
        operand.host = same->host;
        if (!(same->reads || (same->writes && same->size < 4)) && operand.reads) {
          out_.load(operand.host, gpr_offset(operand.guest));
        }
        continue;
      }
      operand.host = free[next++];
      if (operand.reads || operand.size < 4) {
        out_.load(operand.host, gpr_offset(operand.guest));
      }
    }
  }

  void give_back(const Operand& operand) {
    if (!operand.used || !operand.general || !operand.writes) {
      return;
    }
    if (!has_home(operand.guest)) {
      out_.store(gpr_offset(operand.guest), operand.host);
    } else if (home_of(operand.guest) != operand.host) {
      out_.move(home_of(operand.guest), operand.host);
    }
  }

  // The number that goes into an encoding.
  [[nodiscard]] static unsigned number(const Operand& operand) {
    if (operand.high_byte) {
      return Emitter::low(operand.host) + 4U;
    }
    return static_cast<unsigned>(operand.host);
  }

  [[nodiscard]] unsigned reg_number() const { return reg_.used ? number(reg_) : insn_.reg_field(); }
  [[nodiscard]] unsigned rm_number() const { return rm_.used ? number(rm_) : insn_.modrm & 7U; }

  void encode_legacy() {
    const bool integer = insn_.vector_use == VectorUse::kNone;
    if (insn_.lock) {
      out_.byte(0xf0);
    }
    if (insn_.mandatory == 0x66 || (integer && insn_.operand_size == 2)) {
      out_.byte(0x66);
    }
    if (insn_.mandatory == 0xf3 || insn_.mandatory == 0xf2) {
      out_.byte(insn_.mandatory);
    }
    const bool wide = integer ? insn_.operand_size == 8 : insn_.rex_w();
    unsigned rex = wide ? 8U : 0U;
    rex |= reg_.used && reg_number() >= 8 && !reg_.high_byte ? 4U : 0U;
    if (insn_.memory) {
      if (low_address_) {
        rex |= Emitter::high(*low_address_) ? 1U : 0U;
      } else {
        rex |= 1U | (form_ == MemoryForm::kAddressAddend ? 2U : 0U);
      }
    } else if (rm_.used && !rm_.high_byte && rm_number() >= 8) {
      rex |= 1U;
    }
    const auto needs_rex = [](const Operand& operand) {
      return operand.used && operand.general && operand.size == 1 && !operand.high_byte &&
             number(operand) >= 4;
    };
    if (rex != 0 || needs_rex(reg_) || needs_rex(rm_)) {
      out_.byte(0x40U | rex);
    }
    encode_map();
    if (insn_.register_in_opcode) {
      out_.byte((insn_.opcode & 0xf8U) | (rm_number() & 7U));
    } else {
      out_.byte(insn_.opcode);
    }
    encode_modrm();
    encode_immediate();
  }

  void encode_map() {
    if (insn_.map != 0) {
      out_.byte(0x0f);
    }
    if (insn_.map == 2) {
      out_.byte(0x38);
    } else if (insn_.map == 3) {
      out_.byte(0x3a);
    }
  }

  void encode_modrm() {
    if (!insn_.has_modrm) {
      return;
    }
    const unsigned reg = reg_number() & 7U;
    if (!insn_.memory) {
      out_.byte(0xc0U | reg << 3 | (rm_number() & 7U));
    } else if (low_address_) {
      out_.memory(reg, *low_address_, 0);
    } else if (form_ == MemoryForm::kAddressOnly) {
      out_.memory(reg, kAddress, 0);
    } else {
      out_.sib_memory(reg, kAddress, kAddend, 0, 0);
    }
  }

  void encode_immediate() {
    for (unsigned i = 0; i < insn_.immediate_size; ++i) {
      out_.byte(static_cast<std::uint8_t>(insn_.immediate >> (8 * i)));
    }
  }

  void encode_vex() {
    const unsigned reg = reg_number();
    unsigned rxb = reg_.used && reg >= 8 ? 4U : 0U;
    if (insn_.memory) {
      rxb |= 1U | (form_ == MemoryForm::kAddressAddend ? 2U : 0U);
    } else if (rm_.used && rm_number() >= 8) {
      rxb |= 1U;
    }
    const unsigned vvvv = vvvv_.used ? number(vvvv_) : 0U;
    const unsigned prefix = insn_.mandatory == 0x66   ? 1U
                            : insn_.mandatory == 0xf3 ? 2U
                            : insn_.mandatory == 0xf2 ? 3U
                                                      : 0U;
    out_.byte(0xc4);
    out_.byte((~rxb & 7U) << 5 | insn_.map);
    out_.byte((insn_.rex_w() ? 0x80U : 0U) | (~vvvv & 0xfU) << 3 | (insn_.vex_256 ? 4U : 0U) | prefix);
    out_.byte(insn_.opcode);
    encode_modrm();
    encode_immediate();
  }

  Emitter& out_;
  const Insn& insn_;
  MemoryForm form_;
  Operand reg_, rm_, vvvv_;
  bool temp_taken_ = false;
  bool borrowed_ = false;
  std::optional<HostReg> low_address_;
};

constexpr std::int32_t kVectors = offset32(offsetof(Cpu, vectors));
constexpr std::int32_t kVectorsHere = offset32(offsetof(Cpu, vectors_here));
constexpr std::int32_t kArithmetic = offset32(offsetof(Cpu, arithmetic_flags));
constexpr std::int32_t kHostRsp = offset32(offsetof(Cpu, host_rsp));
constexpr std::int32_t kScratch = offset32(offsetof(Cpu, scratch));
constexpr std::array kSaved{HostReg::kRbx, HostReg::kRbp, HostReg::kR12,
                            HostReg::kR13, HostReg::kR14, HostReg::kR15};

void push(Emitter& out, HostReg reg) {
  out.rex(false, HostReg::kRax, reg);
  out.byte(0x50U | Emitter::low(reg));
}
void pop(Emitter& out, HostReg reg) {
  out.rex(false, HostReg::kRax, reg);
  out.byte(0x58U | Emitter::low(reg));
}

// The registers' homes from or to the Cpu, which lies `below` bytes above the stack pointer.
void move_registers(Emitter& out, bool load, std::int32_t below) {
  for (std::uint8_t guest = 0; guest < 16; ++guest) {
    if (!has_home(guest)) {
      continue;
    }
    if (load) {
      out.load(home_of(guest), gpr_offset(guest) + below);
    } else {
      out.store(gpr_offset(guest) + below, home_of(guest));
    }
  }
}

// RAX and kTemp are lost. Not by POPF, which takes ten times as long.
void load_flags(Emitter& out, std::int32_t below) {
  out.load(HostReg::kRax, kArithmetic + below);
  out.move32(kTemp, HostReg::kRax);
  out.byte(0xc1);  // shr ecx, 11: OF is the highest
  out.byte(0xe9);
  out.byte(11);
  out.byte(0x80);  // add cl, 0x7f: overflows where it was set
  out.byte(0xc1);
  out.byte(0x7f);
  out.byte(0x88);  // mov ah, al; sahf: all others
  out.byte(0xc4);
  out.byte(0x9e);
}
// kTemp is lost.
void store_flags(Emitter& out, std::int32_t below) {
  out.byte(0x9c);  // pushfq
  pop(out, kTemp);
  out.byte(0x81);  // and ecx, imm32
  out.byte(0xe1);
  out.number(static_cast<std::uint32_t>(flag::kArithmetic));
  out.store(kArithmetic + below, kTemp);
}

// XSAVE64 or XRSTOR64 of what the host has of x87, SSE and AVX; EAX and EDX are lost.
void move_vectors(Emitter& out, bool load, std::int32_t below) {
  out.constant(HostReg::kRax, host_features().xcr0 & 7);
  out.constant(HostReg::kRdx, 0);
  out.byte(0x48);
  out.byte(0x0f);
  out.byte(0xae);
  out.memory(load ? 5 : 4, HostReg::kRsp, kVectors + below);
}

void host_vector_state(Emitter& out, std::int32_t below) {
  if ((host_features().xcr0 & 4) != 0) {
    out.byte(0xc5);  // vzeroupper
    out.byte(0xf8);
    out.byte(0x77);
  }
  out.byte(0xdb);  // fninit
  out.byte(0xe3);
  out.store_constant(kScratch + 8 + below, 0x1f80);
  out.byte(0x0f);  // ldmxcsr
  out.byte(0xae);
  out.memory(2, HostReg::kRsp, kScratch + 8 + below);
}

}  // namespace

void emit_native(Emitter& out, const Insn& insn, MemoryForm form) {
  NativeEmitter(out, insn, form).emit();
}

Trampolines emit_trampolines(Emitter& out) {
  constexpr std::int32_t kReturn = 8;  // a return address lies between the stack pointer and the Cpu
  Trampolines made;

  made.spill = out.here();
  move_registers(out, false, kReturn);
  store_flags(out, kReturn);
  out.byte(0x80);  // cmp byte [vectors_here], 0
  out.memory(7, HostReg::kRsp, kVectorsHere + kReturn);
  out.byte(0);
  const std::size_t away = out.jump_if_later_short(4);
  move_vectors(out, false, kReturn);
  out.store_constant(kVectorsHere + kReturn, 0);
  host_vector_state(out, kReturn);
  out.place_short(away);
  out.byte(0xc3);

  made.reload = out.here();
  load_flags(out, kReturn);
  move_registers(out, true, kReturn);
  out.byte(0xc3);

  made.load_vectors = out.here();
  out.move(kAddress, HostReg::kRax);
  out.move(kAddend, HostReg::kRdx);
  move_vectors(out, true, kReturn);
  out.move(HostReg::kRax, kAddress);
  out.move(HostReg::kRdx, kAddend);
  out.store_constant(kVectorsHere + kReturn, 1);
  out.byte(0xc3);

  made.save_vectors = out.here();
  out.move(kAddress, HostReg::kRax);
  out.move(kAddend, HostReg::kRdx);
  move_vectors(out, false, kReturn);
  out.move(HostReg::kRax, kAddress);
  out.move(HostReg::kRdx, kAddend);
  out.store_constant(kVectorsHere + kReturn, 0);
  host_vector_state(out, kReturn);
  out.byte(0xc3);

  // On the host's stack, from the top while generated code runs: the Cpu, twice, for calls from generated
  // code back to C++ on that stack, and where an outer entry stands.
  made.enter = out.here();
  for (const HostReg reg : kSaved) {
    push(out, reg);
  }
  out.byte(0xff);  // push qword [rdi + host_rsp]
  out.memory(6, HostReg::kRdi, kHostRsp);
  push(out, HostReg::kRdi);
  push(out, HostReg::kRdi);
  out.rex(true, HostReg::kRsp, HostReg::kRdi);  // mov [rdi + host_rsp], rsp
  out.byte(0x89);
  out.memory(4, HostReg::kRdi, kHostRsp);
  out.move(HostReg::kRsp, HostReg::kRdi);
  out.store(kScratch, HostReg::kRsi);
  load_flags(out, 0);
  move_registers(out, true, 0);
  out.load(kAddress, kScratch + 8);
  out.byte(0xff);  // jmp [rsp + scratch]
  out.memory(4, HostReg::kRsp, kScratch);

  made.leave = out.here();
  out.call(made.spill);
  out.move(HostReg::kRax, kAddress);
  out.load(HostReg::kRsp, kHostRsp);
  pop(out, kTemp);
  pop(out, kTemp);
  out.byte(0x8f);  // pop qword [rcx + host_rsp]
  out.memory(0, kTemp, kHostRsp);
  for (auto reg = kSaved.rbegin(); reg != kSaved.rend(); ++reg) {
    pop(out, *reg);
  }
  out.byte(0xc3);
  return made;
}

}  // namespace wisp::soft
