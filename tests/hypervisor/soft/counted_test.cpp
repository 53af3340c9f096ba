// Guest time in instructions: whatever the translator makes of a program, it stops at each count where the
// interpreter would, in the same state.
#include <vector>

#include "hypervisor/soft/payload_kit.h"

namespace wisp::soft {
namespace {

class Counted : public Payload {
 protected:
  // Branches over what is rare, taken and not, in the middle of what is translated in one piece; a way back;
  // accesses; and interrupts that are let in. Ends at its HLT.
  void load_program() {
    make_machine();
    put(kData, std::uint64_t{0});
    code(kCode, {0x31, 0xc0,        // xor eax, eax
                 0xf6, 0xc1, 0x01,  // again: test cl, 1
                 0x74, 0x05,        // jz over
                 0x83, 0xc0, 0x03,  // add eax, 3
                 0xff, 0x03,        // inc dword [rbx]
                 0xf6, 0xc1, 0x02,  // over: test cl, 2
                 0x75, 0x03,        // jnz on
                 0x83, 0xc0, 0x05,  // add eax, 5
                 0xfb, 0x90,        // on: sti; nop
                 0x90, 0xfa,        // nop; cli
                 0xff, 0xc9,        // dec ecx
                 0x75, 0xe6,        // jnz again
                 0xf4});
    cpu().gpr[kRcx] = 20;
    cpu().gpr[kRbx] = kData;
    start_ = cpu().retired();
  }
  static constexpr std::uint64_t kHalt = kCode + 28;

  struct Place {
    std::uint64_t count, rip, rax, rcx, flags, data;
    bool operator==(const Place&) const = default;
  };
  // After `instructions` more, and one more yet where that is behind STI: nothing stops there.
  Place after(std::uint64_t instructions) {
    cpu().run = kRunning;
    cpu().set_budget(instructions);
    EXPECT_EQ(run(), Processor::Stop::kAttention);
    return here();
  }
  Place here() {
    return {.count = cpu().retired() - start_,
            .rip = cpu().rip,
            .rax = cpu().gpr[kRax],
            .rcx = cpu().gpr[kRcx],
            .flags = cpu().rflags(),
            .data = get(kData)};
  }

 private:
  std::uint64_t start_ = 0;
};

TEST_P(Counted, StopsAtEachCountWhereSingleStepsGo) {
  load_program();
  std::vector<Place> steps{here()};
  while (cpu().rip != kHalt) {
    const Place next = after(1);
    ASSERT_GE(next.count, steps.size());
    ASSERT_LE(next.count, steps.size() + 1);
    steps.resize(next.count + 1, next);
    ASSERT_LT(steps.size(), 1000U);
  }
  EXPECT_EQ(steps.back().rax, 10 * 3 + 10 * 5U);
  for (std::size_t count = 1; count < steps.size(); ++count) {
    load_program();
    const Place stop = after(count);
    ASSERT_TRUE(stop == steps[count]) << count;
    // And on from there, in whatever block that is the middle of.
    if (stop.count + 7 < steps.size()) {
      ASSERT_TRUE(after(7) == steps[stop.count + 7]) << count;
    }
  }
}

// The first two rounds go different ways; each lets the interrupt in behind the instruction after STI.
TEST_P(Counted, AnInterruptLeavesAtItsCount) {
  load_program();
  cpu().no_interrupt_waits = 0;
  cpu().run = kRunning;
  const std::uint64_t before = cpu().retired();
  cpu().set_budget(100'000);
  EXPECT_EQ(run(), Processor::Stop::kAttention);
  EXPECT_EQ(cpu().rip, kCode + 22);
  EXPECT_EQ(cpu().retired() - before, 8U);
  cpu().interrupt_flag = 0;
  EXPECT_EQ(run(), Processor::Stop::kAttention);
  EXPECT_EQ(cpu().rip, kCode + 22);
  EXPECT_EQ(cpu().retired() - before, 8U + 12U);
}

INSTANTIATE_TEST_SUITE_P(Executors, Counted,
                         testing::Values(ExecutionOptions{.executor = ExecutorChoice::kInterpret,
                                                          .virtual_clock = true},
                                         ExecutionOptions{.virtual_clock = true, .quick_loop = false},
                                         ExecutionOptions{.virtual_clock = true, .quick_loop = true}),
                         executor_name);

}  // namespace
}  // namespace wisp::soft
