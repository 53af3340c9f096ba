// Jumps, calls, returns, the stack and flags, in 64-, 32- and 16-bit code.
#include <gtest/gtest.h>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/instruction_kit.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kTop = InstructionKit::kStack - 0x1000;  // rSP at first
constexpr std::uint64_t kRip = 0x401000;
constexpr std::uint64_t kHole = 0x600000;  // nothing is mapped there

TEST(Jumps, EveryConditionAsTheHostSeesIt) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  // The host's SETcc under the same flags.
  const auto host = [](std::uint64_t flags) {
    std::array<std::uint8_t, 16> set{};
#define WISP_SET(number, name) \
  asm volatile("pushq %1; popfq; set" name " %0" : "=m"(set[number]) : "r"(flags | flag::kFixed) : "cc")
    WISP_SET(0, "o");
    WISP_SET(1, "no");
    WISP_SET(2, "b");
    WISP_SET(3, "ae");
    WISP_SET(4, "e");
    WISP_SET(5, "ne");
    WISP_SET(6, "be");
    WISP_SET(7, "a");
    WISP_SET(8, "s");
    WISP_SET(9, "ns");
    WISP_SET(10, "p");
    WISP_SET(11, "np");
    WISP_SET(12, "l");
    WISP_SET(13, "ge");
    WISP_SET(14, "le");
    WISP_SET(15, "g");
#undef WISP_SET
    return set;
  };
  for (unsigned bits = 0; bits < 64; ++bits) {
    constexpr std::array kFlags{flag::kCf, flag::kPf, flag::kAf, flag::kZf, flag::kSf, flag::kOf};
    std::uint64_t flags = 0;
    for (std::size_t i = 0; i < kFlags.size(); ++i) {
      flags |= (bits >> i & 1) != 0 ? kFlags[i] : 0;
    }
    const std::array<std::uint8_t, 16> expected = host(flags);
    for (std::uint8_t code = 0; code < 16; ++code) {
      cpu.arithmetic_flags = flags;
      cpu.rip = kRip;
      const Outcome near = kit.run({static_cast<std::uint8_t>(0x70 | code), 0x10});
      ASSERT_EQ(near, expected[code] != 0 ? Outcome::kJump : Outcome::kNext) << int{code} << " " << flags;
      ASSERT_EQ(cpu.rip, expected[code] != 0 ? kRip + 0x12 : kRip);
      cpu.rip = kRip;
      const Outcome far = kit.run({0x0f, static_cast<std::uint8_t>(0x80 | code), 0xf0, 0xff, 0xff, 0xff});
      ASSERT_EQ(far, near);
      ASSERT_EQ(cpu.rip, expected[code] != 0 ? kRip + 6 - 0x10 : kRip);
    }
  }
}

TEST(Jumps, ToAddressesThatAreNotCanonicalFaultAndChangeNothing) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRax] = 0x800000000000;
  EXPECT_EQ(kit.faults({0xff, 0xe0}), "#GP(0)");
  EXPECT_EQ(kit.faults({0xff, 0xd0}), "#GP(0)");  // call: nothing is pushed
  EXPECT_EQ(cpu.gpr[kRsp], kTop);
  ASSERT_TRUE(kit.mmu().store(kTop, std::uint64_t{0x800000000000}));
  EXPECT_EQ(kit.faults({0xc3}), "#GP(0)");
  EXPECT_EQ(kit.faults({0xc2, 0x10, 0x00}), "#GP(0)");
  EXPECT_EQ(cpu.gpr[kRsp], kTop);
  EXPECT_EQ(cpu.rip, kRip);
  cpu.rip = 0x7ffffffffff0;
  EXPECT_EQ(kit.faults({0xeb, 0x7f}), "#GP(0)");
  cpu.gpr[kRcx] = 5;
  EXPECT_EQ(kit.faults({0xe2, 0x7f}), "#GP(0)");  // loop: the count stays
  EXPECT_EQ(cpu.gpr[kRcx], 5U);
}

