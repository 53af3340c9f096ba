#include "devices/serial.h"

#include <gtest/gtest.h>

#include <thread>

#include "devices/fake_parts.h"

namespace wisp {
namespace {

enum : std::uint64_t { kData, kIer, kIir, kLcr, kMcr, kLsr, kMsr, kScr };
constexpr std::uint64_t kFcr = kIir;

constexpr std::uint8_t kThreAndTemt = 0x60;

class SerialTest : public ::testing::Test {
 protected:
  void send(const std::string& text) {
    for (const char c : text) {
      out(serial_, kData, static_cast<std::uint8_t>(c));
    }
  }
  std::string take() {
    std::string text;
    while ((in8(serial_, kLsr) & 1) != 0) {
      text += static_cast<char>(in8(serial_, kData));
    }
    return text;
  }
  int new_pulses() {
    const int before = seen_pulses_;
    seen_pulses_ = irq_.pulses;
    return seen_pulses_ - before;
  }

  IrqRecord irq_;
  FakeCharBackend backend_;
  Serial serial_{std::make_unique<FakeIrqLine>(irq_), &backend_};
  int seen_pulses_ = 0;
};

TEST_F(SerialTest, PowerUpState) {
  EXPECT_EQ(in8(serial_, kIer), 0);
  EXPECT_EQ(in8(serial_, kIir), 0x01);
  EXPECT_EQ(in8(serial_, kLcr), 0);
  EXPECT_EQ(in8(serial_, kMcr), 0);
  EXPECT_EQ(in8(serial_, kLsr), kThreAndTemt);
  EXPECT_EQ(in8(serial_, kMsr), 0xb0);
  EXPECT_EQ(in8(serial_, kData), 0);
}

// The steps of Linux's autoconfig() and autoconfig_16550a(), in their order.
TEST_F(SerialTest, LinuxFindsA16550A) {
  out(serial_, kIer, 0);
  EXPECT_EQ(in8(serial_, kIer) & 0x0f, 0);
  out(serial_, kIer, 0x0f);
  EXPECT_EQ(in8(serial_, kIer) & 0x0f, 0x0f);
  out(serial_, kIer, 0);
  out(serial_, kMcr, 0x10 | 0x0a);
  EXPECT_EQ(in8(serial_, kMsr) & 0xf0, 0x90) << "loopback";
  out(serial_, kMcr, 0);
  out(serial_, kLcr, 0xbf);
  out(serial_, kFcr, 0);
  out(serial_, kLcr, 0);
  out(serial_, kFcr, 0x01);
  EXPECT_EQ(in8(serial_, kIir) >> 6, 3) << "16550A";
  out(serial_, kLcr, 0x80);
  EXPECT_NE(in8(serial_, kIir), 0) << "no extended feature register of a 16650";
  out(serial_, kLcr, 0xbf);
  EXPECT_NE(in8(serial_, kIir), 0) << "no 16C950 or Exar";
  out(serial_, kLcr, 0);
  const std::uint8_t mcr = in8(serial_, kMcr);
  out(serial_, kLcr, 0xe0);
  const std::uint8_t excr = in8(serial_, 2);
  EXPECT_EQ((mcr ^ excr) & 0x10, 0);
  out(serial_, kLcr, 0);
  out(serial_, kMcr, mcr ^ 0x10);
  out(serial_, kLcr, 0xe0);
  EXPECT_EQ(in8(serial_, 2) & 0x10, 0) << "no National Semiconductor super I/O";
  out(serial_, kLcr, 0);
  out(serial_, kMcr, mcr);
  out(serial_, kIer, 0x40);
  EXPECT_EQ(in8(serial_, kIer) & 0x40, 0) << "no XScale unit enable bit";
}

// serial8250_do_startup(): does THRE come again when the interrupt is enabled again?
TEST_F(SerialTest, LinuxThreTest) {
  out(serial_, kFcr, 0x07);
  out(serial_, kIer, 0x02);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x01) << "reading it took it";
  out(serial_, kIer, 0);
  out(serial_, kIer, 0x02);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02);
}

TEST_F(SerialTest, ScratchDivisorAndLineControlKeepTheirValues) {
  for (unsigned value = 0; value < 256; ++value) {
    out(serial_, kScr, value);
    EXPECT_EQ(in8(serial_, kScr), value);
    out(serial_, kLcr, value);
    EXPECT_EQ(in8(serial_, kLcr), value);
  }
  out(serial_, kLcr, 0x83);
  out(serial_, kData, 0x34);
  out(serial_, kIer, 0x12);
  EXPECT_EQ(in(serial_, kData, 2), 0x1234U);
  EXPECT_EQ(backend_.written, "") << "the divisor is not data";
  out(serial_, kLcr, 0x03);
  EXPECT_EQ(in8(serial_, kIer), 0) << "nor an interrupt mask";
  EXPECT_EQ(backend_.offer("x"), "");
  EXPECT_EQ(in8(serial_, kData), 'x');
}

