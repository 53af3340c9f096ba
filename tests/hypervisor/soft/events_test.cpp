// Delivery of exceptions and interrupts in every mode, and what becomes of faults on the way.
#include <gtest/gtest.h>

#include "hypervisor/soft/system_kit.h"

namespace wisp::soft {
namespace {

using Kit = SystemKit;

constexpr std::uint64_t kHandler = 0x31000;
constexpr std::uint64_t kStackTop = Kit::kKernelStack - 0x1000;  // of ring 0 in the kit

bool deliver(Kit& kit, std::uint8_t vector, EventKind kind, std::uint8_t length = 0) {
  return deliver_event(kit.core(), Fault{.vector = vector}, kind, length);
}

TEST(LongModeEvents, InterruptInTheSameRingPushesFiveWordsOnAnAlignedStack) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  kit.gate64(0x40, {.selector = Kit::kCode64, .offset = kHandler});
  cpu.gpr[kRsp] = kStackTop - 4;
  cpu.set_rflags(flag::kIf | flag::kTf | flag::kNt | flag::kCf | flag::kFixed);
  ASSERT_TRUE(deliver(kit, 0x40, EventKind::kExternal));
  const std::uint64_t sp = ((kStackTop - 4) & ~0xfULL) - 40;
  EXPECT_EQ(cpu.gpr[kRsp], sp);
  EXPECT_EQ(kit.get<std::uint64_t>(sp), 0x30000U);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 8), Kit::kCode64);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 16), flag::kIf | flag::kTf | flag::kNt | flag::kCf | flag::kFixed);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 24), kStackTop - 4);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 32), Kit::kData);
  EXPECT_EQ(cpu.rip, kHandler);
  EXPECT_EQ(cpu.rflags(), flag::kCf | flag::kFixed);
  EXPECT_EQ(cpu.segments[kSs].selector, Kit::kData);
}

TEST(LongModeEvents, TrapGateLeavesInterruptsOn) {
  Kit kit;
  kit.long_mode(0);
  kit.gate64(3, {.selector = Kit::kCode64, .offset = kHandler, .type = 15});
  kit.cpu().interrupt_flag = flag::kIf;
  ASSERT_TRUE(deliver(kit, 3, EventKind::kSoftwareInterrupt, 1));
  EXPECT_EQ(kit.cpu().interrupt_flag, flag::kIf);
}

TEST(LongModeEvents, FromRing3TheStackIsOfTheTssAndSsIsNull) {
  Kit kit;
  kit.long_mode(3);
  Cpu& cpu = kit.cpu();
  kit.gate64(14, {.selector = Kit::kCode64, .offset = 0xffffffff81000000});
  const Fault fault{.vector = vec::kPf, .has_error_code = true, .error_code = 6, .address = 0x123456789};
  ASSERT_TRUE(deliver_event(kit.core(), fault, EventKind::kFault));
  const std::uint64_t sp = Kit::kKernelStack - 48;
  EXPECT_EQ(cpu.gpr[kRsp], sp);
  EXPECT_EQ(kit.get<std::uint64_t>(sp), 6U);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 16), Kit::kUserCode64);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 24), flag::kFixed | flag::kRf);  // faults set RF
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 32), Kit::kUserStack);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 40), Kit::kUserData);
  EXPECT_EQ(cpu.cr2, 0x123456789U);
  EXPECT_EQ(cpu.cpl, 0);
  EXPECT_EQ(cpu.segments[kSs].selector, 0);
  EXPECT_EQ(cpu.segments[kSs].attributes, 0);
  EXPECT_EQ(cpu.segments[kCs].selector, Kit::kCode64);
  EXPECT_EQ(cpu.rip, 0xffffffff81000000);
}

TEST(LongModeEvents, IstSwitchesTheStackInTheSameRingAndKeepsSs) {
  Kit kit;
  kit.long_mode(0);
  kit.gate64(2, {.selector = Kit::kCode64, .offset = kHandler, .extra = 1});
  ASSERT_TRUE(deliver(kit, 2, EventKind::kNmi));
  EXPECT_EQ(kit.cpu().gpr[kRsp], Kit::kIstStack - 40);
  EXPECT_EQ(kit.cpu().segments[kSs].selector, Kit::kData);
  EXPECT_TRUE(kit.cpu().nmi_masked);
}