TEST(Jumps, Outside64BitCodeTheLimitCounts) {
  InstructionKit kit;
  kit.code32();
  Cpu& cpu = kit.cpu();
  cpu.rip = 0x1000;
  cpu.segments[kCs].limit = 0x1fff;
  EXPECT_EQ(kit.faults({0xe9, 0xfb, 0x0f, 0x00, 0x00}), "#GP(0)");  // to 0x2000
  EXPECT_EQ(kit.run({0xe9, 0xfa, 0x0f, 0x00, 0x00}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, 0x1fffU);
  cpu.rip = 0x1000;
  EXPECT_EQ(kit.run({0x66, 0xe9, 0xfc, 0xef}), Outcome::kJump);  // 16 bits of address: 0x1004 - 0x1004
  EXPECT_EQ(cpu.rip, 0U);
}

TEST(Jumps, LoopsCountWithTheAddressSize) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  const auto loop = [&](const std::vector<std::uint8_t>& code, std::uint64_t rcx, std::uint64_t flags) {
    cpu.rip = kRip;
    cpu.gpr[kRcx] = rcx;
    cpu.arithmetic_flags = flags;
    return kit.run(code) == Outcome::kJump;
  };
  EXPECT_TRUE(loop({0xe2, 0x10}, 2, 0));
  EXPECT_EQ(cpu.rip, kRip + 0x12);
  EXPECT_FALSE(loop({0xe2, 0x10}, 1, 0));
  EXPECT_EQ(cpu.gpr[kRcx], 0U);
  EXPECT_TRUE(loop({0xe2, 0x10}, 0, 0));  // all the way round
  EXPECT_EQ(cpu.gpr[kRcx], ~0ULL);
  EXPECT_FALSE(loop({0x67, 0xe2, 0x10}, 0xff00000001, 0));
  EXPECT_EQ(cpu.gpr[kRcx], 0U);
  EXPECT_TRUE(loop({0xe1, 0x10}, 2, flag::kZf));
  EXPECT_FALSE(loop({0xe1, 0x10}, 2, 0));
  EXPECT_EQ(cpu.gpr[kRcx], 1U);
  EXPECT_TRUE(loop({0xe0, 0x10}, 2, 0));
  EXPECT_FALSE(loop({0xe0, 0x10}, 2, flag::kZf));
  EXPECT_TRUE(loop({0xe3, 0x10}, 0, 0));
  EXPECT_FALSE(loop({0xe3, 0x10}, 0x100000000, 0));
  EXPECT_TRUE(loop({0x67, 0xe3, 0x10}, 0x100000000, 0));
}

TEST(Calls, PushTheNextAddressAndReturnToIt) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  EXPECT_EQ(kit.run({0xe8, 0x00, 0x10, 0x00, 0x00}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, kRip + 0x1005);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 8);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), kRip + 5);
  EXPECT_EQ(kit.run({0xc2, 0x20, 0x00}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, kRip + 5);
  EXPECT_EQ(cpu.gpr[kRsp], kTop + 0x20);
  // Through memory, by the stack pointer before the push.
  cpu.gpr[kRsp] = kTop;
  kit.put<std::uint64_t>(kTop - 0x100, 0x1234000);
  cpu.rip = kRip;
  EXPECT_EQ(kit.run({0xff, 0x94, 0x24, 0x00, 0xff, 0xff, 0xff}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, 0x1234000U);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), kRip + 7);
  // The operand prefix means nothing to near branches in 64-bit code.
  cpu.gpr[kRax] = 0x7f0000001000;
  EXPECT_EQ(kit.run({0x66, 0xff, 0xe0}), Outcome::kJump);
  EXPECT_EQ(cpu.rip, 0x7f0000001000U);
}

TEST(Calls, ThatCannotPushGoNowhere) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRsp] = kHole + 8;
  EXPECT_EQ(kit.faults({0xe8, 0, 0, 0, 0}), "#PF(2) at 0x600000");
  EXPECT_EQ(cpu.rip, kRip);
  EXPECT_EQ(cpu.gpr[kRsp], kHole + 8);
  cpu.gpr[kRsp] = 0x800000000000 + 8;
  EXPECT_EQ(kit.run({0xe8, 0, 0, 0, 0}), Outcome::kFault);
  EXPECT_EQ(cpu.fault.vector, vec::kSs);
  EXPECT_EQ(kit.run({0x50}), Outcome::kFault);
  EXPECT_EQ(cpu.fault.vector, vec::kSs);
}

TEST(Stack, PushesOfEachSize) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  kit.put<std::uint64_t>(kTop - 16, ~0ULL);
  cpu.gpr[kRax] = 0x1122334455667788;
  EXPECT_EQ(kit.run({0x50}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), 0x1122334455667788U);
  EXPECT_EQ(kit.run({0x66, 0x50}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 10);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 16), 0x7788ffffffffffffU);
  EXPECT_EQ(kit.run({0x6a, 0xfe}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 18), ~1ULL);
  cpu.gpr[kRsp] = kTop;
  EXPECT_EQ(kit.run({0x68, 0x00, 0x00, 0x00, 0x80}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), 0xffffffff80000000U);
  EXPECT_EQ(kit.run({0x54}), Outcome::kNext);  // push rsp: as it was
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 16), kTop - 8);
  EXPECT_EQ(kit.run({0xff, 0x34, 0x24}), Outcome::kNext);  // push [rsp]
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 24), kTop - 8);
  EXPECT_EQ(kit.run({0x5c}), Outcome::kNext);  // pop rsp: what was popped
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 8);
  EXPECT_EQ(kit.run({0x66, 0x58}), Outcome::kNext);  // pop ax
  EXPECT_EQ(cpu.gpr[kRax], 0x1122334455660000U);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 6);
}

