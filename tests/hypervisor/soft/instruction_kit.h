// Runs single instructions of the groups that are done in C++ on the processor of the paging kit.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "hypervisor/soft/bare_environment.h"
#include "hypervisor/soft/decoder.h"
#include "hypervisor/soft/paging_kit.h"

namespace wisp::soft {

class InstructionKit : public PagingKit {
 public:
  static constexpr std::uint64_t kStack = 0x3f0000;  // linear and physical

  InstructionKit() : core_{.cpu = cpu(), .mmu = mmu(), .memory = memory(), .env = env} {
    for (std::uint64_t offset = 0; offset < 0x10000; offset += kPageSize) {
      map(kStack - 0x10000 + offset, kStack - 0x10000 + offset);
    }
    cpu().gpr[kRsp] = kStack - 0x1000;
    cpu().rip = 0x401000;
    // The registers of vectors: all in their initial state, which is not in memory.
    cpu().cr4 |= cr4::kOsfxsr | cr4::kOsxsave;
    cpu().xcr0 = 7;
  }

  // 32-bit code and a flat stack, without paging.
  void code32() {
    unpaged_mode();
    cpu().gpr[kRsp] = kStack - 0x1000;
  }
  // 16-bit code and stack, still flat; segments of 64 KiB.
  void code16() {
    unpaged_mode();
    for (Segment& segment : cpu().segments) {
      segment.attributes &= 0x0fff;
      segment.limit = 0xffff;
    }
    cpu().gpr[kRsp] = 0x8000;
    cpu().rip = 0x1000;
  }

  Core& core() { return core_; }
  Insn decoded(const std::vector<std::uint8_t>& code) {
    const bool big = cpu().segments[kCs].big();
    Insn insn;
    EXPECT_EQ(decode(code,
                     cpu().code64() ? CodeSize::k64
                     : big          ? CodeSize::k32
                                    : CodeSize::k16,
                     insn),
              DecodeResult::kDone);
    EXPECT_EQ(insn.length, code.size());
    EXPECT_TRUE(group_of(insn.op) != OpGroup::kNone || insn.op == Op::kUndefined)
        << "nothing executes it here";
    return insn;
  }
  // What kNext leaves is where the group leaves it: rip does not move.
  Outcome run(const std::vector<std::uint8_t>& code) {
    const Insn insn = decoded(code);
    cpu().fault = {};
    cpu().io.answers_used = 0;
    const Outcome outcome = execute_by_group(core_, insn);
    if (outcome != Outcome::kIo) {
      cpu().io.answer_count = 0;
    }
    return outcome;
  }
  // Answers what the instruction asks, until it asks no more.
  Outcome run_with_answers(const std::vector<std::uint8_t>& code,
                           const std::function<void(IoState::Access&)>& answer) {
    for (;;) {
      const Outcome outcome = run(code);
      IoState& io = cpu().io;
      if (outcome != Outcome::kIo || !io.waiting || io.answer_count == IoState::kMax) {
        return outcome;
      }
      io.waiting = false;
      answer(io.wanted);
      io.answers[io.answer_count++] = io.wanted;
    }
  }
  // "" where it ran, else the fault.
  std::string faults(const std::vector<std::uint8_t>& code) { return outcome(run(code) != Outcome::kFault); }

  BareEnvironment env;

 private:
  Core core_;
};

}  // namespace wisp::soft
