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

namespace wisp::soft {

// What a stub needs to know of the place that called it.
struct __attribute__((packed)) CallSite {
  std::uint16_t page_offset;  // of the guest instruction; for links: of the target
  std::uint16_t unspent;      // where instructions are counted: those of the block from this one on
  std::uint8_t size;          // slow accesses: bytes
  std::uint8_t access;        // slow accesses: an Access; special instructions: whether the block may go on
  std::int32_t next;  // from here to the code of the next instruction; links: to the jump to be patched;
                      // special instructions: from behind the site to the decoded Insn
};

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
  std::uint32_t way_out = 0;  // leaves with rip at the block's first instruction
  std::uint32_t size = 0;     // of the code
  // Instructions in which the host's processor may raise an exception: code offset, page offset.
  struct FaultSite {
    std::uint32_t begin = 0;
    std::uint32_t end = 0;
    std::uint16_t page_offset = 0;
    std::uint16_t unspent = 0;  // as in CallSite
  };
  std::vector<FaultSite> fault_sites{};
};

class BlockEmitter final {
 public:
  // `fetch(page_offset)` gives the bytes of the page from there, watched for writes, at most 15.
  using Fetch = std::span<const std::uint8_t> (*)(void* context, std::uint32_t page_offset);
  // `count`: blocks take their instructions off cpu.instructions_left, and are not begun where that is less.
  // `quick_loop`: as in HostFeatures.
  BlockEmitter(Emitter& out, const Stubs& stubs, const BlockMode& mode, bool count, bool quick_loop,
               Fetch fetch, void* context)
      : out_(out),
        stubs_(stubs),
        mode_(mode),
        count_(count),
        quick_loop_(quick_loop),
        fetch_(fetch),
        context_(context) {}

  // Emits the block that starts at `page_offset`. False: not even its first instruction can be translated
  // (it goes on in the next page), or the room is too small (out.full()).
  [[nodiscard]] bool emit(std::uint32_t page_offset, EmittedBlock& block);

  // More than a block ever takes.
  static constexpr std::size_t kRoom = 48U << 10;

 private:
  enum class Flow : std::uint8_t { kContinue, kEnd };
  // Code that stands behind the block, out of the way.
  struct Cold {
    enum class Kind : std::uint8_t {
      kSlow,
      kAlone,
      kLink,
      kFarJump,
      kLeave,
      kVectors,
      kSpecial
    } kind = Kind::kSlow;
    std::size_t from = 0;  // the jump that leads here (what place() takes)
    std::size_t back = 0;  // kSlow: where to try again; others: where to go on
    bool forget = false;   // kAlone: what `slot` holds
    std::uint8_t slot = 0;
    std::uint32_t page_offset = 0;
    std::int64_t target = 0;  // kFarJump: relative to the page
    std::uint8_t size = 0;
    std::uint8_t access = 0;
    std::size_t next_mark = 0;  // index of the guest instruction's successor
  };

  Flow instruction(const Insn& insn);
  Flow control(const Insn& insn);
  void address(const Insn& insn);
  void access(std::uint32_t size, bool write);
  void probe(std::uint32_t size, bool write);
  void compare_tag(Bank bank, std::uint32_t before, std::uint32_t size, bool write);
  [[nodiscard]] std::size_t miss_unless_zero();
  void jump_back(std::size_t place);
  void slow_call(const Cold& cold);
  [[nodiscard]] bool decode_block(std::uint32_t page_offset);
  void native(const Insn& insn);
  void lea(const Insn& insn);
  void need_vectors();
  void special(const Insn& insn) {
    special(insn, static_cast<std::uint32_t>(offset_), block_->instructions - 1);
  }
  void special(const Insn& insn, std::uint32_t page_offset, std::size_t index);
  void push_temp_at_probe();
  void begin_push(bool push_planned = true);
  void conditional(const Insn& insn);
  void jump_to(std::int64_t target_offset) { jump_to(target_offset, mode_.bank); }
  void jump_to(std::int64_t target_offset, Bank bank);
  void branch_link(std::size_t from, std::int64_t target_offset);
  void indirect(Bank bank);
  void indirect() { indirect(mode_.bank); }
  void read_tsc(const Insn& insn);
  // Whether nothing behind such an instruction belongs to the same block.
  [[nodiscard]] static bool ends_straight_line(Op op);
  [[nodiscard]] static bool is_conditional(Op op) {
    return op == Op::kJumpIf || op == Op::kLoop || op == Op::kJumpRcxZero;
  }
  [[nodiscard]] bool goes_on_after_next() const;
  void swap_gs();
  void move_from_segment(const Insn& insn);
  void bit_test(const Insn& insn);
  void set_ac(bool on);
  void call_site(std::uint32_t page_offset, std::size_t index, std::uint8_t size, std::uint8_t access,
                 std::int32_t next);
  void settle_counts();
  [[nodiscard]] std::size_t take_from_budget();
  void give_back_all(std::uint32_t page_offset);
  void align_jump(unsigned bytes_before_displacement);
  void emit_cold();
  void emit_specials();
  [[nodiscard]] bool vector_possible(VectorUse use) const;
  [[nodiscard]] std::int64_t next_offset(const Insn& insn) const { return offset_ + insn.length; }
  [[nodiscard]] std::int64_t branch_target(const Insn& insn) const {
    return next_offset(insn) + static_cast<std::int64_t>(insn.immediate);
  }

  Emitter& out_;
  const Stubs& stubs_;
  const BlockMode mode_;
  const bool count_;
  const bool quick_loop_;
  Fetch fetch_;
  void* context_;
  std::int64_t offset_ = 0;  // of the present instruction in its page
  std::vector<Cold> cold_;
  std::vector<std::pair<std::size_t, Insn>> specials_;  // by the place behind their call sites
  std::vector<std::size_t> starts_;                     // code offset of each guest instruction
  std::vector<std::pair<std::size_t, std::size_t>>
      pending_next_;  // call sites that want the next one's start
  EmittedBlock* block_ = nullptr;
  std::vector<Insn> insns_;
  AccessPlan plan_{};
  // Where the code wants the block's length, which is known at its end: places of 32-bit displacements and
  // their sign, and call sites.
  std::vector<std::pair<std::size_t, int>> lengths_;
  std::vector<std::pair<std::size_t, std::size_t>> sites_;  // place of `unspent`, index of the instruction
  bool vectors_here_ = false;
  bool check_interrupts_ = false;  // after the next instruction: STI was before it
};

}  // namespace wisp::soft
