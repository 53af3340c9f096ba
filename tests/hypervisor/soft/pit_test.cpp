#include "hypervisor/soft/pit.h"

#include <gtest/gtest.h>

namespace wisp::soft {
namespace {

struct PitTest : testing::Test {
  void put(int port, int value) {
    pit.write(static_cast<std::uint16_t>(port), static_cast<std::uint8_t>(value));
  }
  int get(int port) { return pit.read(static_cast<std::uint16_t>(port)); }
  void count(int channel, int value) {
    put(0x40 + channel, value & 0xff);
    put(0x40 + channel, value >> 8);
  }
  int word(int channel) {
    const int low = get(0x40 + channel);
    return low | get(0x40 + channel) << 8;
  }
  // Lets `ticks` of the 1.193182 MHz clock pass, counted from `origin`.
  void at(std::uint64_t ticks) { now = origin + (ticks * 1'000'000'000 + 1'193'181) / 1'193'182; }
  bool out2() { return (get(0x61) & 0x20) != 0; }

  std::uint64_t now = 1'000'000;
  std::uint64_t origin = now;
  int edges = 0;
  Pit pit{[this] { return now; }, [this] { ++edges; }};
};

TEST_F(PitTest, RateGenerator) {
  put(0x43, 0x34);
  EXPECT_EQ(pit.next_event_ns(), std::nullopt) << "no count yet";
  count(0, 1000);
  for (std::uint64_t period = 1; period < 5; ++period) {
    at(period * 1000);
    EXPECT_EQ(pit.next_event_ns(), now);
    --now;
    pit.poll();
    EXPECT_EQ(edges, period - 1);
    ++now;
    pit.poll();
    pit.poll();
    EXPECT_EQ(edges, period);
  }
  at(9500);
  pit.poll();
  EXPECT_EQ(edges, 5) << "missed periods are dropped";
  at(10000);
  EXPECT_EQ(pit.next_event_ns(), now);
  at(10250);
  EXPECT_EQ(word(0), 750);
}

TEST_F(PitTest, CountOfZeroIsTheWholeRange) {
  put(0x43, 0x34);
  count(0, 0);
  at(65536);
  EXPECT_EQ(pit.next_event_ns(), now);
  put(0x43, 0x35);
  origin = now;
  count(0, 0);
  at(10000);
  EXPECT_EQ(pit.next_event_ns(), now);
}

TEST_F(PitTest, TerminalCountFiresOnce) {
  put(0x43, 0x30);
  count(0, 500);
  at(500);
  EXPECT_EQ(pit.next_event_ns(), now);
  pit.poll();
  EXPECT_EQ(edges, 1);
  EXPECT_EQ(pit.next_event_ns(), std::nullopt);
  at(501);
  EXPECT_EQ(word(0), 0xffff) << "it goes on below zero";
  at(5000);
  pit.poll();
  EXPECT_EQ(edges, 1);
}

TEST_F(PitTest, FirstByteOfACountStopsModeZero) {
  put(0x43, 0x30);
  count(0, 500);
  put(0x40, 0x10);
  at(600);
  pit.poll();
  EXPECT_EQ(edges, 0);
  origin = now;
  put(0x40, 0x00);
  at(16);
  pit.poll();
  EXPECT_EQ(edges, 1);
}

TEST_F(PitTest, StrobeModeFour) {
  put(0x43, 0x38);
  count(0, 50);
  at(50);
  pit.poll();
  EXPECT_EQ(edges, 1);
  EXPECT_EQ(pit.next_event_ns(), std::nullopt);
}

TEST_F(PitTest, GateModesNeverStartWithTheGateTiedHigh) {
  for (const int mode : {0x32, 0x3a}) {
    put(0x43, mode);
    count(0, 50);
    EXPECT_EQ(pit.next_event_ns(), std::nullopt);
    at(100);
    pit.poll();
    EXPECT_EQ(edges, 0);
  }
}

TEST_F(PitTest, SquareWave) {
  put(0x61, 1);
  put(0x43, 0xb6);
  count(2, 100);
  EXPECT_TRUE(out2());
  at(49);
  EXPECT_TRUE(out2());
  EXPECT_EQ(word(2), 2);
  at(50);
  EXPECT_FALSE(out2());
  EXPECT_EQ(word(2), 100);
  at(100);
  EXPECT_TRUE(out2());
}

TEST_F(PitTest, GateOfChannelTwoPausesModeZero) {
  EXPECT_EQ(get(0x61) & 1, 0);
  put(0x43, 0xb0);
  count(2, 100);
  at(500);
  EXPECT_FALSE(out2()) << "the gate is low";
  EXPECT_EQ(word(2), 100);
  put(0x61, 1);
  origin = now;
  at(40);
  put(0x61, 0);
  at(400);
  EXPECT_EQ(word(2), 60);
  put(0x61, 1);
  origin = now;
  at(59);
  EXPECT_FALSE(out2());
  at(61);
  EXPECT_TRUE(out2());
}

TEST_F(PitTest, GateOfChannelTwoTriggersTheOneShot) {
  put(0x43, 0xb2);
  count(2, 100);
  EXPECT_TRUE(out2());
  put(0x61, 1);
  EXPECT_FALSE(out2());
  put(0x61, 0);  // goes on without the gate
  at(99);
  EXPECT_FALSE(out2());
  at(100);
  EXPECT_TRUE(out2());
}

TEST_F(PitTest, GateRestartsPeriodicModes) {
  put(0x61, 1);
  put(0x43, 0xb4);
  count(2, 100);
  at(30);
  put(0x61, 0);
  EXPECT_TRUE(out2());
  at(77);
  put(0x61, 1);
  EXPECT_EQ(word(2), 100);
}

TEST_F(PitTest, LatchReadBackAndStatus) {
  put(0x43, 0x34);
  put(0x43, 0xe2);  // status of channel 0
  EXPECT_EQ(get(0x40), 0xf4) << "output high, null count, both bytes, mode 2";
  count(0, 0x1234);
  put(0x43, 0x00);
  at(0x100);
  put(0x43, 0x00);  // a second latch changes nothing
  EXPECT_EQ(word(0), 0x1234);
  EXPECT_EQ(word(0), 0x1134);
  put(0x43, 0xc2);  // status and count
  at(0x200);
  EXPECT_EQ(get(0x40), 0xb4);
  EXPECT_EQ(word(0), 0x1134);
}

TEST_F(PitTest, SingleByteAccessAndBcd) {
  put(0x43, 0x14);  // low byte
  put(0x40, 200);
  at(200);
  EXPECT_EQ(pit.next_event_ns(), now);
  put(0x43, 0x24);  // high byte
  put(0x40, 2);
  EXPECT_EQ(get(0x40), 2);
  put(0x43, 0x35);
  origin = now;
  count(0, 0x1000);
  at(1);
  EXPECT_EQ(word(0), 0x0999);
  at(1000);
  EXPECT_EQ(pit.next_event_ns(), now);
}

TEST_F(PitTest, PortsThatAreNotItsOwn) {
  EXPECT_EQ(get(0x47), 0xff);
  put(0x47, 1);
  EXPECT_EQ(get(0x43), 0xff);
  EXPECT_FALSE(Pit::owns(0x44));
}

TEST_F(PitTest, SaveLoadEqualOnAnEarlierClock) {
  put(0x43, 0x34);
  count(0, 60000);
  put(0x43, 0xb0);
  count(2, 500);
  put(0x61, 3);
  put(0x43, 0x80);
  at(59000);
  StateWriter first;
  pit.save(first);
  std::uint64_t clock = 5;
  int fired = 0;
  Pit other([&] { return clock; }, [&] { ++fired; });
  StateReader reader(first.bytes());
  ASSERT_TRUE(other.load(reader).has_value());
  EXPECT_TRUE(reader.empty());
  StateWriter second;
  other.save(second);
  EXPECT_EQ(first.bytes(), second.bytes());
  EXPECT_EQ(*other.next_event_ns() - clock, *pit.next_event_ns() - now);
  clock = *other.next_event_ns();
  other.poll();
  EXPECT_EQ(fired, 1);
  for (std::size_t size = 0; size < first.bytes().size(); ++size) {
    StateReader cut(std::span(first.bytes()).first(size));
    EXPECT_FALSE(other.load(cut).has_value()) << size;
  }
}

TEST_F(PitTest, AnEdgeOverdueAtSaveIsNotLost) {
  put(0x43, 0x34);
  count(0, 1000);
  at(1500);
  StateWriter writer;
  pit.save(writer);
  int fired = 0;
  Pit other([] { return std::uint64_t{5}; }, [&] { ++fired; });
  StateReader reader(writer.bytes());
  ASSERT_TRUE(other.load(reader).has_value());
  EXPECT_EQ(other.next_event_ns(), 5U);
  other.poll();
  EXPECT_EQ(fired, 1);
}

TEST_F(PitTest, HostileRecords) {
  StateWriter writer;
  pit.save(writer);
  const auto refuses = [&](std::size_t at_byte, std::uint8_t value) {
    std::vector<std::uint8_t> bytes = writer.bytes();
    bytes[at_byte] = value;
    StateReader reader(bytes);
    return !pit.load(reader).has_value();
  };
  EXPECT_TRUE(refuses(0, 6)) << "mode";
  EXPECT_TRUE(refuses(1, 0)) << "access";
  EXPECT_TRUE(refuses(1, 4)) << "access";
  EXPECT_TRUE(refuses(16, 0)) << "count of 0 would divide by zero";
  EXPECT_TRUE(refuses(16, 2)) << "count above the range";
}

}  // namespace
}  // namespace wisp::soft
