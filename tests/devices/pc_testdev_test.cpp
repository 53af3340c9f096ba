// The devices of bare-metal test programs.
#include "devices/pc_testdev.h"

#include <gtest/gtest.h>

#include "devices/fake_parts.h"

namespace wisp {
namespace {

TEST(TestRegister, IsOneRegisterAtTwoPlaces) {
  TestRegister device;
  out(device, 0, 0x11223344, 4);
  EXPECT_EQ(in(device, 0, 4), 0x11223344U);
  EXPECT_EQ(in(device, 1, 1), 0x33U);
  EXPECT_EQ(in(device, 2, 2), 0x1122U);
  EXPECT_EQ(in(device, 8, 4), 0x11223344U);
  out(device, 9, 0xaa, 1);
  EXPECT_EQ(in(device, 0, 4), 0x1122aa44U);
  out(device, 4, 0x12345000, 4);
  EXPECT_EQ(in(device, 0, 4), 0x1122aa44U) << "flushing a page changes nothing";
  device.reset();
  EXPECT_EQ(in(device, 0, 4), 0U);
}

struct Lines {
  std::array<IrqRecord, kTestIrqCount> records;
  std::vector<std::unique_ptr<IrqLine>> make() {
    std::vector<std::unique_ptr<IrqLine>> lines;
    for (IrqRecord& record : records) {
      lines.push_back(std::make_unique<FakeIrqLine>(record));
    }
    return lines;
  }
};

TEST(TestIrqLines, EachPortMovesItsLine) {
  Lines lines;
  TestIrqLines device(lines.make());
  out(device, 14, 1, 1);
  EXPECT_TRUE(lines.records[14].level);
  EXPECT_FALSE(lines.records[15].level);
  out(device, 14, 0x0101, 2);
  EXPECT_FALSE(lines.records[15].level);
  out(device, 14, 0, 1);
  EXPECT_FALSE(lines.records[14].level);
  out(device, 23, 0x80, 1);
  EXPECT_TRUE(lines.records[23].level);

  const StateRecord state = device.save();
  Lines others;
  TestIrqLines other(others.make());
  out(other, 3, 1, 1);
  ASSERT_TRUE(other.load(state).has_value());
  EXPECT_TRUE(others.records[23].level);
  EXPECT_FALSE(others.records[3].level);
  other.reset();
  EXPECT_FALSE(others.records[23].level);
  StateRecord bad = state;
  bad.bytes[3] = 1;
  EXPECT_FALSE(other.load(bad).has_value());
}

TEST(TestMemory, KeepsWhatIsWritten) {
  TestMemory device;
  out(device, 0xfff8, 0x0102030405060708, 8);
  EXPECT_EQ(in(device, 0xfff8, 8), 0x0102030405060708U);
  EXPECT_EQ(in(device, 0xfffe, 1), 0x02U);
  EXPECT_EQ(in(device, 0, 8), 0U);
  StateRecord state = device.save();
  device.reset();
  EXPECT_EQ(in(device, 0xfff8, 8), 0U);
  ASSERT_TRUE(device.load(state).has_value());
  EXPECT_EQ(in(device, 0xfff8, 8), 0x0102030405060708U);
  state.bytes.pop_back();
  EXPECT_FALSE(device.load(state).has_value());
}

std::uint64_t item(FirmwareConfig& device, std::uint16_t selector, std::size_t size) {
  out(device, 0, selector, 2);
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < size; ++i) {
    value |= in(device, 1, 1) << (8 * i);
  }
  return value;
}

TEST(FirmwareConfig, TellsCpusAndMemory) {
  FirmwareConfig device({.cpus = 3, .max_cpus = 300, .ram_size = 0x123456789a});
  EXPECT_EQ(item(device, 0, 4), 0x554d4551U);
  EXPECT_EQ(item(device, 1, 4), 1U);
  EXPECT_EQ(item(device, 3, 8), 0x123456789aU);
  EXPECT_EQ(item(device, 5, 2), 3U);
  EXPECT_EQ(item(device, 5, 8), 3U) << "zeros behind the end";
  EXPECT_EQ(item(device, 15, 2), 300U);
  EXPECT_EQ(item(device, 0x19, 8), 0U) << "no files";
  out(device, 0, 5, 1);
  EXPECT_EQ(in(device, 0, 2), 0U);
  // In the middle of an item.
  out(device, 0, 3, 2);
  EXPECT_EQ(in(device, 1, 1), 0x9aU);
  FirmwareConfig other({.cpus = 3, .max_cpus = 300, .ram_size = 0x123456789a});
  ASSERT_TRUE(other.load(device.save()).has_value());
  EXPECT_EQ(in(other, 1, 1), 0x78U);
}

}  // namespace
}  // namespace wisp
