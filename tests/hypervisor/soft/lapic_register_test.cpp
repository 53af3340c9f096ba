#include <gtest/gtest.h>

#include "base/bytes.h"
#include "hypervisor/soft/apic_kit.h"

namespace wisp::soft {
namespace {

TEST(LapicMode, Transitions) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  const std::uint64_t xapic = kApicBaseDefault | kApicBaseBsp | kApicBaseEnable;
  EXPECT_EQ(cpu.base(), xapic);
  EXPECT_FALSE(cpu.set_base(kApicBaseDefault | kApicBaseX2apic)) << "x2APIC without enable";
  EXPECT_FALSE(cpu.set_base(xapic | 1)) << "reserved bit";
  EXPECT_FALSE(cpu.set_base(xapic | 1ULL << 63));
  EXPECT_TRUE(cpu.set_base(xapic | kApicBaseX2apic));
  EXPECT_FALSE(cpu.set_base(xapic)) << "x2APIC to xAPIC";
  EXPECT_TRUE(cpu.set_base(kApicBaseDefault | kApicBaseBsp));
  EXPECT_FALSE(cpu.accept({.mode = DeliveryMode::kNmi}));
  EXPECT_FALSE(cpu.set_base(xapic | kApicBaseX2apic)) << "disabled to x2APIC";
  EXPECT_TRUE(cpu.set_base(xapic));
  EXPECT_EQ(cpu.read(0xf0), 0xffU) << "state of power-up";
  EXPECT_EQ(cpu.read(0xd0), 0U);
}

TEST(LapicMsr, OnlyInX2apicMode) {
  ApicKit kit(1);
  EXPECT_FALSE(kit.cpu(0).read_msr(0x802).has_value());
  EXPECT_FALSE(kit.cpu(0).write_msr(0x808, 0));
}

TEST(LapicMsr, ReservedBitsAndReadOnlyRegisters) {
  ApicKit kit(1, 5);
  kit.x2apic_all();
  Lapic& cpu = kit.cpu(0);
  EXPECT_EQ(cpu.read_msr(0x802), 5U);
  EXPECT_EQ(cpu.read_msr(0x80d), 1U << 5);
  for (const std::uint32_t index : {0x80bU, 0x80eU, 0x831U, 0x83fU, 0x809U, 0x800U, 0x840U, 0x7ffU}) {
    EXPECT_FALSE(cpu.read_msr(index).has_value()) << std::hex << index;
  }
  for (const std::uint32_t index : {0x802U, 0x803U, 0x80aU, 0x80dU, 0x810U, 0x820U, 0x831U, 0x839U, 0x840U}) {
    EXPECT_FALSE(cpu.write_msr(index, 0)) << std::hex << index;
  }
  EXPECT_FALSE(cpu.write_msr(0x80b, 1));
  EXPECT_TRUE(cpu.write_msr(0x80b, 0));
  EXPECT_FALSE(cpu.write_msr(0x828, 1));
  EXPECT_TRUE(cpu.write_msr(0x828, 0));
  EXPECT_FALSE(cpu.write_msr(0x808, 0x100));
  EXPECT_FALSE(cpu.write_msr(0x80f, 0x10000));
  EXPECT_FALSE(cpu.write_msr(0x832, 1U << 20));
  EXPECT_FALSE(cpu.write_msr(0x838, 1ULL << 32));
  EXPECT_FALSE(cpu.write_msr(0x83e, 4));
  EXPECT_FALSE(cpu.write_msr(0x830, 1U << 20));
  EXPECT_FALSE(cpu.write_msr(0x83f, 0x100));
  EXPECT_TRUE(cpu.write_msr(0x83f, 0x77));
  EXPECT_EQ(kit.take(0), 0x77);
  EXPECT_TRUE(cpu.write_msr(0x830, 0x0000000700000850));
  EXPECT_EQ(cpu.read_msr(0x830), 0x0000000700000850U);
}

TEST(LapicError, LatchedByAWriteAndInterruptsOncePerError) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.write(0x370, 0x41);
  cpu.write(0x300, 0x4405 & ~0x400U);  // fixed, vector 5
  EXPECT_EQ(cpu.read(0x280), 0U) << "not before the write";
  EXPECT_EQ(kit.take(0), 0x41);
  cpu.eoi();
  cpu.write(0x300, 0x4005);
  EXPECT_EQ(kit.take(0), -1);
  cpu.write(0x280, 0);
  EXPECT_EQ(cpu.read(0x280), 0x20U);
  cpu.write(0x280, 0);
  EXPECT_EQ(cpu.read(0x280), 0U);
  EXPECT_FALSE(cpu.accept({.vector = 15}));
  (void)cpu.read(0x40);
  cpu.write(0x280, 0);
  EXPECT_EQ(cpu.read(0x280), 0xc0U);
  cpu.write(0x20, 0);  // read-only registers are no error
  cpu.write(0x30, 0);
  cpu.write(0x390, 0);
  cpu.write(0x100, 0);
  cpu.write(0x280, 0);
  EXPECT_EQ(cpu.read(0x280), 0U);
}