TEST(LongModeEvents, FromCompatibilityModeItIs64BitCodeAfterwards) {
  Kit kit;
  kit.compatibility_mode(3);
  kit.gate64(0x80, {.selector = Kit::kCode64, .offset = kHandler, .dpl = 3});
  ASSERT_TRUE(deliver(kit, 0x80, EventKind::kSoftwareInterrupt, 2));
  EXPECT_TRUE(kit.cpu().code64());
  EXPECT_EQ(kit.get<std::uint64_t>(Kit::kKernelStack - 32), Kit::kUserCode32);
}

// What a failing delivery makes of an interrupt: the vector of the handler that runs in the end, and the
// error code that it finds.
struct Ending {
  std::uint8_t vector = 0;
  std::uint64_t error = 0;
  bool operator==(const Ending&) const = default;
};

class FailingDelivery : public ::testing::Test {
 protected:
  void SetUp() override {
    kit.long_mode(3);
    for (std::uint8_t vector = 0; vector < 32; ++vector) {
      kit.gate64(vector, {.selector = Kit::kCode64, .offset = kHandler + vector * 16U});
    }
  }
  Ending end(std::uint8_t vector, EventKind kind, std::uint8_t length = 0) {
    EXPECT_TRUE(deliver(kit, vector, kind, length));
    const auto handler = static_cast<std::uint8_t>((kit.cpu().rip - kHandler) / 16);
    return {.vector = handler, .error = kit.get<std::uint64_t>(Kit::kKernelStack - 48)};
  }
  Kit kit;
};

TEST_F(FailingDelivery, SoftwareInterruptNeedsTheGatesDpl) {
  kit.gate64(0x50, {.selector = Kit::kCode64, .offset = kHandler, .dpl = 0});
  kit.cpu().rip = 0x30002;
  EXPECT_EQ(end(0x50, EventKind::kSoftwareInterrupt, 2), (Ending{vec::kGp, 0x50 * 8 + 2}));
  // The fault is the INT's: it points at it.
  EXPECT_EQ(kit.get<std::uint64_t>(Kit::kKernelStack - 40), 0x30000U);
}

TEST_F(FailingDelivery, HardwareInterruptDoesNotButSetsExt) {
  kit.gate64(0x50, {.selector = Kit::kCode64, .offset = kHandler + 0x500, .dpl = 0});
  EXPECT_EQ(end(0x50, EventKind::kExternal).vector, 0x50);
  kit.long_mode(3);
  kit.gate64(0x51, {.selector = Kit::kCode64, .offset = kHandler, .present = false});
  EXPECT_EQ(end(0x51, EventKind::kExternal), (Ending{vec::kNp, 0x51 * 8 + 3}));
}

TEST_F(FailingDelivery, GateTypesAndSelectors) {
  kit.gate64(0x50, {.selector = Kit::kCode64, .offset = kHandler, .type = 5, .dpl = 3});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kGp, 0x50 * 8 + 3}));
  kit.long_mode(3);
  kit.gate64(0x50, {.selector = 0, .offset = kHandler});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kGp, 1}));
  kit.long_mode(3);
  kit.gate64(0x50, {.selector = Kit::kData, .offset = kHandler});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kGp, Kit::kData | 1}));
  kit.long_mode(3);
  kit.gate64(0x50, {.selector = Kit::kCode32, .offset = kHandler});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kGp, Kit::kCode32 | 1}));
  kit.long_mode(3);
  kit.gate64(0x50, {.selector = Kit::kCode64, .offset = 0x800000000000});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kGp, 1}));
  kit.long_mode(3);
  kit.cpu().idt.limit = 0x50 * 16 + 14;
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kGp, 0x50 * 8 + 3}));
}

