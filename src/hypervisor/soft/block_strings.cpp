// Instructions of blocks whose memory operand is as long, or as far away, as a register says: bit strings,
// and repeated moves and stores.
#include <bit>

#include "hypervisor/soft/block_emitter.h"
#include "hypervisor/soft/block_offsets.h"
#include "hypervisor/soft/mmu.h"

namespace wisp::soft {

using namespace offsets;

// BT, BTS, BTR and BTC of a bit string in memory: the register's upper bits choose the word, its lower ones
// the bit.
void BlockEmitter::bit_test(const Insn& insn) {
  const bool wide = insn.operand_size == 8;
  const unsigned word_bits = wide ? 6 : 5;
  const auto bits_into = [&](HostReg to) {  // sign-extended
    if (wide) {
      if (has_home(insn.reg)) {
        out_->move(to, home_of(insn.reg));
      } else {
        out_->load(to, gpr_offset(insn.reg));
      }
      return;
    }
    const HostReg from = has_home(insn.reg) ? home_of(insn.reg) : to;
    if (from == to) {
      out_->load32(to, gpr_offset(insn.reg));
    }
    out_->rex(true, to, from);  // movsxd
    out_->byte(0x63);
    out_->byte(0xc0U | Emitter::low(to) << 3 | Emitter::low(from));
  };
  address(insn);
  bits_into(kTemp);
  out_->constant(kAddend, word_bits);
  out_->shift(Emitter::Shift::kArithmeticRight, kTemp, kTemp, kAddend);
  out_->lea(kAddress, kAddress, kTemp, wide ? 3 : 2, 0);
  probe(insn.operand_size, insn.op != Op::kBitTest);
  out_->lea(kAddress, kAddress, kAddend, 0, 0);
  bits_into(kTemp);
  out_->constant(kAddend, 64 - word_bits);
  out_->shift(Emitter::Shift::kLeft, kTemp, kTemp, kAddend);
  out_->shift(Emitter::Shift::kRight, kTemp, kTemp, kAddend);
  if (insn.op == Op::kBitTest) {
    // The plain form with a register would take any bit offset: with one inside the word it reads that word.
    out_->rex(wide, kTemp, kAddress);
    out_->byte(0x0f);
    out_->byte(0xa3);
    out_->memory(Emitter::low(kTemp), kAddress, 0);
    return;
  }
  if (insn.lock) {
    out_->byte(0xf0);
  }
  out_->rex(wide, kTemp, kAddress);
  out_->byte(0x0f);
  out_->byte(insn.op == Op::kBitSet ? 0xabU : insn.op == Op::kBitReset ? 0xb3U : 0xbbU);
  out_->memory(Emitter::low(kTemp), kAddress, 0);
}

bool BlockEmitter::can_repeat(const Insn& insn) {
  return insn.repeat == 0xf3 && insn.address_size == 8 && insn.segment != kFs && insn.segment != kGs;
}

// Adds to kTemp what is 0 where the `RCX << scale` bytes from `start` on lie in one page, of which kAddend
// becomes the entry's number in the in-line TLB. RCX must be known to be small. kAddress is lost.
void BlockEmitter::check_run(HostReg start, unsigned scale, bool write) {
  const std::int32_t tag =
      tlb_offset(mode_.bank, write ? offsetof(TlbBank, write_tag) : offsetof(TlbBank, read_tag));
  out_->extract(kAddend, start, offset32(offsetof(Cpu, tlb_mask)));
  out_->load_indexed(kAddress, kAddend, tag);
  const std::int32_t bias = quick_loop_ ? static_cast<std::int32_t>(kPageSize) : 0;
  out_->lea(kAddress, kAddress, start, 0, -bias);
  out_->extract(kAddress, kAddress, kPageMask);
  out_->lea(kTemp, kTemp, kAddress, 0, 0);
  out_->load_indexed(kAddress, kAddend, tag);
  out_->lea(kAddress, kAddress, start, 0, -1 - bias);
  out_->lea(kAddress, kAddress, home_of(kRcx), scale, 0);
  out_->extract(kAddress, kAddress, kPageMask);
  out_->lea(kTemp, kTemp, kAddress, 0, 0);
}

// REP MOVS and REP STOS, upwards and inside one page of each operand, by the host's own; others are special.
void BlockEmitter::repeat_string(const Insn& insn) {
  const bool moves = insn.op == Op::kMoveString;
  const auto scale = static_cast<unsigned>(std::countr_zero(insn.operand_size));
  constexpr HostReg kCount = home_of(kRcx);
  constexpr HostReg kSource = home_of(kRsi);
  constexpr HostReg kTarget = home_of(kRdi);
  static_assert(kSource == HostReg::kRsi && kTarget == HostReg::kRdi && home_of(kRax) == HostReg::kRax);
  // The sum of numbers less than 1 << 52, of which each must be 0.
  out_->extract(kTemp, kCount, offset32(offsetof(Cpu, repeat_mask)));
  out_->load(kAddress, kOtherFlags);
  out_->extract(kAddress, kAddress, offset32(offsetof(Cpu, direction_mask)));
  out_->lea(kTemp, kTemp, kAddress, 0, 0);
  if (moves) {
    check_run(kSource, scale, false);
    out_->load_indexed(kAddend, kAddend, tlb_offset(mode_.bank, offsetof(TlbBank, addend)));
    out_->store(kKept, kAddend);
  }
  check_run(kTarget, scale, true);
  const std::size_t otherwise = miss_unless_zero();
  out_->load_indexed(kAddend, kAddend, tlb_offset(mode_.bank, offsetof(TlbBank, addend)));
  if (moves) {
    out_->load(kTemp, kKept);
    out_->lea(kAddress, kSource, kCount, scale, 0);
    out_->store(kKept, kAddress);
    out_->lea(kSource, kSource, kTemp, 0, 0);
  }
  out_->lea(kAddress, kTarget, kCount, scale, 0);
  out_->lea(kTarget, kTarget, kAddend, 0, 0);
  out_->move(kTemp, kCount);
  if (insn.operand_size == 2) {
    out_->byte(0x66);
  }
  out_->byte(0xf3);
  if (insn.operand_size == 8) {
    out_->byte(0x48);
  }
  out_->byte((moves ? 0xa4U : 0xaaU) | (insn.operand_size > 1 ? 1U : 0U));
  out_->move(kTarget, kAddress);
  if (moves) {
    out_->load(kSource, kKept);
  }
  out_->constant(kCount, 0);
  special_aside(otherwise);
}

}  // namespace wisp::soft