TEST(LapicError, ErrorVectorThatIsIllegalItself) {
  ApicKit kit(1);
  kit.cpu(0).write(0x370, 3);
  kit.cpu(0).write(0x300, 0x4003);
  kit.cpu(0).write(0x280, 0);
  EXPECT_EQ(kit.cpu(0).read(0x280), 0x60U);
  EXPECT_EQ(kit.take(0), -1);
}

TEST(LapicError, SelfIpiWithIllegalVector) {
  ApicKit kit(1);
  kit.x2apic_all();
  EXPECT_TRUE(kit.cpu(0).write_msr(0x83f, 4));
  EXPECT_TRUE(kit.cpu(0).write_msr(0x828, 0));
  EXPECT_EQ(kit.cpu(0).read_msr(0x828), 0x20U);
}

TEST(LapicLvt, SoftwareDisableMasksAll) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  for (const std::uint32_t offset : {0x2f0U, 0x320U, 0x330U, 0x340U, 0x350U, 0x360U, 0x370U}) {
    cpu.write(offset, 0x40);
    EXPECT_EQ(cpu.read(offset), 0x40U);
  }
  cpu.write(0x350, 0x700);
  EXPECT_TRUE(cpu.accepts_ext_int());
  cpu.write(0xf0, 0xff);
  EXPECT_FALSE(cpu.accepts_ext_int());
  for (const std::uint32_t offset : {0x2f0U, 0x320U, 0x330U, 0x340U, 0x350U, 0x360U, 0x370U}) {
    EXPECT_NE(cpu.read(offset) & 0x10000, 0U) << std::hex << offset;
    cpu.write(offset, 0x40);
    EXPECT_EQ(cpu.read(offset), 0x10040U) << std::hex << offset;
  }
}

TEST(LapicState, SaveLoadEqual) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.write(0x80, 0x20);
  cpu.write(0xd0, 0x04000000);
  cpu.write(0x320, 0x200f0);
  cpu.write(0x3e0, 0x3);
  cpu.write(0x380, 1000);
  cpu.accept({.vector = 0x55, .level_triggered = true});
  EXPECT_EQ(kit.take(0), 0x55);
  cpu.accept({.vector = 0x91});
  kit.now += 16 * 250;
  const LapicState saved = cpu.save();
  ApicKit other(1);
  other.now = 7;  // less than what has passed of the period
  ASSERT_TRUE(other.cpu(0).load(saved).has_value());
  EXPECT_EQ(other.cpu(0).save().regs, saved.regs);
  EXPECT_EQ(other.cpu(0).read(0x390), 750U);
  EXPECT_EQ(other.cpu(0).next_timer_ns(), 7U + 16 * 750);
  EXPECT_EQ(other.take(0), 0x91);
  other.cpu(0).eoi();
  other.cpu(0).eoi();
  EXPECT_EQ(other.eois, std::vector<std::uint8_t>{0x55});
}

TEST(LapicState, HostileRecord) {
  ApicKit kit(1);
  LapicState state = kit.cpu(0).save();
  store_le<std::uint32_t>(state.regs.data() + 0x20, 7U << 24);
  EXPECT_FALSE(kit.cpu(0).load(state).has_value()) << "another id";
  state.regs.fill(0xff);
  store_le<std::uint32_t>(state.regs.data() + 0x20, 0);
  ASSERT_TRUE(kit.cpu(0).load(state).has_value());
  Lapic& cpu = kit.cpu(0);
  EXPECT_EQ(cpu.read(0x200), 0xffff0000U) << "vectors below 16 do not exist";
  EXPECT_EQ(cpu.read(0xf0), 0x1ffU);
  EXPECT_EQ(cpu.read(0x300), 0xccfffU);
  EXPECT_EQ(cpu.read(0x320) & ~0x700ffU, 0U);
  cpu.poll_timer();
  (void)cpu.next_timer_ns();
}

}  // namespace
}  // namespace wisp::soft