TEST_F(SerialTest, SendsAtOnceAndThreInterruptsComeAgain) {
  out(serial_, kFcr, 0x01);
  out(serial_, kIer, 0x02);
  EXPECT_EQ(new_pulses(), 1);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02);
  EXPECT_EQ(new_pulses(), 0);
  send("a");
  EXPECT_EQ(new_pulses(), 1);
  EXPECT_EQ(in8(serial_, kLsr), kThreAndTemt);
  // A handler that never reads the identity needs an edge for each character all the same.
  send("b");
  EXPECT_EQ(new_pulses(), 1);
  EXPECT_EQ(backend_.written, "ab");
  out(serial_, kIer, 0);
  send("c");
  EXPECT_EQ(new_pulses(), 0);
}

TEST_F(SerialTest, AFullBackendShowsAsABusyTransmitter) {
  out(serial_, kFcr, 0x01);
  backend_.room = 2;
  out(serial_, kIer, 0x02);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02);
  new_pulses();
  send("0123456789");
  EXPECT_EQ(backend_.written, "01");
  EXPECT_EQ(in8(serial_, kLsr) & kThreAndTemt, 0);
  new_pulses();
  backend_.make_room(3);
  EXPECT_EQ(backend_.written, "01234");
  EXPECT_EQ(in8(serial_, kLsr) & kThreAndTemt, 0);
  EXPECT_EQ(new_pulses(), 0);
  backend_.make_room(100);
  EXPECT_EQ(backend_.written, "0123456789");
  EXPECT_EQ(in8(serial_, kLsr) & kThreAndTemt, kThreAndTemt);
  EXPECT_EQ(new_pulses(), 1);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02);
}

TEST_F(SerialTest, AGuestThatDoesNotWaitLosesCharactersAndNothingElse) {
  out(serial_, kFcr, 0x01);
  backend_.room = 0;
  for (int i = 0; i < 100; ++i) {
    send("x");
  }
  backend_.make_room(1000);
  EXPECT_EQ(backend_.written, std::string(16, 'x'));
}

TEST_F(SerialTest, ClearingTheTransmitFifoMakesItEmpty) {
  out(serial_, kFcr, 0x01);
  out(serial_, kIer, 0x02);
  backend_.room = 0;
  send("lost");
  new_pulses();
  out(serial_, kFcr, 0x05);
  EXPECT_EQ(in8(serial_, kLsr), kThreAndTemt);
  EXPECT_EQ(new_pulses(), 1);
  backend_.make_room(100);
  EXPECT_EQ(backend_.written, "");
}

TEST_F(SerialTest, ReceivesSixteenAndLetsTheRestWait) {
  out(serial_, kFcr, 0x01);
  out(serial_, kIer, 0x01);
  EXPECT_EQ(backend_.offer("abcdefghijklmnopqrst"), "qrst");
  EXPECT_EQ(new_pulses(), 1);
  EXPECT_EQ(in8(serial_, kIir), 0xc4);
  EXPECT_EQ(backend_.resumed, 0);
  EXPECT_EQ(in8(serial_, kData), 'a');
  EXPECT_EQ(backend_.resumed, 1) << "there is room again";
  EXPECT_EQ(backend_.offer("qrst"), "rst");
  EXPECT_EQ(take(), "bcdefghijklmnopq");
  EXPECT_EQ(in8(serial_, kIir), 0xc1);
  EXPECT_EQ(in8(serial_, kLsr), kThreAndTemt);
  new_pulses();
  EXPECT_EQ(backend_.offer("rst"), "");
  EXPECT_EQ(new_pulses(), 1);
  EXPECT_EQ(take(), "rst");
}

TEST_F(SerialTest, WithoutFifoOneCharacterAtATime) {
  EXPECT_EQ(backend_.offer("ab"), "b");
  EXPECT_EQ(in8(serial_, kData), 'a');
  EXPECT_EQ(backend_.resumed, 1);
  EXPECT_EQ(backend_.offer("b"), "");
  EXPECT_EQ(take(), "b");
}

