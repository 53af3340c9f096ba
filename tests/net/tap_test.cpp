// Real tap interfaces: skipped where this process may not create them.
#include "net/tap.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <string>
#include <vector>

namespace wisp {
namespace {

using ::testing::HasSubstr;

constexpr std::uint16_t kTestProtocol = 0x88b5;  // for local experiments

class Tap : public ::testing::Test {
 protected:
  void SetUp() override {
    name_ = "wt" + std::to_string(::getpid() % 100000) + "x" + std::to_string(++counter);
    const UniqueFd probe(::open("/dev/net/tun", O_RDWR | O_CLOEXEC));
    ifreq request = request_for(name_, IFF_TAP | IFF_NO_PI);
    if (!probe.valid() || ::ioctl(probe.get(), TUNSETIFF, &request) != 0) {
      GTEST_SKIP() << "no permission to create tap interfaces";
    }
  }
  static ifreq request_for(const std::string& name, int flags) {
    ifreq request{};
    name.copy(request.ifr_name, IFNAMSIZ - 1);
    request.ifr_flags = static_cast<short>(flags);
    return request;
  }
  static UniqueFd open_raw(const std::string& name, int flags) {
    UniqueFd fd(::open("/dev/net/tun", O_RDWR | O_CLOEXEC));
    ifreq request = request_for(name, flags);
    EXPECT_EQ(::ioctl(fd.get(), TUNSETIFF, &request), 0);
    return fd;
  }
  // The host's side of the interface.
  static UniqueFd packet_socket(const std::string& name) {
    UniqueFd fd(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(kTestProtocol)));
    sockaddr_ll address{};
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(kTestProtocol);
    address.sll_ifindex = static_cast<int>(::if_nametoindex(name.c_str()));
    EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    return fd;
  }
  static std::vector<std::uint8_t> frame(std::size_t size) {
    std::vector<std::uint8_t> bytes(size, 0x5a);
    std::fill_n(bytes.begin(), 6, std::uint8_t{0xff});
    std::fill_n(bytes.begin() + 6, 6, std::uint8_t{0x52});
    bytes[12] = kTestProtocol >> 8;
    bytes[13] = kTestProtocol & 0xff;
    return bytes;
  }
  static bool wait_readable(int fd) {
    pollfd wait{.fd = fd, .events = POLLIN, .revents = 0};
    return ::poll(&wait, 1, 2000) == 1;
  }
  static NetIo send(TapBackend& tap, std::uint16_t pair, std::vector<std::uint8_t> bytes) {
    std::array<std::uint8_t, kVnetHeaderSize> header{};
    const std::array<iovec, 2> pieces{{{header.data(), header.size()}, {bytes.data(), bytes.size()}}};
    return tap.send(pair, pieces);
  }

