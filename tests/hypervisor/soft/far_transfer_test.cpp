// Far jumps, calls and returns, IRET, and the fast system calls.
#include <gtest/gtest.h>

#include <array>

#include "hypervisor/soft/system_kit.h"

namespace wisp::soft {
namespace {

using Kit = SystemKit;

constexpr std::uint64_t kStackTop = Kit::kKernelStack - 0x1000;
constexpr std::uint64_t kTarget = 0x32000;

std::string jump(Kit& kit, std::uint16_t selector, std::uint64_t offset, std::uint32_t size) {
  return far_jump(kit.core(), selector, offset, size) == Outcome::kJump ? "" : kit.fault();
}
std::string call(Kit& kit, std::uint16_t selector, std::uint64_t offset, std::uint32_t size) {
  return far_call(kit.core(), selector, offset, size, kit.cpu().rip + 7) == Outcome::kJump ? "" : kit.fault();
}
std::string iret(Kit& kit, std::uint32_t size) {
  return interrupt_return(kit.core(), size) == Outcome::kJump ? "" : kit.fault();
}
std::string retf(Kit& kit, std::uint32_t size, std::uint32_t drop = 0) {
  return far_return(kit.core(), size, drop) == Outcome::kJump ? "" : kit.fault();
}

template <typename T>
void put_words(Kit& kit, std::uint64_t gpa, std::initializer_list<T> words) {
  for (const T word : words) {
    kit.put(gpa, word);
    gpa += sizeof word;
  }
}

TEST(FarJump, FromRealModeIntoProtectedModeAndBack) {
  Kit kit;
  kit.protected_mode(0);
  kit.cpu().segments[kCs] = {.base = 0, .limit = 0xffff, .selector = 0, .attributes = 0x9b};
  EXPECT_EQ(jump(kit, Kit::kCode32, kTarget, 4), "");
  EXPECT_EQ(kit.cpu().rip, kTarget);
  EXPECT_TRUE(kit.cpu().segments[kCs].big());
  kit.cpu().cr0 &= ~cr0::kPe;
  EXPECT_EQ(jump(kit, 0x1000, 0x10, 2), "");
  EXPECT_EQ(kit.cpu().segments[kCs].base, 0x10000U);
}

TEST(FarJump, EntersAndLeavesCompatibilityMode) {
  Kit kit;
  kit.compatibility_mode(0);
  EXPECT_EQ(jump(kit, Kit::kCode64, kTarget, 4), "");
  EXPECT_TRUE(kit.cpu().code64());
  EXPECT_EQ(jump(kit, Kit::kCode32, kTarget, 8), "");
  EXPECT_FALSE(kit.cpu().code64());
}

TEST(FarJump, Checks) {
  Kit kit;
  kit.long_mode(0);
  EXPECT_EQ(jump(kit, 0, kTarget, 8), "#GP(0)");
  EXPECT_EQ(jump(kit, 0xb8, kTarget, 8), "#GP(184)");
  EXPECT_EQ(jump(kit, Kit::kData, kTarget, 8), "#GP(16)");
  EXPECT_EQ(jump(kit, Kit::kBroken, kTarget, 8), "#GP(152)");
  EXPECT_EQ(jump(kit, Kit::kUserCode64, kTarget, 8), "#GP(40)");
  EXPECT_EQ(jump(kit, Kit::kTask, kTarget, 8), "#GP(48)");
  EXPECT_EQ(jump(kit, Kit::kCode64, 0x800000000000, 8), "#GP(0)");
  EXPECT_EQ(jump(kit, Kit::kCode64 | 3, kTarget, 8), "#GP(8)");
  kit.descriptor(Kit::kAbsent, 0, 0xfffff, 0xa01b);
  EXPECT_EQ(jump(kit, Kit::kAbsent, kTarget, 8), "#NP(72)");
  EXPECT_EQ(kit.cpu().rip, 0x30000U);
  EXPECT_EQ(kit.cpu().segments[kCs].selector, Kit::kCode64);
}

TEST(FarJump, ConformingCodeRunsInTheCallersRing) {
  Kit kit;
  kit.long_mode(3);
  EXPECT_EQ(jump(kit, Kit::kConforming, kTarget, 8), "");
  EXPECT_EQ(kit.cpu().segments[kCs].selector, Kit::kConforming | 3);
  EXPECT_EQ(kit.cpu().cpl, 3);
}

TEST(FarCall, PushesCsAndTheReturnAddress) {
  Kit kit;
  kit.long_mode(0);
  EXPECT_EQ(call(kit, Kit::kCode64, kTarget, 4), "");
  EXPECT_EQ(kit.cpu().gpr[kRsp], kStackTop - 8);
  EXPECT_EQ(kit.get<std::uint32_t>(kStackTop - 8), 0x30007U);
  EXPECT_EQ(kit.get<std::uint32_t>(kStackTop - 4), Kit::kCode64);
  EXPECT_EQ(retf(kit, 4, 16), "");
  EXPECT_EQ(kit.cpu().gpr[kRsp], kStackTop + 16);
  EXPECT_EQ(kit.cpu().rip, 0x30007U);
}

TEST(FarCall, CallGateOfLongModeSwitchesStackAndRing) {
  Kit kit;
  kit.long_mode(3);
  Cpu& cpu = kit.cpu();
  kit.call_gate(Kit::kGate, {.selector = Kit::kCode64, .offset = 0xffffffff80001000, .type = 12, .dpl = 3});
  EXPECT_EQ(call(kit, Kit::kGate | 3, 0, 4), "");
  const std::uint64_t sp = Kit::kKernelStack - 32;
  EXPECT_EQ(cpu.gpr[kRsp], sp);
  EXPECT_EQ(kit.get<std::uint64_t>(sp), 0x30007U);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 8), Kit::kUserCode64);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 16), Kit::kUserStack);
  EXPECT_EQ(kit.get<std::uint64_t>(sp + 24), Kit::kUserData);
  EXPECT_EQ(cpu.rip, 0xffffffff80001000);
  EXPECT_EQ(cpu.cpl, 0);
  EXPECT_EQ(cpu.segments[kSs].selector, 0);
  // And back out.
  EXPECT_EQ(retf(kit, 8), "");
  EXPECT_EQ(cpu.cpl, 3);
  EXPECT_EQ(cpu.gpr[kRsp], Kit::kUserStack);
  EXPECT_EQ(cpu.segments[kSs].selector, Kit::kUserData);
}

