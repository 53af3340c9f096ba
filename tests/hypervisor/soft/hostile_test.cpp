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

// A jump to where no address can be has not happened: the fault is its own, and the stack is as it was.
TEST_P(Hostile, JumpsToWhereNoAddressCanBe) {
  struct Case {
    const char* name;
    std::initializer_list<std::uint8_t> bytes;
  };
  constexpr std::uint64_t kNowhere = 0x8000000000000000;
  for (const Case& one :
       {Case{"return", {0xc3}}, Case{"return and drop", {0xc2, 0x10, 0x00}},
        Case{"jump by register", {0xff, 0xe1}}, Case{"jump by memory", {0xff, 0x24, 0x24}},
        Case{"call by register", {0xff, 0xd1}}, Case{"call by memory", {0xff, 0x14, 0x24}}}) {
    SCOPED_TRACE(one.name);
    CpuState state = long_mode();
    gate(13, kHandler);
    code(kHandler, {0x58,                          // pop rax: the error code
                    0x5b,                          // pop rbx: the instruction
                    0x48, 0x8b, 0x54, 0x24, 0x10,  // mov rdx, [rsp + 16]: its stack
                    0xf4});
    put(kStack, kNowhere);
    code(kCode, {0x90, 0x90});
    code(kCode + 2, one.bytes);
    state.regs.rcx = kNowhere;
    state.regs.rbx = 0;
    ASSERT_TRUE(vcpu_->load(state));
    const CpuState end = run_to_halt();
    EXPECT_EQ(end.regs.rax, 0U);
    EXPECT_EQ(end.regs.rbx, kCode + 2);
    EXPECT_EQ(end.regs.rdx, kStack);
  }
}

// The machine has answered, and the instruction that asked has gone from under the processor: nobody waits
// for the answer any more.
TEST_P(Hostile, TheInstructionThatAskedADeviceIsGone) {
  CpuState state = long_mode();
  put(kPd + 16 * 8,
      kPt | 3);  // 0x2000000: the same again, in the same place of the MMU's own cache at + 0x11000
  gate(14, kHandler);
  put(kIdt + 14 * 16 + 4, std::uint8_t{1});  // on a stack of its own, or faults without end would come to one
  put(kTss + 0x24, kStack + 0x1000);
  state.sregs.tr = {.base = kTss, .limit = 0x67, .selector = 0x30, .type = 0xb, .present = true};
  put(kPt + kHandler / 0x1000 * 8, kHandler | 3 | 1ULL << 63);  // not executable
  code(kCode,
       {0x48, 0xc7, 0x04, 0x25, 0x80, 0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // mov qword [0x4080], 0
        0x48, 0x8b, 0x04, 0x25, 0x00, 0x10, 0x01, 0x02,                          // mov rax, [0x2011000]
        0xec,                                                                    // in al, dx
        0xf4});
  state.regs.rdx = 0x2f8;
  for (const bool handled : {true, false}) {
    put(kPt + kCode / 0x1000 * 8, kCode | 3);
    state.sregs.idt.limit = handled ? 0xfff : 0;
    ASSERT_TRUE(vcpu_->load(state));
    Exit exit = run_and_kick();
    if (GetParam() == ExecutorChoice::kTranslate) {
      ASSERT_TRUE(std::holds_alternative<PortReadExit>(exit));
      exit = run_and_kick();
    }
    if (handled) {
      EXPECT_TRUE(std::holds_alternative<InterruptedExit>(exit));
    } else {
      EXPECT_TRUE(std::holds_alternative<ShutdownExit>(exit));
    }
  }
}

// A handler that faults before its first instruction takes time, too: else no timer would ever get in.
class HostileInVirtualTime : public VmKit {
  [[nodiscard]] ExecutionOptions execution() const override {
    return {.virtual_clock = true, .pause_every = 1000};
  }
};

TEST_P(HostileInVirtualTime, FaultsWithoutAnyInstruction) {
  const CpuState state = long_mode();
  put(kPt + kHandler / 0x1000 * 8, kHandler | 3 | 1ULL << 63);  // not executable
  gate(14, kHandler);
  code(kCode, {0xe9, 0xfb, 0x7f, 0x00, 0x00});  // jmp to the handler
  ASSERT_TRUE(vcpu_->load(state));
  const auto begin = std::chrono::steady_clock::now();
  for (int pauses = 0; pauses < 3; ++pauses) {
    EXPECT_TRUE(std::holds_alternative<InterruptedExit>(run_and_kick(std::chrono::seconds(10))));
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(9)) << "it had to be kicked";
}

INSTANTIATE_TEST_SUITE_P(Executors, HostileInVirtualTime, both_executors(), executor_name);
INSTANTIATE_TEST_SUITE_P(Executors, Hostile, both_executors(), executor_name);

}  // namespace
}  // namespace wisp::soft
