// One block of guest instructions to host code: a straight line from an entry, with exits where it branches,
// inside one page of guest code.
//
// Conventions between blocks, and between blocks and the stubs:
// - An inner entry needs page_address right. An outer entry takes the linear address of its first instruction
//   in kAddress and sets page_address. Both start with an instruction of at least five bytes at an address
//   divisible by 8, so that one store of 8 bytes makes it a jump once the block is dead.
// - After a call of a stub stands a CallSite.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "hypervisor/soft/access_plan.h"
#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/decoder.h"
#include "hypervisor/soft/emitter.h"
#include "hypervisor/soft/insn.h"
#include "hypervisor/soft/native_code.h"
#include "hypervisor/soft/physical_memory.h"

namespace wisp::soft {

// What a stub needs to know of the place that called it.
struct __attribute__((packed)) CallSite {
  std::uint16_t page_offset;  // of the guest instruction; for links: of the target
  std::uint16_t unspent;      // where instructions are counted: those of the block from this one on
  std::uint8_t size;          // slow accesses: bytes; special instructions: 0 where it is yet to be decoded
  std::uint8_t access;  // slow accesses: an Access, and kPlainFault; special instructions: whether the block
                        // may go on
  std::int32_t
      next;  // jumps that miss: what they have added to RSP; others: from here to the code of the next
             // instruction; links: to the jump to be patched, and behind the site stands the guest's page, in
             // 64 bits; special instructions: from behind the site to the decoded Insn
};

// In CallSite::access: where this access meets a page fault, so does the instruction, and has done nothing.
inline constexpr std::uint8_t kPlainFault = 0x80;

// The parts of generated code that all blocks share.
struct Stubs {
  Trampolines trampolines{};
  // Called. The in-line TLB had no entry for kAddress: comes back to the instruction behind the call site
  // (which tries again), to the next guest instruction, or not at all.
  const std::uint8_t* slow = nullptr;
  // Called: the interpreter runs the instruction.
  const std::uint8_t* special = nullptr;
  // Called: a direct jump inside the page whose target's translation is to be found, and linked.
  const std::uint8_t* link = nullptr;
  // Jumped to: goes on at the linear address in kAddress, whose translation is not in the jump cache.
  const std::uint8_t* miss = nullptr;
  // Called: the same, of a jump, which faults where that address is not canonical.
  const std::uint8_t* miss_of_jump = nullptr;
  // Jumped to: rip = page_address + kAddress, and out.
  const std::uint8_t* leave_at = nullptr;
  // The same, and cpu.step_next is set.
  const std::uint8_t* leave_to_step = nullptr;
  // Jumped to: out; rip is set.
  const std::uint8_t* out = nullptr;
};

// The state of the processor that a translation depends on; a block is found by it and its address.
struct BlockMode {
  Bank bank = kUserBank;
  bool x87 = false;  // instructions of these kinds may run
  bool sse = false;
  bool avx = false;
  bool tsc = false;  // RDTSC may run in line
  [[nodiscard]] std::uint32_t key() const { return static_cast<std::uint32_t>(bank) | features(); }
  // What does not depend on the bank.
  [[nodiscard]] std::uint32_t features() const {
    return (x87 ? 4U : 0U) | (sse ? 8U : 0U) | (avx ? 16U : 0U) | (tsc ? 32U : 0U);
  }
};

struct EmittedBlock {
  std::uint32_t guest_bytes = 0;
  std::uint32_t instructions = 0;
  std::uint32_t outer_entry = 0;  // offsets from the start of the code
  std::uint32_t inner_entry = 0;
  std::uint32_t size = 0;  // of the code
  std::uint32_t cold_size = 0;
  std::uint32_t way_out =
      0;  // from the start of the cold code: leaves with rip at the block's first instruction
  // Instructions in which the host's processor may raise an exception: code offset, page offset.
  struct FaultSite {
    std::uint32_t begin = 0;
    std::uint32_t end = 0;
    std::uint16_t page_offset = 0;
    std::uint16_t unspent = 0;  // as in CallSite
  };
};

// Code that stands behind the block, out of the way.
struct ColdCode {
  enum class Kind : std::uint8_t {
    kSlow,
    kAlone,
    kLink,
    kFarJump,
    kEarly,  // taken in the middle of a block that has paid for the rest: gives that back, and is a kLink
    kLeave,
    kMiss,
    kVectors,
    kSpecial
  } kind = Kind::kSlow;
  std::size_t from = 0;    // the jump that leads here (what place() takes)
  bool from_cold = false;  // and whether it is cold code itself
  std::size_t back = 0;    // kSlow: where to try again; others: where to go on
  bool forget = false;     // kAlone: what `slot` holds
  std::uint8_t slot = 0;
  std::uint32_t page_offset = 0;
  std::int64_t target = 0;        // kFarJump: relative to the page
  std::int32_t stack_change = 0;  // kMiss: what the instruction has added to RSP
  std::uint8_t size = 0;
  std::uint8_t access = 0;
  bool plain_fault = false;
  std::size_t next_mark = 0;  // index of the guest instruction's successor
};

// What the emitter works with, kept from block to block.
struct BlockScratch {
  std::vector<Insn> insns{};
  std::vector<ColdCode> cold{};
  std::vector<std::pair<const std::uint8_t*, Insn>> specials{};  // by the address behind their call sites
  std::vector<std::size_t> starts{};                             // code offset of each guest instruction
  // Where the code wants the block's length, which is known at its end: places of 32-bit displacements, their
  // sign and what is added, and call sites: place of `unspent`, index of the instruction.
  struct Place {
    Emitter* out = nullptr;
    std::size_t at = 0;
  };
  struct Length {
    Place place;
    std::int32_t sign = 1;
    std::int32_t more = 0;
  };
  std::vector<Length> lengths{};
  std::vector<std::pair<Place, std::size_t>> sites{};
  std::vector<EmittedBlock::FaultSite> fault_sites{};  // a result: of the block last emitted, ascending
  void clear() {
    insns.clear();
    cold.clear();
    specials.clear();
    starts.clear();
    lengths.clear();
    sites.clear();
    fault_sites.clear();
  }
};

class BlockEmitter final {
 public:
  // `fetch(page_offset)` gives the bytes of the page from there, watched for writes, at most 15.
  using Fetch = std::span<const std::uint8_t> (*)(void* context, std::uint32_t page_offset);
  // `count`: blocks take their instructions off cpu.instructions_left, and are not begun where that is less.
  // `quick_loop`: as in HostFeatures.
  // `straight` is for what mostly runs, `cold` for the rest: apart, so that caches hold what runs.
  BlockEmitter(Emitter& straight, Emitter& cold, const Stubs& stubs, const BlockMode& mode, bool count,
               bool quick_loop, BlockScratch& scratch, Fetch fetch, void* context)
      : straight_(straight),
        cold_(cold),
        stubs_(stubs),
        mode_(mode),
        count_(count),
        quick_loop_(quick_loop),
        scratch_(scratch),
        fetch_(fetch),
        context_(context) {
    scratch_.clear();
  }

