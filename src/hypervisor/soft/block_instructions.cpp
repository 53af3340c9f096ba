// What blocks do for each instruction.
#include <array>

#include "hypervisor/soft/block_emitter.h"
#include "hypervisor/soft/block_offsets.h"
#include "hypervisor/soft/host_features.h"

namespace wisp::soft {

using namespace offsets;

namespace {

// Whether the interpreter's instruction leaves a block's assumptions (address space, mode, flow) alone.
bool keeps_flow(const Insn& insn) {
  switch (insn.op) {
    case Op::kPause:
    case Op::kReadTsc:
    case Op::kReadTscp:
    case Op::kCpuid:
    case Op::kReadMsr:
    case Op::kMoveString:
    case Op::kStoreString:
    case Op::kLoadString:
    case Op::kScanString:
    case Op::kCompareString:
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
    case Op::kPush:
    case Op::kPop:
    case Op::kLea:
    case Op::kEnter:
    case Op::kLeave:
    case Op::kClearDirection:
    case Op::kSetDirection:
    case Op::kTranslateByte:
    case Op::kMoveOffset:
    case Op::kCompareExchange8:
    case Op::kCompareExchange16:
    case Op::kReadFsBase:
    case Op::kReadGsBase:
    case Op::kMoveFromSegment:
    case Op::kMoveFromCr:
    case Op::kNative:
    case Op::kXsave:
    case Op::kXsaveOpt:
    case Op::kLoadMxcsr:
    case Op::kStoreMxcsr:
    case Op::kGather:
    case Op::kMaskMove:
    case Op::kMaskMoveBytes:
    case Op::kRandom:
    case Op::kSwapGs:
    case Op::kVerifyWrite:
    case Op::kReadPid:
    case Op::kFpuEnvironment:
    case Op::kFpuWait:
      return true;
    default:
      return false;
  }
}

}  // namespace

bool BlockEmitter::vector_possible(VectorUse use) const {
  switch (use) {
    case VectorUse::kNone:
      return true;
    case VectorUse::kX87:
    case VectorUse::kMmx:
      return mode_.x87;
    case VectorUse::kSse:
      return mode_.sse;
    case VectorUse::kAvx:
      return mode_.avx;
  }
  return false;
}

void BlockEmitter::need_vectors() {
  if (vectors_here_) {
    return;
  }
  vectors_here_ = true;
  out_->load(kTemp, offset32(offsetof(Cpu, vectors_here)));
  const std::size_t away = out_->far_jump_if_temp_zero();
  scratch_.cold.push_back({.kind = ColdCode::Kind::kVectors, .from = away, .back = out_->size()});
}

void BlockEmitter::native(const Insn& insn) {
  const bool may_fault =
      insn.vector_use != VectorUse::kNone || insn.op != Op::kNative;  // #XM, #MF, #GP; #DE, alignment
  if (insn.vector_use != VectorUse::kNone) {
    need_vectors();
  }
  if (insn.memory) {
    address(insn);
    access(insn.memory_size, (insn.rm_access & kWrites) != 0);
  }
  const std::size_t begin = out_->size();
  emit_native(*out_, insn, MemoryForm::kAddressAddend);
  if (may_fault) {
    scratch_.fault_sites.push_back(
        {static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(out_->size()),
         static_cast<std::uint16_t>(offset_), static_cast<std::uint16_t>(block_->instructions - 1)});
  }
}

void BlockEmitter::lea(const Insn& insn) {
  Insn plain = insn;
  plain.segment = kDs;
  const bool simple = insn.base < 16 && has_home(insn.base) && has_home(insn.reg) && insn.address_size == 8 &&
                      insn.index == kNoRegister && insn.operand_size >= 4;
  if (simple) {
    out_->lea(home_of(insn.reg), home_of(insn.base), static_cast<std::int32_t>(insn.displacement),
              insn.operand_size == 8);
    return;
  }
  const bool indexed = insn.base < 16 && insn.index < 16 && has_home(insn.base) && has_home(insn.index) &&
                       has_home(insn.reg) && insn.address_size == 8 && insn.operand_size >= 4;
  if (indexed) {
    out_->lea(home_of(insn.reg), home_of(insn.base), home_of(insn.index), insn.scale,
              static_cast<std::int32_t>(insn.displacement), insn.operand_size == 8);
    return;
  }
  address(plain);
  const HostReg to = has_home(insn.reg) ? home_of(insn.reg) : kAddress;
  if (insn.operand_size == 8) {
    out_->move(to, kAddress);
  } else {
    out_->move32(to, kAddress);
  }
  if (!has_home(insn.reg)) {
    out_->store(gpr_offset(insn.reg), kAddress);
  }
}

void BlockEmitter::special(const Insn& insn, std::uint32_t page_offset, std::size_t index) {
  out_->call(stubs_.special);
  call_site(page_offset, index, insn.length, keeps_flow(insn) ? 1 : 0, 0);
  scratch_.specials.emplace_back(out_->here(), insn);
}

// The present instruction, for those who come by the jump `from`; others go on here.
void BlockEmitter::special_aside(std::size_t from) {
  scratch_.cold.push_back({.kind = ColdCode::Kind::kSpecial,
                           .from = from,
                           .back = out_->size(),
                           .page_offset = static_cast<std::uint32_t>(offset_),
                           .next_mark = block_->instructions});
}

BlockEmitter::Flow BlockEmitter::instruction(const Insn& insn) {
  // Exceptions of their own may come before a vector instruction's and before CMPXCHG16B's.
  plain_fault_ = insn.vector_use == VectorUse::kNone && insn.op != Op::kCompareExchange16;
  switch (insn.op) {
    case Op::kNop:
      return Flow::kContinue;
    case Op::kNative:
      if ((insn.feature != Feature::kBase && !host_features().has(insn.feature)) ||
          !vector_possible(insn.vector_use)) {
        special(insn);
        return Flow::kEnd;
      }
      native(insn);
      return Flow::kContinue;
    case Op::kDivide:
    case Op::kDivideSigned:
      native(insn);
      return Flow::kContinue;
    case Op::kCompareExchange16: {
      Insn exchange = insn;
      constexpr std::uint16_t kPair = 1U << kRax | 1U << kRdx;
      exchange.implicit_reads = kPair | 1U << kRbx | 1U << kRcx;
      exchange.implicit_writes = kPair;
      exchange.rm_access = kReads | kWrites;
      exchange.writes_flags = true;
      native(exchange);
      return Flow::kContinue;
    }
    case Op::kLea:
      if (insn.operand_size == 2) {
        special(insn);
      } else {
        lea(insn);
      }
      return Flow::kContinue;
    default:
      return control(insn);
  }
}

BlockEmitter::Flow BlockEmitter::control(const Insn& insn) {
  switch (insn.op) {
    case Op::kPush:
      if (insn.operand_size != 8) {
        special(insn);
        return Flow::kContinue;
      }
      if (insn.memory) {
        address(insn);
        probe(8, false);
        out_->load_guest(kTemp, kAddress, kAddend);
        out_->store(kKept, kTemp);
        begin_push(false);
        out_->load(kTemp, kKept);
        push_temp_at_probe();
        return Flow::kContinue;
      }
      begin_push();
      if (has_home(insn.rm)) {
        out_->store_guest(kAddress, kAddend, home_of(insn.rm));
        out_->lea(home_of(kRsp), home_of(kRsp), -8);
      } else {
        out_->load(kTemp, gpr_offset(insn.rm));
        push_temp_at_probe();
      }
      return Flow::kContinue;
    case Op::kPushImm:
      if (insn.operand_size != 8) {
        special(insn);
        return Flow::kEnd;
      }
      begin_push();
      out_->constant(kTemp, insn.immediate);
      push_temp_at_probe();
      return Flow::kContinue;
    case Op::kPop:
      if (insn.memory || insn.operand_size != 8) {
        special(insn);
        return Flow::kContinue;
      }
      out_->move(kAddress, home_of(kRsp));
      access(8, false);
      out_->load_guest(kTemp, kAddress, kAddend);
      out_->lea(home_of(kRsp), home_of(kRsp), 8);
      if (has_home(insn.rm)) {
        out_->move(home_of(insn.rm), kTemp);
      } else {
        out_->store(gpr_offset(insn.rm), kTemp);
      }
      return Flow::kContinue;
    case Op::kLeave:
      if (insn.operand_size != 8) {
        special(insn);
        return Flow::kContinue;
      }
      out_->move(kAddress, home_of(kRbp));
      access(8, false);
      out_->load_guest(kTemp, kAddress, kAddend);
      out_->lea(home_of(kRsp), kAddress, 8);
      out_->move(home_of(kRbp), kTemp);
      return Flow::kContinue;
    case Op::kPushFlags:
      if (insn.operand_size != 8) {
        special(insn);
        return Flow::kEnd;
      }
      begin_push();
      out_->lea(kAddress, kAddress, kAddend, 0, 0);
      out_->byte(0x9c);  // pushfq; pop rcx: arithmetic flags, the host's IF, and bit 1
      out_->byte(0x59);
      out_->load(kAddend, kOtherFlags);
      out_->lea(kTemp, kTemp, kAddend, 0, -0x202);
      out_->load(kAddend, kInterruptFlag);
      out_->lea(kTemp, kTemp, kAddend, 0, 0);
      out_->rex(true, kTemp, kAddress);  // mov [kAddress], rcx
      out_->byte(0x89);
      out_->memory(Emitter::low(kTemp), kAddress, 0);
      out_->lea(home_of(kRsp), home_of(kRsp), -8);
      return Flow::kContinue;
    case Op::kClearInterrupt:
      if (mode_.bank == kUserBank) {
        special(insn);
        return Flow::kEnd;
      }
      out_->store_constant(kInterruptFlag, 0);
      return Flow::kContinue;
    case Op::kSetInterrupt:
      if (mode_.bank == kUserBank) {
        special(insn);
        return Flow::kEnd;
      }
      // The look for an interrupt comes after the next instruction, which must go on in this block for that.
      if (!goes_on_after_next()) {
        special(insn);
        return Flow::kEnd;
      }
      out_->store_constant(kInterruptFlag, static_cast<std::int32_t>(flag::kIf));
      check_interrupts_ = true;
      return Flow::kContinue;
    case Op::kMoveFromCr: {
      constexpr std::array kPlaces{offsetof(Cpu, cr0), std::size_t{0}, offsetof(Cpu, cr2), offsetof(Cpu, cr3),
                                   offsetof(Cpu, cr4)};
      const bool plain = mode_.bank != kUserBank && insn.reg < kPlaces.size() && insn.reg != 1 && !insn.lock;
      if (!plain) {
        special(insn);
        return Flow::kContinue;
      }
      const HostReg to = has_home(insn.rm) ? home_of(insn.rm) : kTemp;
      out_->load(to, offset32(kPlaces.at(insn.reg)));
      if (!has_home(insn.rm)) {
        out_->store(gpr_offset(insn.rm), to);
      }
      return Flow::kContinue;
    }
    case Op::kClearDirection: {
      // Set only for a few instructions now and then.
      out_->load(kTemp, kOtherFlags);
      out_->extract(kTemp, kTemp, offset32(offsetof(Cpu, direction_mask)));
      special_aside(miss_unless_zero());
      return Flow::kContinue;
    }
    case Op::kMoveFromSegment:
      if (insn.memory || insn.operand_size < 4) {
        special(insn);
      } else {
        move_from_segment(insn);
      }
      return Flow::kContinue;
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
      if (!insn.memory || insn.operand_size < 4 || insn.address_size != 8) {
        special(insn);
      } else {
        bit_test(insn);
      }
      return Flow::kContinue;
    case Op::kPause: {
      constexpr auto kPausesLeft = offset32(offsetof(Cpu, pauses_left));
      out_->load(kTemp, kPausesLeft);
      out_->lea(kTemp, kTemp, -1);
      out_->store(kPausesLeft, kTemp);
      special_aside(out_->far_jump_if_temp_zero());
      return Flow::kContinue;
    }
    case Op::kMoveString:
    case Op::kStoreString:
      if (can_repeat(insn)) {
        repeat_string(insn);
      } else {
        special(insn);
      }
      return Flow::kContinue;
    case Op::kReadTsc:
    case Op::kReadTscp:
      if (!mode_.tsc) {
        special(insn);
      } else {
        read_tsc(insn);
      }
      return Flow::kContinue;
    case Op::kSwapGs:
      if (mode_.bank == kUserBank) {
        special(insn);
      } else {
        swap_gs();
      }
      return Flow::kContinue;
    case Op::kSetAc:
    case Op::kClearAc: {
      if (mode_.bank == kUserBank) {
        special(insn);
        return Flow::kEnd;
      }
      const Bank bank = insn.op == Op::kSetAc ? kSupervisorAcBank : kSupervisorBank;
      if (bank == mode_.bank) {
        return Flow::kContinue;
      }
      set_ac(insn.op == Op::kSetAc);
      go_on_at(next_offset(insn), bank);
      return Flow::kEnd;
    }
    case Op::kCall:
    case Op::kCallIndirect:
    case Op::kReturn:
    case Op::kReturnImm:
    case Op::kJump:
    case Op::kJumpIndirect:
    case Op::kJumpIf:
    case Op::kJumpRcxZero:
      break;
    case Op::kLoop:
      if (in_this_page(branch_target(insn))) {
        break;
      }
      // Where no address can be it must fault before it counts.
      [[fallthrough]];
    default:
      special(insn);
      return keeps_flow(insn) ? Flow::kContinue : Flow::kEnd;
  }

  switch (insn.op) {
    case Op::kCall:
      begin_push();
      in_page(kTemp, next_offset(insn));
      push_temp_at_probe();
      jump_to(branch_target(insn), -8);
      return Flow::kEnd;
    case Op::kCallIndirect:
    case Op::kJumpIndirect:
      if (insn.memory) {
        address(insn);
        if (insn.op == Op::kJumpIndirect) {
          access(8, false);
        } else {
          probe(8, false);
        }
        out_->load_guest(kAddress, kAddress, kAddend);
      } else if (has_home(insn.rm)) {
        out_->move(kAddress, home_of(insn.rm));
      } else {
        out_->load(kAddress, gpr_offset(insn.rm));
      }
      if (insn.op == Op::kCallIndirect) {
        out_->store(kKept, kAddress);
        begin_push(false);
        in_page(kTemp, next_offset(insn));
        push_temp_at_probe();
        out_->load(kAddress, kKept);
      }
      indirect_jump(insn.op == Op::kCallIndirect ? -8 : 0);
      return Flow::kEnd;
    case Op::kReturn:
    case Op::kReturnImm: {
      const std::int32_t taken =
          8 + (insn.op == Op::kReturnImm ? static_cast<std::int32_t>(insn.immediate) : 0);
      out_->move(kAddress, home_of(kRsp));
      access(8, false);
      out_->load_guest(kAddress, kAddress, kAddend);
      out_->lea(home_of(kRsp), home_of(kRsp), taken);
      indirect_jump(taken);
      return Flow::kEnd;
    }
    case Op::kJump:
      jump_to(branch_target(insn));
      return Flow::kEnd;
    default:
      if (!count_) {
        conditional(insn);
        return Flow::kContinue;
      }
      if (ends_counted_block(insn, offset_)) {
        conditional(insn);
        go_on_at(next_offset(insn), mode_.bank);
        return Flow::kEnd;
      }
      scratch_.cold.push_back({.kind = ColdCode::Kind::kEarly,
                               .from = out_->jump_if_later(insn.opcode & 0xfU),
                               .page_offset = static_cast<std::uint32_t>(branch_target(insn)),
                               .next_mark = block_->instructions});
      return Flow::kContinue;
  }
}

// Jcc, LOOP and JRCXZ: the way taken leads out of line, the other goes on.
void BlockEmitter::conditional(const Insn& insn) {
  if (insn.op == Op::kJumpIf) {
    align_jump(2);
    branch_link(out_->jump_if_later(insn.opcode & 0xfU), branch_target(insn));
    return;
  }
  const bool wide = insn.address_size == 8;
  if (insn.op == Op::kLoop) {
    out_->lea(home_of(kRcx), home_of(kRcx), -1, wide);
  }
  if (wide) {
    out_->move(kTemp, home_of(kRcx));
  } else {
    out_->move32(kTemp, home_of(kRcx));
  }
  const std::size_t zero = out_->jump_if_temp_zero();
  if (insn.op == Op::kLoop) {
    align_jump(1);
    branch_link(out_->jump_later(), branch_target(insn));
    out_->place_short(zero);
    return;
  }
  out_->byte(0xeb);
  out_->byte(0);
  const std::size_t over = out_->size();
  out_->place_short(zero);
  align_jump(1);
  branch_link(out_->jump_later(), branch_target(insn));
  out_->place_short(over);
}

// RDTSC and RDTSCP by the host's own counter, and the processor's offset.
void BlockEmitter::read_tsc(const Insn& insn) {
  constexpr HostReg kLow = home_of(kRax);
  constexpr HostReg kHigh = home_of(kRdx);
  if (insn.op == Op::kReadTscp) {
    out_->byte(0x0f);  // lfence: what came before is done
    out_->byte(0xae);
    out_->byte(0xe8);
  }
  out_->byte(0x0f);  // rdtsc
  out_->byte(0x31);
  if (insn.op == Op::kReadTscp) {
    out_->load32(home_of(kRcx), offset32(offsetof(Cpu, msr) + offsetof(Cpu::Msrs, tsc_aux)));
  }
  out_->rotate(kHigh, kHigh, 32);
  out_->load(kTemp, offset32(offsetof(Cpu, tsc_offset)));
  out_->lea(kLow, kLow, kHigh, 0, 0);
  out_->lea(kLow, kLow, kTemp, 0, 0);
  out_->rotate(kHigh, kLow, 32);
  out_->move32(kHigh, kHigh);
  out_->move32(kLow, kLow);
}

void BlockEmitter::move_from_segment(const Insn& insn) {
  constexpr auto kSelector = offset32(offsetof(Segment, selector));
  const std::int32_t from =
      offset32(offsetof(Cpu, segments)) + offset32(sizeof(Segment)) * insn.reg_field() + kSelector;
  const HostReg to = has_home(insn.rm) ? home_of(insn.rm) : kTemp;
  out_->rex(false, to, HostReg::kRsp);  // movzx to, word [rsp + from]
  out_->byte(0x0f);
  out_->byte(0xb7);
  out_->memory(Emitter::low(to), HostReg::kRsp, from);
  if (!has_home(insn.rm)) {
    out_->store(gpr_offset(insn.rm), to);
  }
}

// Whether the instruction behind the present one is of this block and not its last.
bool BlockEmitter::goes_on_after_next() const {
  const std::size_t next = block_->instructions;
  if (next + 1 >= scratch_.insns.size()) {
    return false;
  }
  const Op op = scratch_.insns[next].op;
  // STAC and CLAC may end it.
  return !ends_straight_line(op) && !is_conditional(op) && op != Op::kSetAc && op != Op::kClearAc;
}

void BlockEmitter::swap_gs() {
  constexpr std::int32_t kKernelGsBase = offset32(offsetof(Cpu, msr) + offsetof(Cpu::Msrs, kernel_gs_base));
  out_->load(kAddress, segment_base(kGs));
  out_->load(kAddend, kKernelGsBase);
  out_->store(segment_base(kGs), kAddend);
  out_->store(kKernelGsBase, kAddress);
}

// STAC and CLAC, where they change the bank; the block ends.
void BlockEmitter::set_ac(bool on) {
  constexpr auto kBit = static_cast<std::int32_t>(flag::kAc);
  out_->load(kTemp, kOtherFlags);
  out_->lea(kTemp, kTemp, on ? kBit : -kBit);
  out_->store(kOtherFlags, kTemp);
}

}  // namespace wisp::soft