TEST_F(FailingDelivery, ContributoryFaultsBecomeDoubleFaults) {
  kit.gate64(vec::kGp, {.selector = Kit::kCode64, .offset = kHandler, .present = false});
  const Fault fault{.vector = vec::kGp, .has_error_code = true, .error_code = 8};
  ASSERT_TRUE(deliver_event(kit.core(), fault, EventKind::kFault));
  EXPECT_EQ(kit.cpu().rip, kHandler + vec::kDf * 16U);
  EXPECT_EQ(kit.get<std::uint64_t>(Kit::kKernelStack - 48), 0U);
}

TEST_F(FailingDelivery, PageFaultAfterAContributoryFaultIsDeliveredAsSuch) {
  // #DE's handler has a stack that is not there.
  kit.put<std::uint64_t>(Kit::kTss + 0x24 + 8, 0x40000000);
  kit.gate64(vec::kDe, {.selector = Kit::kCode64, .offset = kHandler, .extra = 2});
  ASSERT_TRUE(deliver(kit, vec::kDe, EventKind::kFault));
  EXPECT_EQ(kit.cpu().rip, kHandler + vec::kPf * 16U);
  EXPECT_EQ(kit.cpu().cr2 & ~0xfffULL, 0x3ffff000U);
  EXPECT_EQ(kit.get<std::uint64_t>(Kit::kKernelStack - 48), 2U);  // a write by the processor itself
}

TEST_F(FailingDelivery, PageFaultInAPageFaultIsADoubleFault) {
  kit.put<std::uint64_t>(Kit::kTss + 0x24 + 8, 0x40000000);
  kit.gate64(vec::kPf, {.selector = Kit::kCode64, .offset = kHandler, .extra = 2});
  ASSERT_TRUE(deliver(kit, vec::kPf, EventKind::kFault));
  EXPECT_EQ(kit.cpu().rip, kHandler + vec::kDf * 16U);
}

TEST_F(FailingDelivery, FaultInADoubleFaultShutsDown) {
  kit.gate64(vec::kDf, {.selector = Kit::kCode64, .offset = kHandler, .present = false});
  kit.gate64(vec::kGp, {.selector = Kit::kCode64, .offset = kHandler, .present = false});
  EXPECT_FALSE(deliver(kit, vec::kGp, EventKind::kFault));
  kit.long_mode(3);
  kit.cpu().idt = {};
  EXPECT_FALSE(deliver(kit, 0x20, EventKind::kExternal));
}

TEST_F(FailingDelivery, TssThatIsTooShortIsTs) {
  kit.cpu().tr.limit = 0x2a;
  kit.gate64(0x50, {.selector = Kit::kCode64, .offset = kHandler, .extra = 1});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kTs, Kit::kTask | 1}));
}

TEST_F(FailingDelivery, NonCanonicalStackIsSs) {
  kit.put<std::uint64_t>(Kit::kTss + 0x24, 0x8000000000000000);
  kit.gate64(0x50, {.selector = Kit::kCode64, .offset = kHandler, .extra = 1});
  EXPECT_EQ(end(0x50, EventKind::kExternal), (Ending{vec::kSs, 1}));
}

TEST(DebugEvents, SetDr6AndClearGeneralDetect) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  kit.gate64(vec::kDb, {.selector = Kit::kCode64, .offset = kHandler});
  cpu.dr6 = 0xffff0ff5;
  cpu.dr7 = 0x2400;
  ASSERT_TRUE(deliver_event(kit.core(), {.vector = vec::kDb, .address = 1U << 14}, EventKind::kTrap));
  EXPECT_EQ(cpu.dr6, 0xffff4ff0);
  EXPECT_EQ(cpu.dr7, 0x400U);
  const std::uint64_t frame = cpu.gpr[kRsp];
  EXPECT_EQ(kit.get<std::uint64_t>(frame + 16) & flag::kRf, 0U);
}

