// Guests that mean no good: whatever they do, the processor comes back at once when it is kicked.
#include "hypervisor/soft/vm_kit.h"

namespace wisp::soft {
namespace {

class Hostile : public VmKit {};

// Every page is one and the same, and full of loads of SS: each would hold interrupts back for one more.
TEST_P(Hostile, LoadsOfTheStackSegmentWithoutEnd) {
  CpuState state = long_mode();
  for (std::uint64_t i = 0; i < 512; ++i) {
    put(kPml4 + i * 8, kPdpt | 3);
    put(kPdpt + i * 8, kPd | 3);
    put(kPd + i * 8, kPt | 3);
    put(kPt + i * 8, kCode | 3);
  }
  fill(kCode, 0x1000, {0x8e, 0xd0});  // mov ss, eax: the null selector
  ASSERT_TRUE(vcpu_->load(state));
  EXPECT_TRUE(std::holds_alternative<InterruptedExit>(run_and_kick()));
}

TEST_P(Hostile, LoadsOfTheStackSegmentAroundARealModeSegment) {
  auto saved = vcpu_->save();
  ASSERT_TRUE(saved);
  CpuState state = *saved;
  state.sregs.cs.base = 0x20000;
  state.sregs.cs.selector = 0x2000;
  state.regs = {.rip = 0, .rflags = 2};
  fill(0x20000, 0x10000, {0x8e, 0xd0});
  ASSERT_TRUE(vcpu_->load(state));
  EXPECT_TRUE(std::holds_alternative<InterruptedExit>(run_and_kick()));
}

INSTANTIATE_TEST_SUITE_P(Executors, Hostile, both_executors(), executor_name);

}  // namespace
}  // namespace wisp::soft
