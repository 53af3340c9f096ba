#include "net/passt.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <string>
#include <vector>

namespace wisp {
namespace {

using ::testing::HasSubstr;

TEST(PortForwards, ParsesQemusForm) {
  const auto forwards = parse_port_forwards("tcp::2222-:22;udp:127.0.0.1:53-:5353;:[::1]:80-:8080").value();
  ASSERT_EQ(forwards.size(), 3U);
  EXPECT_EQ(forwards[0], (PortForward{false, "", 2222, 22}));
  EXPECT_EQ(forwards[1], (PortForward{true, "127.0.0.1", 53, 5353}));
  EXPECT_EQ(forwards[2], (PortForward{false, "::1", 80, 8080}));
  EXPECT_TRUE(parse_port_forwards("").value().empty());
}

TEST(PortForwards, RefusesWhatItCannotDo) {
  for (const char* text : {"x", "tcp", "tcp:", "tcp::2222", "tcp::2222-22", "tcp::0-:22", "tcp::2222-:0",
                           "tcp::65536-:22", "tcp::2222-:65536", "icmp::1-:1", "tcp:host:1-:1",
                           "tcp::2222-10.0.2.15:22", "tcp::-:", "tcp::1-:1;x", "tcp:-t:1-:1"}) {
    EXPECT_FALSE(parse_port_forwards(text).has_value()) << text;
  }
}

// A stand-in for passt, so that its misbehaviour can be tested too.
class FakePasst : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(::mkdtemp(dir_.data()), nullptr); }
  void TearDown() override {
    ::unlink((dir_ + "/passt").c_str());
    ::unlink((dir_ + "/args").c_str());
    ::rmdir(dir_.c_str());
  }
  PasstOptions program(const std::string& script) {
    const std::string path = dir_ + "/passt";
    std::ofstream(path) << "#!/bin/sh\n" << script << "\n";
    ::chmod(path.c_str(), 0700);
    return {.program = path};
  }
  std::string dir_ = "/tmp/wisp-passt-XXXXXX";
};

TEST_F(FakePasst, ComplaintsAtTheStartAreTheError) {
  const auto backend = PasstBackend::start(program("echo 'no route today' >&2; exit 3"));
  ASSERT_FALSE(backend.has_value());
  EXPECT_THAT(backend.error().message, HasSubstr("exit status 3"));
  EXPECT_THAT(backend.error().message, HasSubstr("no route today"));
  EXPECT_EQ(backend.error().message.find('\n'), std::string::npos);
}

TEST_F(FakePasst, GetsItsOptionsAndOneDescriptorOnly) {
  PasstOptions options =
      program("{ echo \"$@\"; for f in /proc/$$/fd/*; do echo ${f##*/}; done; } > " + dir_ + "/args; exit 1");
  options.forwards = {{false, "", 2222, 22}, {true, "127.0.0.1", 53, 5353}};
  options.mtu = 1400;
  options.ipv6 = false;
  EXPECT_FALSE(PasstBackend::start(options).has_value());
  std::ifstream file(dir_ + "/args");
  std::string arguments;
  std::getline(file, arguments);
  EXPECT_EQ(arguments,
            "--foreground --quiet --fd 3 --tcp-ports 2222:22 --udp-ports 127.0.0.1/53:5353 --mtu 1400 "
            "--ipv4-only");
  // The shell keeps its script open too.
  std::vector<int> open;
  for (int fd = 0; file >> fd;) {
    if (fd < 10) {
      open.push_back(fd);
    }
  }
  EXPECT_THAT(open, ::testing::IsSubsetOf({0, 1, 2, 3, 4}));
}

TEST_F(FakePasst, AHangingProgramIsKilledAndReaped) {
  auto backend = PasstBackend::start(program("trap '' TERM HUP INT; while :; do sleep 1; done"));
  ASSERT_TRUE(backend.has_value()) << backend.error().message;
  const pid_t pid = (*backend)->pid();
  EXPECT_EQ(::kill(pid, 0), 0);
  backend->reset();
  EXPECT_EQ(::kill(pid, 0), -1);
}

