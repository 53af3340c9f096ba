#include <gtest/gtest.h>

#include <array>

#include "hypervisor/soft/apic_kit.h"

namespace wisp::soft {
namespace {

constexpr std::uint32_t kIcrLow = 0x300;
constexpr std::uint32_t kIcrHigh = 0x310;

void ipi(Lapic& from, std::uint32_t destination, std::uint32_t low) {
  from.write(kIcrHigh, destination << 24);
  from.write(kIcrLow, low);
}

TEST(LapicPriority, HighestFirstAndNestedByClass) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  for (const std::uint8_t vector : std::array<std::uint8_t, 3>{0x31, 0x45, 0x48}) {
    EXPECT_TRUE(cpu.accept({.vector = vector}));
  }
  EXPECT_EQ(kit.take(0), 0x48);
  EXPECT_EQ(cpu.read(0xa0), 0x40U);
  EXPECT_EQ(kit.take(0), -1) << "same class must wait";
  EXPECT_TRUE(cpu.accept({.vector = 0x51}));
  EXPECT_EQ(kit.take(0), 0x51);
  cpu.write(0xb0, 0);
  EXPECT_EQ(kit.take(0), -1);
  cpu.write(0xb0, 0);
  EXPECT_EQ(kit.take(0), 0x45);
  cpu.eoi();
  EXPECT_EQ(kit.take(0), 0x31);
  cpu.eoi();
  cpu.eoi();  // nothing in service
  EXPECT_EQ(cpu.read(0xa0), 0U);
  EXPECT_TRUE(kit.eois.empty()) << "edges are not broadcast";
}

TEST(LapicPriority, TaskPriorityAndCr8) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.write(0x80, 0x45);
  EXPECT_EQ(cpu.cr8(), 4);
  EXPECT_EQ(cpu.read(0xa0), 0x45U);
  cpu.accept({.vector = 0x4f});
  EXPECT_EQ(kit.take(0), -1);
  cpu.set_cr8(3);
  EXPECT_EQ(cpu.read(0x80), 0x30U);
  EXPECT_EQ(kit.take(0), 0x4f);
  cpu.set_cr8(15);
  cpu.accept({.vector = 0xff});
  EXPECT_EQ(kit.take(0), -1);
  EXPECT_EQ(cpu.read(0xa0), 0xf0U);
}

TEST(LapicAccept, SoftwareDisabledTakesOnlyNmiInitSipi) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.write(0xf0, 0xff);
  EXPECT_FALSE(cpu.accept({.vector = 0x50}));
  EXPECT_TRUE(cpu.accept({.mode = DeliveryMode::kNmi}));
  EXPECT_TRUE(cpu.take_nmi());
  EXPECT_FALSE(cpu.take_nmi());
  for (const auto mode : {DeliveryMode::kSmi, DeliveryMode::kExtInt, static_cast<DeliveryMode>(3)}) {
    kit.wakes = 0;
    EXPECT_FALSE(cpu.accept({.mode = mode, .vector = 0x50}));
    EXPECT_EQ(kit.wakes, 0);
  }
}

TEST(LapicIpi, PhysicalShorthandsAndBroadcast) {
  ApicKit kit(4);
  ipi(kit.cpu(0), 2, 0x4050);
  EXPECT_EQ(kit.sweep(), 0b0100U);
  ipi(kit.cpu(0), 0xff, 0x4050);
  EXPECT_EQ(kit.sweep(), 0b1111U);
  ipi(kit.cpu(1), 0, 0x4050 | 1U << 18);
  EXPECT_EQ(kit.sweep(), 0b0010U);
  ipi(kit.cpu(1), 0, 0x4050 | 2U << 18);
  EXPECT_EQ(kit.sweep(), 0b1111U);
  ipi(kit.cpu(1), 0, 0x4050 | 3U << 18);
  EXPECT_EQ(kit.sweep(), 0b1101U);
  ipi(kit.cpu(0), 9, 0x4050);
  EXPECT_EQ(kit.sweep(), 0U);
}

