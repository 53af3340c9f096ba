#include "hypervisor/soft/pic.h"

#include <gtest/gtest.h>

namespace wisp::soft {
namespace {

struct PicTest : testing::Test {
  void init(std::uint8_t master_icw4 = 1, std::uint8_t slave_icw4 = 1) {
    for (const auto& [port, base, icw3, icw4] :
         {std::tuple{0x20, 0x30, 4, +master_icw4}, std::tuple{0xa0, 0x38, 2, +slave_icw4}}) {
      put(port, 0x11);
      put(port + 1, base);
      put(port + 1, icw3);
      put(port + 1, icw4);
    }
  }
  void put(int port, int value) {
    pic.write(static_cast<std::uint16_t>(port), static_cast<std::uint8_t>(value));
  }
  int get(int port) { return pic.read(static_cast<std::uint16_t>(port)); }
  int take() { return pic.has_interrupt() ? pic.acknowledge() : -1; }
  int service(int port) {
    put(port, 0x0b);
    return get(port);
  }

  int wakes = 0;
  PicPair pic{[this] { ++wakes; }};
};

TEST_F(PicTest, PriorityNestingAndEoi) {
  init();
  pic.pulse(5);
  EXPECT_EQ(wakes, 1);
  EXPECT_EQ(take(), 0x35);
  pic.pulse(6);
  EXPECT_EQ(take(), -1);
  pic.pulse(1);
  EXPECT_EQ(take(), 0x31);
  EXPECT_EQ(service(0x20), 0x22);
  put(0x20, 0x20);
  EXPECT_EQ(service(0x20), 0x20);
  EXPECT_EQ(take(), -1);
  put(0x20, 0x65);  // specific
  EXPECT_EQ(take(), 0x36);
}

TEST_F(PicTest, MaskAndRequestRegister) {
  init();
  put(0x21, 0x08);
  EXPECT_EQ(get(0x21), 0x08);
  pic.pulse(3);
  EXPECT_EQ(take(), -1);
  put(0x20, 0x0a);
  EXPECT_EQ(get(0x20), 0x08);
  put(0x21, 0);
  EXPECT_EQ(take(), 0x33);
  EXPECT_EQ(get(0x20), 0);
}

TEST_F(PicTest, WakeOnlyOnTheRise) {
  init();
  pic.pulse(3);
  pic.pulse(4);
  (void)get(0x21);
  EXPECT_EQ(wakes, 1);
}

TEST_F(PicTest, CascadeNeedsBothEois) {
  init();
  pic.pulse(12);
  EXPECT_EQ(take(), 0x3c);
  EXPECT_EQ(service(0x20), 0x04);
  EXPECT_EQ(service(0xa0), 0x10);
  pic.pulse(8);
  EXPECT_EQ(take(), -1) << "the master's input 2 is in service";
  put(0xa0, 0x20);
  put(0x20, 0x20);
  EXPECT_EQ(take(), 0x38);
}

TEST_F(PicTest, SpeciallyFullyNestedLetsOnlyTheSlaveIn) {
  init(0x11);
  pic.pulse(12);
  EXPECT_EQ(take(), 0x3c);
  pic.pulse(5);
  EXPECT_EQ(take(), -1) << "input 5 is less urgent than the slave in service";
  pic.pulse(8);
  EXPECT_EQ(take(), 0x38);
}

TEST_F(PicTest, SpuriousWhenTheLineFalls) {
  init();
  pic.set_level(5, true);
  pic.set_level(5, false);
  EXPECT_FALSE(pic.has_interrupt());
  EXPECT_EQ(pic.acknowledge(), 0x37);
  EXPECT_EQ(service(0x20), 0) << "a spurious one is not in service";
}

TEST_F(PicTest, Rotation) {
  init();
  put(0x20, 0xc0 | 4);  // 4 lowest, 5 highest
  pic.pulse(1);
  pic.pulse(5);
  EXPECT_EQ(take(), 0x35);
  put(0x20, 0xa0);  // rotate on EOI: 5 lowest, 6 highest
  pic.pulse(5);
  EXPECT_EQ(take(), 0x31);
  put(0x20, 0xe1);  // rotate on specific EOI of 1: 2 highest
  pic.pulse(1);
  EXPECT_EQ(take(), 0x35);
}

TEST_F(PicTest, AutomaticEoiWithRotation) {
  init(3);
  put(0x20, 0x80);
  pic.pulse(3);
  EXPECT_EQ(take(), 0x33);
  EXPECT_EQ(service(0x20), 0);
  pic.pulse(3);
  pic.pulse(4);
  EXPECT_EQ(take(), 0x34) << "3 went to the end";
  put(0x20, 0x00);
  EXPECT_EQ(take(), 0x33);
}

TEST_F(PicTest, SpecialMaskMode) {
  init();
  pic.pulse(2 + 1);
  EXPECT_EQ(take(), 0x33);
  pic.pulse(6);
  EXPECT_EQ(take(), -1);
  put(0x21, 0x08);
  put(0x20, 0x68);
  EXPECT_EQ(take(), 0x36);
  put(0x20, 0x20);  // ends 6: a masked input is left alone in this mode
  EXPECT_EQ(service(0x20), 0x08);
  put(0x20, 0x20);
  EXPECT_EQ(service(0x20), 0x08);
  put(0x20, 0x63);
  EXPECT_EQ(service(0x20), 0);
}

TEST_F(PicTest, Poll) {
  init();
  put(0x20, 0x0c);
  EXPECT_EQ(get(0x20), 0);
  pic.pulse(4);
  put(0x20, 0x0c);
  EXPECT_EQ(get(0x20), 0x84);
  EXPECT_FALSE(pic.has_interrupt());
  EXPECT_EQ(service(0x20), 0x10);
}

TEST_F(PicTest, LevelMode) {
  init();
  put(0x4d0, 0xff);
  put(0x4d1, 0xff);
  EXPECT_EQ(get(0x4d0), 0xf8);
  EXPECT_EQ(get(0x4d1), 0xde);
  pic.set_level(11, true);
  EXPECT_EQ(take(), 0x3b);
  put(0xa0, 0x20);
  put(0x20, 0x20);
  EXPECT_EQ(take(), 0x3b) << "still high";
  put(0xa0, 0x20);
  put(0x20, 0x20);
  pic.set_level(11, false);
  EXPECT_EQ(take(), -1);
}

TEST_F(PicTest, AnInputThatBecomesLevelAsksWhileHigh) {
  init();
  pic.set_level(5, true);
  EXPECT_EQ(take(), 0x35);
  put(0x20, 0x20);
  EXPECT_EQ(take(), -1);
  put(0x4d0, 0x20);
  EXPECT_EQ(take(), 0x35);
  put(0x20, 0x20);
  put(0x4d0, 0);
  EXPECT_EQ(take(), -1) << "edge again: waits for the next edge";
}

TEST_F(PicTest, InitializationSequences) {
  put(0x20, 0x13);  // single, with ICW4
  put(0x21, 0x4f);
  put(0x21, 0x01);  // ICW4
  put(0x21, 0xa5);
  EXPECT_EQ(get(0x21), 0xa5);
  put(0x20, 0x10);  // cascade, no ICW4
  EXPECT_EQ(get(0x21), 0) << "ICW1 clears the mask";
  put(0x21, 0x48);
  put(0x21, 0x04);
  put(0x21, 0x5a);
  EXPECT_EQ(get(0x21), 0x5a);
  pic.pulse(0);
  EXPECT_EQ(take(), 0x48);
  pic.set_level(2 + 5, true);
  put(0x20, 0x10);
  EXPECT_EQ(take(), -1) << "edges from before are forgotten";
}

TEST_F(PicTest, SaveLoadEqualAndHostile) {
  init(0x11);
  pic.pulse(12);
  EXPECT_EQ(take(), 0x3c);
  pic.pulse(3);
  put(0xa0, 0x11);  // half-way through an initialisation
  put(0xa1, 0x70);
  StateWriter first;
  pic.save(first);
  PicPair other([] {});
  StateReader reader(first.bytes());
  ASSERT_TRUE(other.load(reader).has_value());
  EXPECT_TRUE(reader.empty());
  StateWriter second;
  other.save(second);
  EXPECT_EQ(first.bytes(), second.bytes());
  for (std::size_t size = 0; size < first.bytes().size(); ++size) {
    StateReader cut(std::span(first.bytes()).first(size));
    EXPECT_FALSE(other.load(cut).has_value()) << size;
  }
  for (const auto& [at, value] : {std::pair{6, 8}, std::pair{7, 5}, std::pair{7, 1}}) {
    std::vector<std::uint8_t> bytes = first.bytes();
    bytes[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(value);
    StateReader hostile(bytes);
    EXPECT_FALSE(other.load(hostile).has_value()) << at << " " << value;
  }
}

}  // namespace
}  // namespace wisp::soft