TEST_F(FakePasst, ItsDeathIsAClosedLinkWithAReason) {
  auto backend = PasstBackend::start(program("sleep 1.5; echo gone fishing >&2; kill -9 $$"));
  ASSERT_TRUE(backend.has_value()) << backend.error().message;
  pollfd wait{.fd = (*backend)->poll_fd(0), .events = POLLIN, .revents = 0};
  ASSERT_EQ(::poll(&wait, 1, 5000), 1);
  std::array<std::uint8_t, 64> bytes{};
  const iovec piece{bytes.data(), bytes.size()};
  EXPECT_EQ((*backend)->receive(0, std::span(&piece, 1)).status, NetIo::kClosed);
  EXPECT_EQ((*backend)->failure(), "passt ended with signal 9: gone fishing");
  EXPECT_EQ((*backend)->send(0, std::span(&piece, 1)), NetIo::kClosed);
}

TEST(Passt, AMissingProgramIsAnErrorThatSaysWhatToDo) {
  const auto backend = PasstBackend::start({.program = "/nonexistent/passt"});
  ASSERT_FALSE(backend.has_value());
  EXPECT_THAT(backend.error().message, HasSubstr("/nonexistent/passt"));
  EXPECT_THAT(backend.error().message, HasSubstr("install"));
}

// The real program.
class RealPasst : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto probe = PasstBackend::start({});
    if (!probe) {
      GTEST_SKIP() << "passt does not run here: " << probe.error().message;
    }
  }
};

std::vector<std::uint8_t> arp_request(std::uint32_t target) {
  std::vector<std::uint8_t> frame(42);
  std::fill_n(frame.begin(), 6, std::uint8_t{0xff});
  const std::array<std::uint8_t, 6> mac{0x52, 0x54, 0, 0x12, 0x34, 0x56};
  std::ranges::copy(mac, frame.begin() + 6);
  const std::array<std::uint8_t, 10> head{8, 6, 0, 1, 8, 0, 6, 4, 0, 1};
  std::ranges::copy(head, frame.begin() + 12);
  std::ranges::copy(mac, frame.begin() + 22);
  const std::uint32_t target_be = htonl(target);
  std::memcpy(&frame[38], &target_be, 4);
  return frame;
}

TEST_F(RealPasst, AnswersAnArpRequest) {
  const auto backend = PasstBackend::start({}).value();
  auto request = arp_request(0xc0000201);
  const iovec out{request.data(), request.size()};
  ASSERT_EQ(backend->send(0, std::span(&out, 1)), NetIo::kDone);
  ASSERT_EQ(backend->flush(0), NetIo::kDone);
  bool answered = false;
  for (int i = 0; i < 50 && !answered; ++i) {
    pollfd wait{.fd = backend->poll_fd(0), .events = POLLIN, .revents = 0};
    ::poll(&wait, 1, 100);
    std::array<std::uint8_t, 2048> bytes{};
    const iovec in{bytes.data(), bytes.size()};
    const NetReceived got = backend->receive(0, std::span(&in, 1));
    answered =
        got.status == NetIo::kDone && got.size == 42 && bytes[12] == 8 && bytes[13] == 6 && bytes[21] == 2;
  }
  EXPECT_TRUE(answered);
}

TEST_F(RealPasst, ABusyPortIsAnErrorAtTheStart) {
  const UniqueFd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_TRUE(socket.valid());
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(socket.get(), 1), 0);
  socklen_t size = sizeof address;
  ASSERT_EQ(::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  const auto backend = PasstBackend::start({.forwards = {{false, "127.0.0.1", ntohs(address.sin_port), 22}}});
  ASSERT_FALSE(backend.has_value());
  EXPECT_THAT(backend.error().message, HasSubstr(std::to_string(ntohs(address.sin_port))));
}

}  // namespace
}  // namespace wisp