TEST(FarCall, CallGateChecks) {
  Kit kit;
  kit.long_mode(3);
  kit.call_gate(Kit::kGate, {.selector = Kit::kCode64, .offset = kTarget, .type = 12, .dpl = 0});
  EXPECT_EQ(call(kit, Kit::kGate | 3, 0, 4), "#GP(96)");
  kit.call_gate(Kit::kGate,
                {.selector = Kit::kCode64, .offset = kTarget, .type = 12, .dpl = 3, .present = false});
  EXPECT_EQ(call(kit, Kit::kGate | 3, 0, 4), "#NP(96)");
  kit.call_gate(Kit::kGate, {.selector = Kit::kCode32, .offset = kTarget, .type = 12, .dpl = 3});
  EXPECT_EQ(call(kit, Kit::kGate | 3, 0, 4), "#GP(64)");
  kit.call_gate(Kit::kGate, {.selector = Kit::kCode64, .offset = kTarget, .type = 12, .dpl = 3});
  EXPECT_EQ(jump(kit, Kit::kGate | 3, 0, 4), "#GP(8)");   // a jump does not change rings
  kit.put<std::uint8_t>(Kit::kGdt + Kit::kGate + 13, 1);  // type bits of the upper half
  EXPECT_EQ(call(kit, Kit::kGate | 3, 0, 4), "#GP(96)");
}

TEST(FarCall, CallGateOf32BitsCopiesParameters) {
  Kit kit;
  kit.protected_mode(3);
  Cpu& cpu = kit.cpu();
  kit.call_gate(Kit::kGate, {.selector = Kit::kCode32, .offset = kTarget, .type = 12, .dpl = 3, .extra = 2});
  put_words<std::uint32_t>(kit, Kit::kUserStack, {0x11111111, 0x22222222});
  EXPECT_EQ(call(kit, Kit::kGate | 3, 0, 4), "");
  const std::uint64_t sp = Kit::kKernelStack - 24;
  EXPECT_EQ(cpu.gpr[kRsp], sp);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 4), Kit::kUserCode32);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 8), 0x11111111U);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 12), 0x22222222U);
  EXPECT_EQ(kit.get<std::uint32_t>(sp + 16), Kit::kUserStack);
  EXPECT_EQ(retf(kit, 4, 8), "");
  EXPECT_EQ(cpu.gpr[kRsp], Kit::kUserStack + 8);
  EXPECT_EQ(cpu.cpl, 3);
}