TEST(DebugEvents, BreakpointFaultsDoNotSetRf) {
  Kit kit;
  kit.long_mode(0);
  kit.gate64(vec::kDb, {.selector = Kit::kCode64, .offset = kHandler});
  ASSERT_TRUE(deliver_event(kit.core(), {.vector = vec::kDb, .address = 1}, EventKind::kFault));
  EXPECT_EQ(kit.get<std::uint64_t>(kit.cpu().gpr[kRsp] + 16) & flag::kRf, 0U);
  EXPECT_FALSE(debug_active(kit.cpu()));
  kit.cpu().dr7 |= 1;
  EXPECT_TRUE(debug_active(kit.cpu()));
}

TEST(ProtectedModeEvents, InterruptFromRing3TakesTheStackOfTheTss) {
  Kit kit;
  kit.protected_mode(3);
  Cpu& cpu = kit.cpu();
  kit.gate32(vec::kGp, {.selector = Kit::kCode32, .offset = kHandler});
  const Fault fault{.vector = vec::kGp, .has_error_code = true, .error_code = 0x18};
  ASSERT_TRUE(deliver_event(kit.core(), fault, EventKind::kFault));
  const std::uint64_t sp = Kit::kKernelStack - 24;
  EXPECT_EQ(cpu.gpr[kRsp], sp);
  EXPECT_EQ(kit.get<std::uint32_t>(sp), 0x18U);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 4), 0x30000U);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 8), Kit::kUserCode32);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 16), Kit::kUserStack);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 20), Kit::kUserData);
  EXPECT_EQ(cpu.segments[kSs].selector, Kit::kData);
  EXPECT_EQ(cpu.cpl, 0);
}

TEST(ProtectedModeEvents, SameRingPushesThreeWordsAnd16BitGatesHalf) {
  Kit kit;
  kit.protected_mode(0);
  kit.gate32(0x20, {.selector = Kit::kCode32, .offset = kHandler});
  ASSERT_TRUE(deliver(kit, 0x20, EventKind::kExternal));
  EXPECT_EQ(kit.cpu().gpr[kRsp], kStackTop - 12);
  EXPECT_EQ(kit.get<std::uint32_t>(kStackTop - 12), 0x30000U);
  kit.protected_mode(0);
  kit.cpu().rip = 0x3456;
  kit.gate32(0x21, {.selector = Kit::kCode32, .offset = 0x1000, .type = 6});
  ASSERT_TRUE(deliver(kit, 0x21, EventKind::kExternal));
  EXPECT_EQ(kit.cpu().gpr[kRsp], kStackTop - 6);
  EXPECT_EQ(kit.get<std::uint16_t>(kStackTop - 6), 0x3456);
}

TEST(ProtectedModeEvents, BadInnerStackIsTsWithItsSelector) {
  Kit kit;
  kit.protected_mode(3);
  kit.put<std::uint16_t>(Kit::kTss + 8, Kit::kUserData);
  kit.gate32(0x20, {.selector = Kit::kCode32, .offset = kHandler});
  kit.gate32(vec::kTs, {.selector = Kit::kConforming32, .offset = kHandler + 0x100});
  ASSERT_TRUE(deliver(kit, 0x20, EventKind::kExternal));
  // The conforming handler runs in ring 3, on the stack that is there.
  EXPECT_EQ(kit.cpu().rip, kHandler + 0x100);
  EXPECT_EQ(kit.get<std::uint32_t>(Kit::kUserStack - 16), (Kit::kUserData & 0xfffcU) | 1);
}

TEST(RealModeEvents, PushThreeWordsAndNoErrorCode) {
  Kit kit;
  kit.real_mode();
  Cpu& cpu = kit.cpu();
  cpu.interrupt_flag = flag::kIf;
  kit.put<std::uint32_t>(vec::kGp * 4, 0x20000123);
  const Fault fault{.vector = vec::kGp, .has_error_code = true};
  ASSERT_TRUE(deliver_event(kit.core(), fault, EventKind::kFault));
  EXPECT_EQ(cpu.gpr[kRsp], 0x7ffaU);
  EXPECT_EQ(kit.get<std::uint16_t>(0x7ffa), 0x1000);
  EXPECT_EQ(kit.get<std::uint16_t>(0x7ffe), flag::kIf | flag::kFixed);
  EXPECT_EQ(cpu.segments[kCs].base, 0x20000U);
  EXPECT_EQ(cpu.rip, 0x123U);
  EXPECT_EQ(cpu.interrupt_flag, 0U);
}

