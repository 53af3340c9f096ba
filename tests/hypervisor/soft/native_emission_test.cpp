// What is emitted for native instructions of all three code sizes, read back with Zydis: the same operation
// on operands of the same widths, and no memory touched but the guest's operand and the Cpu.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <vector>

#include "hypervisor/soft/native_code.h"
#include "hypervisor/soft/zydis_peer.h"

namespace wisp::soft {
namespace {

using Bytes = std::array<std::uint8_t, kMaxInsnLength>;

std::string hex(std::span<const std::uint8_t> bytes) {
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += fmt::format("{:02x} ", byte);
  }
  return text;
}

class EmissionCheck {
 public:
  ~EmissionCheck() {
    for (const auto& [kind, example] : findings_) {
      ADD_FAILURE() << kind << ": " << example;
    }
    EXPECT_GT(emitted_, 10000U);
  }

  void look(const Bytes& bytes, CodeSize code) {
    Insn insn;
    if (decode(bytes, code, insn) != DecodeResult::kDone || insn.op != Op::kNative) {
      return;
    }
    peer_.decode(bytes, code, guest_);
    if (!guest_.valid) {
      return;  // the decoder's own test tells of these
    }
    for (const MemoryForm form : {MemoryForm::kAddressOnly, MemoryForm::kAddressAddend}) {
      std::array<std::uint8_t, 256> room{};
      Emitter out(room.data(), room.data(), room.size());
      emit_native(out, insn, form);
      const std::span<const std::uint8_t> made(room.data(), out.size());
      const std::string trouble = out.full() ? "does not fit" : examine(made, form);
      if (!trouble.empty() && findings_.size() < 40) {
        findings_.try_emplace(
            fmt::format("map {} opcode {:02x} {}, {}", insn.map, insn.opcode,
                        ZydisMnemonicGetString(guest_.insn.mnemonic), trouble),
            fmt::format("{}in {}-bit code became {}", hex(std::span(bytes).first(insn.length)),
                        16 << static_cast<int>(code), hex(made)));
      }
      ++emitted_;
    }
  }

 private:
  // Empty where all is well.
  std::string examine(std::span<const std::uint8_t> code, MemoryForm form) {
    std::string last = "the instruction is not there";
    bool found = false;
    while (!code.empty()) {
      peer_.decode(code, CodeSize::k64, host_);
      if (!host_.valid) {
        return "made no code";
      }
      code = code.subspan(host_.insn.length);
      const std::string memory = stray_memory(form);
      if (!memory.empty()) {
        return memory;
      }
      if (host_.insn.mnemonic == guest_.insn.mnemonic && !found) {
        last = unlike();
        found = last.empty();
      }
    }
    return found ? "" : last;
  }

  std::string stray_memory(MemoryForm form) const {
    for (unsigned i = 0; i < host_.insn.operand_count; ++i) {
      const ZydisDecodedOperand& operand = host_.operands[i];
      if (operand.type != ZYDIS_OPERAND_TYPE_MEMORY || operand.mem.type == ZYDIS_MEMOP_TYPE_AGEN) {
        continue;
      }
      const ZydisDecodedOperandMem& memory = operand.mem;
      const bool state = memory.base == ZYDIS_REGISTER_RSP && memory.index == ZYDIS_REGISTER_NONE &&
                         memory.disp.value >= 0 && memory.disp.value < static_cast<std::int64_t>(sizeof(Cpu));
      const bool plain = memory.index == ZYDIS_REGISTER_NONE && !memory.disp.has_displacement &&
                         (memory.base == ZYDIS_REGISTER_R14 || memory.base == ZYDIS_REGISTER_RCX ||
                          memory.base == ZYDIS_REGISTER_RDI);
      const bool added = form == MemoryForm::kAddressAddend && memory.base == ZYDIS_REGISTER_R14 &&
                         memory.index == ZYDIS_REGISTER_R15 && memory.scale == 1 &&
                         !memory.disp.has_displacement;
      if (memory.segment == ZYDIS_REGISTER_FS || memory.segment == ZYDIS_REGISTER_GS ||
          (!state && !plain && !added)) {
        return "touches strange memory";
      }
    }
    return "";
  }

