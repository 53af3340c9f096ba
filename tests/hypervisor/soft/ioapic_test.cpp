#include <gtest/gtest.h>

#include "base/bytes.h"
#include "hypervisor/soft/apic_kit.h"

namespace wisp::soft {
namespace {

void put(IoApic& chip, std::uint8_t index, std::uint32_t value) {
  std::array<std::uint8_t, 4> bytes{index, 0, 0, 0};
  chip.io_write(0, bytes);
  store_le(bytes.data(), value);
  chip.io_write(0x10, bytes);
}
std::uint32_t get(IoApic& chip, std::uint8_t index) {
  std::array<std::uint8_t, 4> bytes{index, 0, 0, 0};
  chip.io_write(0, bytes);
  chip.io_read(0x10, bytes);
  return load_le<std::uint32_t>(bytes.data());
}
void entry(IoApic& chip, std::uint32_t pin, std::uint32_t low, std::uint32_t high = 0) {
  put(chip, static_cast<std::uint8_t>(0x11 + 2 * pin), high);
  put(chip, static_cast<std::uint8_t>(0x10 + 2 * pin), low);
}

TEST(IoApic, Registers) {
  ApicKit kit(1);
  EXPECT_EQ(get(kit.ioapic, 1), 0x00170020U);
  put(kit.ioapic, 0, 0xff000000);
  EXPECT_EQ(get(kit.ioapic, 0), 0x0f000000U);
  EXPECT_EQ(get(kit.ioapic, 0x10), 0x10000U) << "masked at reset";
  entry(kit.ioapic, 3, 0xffffffff, 0xffffffff);
  EXPECT_EQ(get(kit.ioapic, 0x16), 0x1afffU) << "status bits are read-only";
  EXPECT_EQ(get(kit.ioapic, 0x40), 0U);
  EXPECT_EQ(get(kit.ioapic, 5), 0U);
}

TEST(IoApic, EdgesAndMaskedEdges) {
  ApicKit kit(2);
  entry(kit.ioapic, 4, 0x10050, 1U << 24);
  kit.ioapic.set_level(4, true);
  kit.ioapic.set_level(4, false);
  kit.ioapic.pulse(4);
  entry(kit.ioapic, 4, 0x50, 1U << 24);
  EXPECT_EQ(kit.sweep(), 0U) << "an edge on a masked pin is lost";
  kit.ioapic.set_level(4, true);
  kit.ioapic.set_level(4, true);
  EXPECT_EQ(kit.take(1), 0x50);
  kit.cpu(1).eoi();
  EXPECT_EQ(kit.sweep(), 0U) << "one edge, one interrupt";
  kit.ioapic.set_level(4, false);
  kit.ioapic.pulse(4);
  EXPECT_EQ(kit.sweep(), 0b10U);
  kit.ioapic.set_level(24, true);
  kit.ioapic.pulse(0xffffffff);
  EXPECT_EQ(kit.sweep(), 0U);
}

TEST(IoApic, LevelWithRemoteIrr) {
  ApicKit kit(1);
  entry(kit.ioapic, 10, 0x8061);
  kit.ioapic.set_level(10, true);
  EXPECT_EQ(get(kit.ioapic, 0x24), 0xc061U);
  EXPECT_EQ(kit.take(0), 0x61);
  EXPECT_EQ(kit.take(0), -1);
  kit.cpu(0).eoi();  // still high: again
  EXPECT_EQ(kit.take(0), 0x61);
  kit.ioapic.set_level(10, false);
  kit.cpu(0).eoi();
  EXPECT_EQ(kit.take(0), -1);
  EXPECT_EQ(get(kit.ioapic, 0x24), 0x8061U);
  EXPECT_EQ(kit.eois.size(), 2U);
}

TEST(IoApic, MaskedLevelWaitsForUnmasking) {
  ApicKit kit(1);
  entry(kit.ioapic, 10, 0x18061);
  kit.ioapic.set_level(10, true);
  EXPECT_EQ(kit.take(0), -1);
  entry(kit.ioapic, 10, 0x8061);
  EXPECT_EQ(kit.take(0), 0x61);
}

TEST(IoApic, RefusedLevelLeavesRemoteIrrClear) {
  ApicKit kit(1);
  kit.cpu(0).write(0xf0, 0xff);
  entry(kit.ioapic, 10, 0x8061);
  kit.ioapic.set_level(10, true);
  EXPECT_EQ(get(kit.ioapic, 0x24), 0x8061U);
  kit.cpu(0).write(0xf0, 0x1ff);
  entry(kit.ioapic, 10, 0x8061);
  EXPECT_EQ(kit.take(0), 0x61);
}

TEST(IoApic, EoiRegisterAndSwitchToEdgeClearRemoteIrr) {
  ApicKit kit(1);
  entry(kit.ioapic, 10, 0x8061);
  kit.ioapic.set_level(10, true);
  kit.ioapic.set_level(10, false);
  const std::array<std::uint8_t, 4> vector{0x61, 0, 0, 0};
  kit.ioapic.io_write(0x40, vector);
  EXPECT_EQ(get(kit.ioapic, 0x24), 0x8061U);
  kit.ioapic.set_level(10, true);
  EXPECT_EQ(get(kit.ioapic, 0x24), 0xc061U);
  put(kit.ioapic, 0x24, 0x10061);
  EXPECT_EQ(get(kit.ioapic, 0x24), 0x10061U);
}

TEST(IoApic, NmiIsAnEdgeWhateverTheTriggerMode) {
  ApicKit kit(1);
  entry(kit.ioapic, 7, 0x8400);
  kit.ioapic.set_level(7, true);
  EXPECT_TRUE(kit.cpu(0).take_nmi());
  EXPECT_EQ(get(kit.ioapic, 0x1e), 0x8400U);
  entry(kit.ioapic, 7, 0x8400);
  EXPECT_FALSE(kit.cpu(0).take_nmi());
}

TEST(IoApic, SaveLoadEqualAndHostile) {
  ApicKit kit(1);
  entry(kit.ioapic, 10, 0x8061);
  kit.ioapic.set_level(10, true);
  StateWriter first;
  kit.ioapic.save(first);
  ApicKit other(1);
  StateReader reader(first.bytes());
  ASSERT_TRUE(other.ioapic.load(reader).has_value());
  EXPECT_TRUE(reader.empty());
  StateWriter second;
  other.ioapic.save(second);
  EXPECT_EQ(first.bytes(), second.bytes());
  for (std::size_t size = 0; size < first.bytes().size(); ++size) {
    StateReader cut(std::span(first.bytes()).first(size));
    EXPECT_FALSE(other.ioapic.load(cut).has_value()) << size;
  }
  StateWriter unchanged;
  other.ioapic.save(unchanged);
  EXPECT_EQ(first.bytes(), unchanged.bytes()) << "a refused record leaves no trace";
  std::vector<std::uint8_t> ones(first.bytes().size(), 0xff);
  StateReader hostile(ones);
  EXPECT_FALSE(other.ioapic.load(hostile).has_value());
}

}  // namespace
}  // namespace wisp::soft