TEST(Stack, APopIntoMemoryAddressesWithWhatRspBecomes) {
  InstructionKit kit;
  kit.put<std::uint64_t>(kTop, 0xabcdef);
  EXPECT_EQ(kit.run({0x8f, 0x44, 0x24, 0x10}), Outcome::kNext);  // pop [rsp+16]
  EXPECT_EQ(kit.get<std::uint64_t>(kTop + 8 + 16), 0xabcdefU);
  EXPECT_EQ(kit.cpu().gpr[kRsp], kTop + 8);
  kit.cpu().gpr[kRbx] = kHole;
  EXPECT_EQ(kit.faults({0x8f, 0x03}), "#PF(2) at 0x600000");
  EXPECT_EQ(kit.cpu().gpr[kRsp], kTop + 8);
}

TEST(Stack, SegmentRegisters) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.segments[kFs].selector = 0x1234;
  kit.put<std::uint64_t>(kTop - 8, ~0ULL);
  EXPECT_EQ(kit.run({0x0f, 0xa0}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), 0x1234U);
  kit.put<std::uint64_t>(kTop - 8, 0);
  EXPECT_EQ(kit.run({0x0f, 0xa9}), Outcome::kNext);  // pop gs: null
  EXPECT_EQ(cpu.segments[kGs].selector, 0);
  EXPECT_EQ(cpu.gpr[kRsp], kTop);
  kit.put<std::uint64_t>(kTop, 0x50);
  EXPECT_EQ(kit.faults({0x0f, 0xa9}), "#GP(80)");
  EXPECT_EQ(cpu.gpr[kRsp], kTop);

  kit.code32();
  cpu.segments[kEs].selector = 0x4321;
  kit.put<std::uint32_t>(kTop - 4, 0xffffffff);
  EXPECT_EQ(kit.run({0x06}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 4);
  EXPECT_EQ(kit.get<std::uint32_t>(kTop - 4), 0xffff4321U);
  kit.code16();
  cpu.cr0 &= ~cr0::kPe;
  kit.put<std::uint16_t>(0x8000, 0x700);
  EXPECT_EQ(kit.run({0x17}), Outcome::kNext);  // pop ss
  EXPECT_EQ(cpu.segments[kSs].base, 0x7000U);
  EXPECT_EQ(cpu.gpr[kRsp], 0x8002U);
  EXPECT_EQ(cpu.interrupt_shadow, 2);
}

TEST(Stack, AllRegistersAtOnce) {
  InstructionKit kit;
  kit.code32();
  Cpu& cpu = kit.cpu();
  for (std::uint8_t i = 0; i < 8; ++i) {
    cpu.gpr[i] = i == kRsp ? kTop : 0x1000U + i;
  }
  EXPECT_EQ(kit.run({0x60}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 32);
  for (std::uint8_t i = 0; i < 8; ++i) {
    EXPECT_EQ(kit.get<std::uint32_t>(kTop - 4U * (i + 1)), i == kRsp ? kTop : 0x1000U + i);
    cpu.gpr[i] = i == kRsp ? cpu.gpr[kRsp] : 0;
  }
  EXPECT_EQ(kit.run({0x61}), Outcome::kNext);
  for (std::uint8_t i = 0; i < 8; ++i) {
    EXPECT_EQ(cpu.gpr[i], i == kRsp ? kTop : 0x1000U + i);
  }
  // A 16-bit stack pointer wraps inside its segment.
  kit.code16();
  cpu.gpr[kRsp] = 0xabcd0004;
  cpu.gpr[kRbx] = 0x7777;
  EXPECT_EQ(kit.run({0x53}), Outcome::kNext);
  EXPECT_EQ(kit.run({0x53}), Outcome::kNext);
  EXPECT_EQ(kit.run({0x53}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRsp], 0xabcdfffeU);
  EXPECT_EQ(kit.get<std::uint16_t>(0xfffe), 0x7777);
}

TEST(Stack, EnterAndLeave) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbp] = 0x1111;
  EXPECT_EQ(kit.run({0xc8, 0x20, 0x00, 0x00}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRbp], kTop - 8);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 8 - 0x20);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), 0x1111U);
  EXPECT_EQ(kit.run({0xc9}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRbp], 0x1111U);
  EXPECT_EQ(cpu.gpr[kRsp], kTop);
  // Level 3: two frame pointers of the frame before, and the new one.
  cpu.gpr[kRbp] = kTop + 0x100;
  kit.put<std::uint64_t>(kTop + 0xf8, 0xaaaa);
  kit.put<std::uint64_t>(kTop + 0xf0, 0xbbbb);
  EXPECT_EQ(kit.run({0xc8, 0x08, 0x00, 0x03}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), kTop + 0x100);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 16), 0xaaaaU);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 24), 0xbbbbU);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 32), kTop - 8);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 40);
  EXPECT_EQ(cpu.gpr[kRbp], kTop - 8);
  // Where the new top cannot be written, nothing happens.
  cpu.gpr[kRsp] = kTop - 0xe000;
  cpu.gpr[kRbp] = 0x2222;
  EXPECT_EQ(kit.run({0xc8, 0x00, 0x80, 0x00}), Outcome::kFault);
  EXPECT_EQ(cpu.fault.vector, vec::kPf);
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 0xe000);
  EXPECT_EQ(cpu.gpr[kRbp], 0x2222U);
  cpu.gpr[kRbp] = kHole;
  EXPECT_EQ(kit.faults({0xc9}), "#PF(0) at 0x600000");
  EXPECT_EQ(cpu.gpr[kRsp], kTop - 0xe000);
}

