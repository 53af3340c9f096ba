#include "hypervisor/soft/block_emitter.h"

#include <algorithm>

#include "hypervisor/soft/block_offsets.h"
#include "hypervisor/soft/mmu.h"

namespace wisp::soft {

using namespace offsets;

// Whether nothing behind the instruction belongs to the same block.
bool BlockEmitter::ends_straight_line(Op op) {
  switch (op) {
    case Op::kUndefined:
    case Op::kUnknown:
    case Op::kCall:
    case Op::kCallIndirect:
    case Op::kReturn:
    case Op::kReturnImm:
    case Op::kJump:
    case Op::kJumpIndirect:
    case Op::kInterruptReturn:
    case Op::kSyscall:
    case Op::kSysret:
    case Op::kHalt:
      return true;
    default:
      return false;
  }
}

// Decodes what the block can hold at most: up to where it surely ends.
void BlockEmitter::decode_block(std::uint32_t page_offset) {
  std::uint64_t offset = page_offset;
  while (offset < kPageSize && scratch_.insns.size() < kMaxBlockInstructions) {
    Insn& insn = scratch_.insns.emplace_back();
    const std::span<const std::uint8_t> bytes = fetch_(context_, static_cast<std::uint32_t>(offset));
    if (decode(bytes, CodeSize::k64, insn) != DecodeResult::kDone) {
      scratch_.insns.pop_back();
      break;
    }
    if (ends_straight_line(insn.op) ||
        (count_ && ends_counted_block(insn, static_cast<std::int64_t>(offset)))) {
      break;
    }
    offset += insn.length;
  }
  plan_accesses(scratch_.insns, plan_);
}

bool BlockEmitter::emit(std::uint64_t gpa, EmittedBlock& block) {
  const auto page_offset = static_cast<std::uint32_t>(gpa & kPageOffset);
  page_ = gpa & ~kPageOffset;
  decode_block(page_offset);
  block_ = &block;
  offset_ = page_offset;
  // Outer entry: page_address from the linear address, then the inner one.
  out_->align(8);
  block.outer_entry = static_cast<std::uint32_t>(out_->size());
  out_->byte(0x4d);  // lea r14, [r14 + disp32], in its long form
  out_->byte(0x8d);
  out_->byte(0xb6);
  out_->number(-static_cast<std::int32_t>(page_offset));
  out_->store(kPageAddress, kAddress);
  out_->align(8);
  block.inner_entry = static_cast<std::uint32_t>(out_->size());
  std::size_t leave = 0;
  if (count_) {
    leave = take_from_budget();
  } else {
    out_->load(kTemp, kRun);  // five bytes
    leave = out_->far_jump_if_temp_zero();
  }

  Flow flow = Flow::kContinue;
  while (flow == Flow::kContinue) {
    scratch_.starts.push_back(out_->size());
    if (offset_ >= static_cast<std::int64_t>(kPageSize) || block.instructions >= kMaxBlockInstructions ||
        out_->full()) {
      go_on_at(offset_, mode_.bank);
      break;
    }
    if (block.instructions == scratch_.insns.size()) {
      // It crosses into the next page, or is no instruction: the interpreter finds out.
      out_->call(stubs_.special);
      call_site(static_cast<std::uint32_t>(offset_), block.instructions, 0, 0, 0);
      break;
    }
    const Insn& insn = scratch_.insns[block.instructions++];
    const bool check = check_interrupts_;
    check_interrupts_ = false;
    flow = instruction(insn);
    offset_ += insn.length;
    if (check && flow == Flow::kContinue) {
      out_->load(kTemp, kNoInterruptWaits);
      scratch_.cold.push_back({.kind = ColdCode::Kind::kLeave,
                               .from = out_->far_jump_if_temp_zero(),
                               .page_offset = static_cast<std::uint32_t>(offset_),
                               .next_mark = block.instructions});
    }
  }
  block.guest_bytes = static_cast<std::uint32_t>(offset_) - page_offset;
  if (flow == Flow::kEnd) {
    // What follows the last instruction, for those that come back after it.
    scratch_.starts.push_back(out_->size());
    out_->constant(kAddress, static_cast<std::uint64_t>(offset_));
    out_->jump(stubs_.leave_at);
  }
  out_ = &cold_;
  emit_cold();
  straight_.place_at(leave, cold_.here());
  if (count_) {
    give_back_all(page_offset);
  }
  block.way_out = static_cast<std::uint32_t>(cold_.size());
  cold_.constant(kAddress, page_offset);
  cold_.jump(stubs_.leave_at);
  emit_specials();
  settle_counts();
  block.size = static_cast<std::uint32_t>(straight_.size());
  block.cold_size = static_cast<std::uint32_t>(cold_.size());
  return !straight_.full() && !cold_.full();
}

// What the block has taken, but for its first `but` instructions.
void BlockEmitter::give_back(std::size_t but) {
  out_->load(kTemp, kInstructionsLeft);
  const std::size_t place = out_->lea_long(kTemp, kTemp);
  scratch_.lengths.push_back({.place = {out_, place}, .sign = 1, .more = -static_cast<std::int32_t>(but)});
  out_->store(kInstructionsLeft, kTemp);
}

// Where the block must not begin, or instructions_left does not do for it: gives back what was taken, and
// leaves for single steps.
void BlockEmitter::give_back_all(std::uint32_t page_offset) {
  give_back(0);
  out_->constant(kAddress, page_offset);
  out_->jump(stubs_.leave_to_step);
}

// Returns the jump of those who have not enough left, or must not run.
std::size_t BlockEmitter::take_from_budget() {
  out_->load(kTemp, kInstructionsLeft);
  const std::size_t place = out_->lea_long(kTemp, kTemp);
  scratch_.lengths.push_back({.place = {out_, place}, .sign = -1});
  out_->store(kInstructionsLeft, kTemp);
  out_->extract(kTemp, kTemp, kRun);
  return out_->far_jump_if_temp_zero();
}

void BlockEmitter::settle_counts() {
  const std::uint32_t count = block_->instructions;
  for (const auto& [place, sign, more] : scratch_.lengths) {
    place.out->patch(place.at, sign * static_cast<std::int32_t>(count) + more);
  }
  for (const auto& [place, index] : scratch_.sites) {
    place.out->patch(place.at, static_cast<std::uint16_t>(count - index));
  }
  for (EmittedBlock::FaultSite& site : scratch_.fault_sites) {
    site.unspent = static_cast<std::uint16_t>(count - site.unspent);
  }
}

void BlockEmitter::call_site(std::uint32_t page_offset, std::size_t index, std::uint8_t size,
                             std::uint8_t access, std::int32_t next) {
  out_->number(static_cast<std::uint16_t>(page_offset));
  scratch_.sites.push_back({{out_, out_->size()}, index});
  out_->number(std::uint16_t{0});
  out_->byte(size);
  out_->byte(access);
  out_->number(next);
}

// Pads so that the displacement of the jump that follows can be replaced by one store.
void BlockEmitter::align_jump(unsigned bytes_before_displacement) {
  out_->align(4, bytes_before_displacement);
}

void BlockEmitter::branch_link(std::size_t from, std::int64_t target_offset) {
  const bool near = in_this_page(target_offset);
  scratch_.cold.push_back({.kind = near ? ColdCode::Kind::kLink : ColdCode::Kind::kFarJump,
                           .from = from,
                           .page_offset = static_cast<std::uint32_t>(near ? target_offset : offset_),
                           .target = target_offset,
                           .next_mark = block_->instructions});
}

// The linear address `offset` bytes behind the page's start. An instruction's displacement and what is before
// it in the page can be more than one displacement takes.
void BlockEmitter::in_page(HostReg to, std::int64_t offset) {
  constexpr std::int64_t kMost = INT32_MAX;
  out_->load(to, kPageAddress);
  out_->lea(to, to, static_cast<std::int32_t>(std::min(offset, kMost)));
  if (offset > kMost) {
    out_->lea(to, to, static_cast<std::int32_t>(offset - kMost));
  }
}

// On behind the present instruction, elsewhere than in this block.
void BlockEmitter::go_on_at(std::int64_t target_offset, Bank bank) {
  if (target_offset < 4096) {
    align_jump(1);
    branch_link(out_->jump_later(), target_offset);
    return;
  }
  in_page(kAddress, target_offset);
  out_->place_at(indirect(bank), stubs_.miss);
}

// `stack_change`: what the instruction has added to RSP.
void BlockEmitter::jump_to(std::int64_t target_offset, std::int32_t stack_change) {
  if (in_this_page(target_offset)) {
    align_jump(1);
    branch_link(out_->jump_later(), target_offset);
    return;
  }
  in_page(kAddress, target_offset);
  indirect_jump(stack_change);
}

// To the linear address in kAddress.
void BlockEmitter::indirect_jump(std::int32_t stack_change) {
  const std::size_t miss = indirect(mode_.bank);
  scratch_.cold.push_back({.kind = ColdCode::Kind::kMiss,
                           .from = miss,
                           .page_offset = static_cast<std::uint32_t>(offset_),
                           .stack_change = stack_change,
                           .next_mark = block_->instructions});
}

void BlockEmitter::miss_call(const ColdCode& cold) {
  out_->call(stubs_.miss_of_jump);
  call_site(cold.page_offset, cold.next_mark - 1, 0, 0, cold.stack_change);
}

// Goes on at the linear address in kAddress, as code of `bank`. Returns the jump of those who find no
// translation.
std::size_t BlockEmitter::indirect(Bank bank) {
  out_->rotate(kAddend, kAddress, kJumpBits);
  out_->lea(kAddend, kAddend, kAddress, 0, 0);
  out_->extract(kAddend, kAddend, offset32(offsetof(Cpu, jump_mask)));
  out_->load_indexed(kTemp, kAddend, jump_offset(bank, offsetof(JumpBank, tag)));
  out_->lea(kTemp, kTemp, kAddress, 0, hit_value());
  if (!quick_loop_) {
    // What remains may be any number but 1: addresses side by side have different entries.
    out_->extract(kTemp, kTemp, offset32(offsetof(Cpu, half_mask)));
  }
  const std::size_t miss = miss_unless_hit();
  out_->jump_indexed(kAddend, jump_offset(bank, offsetof(JumpBank, code)));
  return miss;
}

void BlockEmitter::slow_call(const ColdCode& cold) {
  out_->call(stubs_.slow);
  const auto next = straight_.here_at(scratch_.starts[cold.next_mark]) - out_->here();
  call_site(cold.page_offset, cold.next_mark - 1, cold.size,
            static_cast<std::uint8_t>(cold.access | (cold.plain_fault ? kPlainFault : 0)),
            static_cast<std::int32_t>(next));
}

void BlockEmitter::emit_cold() {
  for (std::size_t i = 0; i < scratch_.cold.size(); ++i) {
    const ColdCode cold = scratch_.cold[i];
    Emitter& with_jump = cold.from_cold ? cold_ : straight_;
    with_jump.place_at(cold.from, out_->here());
    switch (cold.kind) {
      case ColdCode::Kind::kSlow:
        slow_call(cold);
        jump_back(cold.back);
        break;
      case ColdCode::Kind::kAlone: {
        if (cold.forget) {
          out_->store_constant(shared_addend(cold.slot), 0);
        }
        const std::uint8_t* retry = out_->here();
        compare_tag(mode_.bank, 0, cold.size, cold.access == static_cast<std::uint8_t>(Access::kWrite));
        if (quick_loop_) {
          out_->lea(kTemp, kTemp, -1);
        }
        const std::size_t hit = out_->jump_if_temp_zero();
        slow_call(cold);
        out_->jump(retry);
        out_->place_short(hit);
        out_->load_indexed(kAddend, kAddend, tlb_offset(mode_.bank, offsetof(TlbBank, addend)));
        jump_back(cold.back);
        break;
      }
      case ColdCode::Kind::kLink: {
        out_->call(stubs_.link);
        const auto displacement = with_jump.here_at(cold.from - 4) - out_->here();
        call_site(cold.page_offset, block_->instructions, 0, 0, static_cast<std::int32_t>(displacement));
        out_->number(page_);
        break;
      }
      case ColdCode::Kind::kEarly: {
        give_back(cold.next_mark);
        align_jump(1);
        scratch_.cold.push_back({.kind = ColdCode::Kind::kLink,
                                 .from = out_->jump_later(),
                                 .from_cold = true,
                                 .page_offset = cold.page_offset});
        break;
      }
      case ColdCode::Kind::kFarJump:
        in_page(kAddress, cold.target);
        out_->place(indirect(mode_.bank));
        miss_call(cold);
        break;
      case ColdCode::Kind::kMiss:
        miss_call(cold);
        break;
      case ColdCode::Kind::kLeave:
        if (count_) {
          give_back(cold.next_mark);
        }
        out_->constant(kAddress, cold.page_offset);
        out_->jump(stubs_.leave_at);
        break;
      case ColdCode::Kind::kVectors:
        out_->call(stubs_.trampolines.load_vectors);
        jump_back(cold.back);
        break;
      case ColdCode::Kind::kSpecial:
        special(scratch_.insns[cold.next_mark - 1], cold.page_offset, cold.next_mark - 1);
        jump_back(cold.back);
        break;
    }
  }
}

void BlockEmitter::emit_specials() {
  for (const auto& [site, insn] : scratch_.specials) {
    // CallSite::next is the last of it.
    Emitter& with = site > straight_.here_at(0) && site <= straight_.here() ? straight_ : cold_;
    with.patch(static_cast<std::size_t>(site - with.here_at(0)) - 4,
               static_cast<std::int32_t>(out_->here() - site));
    out_->number(insn);
  }
}

}  // namespace wisp::soft
