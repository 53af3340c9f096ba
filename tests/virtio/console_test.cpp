#include "virtio/console.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "virtio/support/device_harness.h"
#include "virtio/support/fake_char_backend.h"

namespace wisp {
namespace {

using test::ChainBuilder;
using test::DeviceHarness;
using test::FakeCharBackend;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr std::uint64_t kMultiport = 1ULL << 1;

Result<std::unique_ptr<VirtioConsole>> create(EventLoop& loop, const GuestMemory& memory,
                                              std::vector<VirtioConsolePort> ports, Log& log,
                                              const Clock& clock) {
  return VirtioConsole::create(loop, memory, {.id = "serial0"}, std::move(ports), log, clock);
}

class ConsoleTest : public testing::Test {
 protected:
  // A console with number 0 and a named port with number 1.
  FakeCharBackend console_backend_;
  FakeCharBackend port_backend_;
  Log log_{-1};
  SystemClock clock_;
  DeviceHarness harness_{[this](EventLoop& loop, const GuestMemory& memory) {
    std::vector<VirtioConsolePort> ports;
    ports.push_back({{.id = "p", .name = "org.example.0"}, &port_backend_});
    ports.push_back({{.id = "c", .console = true}, &console_backend_});
    return create(loop, memory, std::move(ports), log_, clock_).value();
  }};