// --- flags

TEST(Flags, PopfChangesWhatTheRingMay) {
  constexpr std::uint64_t kAnyone =
      flag::kArithmetic | flag::kTf | flag::kDf | flag::kNt | flag::kAc | flag::kId;
  for (const std::uint8_t ring : {std::uint8_t{0}, std::uint8_t{3}}) {
    for (std::uint64_t iopl = 0; iopl < 4; iopl += 3) {
      InstructionKit kit;
      Cpu& cpu = kit.cpu();
      cpu.set_rflags(iopl << 12 | flag::kRf | flag::kFixed);
      for (std::uint64_t offset = 0; offset < 0x10000; offset += kPageSize) {
        kit.map(InstructionKit::kStack - 0x10000 + offset, InstructionKit::kStack - 0x10000 + offset);
      }
      kit.ring(ring);
      kit.put<std::uint64_t>(kTop, ~0ULL);
      ASSERT_EQ(kit.run({0x9d}), Outcome::kNext);
      std::uint64_t expected = kAnyone | flag::kFixed | iopl << 12;
      expected |= ring == 0 ? flag::kIopl | flag::kIf : 0;
      expected |= ring <= iopl ? flag::kIf : 0;
      EXPECT_EQ(cpu.rflags(), expected) << int{ring} << " " << iopl;
      EXPECT_EQ(cpu.gpr[kRsp], kTop + 8);
      // 16 bits leave the rest alone, RF too.
      cpu.set_rflags(iopl << 12 | flag::kRf | flag::kAc | flag::kFixed);
      cpu.gpr[kRsp] = kTop;
      ASSERT_EQ(kit.run({0x66, 0x9d}), Outcome::kNext);
      EXPECT_EQ(cpu.rflags() >> 16, (flag::kRf | flag::kAc) >> 16);
    }
  }
}

TEST(Flags, PushfTellsAllButRfAndVm) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.set_rflags(flag::kAll & ~flag::kVm);
  EXPECT_EQ(kit.run({0x9c}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kTop - 8), flag::kAll & ~(flag::kVm | flag::kRf));
}

TEST(Flags, Virtual8086ModeNeedsIopl3) {
  InstructionKit kit;
  kit.code16();
  Cpu& cpu = kit.cpu();
  cpu.other_flags |= flag::kVm;
  cpu.cpl = 3;
  for (const std::vector<std::uint8_t>& code :
       {std::vector<std::uint8_t>{0x9c}, {0x9d}, {0xfa}, {0xfb}, {0xcd, 0x21}}) {
    EXPECT_EQ(kit.faults(code), "#GP(0)") << int{code[0]};
  }
  EXPECT_EQ(kit.run({0xcc}), Outcome::kTrap);  // not INT3
  cpu.rip = 0x1000;
  cpu.other_flags |= flag::kIopl;
  kit.put<std::uint16_t>(0x8000, static_cast<std::uint16_t>(flag::kIf | flag::kFixed));
  EXPECT_EQ(kit.run({0x9d}), Outcome::kNext);
  EXPECT_EQ(cpu.rflags(), flag::kIf | flag::kFixed | flag::kVm | flag::kIopl);
  EXPECT_EQ(kit.run({0xfa}), Outcome::kNext);
  EXPECT_EQ(cpu.interrupt_flag, 0U);
  EXPECT_EQ(kit.run({0xcd, 0x21}), Outcome::kTrap);
}