TEST(InterruptReturn, ToTheSameRingInLongModePopsFiveWords) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.nmi_masked = true;
  put_words<std::uint64_t>(
      kit, kStackTop,
      {0x30123, Kit::kCode64, flag::kIf | flag::kZf | flag::kFixed | flag::kAc, 0x21000, Kit::kData});
  EXPECT_EQ(iret(kit, 8), "");
  EXPECT_EQ(cpu.rip, 0x30123U);
  EXPECT_EQ(cpu.gpr[kRsp], 0x21000U);
  EXPECT_EQ(cpu.rflags(), flag::kIf | flag::kZf | flag::kFixed | flag::kAc);
  EXPECT_FALSE(cpu.nmi_masked);
}

TEST(InterruptReturn, ToRing3DropsInnerSegments) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.segments[kFs] = {.base = 0x7f0000001000, .selector = 0};
  cpu.segments[kEs].selector = Kit::kUserData;
  cpu.segments[kEs].attributes = 0xc0f3;
  put_words<std::uint64_t>(kit, kStackTop,
                           {0x7fff00000000, Kit::kUserCode64, 0x202, 0x7ffe12345678, Kit::kUserData});
  EXPECT_EQ(iret(kit, 8), "");
  EXPECT_EQ(cpu.cpl, 3);
  EXPECT_EQ(cpu.segments[kDs].selector, 0);
  EXPECT_EQ(cpu.segments[kDs].attributes, 0);
  EXPECT_EQ(cpu.segments[kEs].selector, Kit::kUserData);
  EXPECT_EQ(cpu.segments[kFs].base, 0x7f0000001000U);
  EXPECT_EQ(cpu.gpr[kRsp], 0x7ffe12345678U);
}

TEST(InterruptReturn, ToCompatibilityModeTakes32BitsOfTheStackPointer) {
  Kit kit;
  kit.long_mode(0);
  put_words<std::uint64_t>(kit, kStackTop, {0x1000, Kit::kUserCode32, 0x202, 0x123456789a, Kit::kUserData});
  EXPECT_EQ(iret(kit, 8), "");
  EXPECT_EQ(kit.cpu().gpr[kRsp], 0x3456789aU);
  EXPECT_FALSE(kit.cpu().code64());
}

TEST(InterruptReturn, Checks) {
  Kit kit;
  const auto attempt = [&kit](std::uint64_t rip, std::uint64_t cs, std::uint64_t ss) {
    kit.long_mode(0);
    put_words<std::uint64_t>(kit, kStackTop, {rip, cs, 0x202, 0x21000, ss});
    const std::string fault = iret(kit, 8);
    if (!fault.empty()) {
      EXPECT_EQ(kit.cpu().gpr[kRsp], kStackTop);
      EXPECT_EQ(kit.cpu().rip, 0x30000U);
      EXPECT_EQ(kit.cpu().cpl, 0);
    }
    return fault;
  };
  EXPECT_EQ(attempt(kTarget, 0, Kit::kData), "#GP(0)");
  EXPECT_EQ(attempt(kTarget, 0xb8, Kit::kData), "#GP(184)");
  EXPECT_EQ(attempt(kTarget, Kit::kData, Kit::kData), "#GP(16)");
  EXPECT_EQ(attempt(kTarget, Kit::kUserCode64 & ~3, Kit::kData), "#GP(40)");
  EXPECT_EQ(attempt(kTarget, Kit::kBroken, Kit::kData), "#GP(152)");
  EXPECT_EQ(attempt(kTarget, Kit::kUserCode64, Kit::kData), "#GP(16)");
  EXPECT_EQ(attempt(kTarget, Kit::kUserCode64, 3), "#GP(0)");
  EXPECT_EQ(attempt(kTarget, Kit::kCode64, 0), "");
  EXPECT_EQ(attempt(kTarget, Kit::kCode64, 3), "#GP(0)");
  EXPECT_EQ(attempt(kTarget, Kit::kCode32, 0), "#GP(0)");
  EXPECT_EQ(attempt(kTarget, Kit::kCode64, Kit::kAbsent), "#SS(72)");
  EXPECT_EQ(attempt(0x800000000000, Kit::kCode64, Kit::kData), "#GP(0)");
  EXPECT_EQ(attempt(0x800000000000, Kit::kUserCode64, Kit::kUserData), "#GP(0)");
  kit.long_mode(0);
  kit.cpu().other_flags |= flag::kNt;
  EXPECT_EQ(iret(kit, 8), "#GP(0)");
}