  std::string unlike() const {
    if (host_.insn.operand_count_visible != guest_.insn.operand_count_visible) {
      return "other operands";
    }
    for (unsigned i = 0; i < host_.insn.operand_count_visible; ++i) {
      const ZydisDecodedOperand& mine = host_.operands[i];
      const ZydisDecodedOperand& theirs = guest_.operands[i];
      if (mine.type != theirs.type) {
        return fmt::format("operand {} of another kind", i);
      }
      // Vector instructions with a general register as result clear its upper half in either width.
      const bool cleared = theirs.type == ZYDIS_OPERAND_TYPE_REGISTER && theirs.size >= 32 &&
                           mine.size == 32 && guest_.insn.meta.isa_ext != ZYDIS_ISA_EXT_BASE && i == 0 &&
                           guest_.operands[i].actions == ZYDIS_OPERAND_ACTION_WRITE &&
                           guest_.insn.mnemonic != ZYDIS_MNEMONIC_MOVQ &&
                           guest_.insn.mnemonic != ZYDIS_MNEMONIC_VMOVQ;
      if (mine.size != theirs.size && mine.type != ZYDIS_OPERAND_TYPE_IMMEDIATE && !cleared) {
        return fmt::format("operand {} has {} bits for {}", i, mine.size, theirs.size);
      }
      if (mine.actions != theirs.actions) {
        return fmt::format("operand {} is used otherwise", i);
      }
      if (mine.type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        // Sign extension to 64 bits in the reading of it.
        const unsigned bits = std::max<unsigned>(theirs.size, 1);
        const std::uint64_t mask = bits >= 64 ? ~0ULL : (1ULL << bits) - 1;
        if ((mine.imm.value.u & mask) != (theirs.imm.value.u & mask)) {
          return fmt::format("immediate {:#x} for {:#x}", mine.imm.value.u, theirs.imm.value.u);
        }
      }
    }
    constexpr ZydisInstructionAttributes kLocked = ZYDIS_ATTRIB_HAS_LOCK;
    if ((host_.insn.attributes & kLocked) != (guest_.insn.attributes & kLocked) &&
        guest_.insn.mnemonic != ZYDIS_MNEMONIC_XCHG) {
      return "lock prefix lost or invented";
    }
    return "";
  }

  ZydisPeer peer_{};
  PeerInsn guest_{};
  PeerInsn host_{};
  std::map<std::string, std::string> findings_{};
  std::uint64_t emitted_ = 0;
};

constexpr std::array kSizes{CodeSize::k16, CodeSize::k32, CodeSize::k64};

TEST(SoftNativeCode, LegacyInstructionsAreTheSameOperation) {
  EmissionCheck check;
  const std::vector<std::vector<std::uint8_t>> prefixes{
      {},           {0x66},       {0xf3}, {0xf2},       {0xf0},       {0x48},      {0x45},
      {0x66, 0x4f}, {0xf2, 0x4c}, {0x40}, {0xf3, 0x49}, {0x66, 0x41}, {0x66, 0xf2}};
  const std::vector<std::vector<std::uint8_t>> maps{{}, {0x0f}, {0x0f, 0x38}, {0x0f, 0x3a}};
  for (const CodeSize code : kSizes) {
    for (const auto& prefix : prefixes) {
      for (const auto& map : maps) {
        for (unsigned opcode = 0; opcode < 256; ++opcode) {
          for (unsigned modrm = 0; modrm < 256; ++modrm) {
            const unsigned mod = modrm >> 6;
            if (mod == 2 || (mod == 1 && (modrm & 7) != 4) || (mod == 0 && (modrm & 7) != 7)) {
              continue;
            }
            Bytes bytes{};
            std::size_t at = 0;
            for (const auto& part : {prefix, map}) {
              for (const std::uint8_t byte : part) {
                bytes[at++] = byte;
              }
            }
            bytes[at++] = static_cast<std::uint8_t>(opcode);
            bytes[at++] = static_cast<std::uint8_t>(modrm);
            for (std::uint8_t value = 0x91; at < bytes.size();
                 value = static_cast<std::uint8_t>(value * 7U)) {
              bytes[at++] = value;
            }
            check.look(bytes, code);
          }
        }
      }
    }
  }
}

TEST(SoftNativeCode, VexInstructionsAreTheSameOperation) {
  EmissionCheck check;
  for (const CodeSize code : kSizes) {
    for (unsigned map = 1; map < 4; ++map) {
      for (unsigned opcode = 0; opcode < 256; ++opcode) {
        for (unsigned last = 0; last < 256; ++last) {
          const unsigned vvvv = ~last >> 3 & 15;
          if (vvvv != 0 && vvvv != 4 && vvvv != 11 && vvvv != 14) {
            continue;
          }
          for (const unsigned rxb : {7U, 2U}) {
            for (const unsigned modrm : {0xd1U, 0xe4U, 0xfaU, 0x07U, 0x1fU, 0x2fU}) {
              check.look(
                  {0xc4, static_cast<std::uint8_t>(rxb << 5 | map), static_cast<std::uint8_t>(last),
                   static_cast<std::uint8_t>(opcode), static_cast<std::uint8_t>(modrm), 0xb5, 0x2b, 0x5d},
                  code);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace wisp::soft