TEST(Flags, StiHoldsInterruptsBackForOneInstruction) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  EXPECT_EQ(kit.run({0xfb}), Outcome::kNext);
  EXPECT_EQ(cpu.interrupt_flag, flag::kIf);
  EXPECT_EQ(cpu.interrupt_shadow, 1);
  cpu.interrupt_shadow = 0;
  EXPECT_EQ(kit.run({0xfb}), Outcome::kNext);  // they were on: nothing to hold back
  EXPECT_EQ(cpu.interrupt_shadow, 0);
  kit.ring(3);
  EXPECT_EQ(kit.faults({0xfa}), "#GP(0)");
  EXPECT_EQ(kit.faults({0xfb}), "#GP(0)");
  cpu.other_flags |= flag::kIopl;
  EXPECT_EQ(kit.run({0xfa}), Outcome::kNext);
  EXPECT_EQ(cpu.interrupt_flag, 0U);
}

TEST(Flags, TheSmallOnes) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  EXPECT_EQ(kit.run({0xfd}), Outcome::kNext);
  EXPECT_NE(cpu.other_flags & flag::kDf, 0U);
  EXPECT_EQ(kit.run({0xfc}), Outcome::kNext);
  EXPECT_EQ(cpu.other_flags & flag::kDf, 0U);
  kit.code32();
  cpu.gpr[kRax] = 0x55;
  cpu.arithmetic_flags = flag::kCf;
  EXPECT_EQ(kit.run({0xd6}), Outcome::kNext);  // SALC
  EXPECT_EQ(cpu.gpr[kRax] & 0xff, 0xffU);
  cpu.arithmetic_flags = 0;
  EXPECT_EQ(kit.run({0xd6}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax] & 0xff, 0U);
}

// --- software interrupts

TEST(SoftwareInterrupts, AreTrapsWithRipBehindThem) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  const auto trap = [&](const std::vector<std::uint8_t>& code) {
    cpu.rip = kRip;
    const Outcome outcome = kit.run(code);
    EXPECT_EQ(outcome, Outcome::kTrap);
    EXPECT_EQ(cpu.rip, kRip + code.size());
    return int{cpu.fault.vector};
  };
  EXPECT_EQ(trap({0xcd, 0x80}), 0x80);
  EXPECT_EQ(trap({0xcd, 0x03}), 3);
  EXPECT_EQ(trap({0xcc}), vec::kBp);
  EXPECT_EQ(trap({0xf1}), vec::kDb);
  EXPECT_EQ(cpu.fault.address, 0U);  // nothing for DR6
  kit.code32();
  cpu.rip = 0x1000;
  cpu.arithmetic_flags = 0;
  EXPECT_EQ(kit.run({0xce}), Outcome::kNext);
  cpu.arithmetic_flags = flag::kOf;
  EXPECT_EQ(kit.run({0xce}), Outcome::kTrap);
  EXPECT_EQ(cpu.fault.vector, vec::kOf);
}

TEST(SoftwareInterrupts, Bound) {
  InstructionKit kit;
  kit.code32();
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbx] = 0x300000;
  kit.put<std::int32_t>(0x300000, -5);
  kit.put<std::int32_t>(0x300004, 7);
  const auto bound = [&](std::int64_t value) {
    cpu.gpr[kRax] = static_cast<std::uint64_t>(value) & 0xffffffff;
    return kit.run({0x62, 0x03});
  };
  EXPECT_EQ(bound(-5), Outcome::kNext);
  EXPECT_EQ(bound(7), Outcome::kNext);
  EXPECT_EQ(bound(-6), Outcome::kFault);
  EXPECT_EQ(cpu.fault.vector, vec::kBr);
  EXPECT_EQ(bound(8), Outcome::kFault);
  kit.put<std::int16_t>(0x300000, -5);
  kit.put<std::int16_t>(0x300002, 7);
  cpu.gpr[kRax] = 0xfffb;
  EXPECT_EQ(kit.run({0x66, 0x62, 0x03}), Outcome::kNext);
  cpu.gpr[kRax] = 0xfffa;
  EXPECT_EQ(kit.run({0x66, 0x62, 0x03}), Outcome::kFault);
}

}  // namespace
}  // namespace wisp::soft