TEST(InterruptReturn, Ring3KeepsIoplAndIf) {
  Kit kit;
  kit.long_mode(3);
  put_words<std::uint64_t>(kit, Kit::kUserStack,
                           {0x200000, Kit::kUserCode64, 0x3002, 0x250000, Kit::kUserData});
  kit.cpu().interrupt_flag = flag::kIf;
  EXPECT_EQ(iret(kit, 8), "");
  EXPECT_EQ(kit.cpu().rflags(), flag::kIf | flag::kFixed);
}

TEST(InterruptReturn, SixteenBitOperandsLeaveTheUpperFlags) {
  Kit kit;
  kit.protected_mode(0);
  kit.cpu().other_flags |= flag::kId | flag::kAc;
  put_words<std::uint16_t>(kit, kStackTop, {0x1000, Kit::kCode32, 0x0202});
  EXPECT_EQ(iret(kit, 2), "");
  EXPECT_EQ(kit.cpu().rflags(), flag::kId | flag::kAc | flag::kIf | flag::kFixed);
  EXPECT_EQ(kit.cpu().gpr[kRsp], kStackTop + 6);
}

TEST(InterruptReturn, InProtectedModeToRing3) {
  Kit kit;
  kit.protected_mode(0);
  put_words<std::uint32_t>(kit, kStackTop, {0x200000, Kit::kUserCode32, 0x202, 0x250000, Kit::kUserData});
  EXPECT_EQ(iret(kit, 4), "");
  EXPECT_EQ(kit.cpu().cpl, 3);
  EXPECT_EQ(kit.cpu().gpr[kRsp], 0x250000U);
  EXPECT_EQ(kit.cpu().segments[kDs].attributes, 0);
}

TEST(InterruptReturn, InRealMode) {
  Kit kit;
  kit.real_mode();
  put_words<std::uint16_t>(kit, 0x8000, {0x1234, 0x2000, 0x0ed7});
  EXPECT_EQ(iret(kit, 2), "");
  EXPECT_EQ(kit.cpu().rip, 0x1234U);
  EXPECT_EQ(kit.cpu().segments[kCs].base, 0x20000U);
  EXPECT_EQ(kit.cpu().rflags(), 0x0ed7U);
  EXPECT_EQ(kit.cpu().gpr[kRsp], 0x8006U);
}

TEST(FarReturn, NeverInward) {
  Kit kit;
  kit.long_mode(3);
  put_words<std::uint64_t>(kit, Kit::kUserStack, {kTarget, Kit::kCode64});
  EXPECT_EQ(retf(kit, 8), "#GP(8)");
}

class FastCalls : public ::testing::Test {
 protected:
  void SetUp() override {
    kit.long_mode(3);
    kit.cpu().msr.star = 0x0018000800000000;
    kit.cpu().msr.lstar = 0xffffffff81000000;
    kit.cpu().msr.sfmask = flag::kIf | flag::kTf;
  }
  Kit kit;
};