TEST_F(SerialTest, TheTriggerLevelShowsInTheIdentity) {
  out(serial_, kIer, 0x01);
  const std::array<std::size_t, 4> levels{1, 4, 8, 14};
  for (unsigned setting = 0; setting < 4; ++setting) {
    out(serial_, kFcr, setting << 6 | 0x03);
    for (std::size_t count = 1; count <= 16; ++count) {
      EXPECT_EQ(backend_.offer("x"), "");
      EXPECT_EQ(in8(serial_, kIir), count >= levels[setting] ? 0xc4 : 0xcc) << setting << " " << count;
    }
    EXPECT_EQ(in8(serial_, kLsr) & 1, 1);
  }
}

TEST_F(SerialTest, InterruptPrioritiesAndWhatClearsEach) {
  out(serial_, kFcr, 0x01);
  out(serial_, kIer, 0x0f);
  backend_.offer("x");
  serial_.receive_break();
  out(serial_, kMcr, 0x1f);  // into the loop and out again: all modem inputs change
  out(serial_, kMcr, 0x10);
  out(serial_, kMcr, 0x0b);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x04) << "the break is behind the first character";
  EXPECT_EQ(in8(serial_, kData), 'x');
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x06) << "line status first";
  EXPECT_EQ(in8(serial_, kLsr) & 0x11, 0x11);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x04) << "then received data";
  EXPECT_EQ(in8(serial_, kData), 0);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02) << "then the transmitter";
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x00) << "then the modem status";
  EXPECT_NE(in8(serial_, kMsr) & 0x0f, 0);
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x01);
}

TEST_F(SerialTest, AnEdgeForWhatIsStillPendingWhenOneCauseIsCleared) {
  out(serial_, kFcr, 0x01);
  out(serial_, kIer, 0x03);
  new_pulses();
  backend_.offer("x");
  EXPECT_EQ(new_pulses(), 1) << "a second cause";
  EXPECT_EQ(in8(serial_, kData), 'x');
  EXPECT_EQ(new_pulses(), 1) << "THRE is still there, and a handler may have returned";
  EXPECT_EQ(in8(serial_, kIir) & 0x0f, 0x02);
  EXPECT_EQ(new_pulses(), 0);
}

// A handler that serves one cause for each interrupt and trusts in the next edge, as an edge-triggered pin
// allows.
TEST_F(SerialTest, ALazyHandlerStarvesNeither) {
  out(serial_, kFcr, 0x01);
  std::string to_send = "the quick brown fox jumps over the lazy dog";
  const std::string wanted = to_send;
  std::string incoming = "pack my box with five dozen liquor jugs";
  const std::string wanted_in = incoming;
  std::string received;
  out(serial_, kIer, 0x03);
  int handled = 0;
  for (int round = 0; round < 10'000 && (handled < irq_.pulses || !incoming.empty()); ++round) {
    if (handled == irq_.pulses) {
      incoming =
          backend_.offer(incoming.substr(0, 3)) + incoming.substr(std::min<std::size_t>(3, incoming.size()));
      continue;
    }
    handled = irq_.pulses;  // pending edges are one
    switch (in8(serial_, kIir) & 0x0f) {
      case 0x04:
      case 0x0c:
        while ((in8(serial_, kLsr) & 1) != 0) {
          received += static_cast<char>(in8(serial_, kData));
        }
        break;
      case 0x02:
        if (!to_send.empty()) {
          send(to_send.substr(0, 1));
          to_send.erase(0, 1);
        }
        break;
      default:
        break;
    }
  }
  EXPECT_EQ(backend_.written, wanted);
  EXPECT_EQ(received, wanted_in);
}

TEST_F(SerialTest, LoopbackReturnsWhatIsSentAndShutsTheOutsideOut) {
  out(serial_, kFcr, 0x01);
  out(serial_, kMcr, 0x10);
  EXPECT_EQ(backend_.offer("outside"), "outside");
  send("inside");
  EXPECT_EQ(backend_.written, "");
  EXPECT_EQ(take(), "inside");
  out(serial_, kMcr, 0x00);
  EXPECT_EQ(backend_.resumed, 1);
  EXPECT_EQ(backend_.offer("outside"), "");
  EXPECT_EQ(take(), "outside");
}

TEST_F(SerialTest, LoopbackConnectsModemOutputsToInputs) {
  for (unsigned mcr = 0; mcr < 16; ++mcr) {
    out(serial_, kMcr, 0x10 | mcr);
    const unsigned wanted = ((mcr & 2) << 3) | ((mcr & 1) << 5) | ((mcr & 4) << 4) | ((mcr & 8) << 4);
    EXPECT_EQ(in8(serial_, kMsr) & 0xf0U, wanted) << mcr;
    EXPECT_EQ(in8(serial_, kMsr) & 0x0fU, 0U) << "reading clears the deltas";
  }
  out(serial_, kMcr, 0x10);
  EXPECT_EQ(in8(serial_, kMsr) & 0x0f, 0x0f) << "all four fell, the ring indicator too";
  out(serial_, kMcr, 0x14);
  EXPECT_EQ(in8(serial_, kMsr) & 0x0f, 0x00) << "a rising ring indicator does not count";
}