  // "event port value [rest]" of each control message that came.
  std::vector<std::string> messages() {
    harness_.pump();
    std::vector<std::string> texts;
    while (const auto used = harness_.queue(2).take_used()) {
      const Gpa at = control_at_.at(used->head);
      std::string text =
          fmt::format("{} {} {}", harness_.guest().load<std::uint16_t>(at + 4),
                      harness_.guest().load<std::uint32_t>(at), harness_.guest().load<std::uint16_t>(at + 6));
      if (used->written > 8) {
        const std::string rest = harness_.guest().read_text(at + 8, used->written - 8);
        text += harness_.guest().load<std::uint16_t>(at + 4) == 5
                    ? fmt::format(" {}x{}", harness_.guest().load<std::uint16_t>(at + 8),
                                  harness_.guest().load<std::uint16_t>(at + 10))
                    : " " + rest;
      }
      texts.push_back(text);
    }
    return texts;
  }
  void give_control_buffers(int count) {
    for (int i = 0; i < count; ++i) {
      const Gpa at = harness_.guest().allocate(128);
      control_at_[harness_.submit(2, ChainBuilder().writable(at, 128))] = at;
    }
  }
  void control(std::uint32_t port, std::uint16_t event, std::uint16_t value) {
    const Gpa at = harness_.guest().allocate(8);
    harness_.guest().store(at, port);
    harness_.guest().store(at + 4, event);
    harness_.guest().store(at + 6, value);
    harness_.submit(3, ChainBuilder().readable(at, 8));
    harness_.pump();
    ASSERT_TRUE(harness_.queue(3).take_used().has_value());
  }
  void start() {
    ASSERT_TRUE(harness_.activate().has_value());
    give_control_buffers(12);
    control(0, 0, 1);
    EXPECT_THAT(messages(), ElementsAre("1 0 1", "1 1 1"));
    control(0, 3, 1);
    EXPECT_THAT(messages(), ElementsAre("4 0 1", "5 0 0 80x25", "6 0 1"));
    control(1, 3, 1);
    EXPECT_THAT(messages(), ElementsAre("7 1 1 org.example.0", "6 1 1"));
    control(0, 6, 1);
    control(1, 6, 1);
  }
  void send(std::uint16_t queue, const std::string& text) {
    const Gpa at = harness_.guest().allocate(text.size());
    harness_.guest().write(at, text);
    harness_.submit(queue, ChainBuilder().readable(at, static_cast<std::uint32_t>(text.size())));
    harness_.pump();
  }
  std::map<std::uint32_t, Gpa> control_at_;
};

TEST_F(ConsoleTest, QueuesArePlacedByPortNumber) {
  EXPECT_EQ(harness_.device().queue_sizes().size(), 6U);
  EXPECT_EQ(harness_.read_config<std::uint32_t>(4), 2U);  // max_nr_ports
  EXPECT_EQ(harness_.read_config<std::uint16_t>(0), 80U);
  EXPECT_EQ(harness_.read_config<std::uint16_t>(2), 25U);
}

TEST_F(ConsoleTest, PortsAreAnnouncedThenDescribed) {
  start();
}

TEST_F(ConsoleTest, MessagesWaitForBuffersWithoutPilingUp) {
  ASSERT_TRUE(harness_.activate().has_value());
  control(0, 0, 1);
  control(1, 3, 1);
  for (int i = 0; i < 1000; ++i) {
    port_backend_.set_connected(i % 2 == 0);
  }
  give_control_buffers(12);
  // The last state, once.
  EXPECT_THAT(messages(), ElementsAre("1 0 1", "1 1 1", "7 1 1 org.example.0", "6 1 0"));
}

TEST_F(ConsoleTest, OutputReachesTheRightBackEnd) {
  start();
  send(1, "console");
  send(5, "port");
  EXPECT_EQ(console_backend_.take_output(), "console");
  EXPECT_EQ(port_backend_.take_output(), "port");
  EXPECT_TRUE(harness_.queue(1).take_used().has_value());
  EXPECT_EQ(harness_.interrupts().used(1), 1U);
}

TEST_F(ConsoleTest, SlowBackEndHoldsTheGuestsBufferAndNothingIsLost) {
  start();
  std::string text;
  for (int i = 0; i < 9000; ++i) {
    text += static_cast<char>('a' + i % 26);
  }
  console_backend_.set_room(5);
  send(1, text);
  EXPECT_FALSE(harness_.queue(1).take_used().has_value());
  // Another port is not held up.
  send(5, "meanwhile");
  EXPECT_EQ(port_backend_.take_output(), "meanwhile");
  std::string out = console_backend_.take_output();
  EXPECT_EQ(out, text.substr(0, 5));
  // A snapshot in between: the buffer goes back, what was sent is not sent again.
  harness_.pause();
  EXPECT_EQ(harness_.device().queue(1)->in_flight(), 0U);
  console_backend_.set_room(1);
  harness_.resume();
  harness_.pump();
  console_backend_.set_room(1 << 20);
  harness_.pump();
  out += console_backend_.take_output();
  EXPECT_EQ(out, text);
  EXPECT_TRUE(harness_.queue(1).take_used().has_value());
}

TEST_F(ConsoleTest, InputGoesIntoTheGuestsBuffersAndStopsWithoutThem) {
  start();
  EXPECT_EQ(console_backend_.input("nobody listens"), 0U);
  const Gpa a = harness_.guest().allocate(8);
  const Gpa b = harness_.guest().allocate(8);
  const int resumes = console_backend_.resumes();
  harness_.submit(0, ChainBuilder().writable(a, 4));
  harness_.submit(0, ChainBuilder().writable(b, 8));
  harness_.pump();
  EXPECT_GT(console_backend_.resumes(), resumes);
  EXPECT_EQ(console_backend_.input("hello world, this is more"), 12U);
  EXPECT_EQ(harness_.queue(0).take_used()->written, 4U);
  EXPECT_EQ(harness_.queue(0).take_used()->written, 8U);
  EXPECT_EQ(harness_.guest().read_text(a, 4) + harness_.guest().read_text(b, 8), "hello world,");
}

TEST_F(ConsoleTest, ClosedPortsGetNoInput) {
  start();
  harness_.submit(4, ChainBuilder().writable(harness_.guest().allocate(8), 8));
  control(1, 6, 0);
  EXPECT_EQ(port_backend_.input("x"), 0U);
  control(1, 6, 1);
  EXPECT_EQ(port_backend_.input("x"), 1U);
}

TEST_F(ConsoleTest, PeersAndSizesAreTold) {
  start();
  port_backend_.set_connected(false);
  port_backend_.set_connected(true);
  console_backend_.resize(132, 50);
  console_backend_.resize(132, 50);
  EXPECT_THAT(messages(), ElementsAre("6 1 0", "6 1 1", "5 0 0 132x50"));
  EXPECT_EQ(harness_.read_config<std::uint16_t>(0), 132U);
  EXPECT_EQ(harness_.interrupts().config(), 1U);
}

TEST_F(ConsoleTest, WithoutMultiportThereIsOneConsole) {
  ASSERT_TRUE(harness_.activate({.features = ~kMultiport}).has_value());
  send(1, "plain");
  EXPECT_EQ(console_backend_.take_output(), "plain");
  harness_.submit(0, ChainBuilder().writable(harness_.guest().allocate(8), 8));
  EXPECT_EQ(console_backend_.input("in"), 2U);
  harness_.submit(4, ChainBuilder().writable(harness_.guest().allocate(8), 8));
  EXPECT_EQ(port_backend_.input("in"), 0U);
}

TEST_F(ConsoleTest, EmergencyWriteWorksBeforeTheDriver) {
  harness_.write_config<std::uint32_t>(8, 'A');
  harness_.write_config<std::uint8_t>(8, 'B');
  EXPECT_EQ(console_backend_.take_output(), "AB");
}

TEST_F(ConsoleTest, BadControlMessagesAreHarmless) {
  start();
  control(77, 3, 1);
  control(1, 99, 1);
  control(0xffffffff, 6, 1);
  const Gpa at = harness_.guest().allocate(8);
  harness_.submit(3, ChainBuilder().readable(at, 3));
  harness_.submit(3, ChainBuilder().writable(at, 8));
  harness_.pump();
  EXPECT_FALSE(harness_.interrupts().broken());
  send(1, "alive");
  EXPECT_EQ(console_backend_.take_output(), "alive");
}

TEST_F(ConsoleTest, PortsStayOpenOverARestore) {
  start();
  harness_.pause();
  const StateRecord saved = harness_.device().save();
  harness_.resume();
  harness_.reset();
  harness_.pause();
  ASSERT_TRUE(harness_.device().load(saved).has_value());
  ASSERT_TRUE(harness_.activate().has_value());
  harness_.resume();
  harness_.submit(4, ChainBuilder().writable(harness_.guest().allocate(8), 8));
  EXPECT_EQ(port_backend_.input("x"), 1U);
}

TEST(ConsolePorts, NumbersAreChecked) {
  const auto loop = EventLoop::create().value();
  test::FakeGuest guest;
  Log log{-1};
  SystemClock clock;
  FakeCharBackend backend;
  const auto error = [&](std::vector<VirtioConsolePortOptions> options) {
    std::vector<VirtioConsolePort> ports;
    for (auto& option : options) {
      ports.push_back({std::move(option), &backend});
    }
    const auto made = create(*loop, guest.memory(), std::move(ports), log, clock);
    return made ? std::string() : made.error().message;
  };
  EXPECT_THAT(error({{.id = "a", .nr = 0}}), HasSubstr("port a: nr=0 is for a virtconsole"));
  EXPECT_THAT(error({{.id = "a", .nr = 31, .console = true}}), HasSubstr("nr=31 is too high"));
  EXPECT_THAT(error({{.id = "a", .nr = 3}, {.id = "b", .nr = 3}}), HasSubstr("port b: nr=3 is taken"));
  EXPECT_EQ(error({{.id = "a", .nr = 30}, {.id = "b"}, {.id = "c", .console = true}}), "");
  EXPECT_FALSE(backend.has_receiver());  // let go by the last one that was made
  std::vector<VirtioConsolePortOptions> many(31, {.id = "x"});
  EXPECT_THAT(error(many), HasSubstr("all 31 port numbers are taken"));
}

}  // namespace
}  // namespace wisp