TEST_F(FastCalls, SyscallAndSysret) {
  Cpu& cpu = kit.cpu();
  cpu.set_rflags(flag::kIf | flag::kCf | flag::kFixed);
  EXPECT_EQ(kit.run({0x0f, 0x05}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, 0xffffffff81000000);
  EXPECT_EQ(cpu.gpr[kRcx], 0x30002U);
  EXPECT_EQ(cpu.gpr[kR11], flag::kIf | flag::kCf | flag::kFixed);
  EXPECT_EQ(cpu.rflags(), flag::kCf | flag::kFixed);
  EXPECT_EQ(cpu.cpl, 0);
  EXPECT_EQ(cpu.segments[kCs].selector, 8);
  EXPECT_EQ(cpu.segments[kCs].attributes, 0xa09b);
  EXPECT_EQ(cpu.segments[kSs].selector, 16);
  cpu.gpr[kR11] |= flag::kRf | flag::kVm;
  EXPECT_EQ(kit.run({0x48, 0x0f, 0x07}), Outcome::kJump);
  EXPECT_EQ(cpu.cpl, 3);
  EXPECT_EQ(cpu.rip, 0x30002U);
  EXPECT_EQ(cpu.segments[kCs].selector, Kit::kUserCode64);
  EXPECT_EQ(cpu.segments[kCs].attributes, 0xa0fb);
  EXPECT_EQ(cpu.segments[kSs].selector, Kit::kUserData);
  EXPECT_EQ(cpu.segments[kSs].attributes, 0xc0f3);
  EXPECT_EQ(cpu.rflags(), flag::kIf | flag::kCf | flag::kFixed);
}

TEST_F(FastCalls, SysretTo32Bits) {
  kit.cpu().cpl = 0;
  kit.cpu().gpr[kRcx] = 0xffffffff12345678;
  EXPECT_EQ(kit.run({0x0f, 0x07}), Outcome::kJump);
  EXPECT_EQ(kit.cpu().rip, 0x12345678U);
  EXPECT_EQ(kit.cpu().segments[kCs].selector, Kit::kUserCode32);
  EXPECT_FALSE(kit.cpu().code64());
}

TEST_F(FastCalls, Faults) {
  EXPECT_EQ(kit.faults({0x0f, 0x07}), "#GP(0)");  // ring 3
  kit.cpu().cpl = 0;
  kit.cpu().gpr[kRcx] = 0x800000000000;
  EXPECT_EQ(kit.faults({0x48, 0x0f, 0x07}), "#GP(0)");
  EXPECT_EQ(kit.cpu().cpl, 0);
  kit.cpu().efer &= ~efer::kSce;
  EXPECT_EQ(kit.faults({0x0f, 0x05}), "#UD");
  EXPECT_EQ(kit.faults({0x0f, 0x07}), "#UD");
  kit.compatibility_mode(3);
  EXPECT_EQ(kit.faults({0x0f, 0x05}), "#UD");
}

TEST_F(FastCalls, SysenterAndSysexit) {
  Cpu& cpu = kit.cpu();
  EXPECT_EQ(kit.faults({0x0f, 0x34}), "#GP(0)");  // SYSENTER_CS is 0
  kit.compatibility_mode(3);
  cpu.msr.sysenter_cs = 8;
  cpu.msr.sysenter_esp = 0xffff800000001000;
  cpu.msr.sysenter_eip = 0xffffffff81000100;
  cpu.interrupt_flag = flag::kIf;
  EXPECT_EQ(kit.run({0x0f, 0x34}), Outcome::kJump);
  EXPECT_TRUE(cpu.code64());
  EXPECT_EQ(cpu.cpl, 0);
  EXPECT_EQ(cpu.gpr[kRsp], 0xffff800000001000);
  EXPECT_EQ(cpu.interrupt_flag, 0U);
  cpu.gpr[kRcx] = 0x6bcd00001000;
  cpu.gpr[kRdx] = 0x123400002000;
  EXPECT_EQ(kit.run({0x48, 0x0f, 0x35}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, 0x123400002000U);
  EXPECT_EQ(cpu.gpr[kRsp], 0x6bcd00001000U);
  EXPECT_EQ(cpu.segments[kCs].selector, 8 + 32 + 3);
  EXPECT_EQ(cpu.segments[kSs].selector, 8 + 40 + 3);
  EXPECT_EQ(kit.faults({0x0f, 0x35}), "#GP(0)");  // ring 3
  kit.long_mode(0);
  cpu.msr.sysenter_cs = 8;
  cpu.gpr[kRcx] = 0x6bcd00001000;
  cpu.gpr[kRdx] = 0x123400002000;
  EXPECT_EQ(kit.run({0x0f, 0x35}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, 0x2000U);
  EXPECT_EQ(cpu.segments[kCs].selector, 8 + 16 + 3);
  EXPECT_FALSE(cpu.code64());
}

}  // namespace
}  // namespace wisp::soft