TEST_F(SerialTest, OverrunKeepsTheOldInTheFifoAndTheNewWithoutIt) {
  out(serial_, kMcr, 0x10);
  send("ab");
  EXPECT_EQ(in8(serial_, kLsr) & 0x03, 0x03);
  EXPECT_EQ(in8(serial_, kLsr) & 0x03, 0x01) << "reading clears the error";
  EXPECT_EQ(in8(serial_, kData), 'b');
  out(serial_, kFcr, 0x01);
  send("0123456789abcdefgh");
  EXPECT_EQ(in8(serial_, kLsr) & 0x03, 0x03);
  EXPECT_EQ(take(), "0123456789abcdef");
}

TEST_F(SerialTest, BreakInTheLoop) {
  out(serial_, kFcr, 0x01);
  out(serial_, kMcr, 0x10);
  out(serial_, kLcr, 0x43);
  EXPECT_EQ(in8(serial_, kLsr) & 0x91, 0x91) << "data, break, error in the FIFO";
  EXPECT_EQ(in8(serial_, kLsr) & 0x91, 0x01);
  out(serial_, kLcr, 0x43);
  EXPECT_EQ(take(), std::string(1, '\0')) << "holding the line is one break";
}

TEST_F(SerialTest, SwitchingTheFifoClearsIt) {
  backend_.offer("a");
  out(serial_, kFcr, 0x01);
  EXPECT_EQ(in8(serial_, kLsr) & 1, 0);
  backend_.offer("abc");
  out(serial_, kFcr, 0x01);
  EXPECT_EQ(in8(serial_, kData), 'a') << "writing the same value clears nothing";
  out(serial_, kFcr, 0x03);
  EXPECT_EQ(in8(serial_, kLsr) & 1, 0);
}

TEST_F(SerialTest, SnapshotKeepsWhatIsInFlight) {
  out(serial_, kFcr, 0x81);
  out(serial_, kLcr, 0x13);
  out(serial_, kMcr, 0x0b);
  out(serial_, kScr, 0x5a);
  out(serial_, kIer, 0x03);
  backend_.room = 1;
  send("out");
  backend_.offer("in");
  const StateRecord record = serial_.save();

  IrqRecord irq;
  FakeCharBackend backend;
  backend.room = 0;
  Serial other(std::make_unique<FakeIrqLine>(irq), &backend);
  ASSERT_TRUE(other.load(record));
  EXPECT_EQ(other.save().bytes, record.bytes);
  EXPECT_EQ(irq.pulses, 1) << "what was pending is told again";
  EXPECT_EQ(in8(other, kScr), 0x5a);
  EXPECT_EQ(in8(other, kData), 'i');
  EXPECT_EQ(in8(other, kData), 'n');
  backend.make_room(100);
  EXPECT_EQ(backend.written, "ut");
}

TEST_F(SerialTest, DamagedStateIsRefusedAndLeavesTheDeviceAlone) {
  out(serial_, kFcr, 0x01);
  backend_.offer("abc");
  const StateRecord good = serial_.save();
  for (std::size_t size = 0; size < good.bytes.size(); ++size) {
    StateRecord cut = good;
    cut.bytes.resize(size);
    EXPECT_FALSE(serial_.load(cut)) << size;
  }
  StateRecord too_many = good;
  too_many.bytes[10] = 17;
  EXPECT_FALSE(serial_.load(too_many));
  EXPECT_EQ(take(), "abc");
}

TEST(Serial, WithoutABackendWhatIsSentIsDropped) {
  IrqRecord irq;
  Serial serial(std::make_unique<FakeIrqLine>(irq), nullptr);
  for (int i = 0; i < 100; ++i) {
    out(serial, kData, 'x');
    EXPECT_EQ(in8(serial, kLsr), kThreAndTemt);
  }
}

TEST(Serial, LeavesTheBackendWhenItGoes) {
  FakeCharBackend backend;
  IrqRecord irq;
  {
    const Serial serial(std::make_unique<FakeIrqLine>(irq), &backend);
    EXPECT_TRUE(backend.has_receiver());
  }
  EXPECT_FALSE(backend.has_receiver());
}

}  // namespace
}  // namespace wisp