TEST(RealModeEvents, StackWrapsAt64K) {
  Kit kit;
  kit.real_mode();
  kit.put<std::uint32_t>(0x20 * 4, 0x20000123);
  kit.cpu().gpr[kRsp] = 0xabcd0002;
  ASSERT_TRUE(deliver(kit, 0x20, EventKind::kExternal));
  EXPECT_EQ(kit.cpu().gpr[kRsp], 0xabcdfffcU);
  EXPECT_EQ(kit.get<std::uint16_t>(0xfffc), 0x1000);
}

TEST(Virtual8086Events, GoToRing0WithTheDataSegmentsPushed) {
  Kit kit;
  kit.protected_mode(0);
  Cpu& cpu = kit.cpu();
  // Into virtual-8086 mode by IRET, and out of it by an interrupt.
  const std::array<std::uint32_t, 9> frame{0x100,  0x2000, 0x20000 | 0x3202, 0x800, 0x3000,
                                           0x1111, 0x2222, 0x3333,           0x4444};
  for (std::size_t i = 0; i < frame.size(); ++i) {
    kit.put(kStackTop + i * 4, frame[i]);
  }
  ASSERT_EQ(interrupt_return(kit.core(), 4), Outcome::kJump);
  EXPECT_TRUE(cpu.virtual_8086());
  EXPECT_EQ(cpu.cpl, 3);
  EXPECT_EQ(cpu.segments[kCs].base, 0x20000U);
  EXPECT_EQ(cpu.segments[kSs].base, 0x30000U);
  EXPECT_EQ(cpu.segments[kDs].selector, 0x2222);
  EXPECT_EQ(cpu.gpr[kRsp], 0x800U);
  kit.gate32(0x20, {.selector = Kit::kCode32, .offset = kHandler});
  ASSERT_TRUE(deliver(kit, 0x20, EventKind::kExternal));
  EXPECT_FALSE(cpu.virtual_8086());
  EXPECT_EQ(cpu.cpl, 0);
  EXPECT_EQ(cpu.gpr[kRsp], Kit::kKernelStack - 36);
  for (std::size_t i = 0; i < frame.size(); ++i) {
    EXPECT_EQ(kit.get<std::uint32_t>(cpu.gpr[kRsp] + i * 4), frame[i]) << i;
  }
  EXPECT_EQ(cpu.segments[kDs].attributes, 0);
}

TEST(Reset, PowerUpAndInitAndStartup) {
  Kit kit;
  Cpu& cpu = kit.cpu();
  cpu.xcr0 = 7;
  cpu.msr.lstar = 0x1234;
  cpu.cr0 = cr0::kPe | cr0::kCd;
  cpu.nmi_masked = true;
  reset_cpu(cpu, false);
  EXPECT_EQ(cpu.cr0, cr0::kEt | cr0::kCd);
  EXPECT_EQ(cpu.xcr0, 7U);
  EXPECT_EQ(cpu.msr.lstar, 0x1234U);
  EXPECT_EQ(cpu.segments[kCs].base + cpu.rip, 0xfffffff0U);
  EXPECT_FALSE(cpu.nmi_masked);
  reset_cpu(cpu, true);
  EXPECT_EQ(cpu.cr0, 0x60000010U);
  EXPECT_EQ(cpu.xcr0, 1U);
  EXPECT_EQ(cpu.msr.lstar, 0U);
  start_at(cpu, 0x9a);
  EXPECT_EQ(cpu.segments[kCs].base, 0x9a000U);
  EXPECT_EQ(cpu.segments[kCs].selector, 0x9a00);
  EXPECT_EQ(cpu.rip, 0U);
}

}  // namespace
}  // namespace wisp::soft