TEST(LapicIpi, LogicalFlatAndCluster) {
  ApicKit kit(4);
  for (std::uint32_t i = 0; i < 4; ++i) {
    kit.cpu(i).write(0xd0, 1U << (24 + i));
  }
  ipi(kit.cpu(0), 0b1010, 0x4850);
  EXPECT_EQ(kit.sweep(), 0b1010U);
  for (std::uint32_t i = 0; i < 4; ++i) {
    kit.cpu(i).write(0xe0, 0x0fffffff);
    kit.cpu(i).write(0xd0, ((i / 2) << 4 | 1U << (i % 2)) << 24);
  }
  ipi(kit.cpu(0), 0x13, 0x4850);
  EXPECT_EQ(kit.sweep(), 0b1100U);
  ipi(kit.cpu(0), 0x02, 0x4850);
  EXPECT_EQ(kit.sweep(), 0b0010U);
  ipi(kit.cpu(0), 0xff, 0x4850);
  EXPECT_EQ(kit.sweep(), 0b1111U);
}

TEST(LapicIpi, LowestPriorityPassesByTheDisabledAndTheBusy) {
  ApicKit kit(3);
  for (std::uint32_t i = 0; i < 3; ++i) {
    kit.cpu(i).write(0xd0, 1U << (24 + i));
  }
  kit.cpu(0).write(0xf0, 0xff);  // its priority, 0, would win
  kit.cpu(1).write(0x80, 0x40);
  kit.cpu(2).write(0x80, 0x20);
  const ApicMessage message{
      .mode = DeliveryMode::kLowestPriority, .vector = 0x60, .logical = true, .destination = 0xff};
  EXPECT_TRUE(kit.bus.deliver(message));
  EXPECT_EQ(kit.sweep(), 0b100U);
  kit.cpu(2).write(0x80, 0x50);
  // MSI: fixed, logical, with redirection hint.
  kit.bus.deliver_msi(0xfee00000 | 0x07 << 12 | 8 | 4, 0x60);
  EXPECT_EQ(kit.sweep(), 0b010U);
  kit.bus.deliver_msi(0xfee00000 | 0x06 << 12 | 4, 0x60);
  EXPECT_EQ(kit.sweep(), 0b110U);
}

TEST(LapicIpi, X2apicDestinations) {
  ApicKit kit(3, 254);  // ids 254, 255, 256
  kit.x2apic_all();
  const auto send = [&](std::uint64_t destination, std::uint64_t low) {
    EXPECT_TRUE(kit.cpu(0).write_msr(0x830, destination << 32 | low));
  };
  send(255, 0x50);
  EXPECT_EQ(kit.sweep(), 0b010U) << "255 is an id, no broadcast";
  send(256, 0x50);
  EXPECT_EQ(kit.sweep(), 0b100U);
  send(0xffffffff, 0x50);
  EXPECT_EQ(kit.sweep(), 0b111U);
  send(15U << 16 | 0xc000, 0x850);  // cluster 15: members 14 and 15
  EXPECT_EQ(kit.sweep(), 0b011U);
  kit.bus.deliver_msi(0xfee00000 | 0xffU << 12, 0x50);
  EXPECT_EQ(kit.sweep(), 0b111U) << "an MSI has eight bits: all ones is broadcast";
  kit.bus.deliver_msi(0xfee00000 | 1U << 5, 0x50);  // extended destination id: 256
  EXPECT_EQ(kit.sweep(), 0b100U);
}

TEST(LapicIpi, StartUpThatFollowsAnInitSurvivesIt) {
  ApicKit kit(2);
  ipi(kit.cpu(0), 1, 0x4612);  // from before: the INIT takes it away
  ipi(kit.cpu(0), 1, 0x4500);
  EXPECT_FALSE(kit.cpu(1).take_sipi());
  ipi(kit.cpu(0), 1, 0x8500);  // de-assert: nothing
  ipi(kit.cpu(0), 1, 0x4608);
  EXPECT_TRUE(kit.cpu(1).take_init());
  kit.cpu(1).reset(true);
  const auto page = kit.cpu(1).take_sipi();
  ASSERT_TRUE(page.has_value());
  EXPECT_EQ(*page, 8);
  EXPECT_FALSE(kit.cpu(1).take_sipi().has_value());
  EXPECT_FALSE(kit.cpu(1).take_init());
}

TEST(LapicIpi, DeAssertedInitIsIgnored) {
  ApicKit kit(2);
  ipi(kit.cpu(0), 1, 0x8500);
  EXPECT_FALSE(kit.cpu(1).take_init());
}

TEST(LapicMode, InitKeepsTheX2apicLogicalId) {
  ApicKit kit(1, 0x23);
  kit.x2apic_all();
  kit.cpu(0).reset(true);
  EXPECT_TRUE(kit.cpu(0).x2apic());
  EXPECT_EQ(kit.cpu(0).read_msr(0x80d), 0x20008U);
}

}  // namespace
}  // namespace wisp::soft
