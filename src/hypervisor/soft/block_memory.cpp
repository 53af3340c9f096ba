// How blocks reach guest memory: addresses, and their look-up in the in-line TLB.
#include "hypervisor/soft/block_emitter.h"
#include "hypervisor/soft/block_offsets.h"
#include "hypervisor/soft/mmu.h"

namespace wisp::soft {

using namespace offsets;

// The linear address of the memory operand into kAddress.
void BlockEmitter::address(const Insn& insn) {
  const auto displacement = static_cast<std::int32_t>(insn.displacement);
  const bool wide = insn.address_size == 8;
  const auto host = [this](std::uint8_t guest, HostReg scratch) {
    if (has_home(guest)) {
      return home_of(guest);
    }
    out_->load(scratch, gpr_offset(guest));
    return scratch;
  };
  if (insn.base == kRipBase) {
    in_page(kAddress, next_offset(insn) + displacement);
    if (!wide) {
      out_->move32(kAddress, kAddress);
    }
  } else if (insn.base == kNoRegister && insn.index == kNoRegister) {
    out_->constant(kAddress, wide ? static_cast<std::uint64_t>(insn.displacement)
                                  : static_cast<std::uint32_t>(insn.displacement));
  } else if (insn.index == kNoRegister) {
    const HostReg base = host(insn.base, kAddress);
    if (displacement == 0 && wide) {
      out_->move(kAddress, base);
    } else {
      out_->lea(kAddress, base, displacement, wide);
    }
  } else if (insn.base == kNoRegister) {
    out_->lea_index(kAddress, host(insn.index, kAddend), insn.scale, displacement, wide);
  } else {
    const HostReg base = host(insn.base, kAddress);
    const HostReg index = host(insn.index, kAddend);
    out_->lea(kAddress, base, index, insn.scale, displacement, wide);
  }
  if (insn.segment == kFs || insn.segment == kGs) {
    out_->load(kAddend, segment_base(insn.segment));
    out_->lea(kAddress, kAddress, kAddend, 0, 0);
  }
}

// Makes kTemp hit_value() where the `size` bytes from `before` bytes before kAddress lie in a page that the
// in-line TLB has; kAddend is that entry's number then. Flags stay. (Where a hit is 1, the tags are a page
// more: Cpu::tag_bias.)
void BlockEmitter::compare_tag(Bank bank, std::uint32_t before, std::uint32_t size, bool write) {
  HostReg from = kAddress;
  if (before != 0) {
    out_->lea(kAddend, kAddress, -static_cast<std::int32_t>(before));
    from = kAddend;
  }
  out_->extract(kAddend, from, offset32(offsetof(Cpu, tlb_mask)));
  out_->load_indexed(kTemp, kAddend,
                     tlb_offset(bank, write ? offsetof(TlbBank, write_tag) : offsetof(TlbBank, read_tag)));
  out_->lea(kTemp, kTemp, kAddress, 0,
            static_cast<std::int32_t>(size) - 1 - static_cast<std::int32_t>(before));
  out_->extract(kTemp, kTemp, kPageMask);
}

// Jumps to a place set later where kTemp, less than 1 << 63, is not hit_value(). Where it is, no jump is
// taken: most code of a kernel runs seldom, and is slow where each of its memory accesses is a jump that the
// host's processor foresees no more. Flags stay, and so there is no comparison but with LOOP and JRCXZ.
std::size_t BlockEmitter::miss_unless_hit() {
  if (quick_loop_) {
    return out_->far_jump_unless_temp_one();
  }
  out_->lea(kTemp, kTemp, -1);
  out_->extract(kTemp, kTemp, offset32(offsetof(Cpu, sign_mask)));
  return out_->far_jump_if_temp_zero();
}

std::size_t BlockEmitter::miss_unless_zero() {
  if (quick_loop_) {
    out_->lea(kTemp, kTemp, hit_value());
  }
  return miss_unless_hit();
}

// Looks kAddress up; kAddend becomes what makes a host address of it. Flags stay.
void BlockEmitter::probe(std::uint32_t size, bool write) {
  const std::size_t retry = out_->size();
  compare_tag(mode_.bank, 0, size, write);
  const std::size_t miss = miss_unless_hit();
  out_->load_indexed(kAddend, kAddend, tlb_offset(mode_.bank, offsetof(TlbBank, addend)));
  scratch_.cold.push_back({.kind = ColdCode::Kind::kSlow,
                           .from = miss,
                           .back = retry,
                           .page_offset = static_cast<std::uint32_t>(offset_),
                           .size = static_cast<std::uint8_t>(size),
                           .access = static_cast<std::uint8_t>(write ? Access::kWrite : Access::kRead),
                           .plain_fault = plain_fault_,
                           .next_mark = scratch_.starts.size()});
}

// The same for the instruction's planned access.
void BlockEmitter::access(std::uint32_t size, bool write) {
  const PlannedAccess& plan = plan_[block_->instructions - 1];
  if (plan.kind == PlannedAccess::Kind::kAlone) {
    probe(size, write);
    return;
  }
  const std::int32_t slot = shared_addend(plan.slot);
  std::size_t miss = 0;
  const bool first = plan.kind == PlannedAccess::Kind::kFirst;
  if (first) {
    compare_tag(mode_.bank, plan.before, plan.length, plan.write);
    miss = miss_unless_hit();
    out_->load_indexed(kAddend, kAddend, tlb_offset(mode_.bank, offsetof(TlbBank, addend)));
    out_->store(slot, kAddend);
  } else {
    out_->load(kTemp, slot);
    miss = out_->far_jump_if_temp_zero();
    out_->move(kAddend, kTemp);
  }
  scratch_.cold.push_back({.kind = ColdCode::Kind::kAlone,
                           .from = miss,
                           .back = out_->size(),
                           .forget = first,
                           .slot = plan.slot,
                           .page_offset = static_cast<std::uint32_t>(offset_),
                           .size = static_cast<std::uint8_t>(size),
                           .access = static_cast<std::uint8_t>(write ? Access::kWrite : Access::kRead),
                           .plain_fault = plain_fault_,
                           .next_mark = scratch_.starts.size()});
}

// A push is under way: kAddress is where it goes, looked up.
void BlockEmitter::begin_push(bool push_planned) {
  out_->lea(kAddress, home_of(kRsp), -8);
  if (push_planned) {
    access(8, true);
  } else {
    probe(8, true);
  }
}

void BlockEmitter::push_temp_at_probe() {
  out_->store_guest(kAddress, kAddend, kTemp);
  out_->lea(home_of(kRsp), home_of(kRsp), -8);
}

}  // namespace wisp::soft