  std::string name_;
  static inline int counter = 0;
};

TEST_F(Tap, CreatesBringsUpCarriesFramesAndGoesAway) {
  auto tap = TapBackend::open(name_, 1);
  ASSERT_TRUE(tap.has_value()) << tap.error().message;
  EXPECT_TRUE((*tap)->has_vnet_header());
  EXPECT_TRUE((*tap)->offloads().checksum);
  EXPECT_TRUE((*tap)->offloads().tso4);
  const UniqueFd host = packet_socket(name_);

  ASSERT_EQ(send(**tap, 0, frame(60)), NetIo::kDone);
  ASSERT_TRUE(wait_readable(host.get()));
  std::array<std::uint8_t, 2048> bytes{};
  EXPECT_EQ(::recv(host.get(), bytes.data(), bytes.size(), MSG_DONTWAIT), 60);

  const auto sent = frame(1000);
  ASSERT_EQ(::send(host.get(), sent.data(), sent.size(), 0), 1000);
  // Other frames (router solicitations) may come first.
  bool found = false;
  while (!found && wait_readable((*tap)->poll_fd(0))) {
    std::array<std::uint8_t, 4096> in{};
    const iovec piece{in.data(), in.size()};
    const NetReceived got = (*tap)->receive(0, std::span(&piece, 1));
    ASSERT_EQ(got.status, NetIo::kDone);
    found = got.size == kVnetHeaderSize + 1000 &&
            std::equal(sent.begin(), sent.end(), in.begin() + kVnetHeaderSize);
  }
  EXPECT_TRUE(found);

  tap->reset();
  EXPECT_EQ(::if_nametoindex(name_.c_str()), 0U) << "nothing is left behind";
}

TEST_F(Tap, HeadersThatLieAndShortFramesAreDropped) {
  const auto tap = TapBackend::open(name_, 1).value();
  EXPECT_EQ(send(*tap, 0, {}), NetIo::kDropped);
  EXPECT_EQ(send(*tap, 0, std::vector<std::uint8_t>(13)), NetIo::kDropped);
  auto bytes = frame(100);
  // NEEDS_CSUM at 60000, TSO with a header longer than the frame, an unknown type.
  for (const std::array<std::uint8_t, kVnetHeaderSize>& lie :
       {std::array<std::uint8_t, kVnetHeaderSize>{1, 0, 0, 0, 0, 0, 0x60, 0xea, 0x60, 0xea},
        std::array<std::uint8_t, kVnetHeaderSize>{1, 1, 0xff, 0xff, 0, 0, 0, 0, 0, 0},
        std::array<std::uint8_t, kVnetHeaderSize>{0, 0x77, 0, 0, 0, 0, 0, 0, 0, 0}}) {
    auto header = lie;
    const std::array<iovec, 2> pieces{{{header.data(), header.size()}, {bytes.data(), bytes.size()}}};
    EXPECT_EQ(tap->send(0, pieces), NetIo::kDropped);
  }
  EXPECT_EQ(send(*tap, 0, frame(60)), NetIo::kDone);
}

TEST_F(Tap, SeveralQueuesCanBeSwitched) {
  const auto tap = TapBackend::open(name_, 4).value();
  EXPECT_EQ(tap->queue_pairs(), 4);
  for (std::uint16_t i = 0; i < 4; ++i) {
    EXPECT_EQ(send(*tap, i, frame(60)), NetIo::kDone);
  }
  ASSERT_TRUE(tap->set_active_pairs(1).has_value());
  EXPECT_EQ(send(*tap, 0, frame(60)), NetIo::kDone);
  const auto detached = [&](std::uint16_t pair) {
    ifreq request{};
    EXPECT_EQ(::ioctl(tap->poll_fd(pair), TUNGETIFF, &request), 0);
    return (request.ifr_flags & IFF_DETACH_QUEUE) != 0;
  };
  EXPECT_FALSE(detached(0));
  EXPECT_TRUE(detached(1));
  EXPECT_TRUE(detached(3));
  ASSERT_TRUE(tap->set_active_pairs(4).has_value());
  EXPECT_FALSE(detached(3));
  EXPECT_EQ(send(*tap, 3, frame(60)), NetIo::kDone);
  EXPECT_TRUE(tap->set_offloads({.checksum = true, .tso4 = true}).has_value());
  EXPECT_TRUE(tap->set_offloads({}).has_value());
}

TEST_F(Tap, ABusyInterfaceIsAnError) {
  const UniqueFd other = open_raw(name_, IFF_TAP | IFF_NO_PI);
  const auto tap = TapBackend::open(name_, 1);
  ASSERT_FALSE(tap.has_value());
  EXPECT_THAT(tap.error().message, HasSubstr("in use by another program"));
  const auto queues = TapBackend::open(name_, 2);
  ASSERT_FALSE(queues.has_value());
  EXPECT_THAT(queues.error().message, HasSubstr("queues=1"));
}

TEST_F(Tap, AnInterfaceMadeForSeveralQueuesServesAUserOfOne) {
  UniqueFd maker = open_raw(name_, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE);
  const auto tap = TapBackend::open(name_, 1);
  EXPECT_TRUE(tap.has_value()) << tap.error().message;
}

TEST_F(Tap, AnotherKindOfInterfaceIsAnError) {
  const auto tap = TapBackend::open("lo", 1);
  ASSERT_FALSE(tap.has_value());
  EXPECT_THAT(tap.error().message, HasSubstr("lo"));
}

TEST_F(Tap, TakesDescriptorsOver) {
  std::vector<UniqueFd> fds;
  fds.push_back(open_raw(name_, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE));
  fds.push_back(open_raw(name_, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE));
  const int raw = fds[0].get();
  const auto tap = TapBackend::from_fds(std::move(fds));
  ASSERT_TRUE(tap.has_value()) << tap.error().message;
  EXPECT_EQ((*tap)->name(), name_);
  EXPECT_EQ((*tap)->queue_pairs(), 2);
  EXPECT_NE(::fcntl(raw, F_GETFL) & O_NONBLOCK, 0);
  EXPECT_NE(::fcntl(raw, F_GETFD) & FD_CLOEXEC, 0);
  std::uint8_t byte = 0;
  const iovec piece{&byte, 1};
  NetReceived got = (*tap)->receive(0, std::span(&piece, 1));
  EXPECT_EQ(got.status, NetIo::kAgain);
}

TEST_F(Tap, ADescriptorWithoutHeadersHasNoOffloads) {
  std::vector<UniqueFd> fds;
  fds.push_back(open_raw(name_, IFF_TAP | IFF_NO_PI));
  const auto tap = TapBackend::from_fds(std::move(fds)).value();
  EXPECT_FALSE(tap->has_vnet_header());
  EXPECT_EQ(tap->offloads(), NetOffloads{});
  EXPECT_FALSE(tap->set_offloads({.checksum = true}).has_value());
}

TEST_F(Tap, DescriptorsOfTwoInterfacesOrOfTunAreRefused) {
  std::vector<UniqueFd> two;
  two.push_back(open_raw(name_, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR));
  two.push_back(open_raw(name_ + "b", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR));
  const auto mixed = TapBackend::from_fds(std::move(two));
  ASSERT_FALSE(mixed.has_value());
  EXPECT_THAT(mixed.error().message, HasSubstr("two interfaces"));
  std::vector<UniqueFd> tun;
  tun.push_back(open_raw(name_ + "t", IFF_TUN | IFF_NO_PI));
  const auto refused = TapBackend::from_fds(std::move(tun));
  ASSERT_FALSE(refused.has_value());
  EXPECT_THAT(refused.error().message, HasSubstr("tun mode"));
}

TEST_F(Tap, AnInterfaceThatIsRemovedIsAClosedLink) {
  UniqueFd maker = open_raw(name_, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE);
  ASSERT_EQ(::ioctl(maker.get(), TUNSETPERSIST, 1), 0);
  const auto tap = TapBackend::open(name_, 1).value();
  maker.reset();
  ASSERT_EQ(std::system(("ip link del " + name_).c_str()), 0);
  EXPECT_EQ(send(*tap, 0, frame(60)), NetIo::kClosed);
  std::array<std::uint8_t, 64> bytes{};
  const iovec piece{bytes.data(), bytes.size()};
  EXPECT_EQ(tap->receive(0, std::span(&piece, 1)).status, NetIo::kClosed);
  EXPECT_THAT(tap->failure(), HasSubstr(name_));
}

TEST(TapErrors, NamesAreChecked) {
  for (const std::string& name : {std::string(), std::string(16, 'x'), std::string("a/b"), std::string("a b"),
                                  std::string("tap%d"), std::string(".."), std::string("a:1")}) {
    EXPECT_FALSE(TapBackend::open(name, 1).has_value()) << name;
  }
  EXPECT_FALSE(TapBackend::open("x", 0).has_value());
  EXPECT_FALSE(TapBackend::open("x", 17).has_value());
}

TEST(TapErrors, OtherDescriptorsAreRefused) {
  const auto refuse = [](UniqueFd fd) {
    std::vector<UniqueFd> fds;
    fds.push_back(std::move(fd));
    return !TapBackend::from_fds(std::move(fds)).has_value();
  };
  EXPECT_TRUE(refuse(UniqueFd(::open("/dev/null", O_RDWR))));
  EXPECT_TRUE(refuse(UniqueFd(::socket(AF_UNIX, SOCK_STREAM, 0))));
  EXPECT_TRUE(refuse(UniqueFd()));
  EXPECT_TRUE(refuse(UniqueFd(::open("/dev/net/tun", O_RDWR))));
  EXPECT_FALSE(TapBackend::from_fds({}).has_value());
}

}  // namespace
}  // namespace wisp