  // Emits the block that starts at `gpa`. False: there is too little room left for it.
  [[nodiscard]] bool emit(std::uint64_t gpa, EmittedBlock& block);

  // More than a block ever takes, of each.
  static constexpr std::size_t kRoom = 48U << 10;

 private:
  enum class Flow : std::uint8_t { kContinue, kEnd };
  Flow instruction(const Insn& insn);
  Flow control(const Insn& insn);
  void address(const Insn& insn);
  void access(std::uint32_t size, bool write);
  void probe(std::uint32_t size, bool write);
  void compare_tag(Bank bank, std::uint32_t before, std::uint32_t size, bool write);
  // What kTemp is after a comparison that found what it looked for.
  [[nodiscard]] std::int32_t hit_value() const { return quick_loop_ ? 1 : 0; }
  [[nodiscard]] std::size_t miss_unless_hit();
  [[nodiscard]] std::size_t miss_unless_zero();
  void jump_back(std::size_t place) { out_->jump(straight_.here_at(place)); }
  void slow_call(const ColdCode& cold);
  void decode_block(std::uint32_t page_offset);
  void native(const Insn& insn);
  void lea(const Insn& insn);
  void need_vectors();
  void special(const Insn& insn) {
    special(insn, static_cast<std::uint32_t>(offset_), block_->instructions - 1);
  }
  void special(const Insn& insn, std::uint32_t page_offset, std::size_t index);
  void special_aside(std::size_t from);
  void push_temp_at_probe();
  void begin_push(bool push_planned = true);
  void conditional(const Insn& insn);
  void in_page(HostReg to, std::int64_t offset);
  void go_on_at(std::int64_t target_offset, Bank bank);
  void jump_to(std::int64_t target_offset, std::int32_t stack_change = 0);
  void branch_link(std::size_t from, std::int64_t target_offset);
  [[nodiscard]] std::size_t indirect(Bank bank);
  void indirect_jump(std::int32_t stack_change);
  void miss_call(const ColdCode& cold);
  void read_tsc(const Insn& insn);
  // Whether nothing behind such an instruction belongs to the same block.
  [[nodiscard]] static bool ends_straight_line(Op op);
  [[nodiscard]] static bool is_conditional(Op op) {
    return op == Op::kJumpIf || op == Op::kLoop || op == Op::kJumpRcxZero;
  }
  // Whether `insn`, at `offset` of the page, is a conditional jump that a counted block ends with: not where
  // it leads forward in the page, where compilers put what is rare.
  [[nodiscard]] static bool ends_counted_block(const Insn& insn, std::int64_t offset) {
    const std::int64_t target = offset + insn.length + static_cast<std::int64_t>(insn.immediate);
    return is_conditional(insn.op) && !(insn.op == Op::kJumpIf && target > offset && in_this_page(target));
  }
  [[nodiscard]] bool goes_on_after_next() const;
  void swap_gs();
  void move_from_segment(const Insn& insn);
  void bit_test(const Insn& insn);
  [[nodiscard]] static bool can_repeat(const Insn& insn);
  void repeat_string(const Insn& insn);
  void check_run(HostReg start, unsigned scale, bool write);
  void set_ac(bool on);
  void call_site(std::uint32_t page_offset, std::size_t index, std::uint8_t size, std::uint8_t access,
                 std::int32_t next);
  void settle_counts();
  [[nodiscard]] std::size_t take_from_budget();
  void give_back(std::size_t but);
  void give_back_all(std::uint32_t page_offset);
  void align_jump(unsigned bytes_before_displacement);
  void emit_cold();
  void emit_specials();
  [[nodiscard]] bool vector_possible(VectorUse use) const;
  [[nodiscard]] std::int64_t next_offset(const Insn& insn) const { return offset_ + insn.length; }
  [[nodiscard]] static bool in_this_page(std::int64_t offset) {
    return offset >= 0 && offset < static_cast<std::int64_t>(kPageSize);
  }
  [[nodiscard]] std::int64_t branch_target(const Insn& insn) const {
    return next_offset(insn) + static_cast<std::int64_t>(insn.immediate);
  }

  Emitter& straight_;
  Emitter& cold_;
  Emitter* out_ = &straight_;  // where to write now
  const Stubs& stubs_;
  const BlockMode mode_;
  const bool count_;
  const bool quick_loop_;
  BlockScratch& scratch_;
  Fetch fetch_;
  void* context_;
  std::uint64_t page_ = 0;   // of the guest's memory
  std::int64_t offset_ = 0;  // of the present instruction in it
  EmittedBlock* block_ = nullptr;
  AccessPlan plan_;
  bool vectors_here_ = false;
  bool plain_fault_ = false;       // of the present instruction's accesses: kPlainFault
  bool check_interrupts_ = false;  // after the next instruction: STI was before it
};

}  // namespace wisp::soft
