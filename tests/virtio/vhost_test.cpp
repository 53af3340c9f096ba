// The kernel's back ends, where this machine has them; errors everywhere.
#include "virtio/vhost.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/if_packet.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>

#include "net/tap.h"
#include "virtio/net_kit.h"
#include "virtio/vhost_vsock.h"
#include "virtio/vsock_packet.h"

namespace wisp::test {
namespace {

using ::testing::HasSubstr;

TEST(VhostKernel, RefusesOtherDescriptors) {
  for (const char* path : {"/dev/null", "/proc/self/exe"}) {
    const auto vhost = VhostKernel::create(UniqueFd(::open(path, O_RDONLY | O_CLOEXEC)), "/dev/vhost-net");
    ASSERT_FALSE(vhost.has_value());
    EXPECT_THAT(vhost.error().message, HasSubstr("is not an opened /dev/vhost-net"));
  }
  EXPECT_FALSE(VhostKernel::create(UniqueFd(), "/dev/vhost-net").has_value());
}

TEST(VhostVsockOptions, ComeFromProperties) {
  PropertySet set;
  set.set("guest-cid", std::uint64_t{9});
  set.set("vhostfd", std::string("7"));
  const auto options = parse_vhost_vsock_options("v", set).value();
  EXPECT_EQ(options.guest_cid, 9U);
  EXPECT_EQ(options.vhost_fd, 7);
  set.set("vhostfd", std::string("x"));
  EXPECT_FALSE(parse_vhost_vsock_options("v", set).has_value());
}

TEST(VhostVsock, TakesItsDescriptorOverOnFailureToo) {
  const auto loop = EventLoop::create().value();
  const FakeGuest guest;
  Log log(-1);
  const SystemClock clock;
  const int fd = ::open("/dev/null", O_RDWR);
  const auto device =
      VhostVsock::create(*loop, guest.memory(), {.id = "v", .guest_cid = 9, .vhost_fd = fd}, log, clock);
  ASSERT_FALSE(device.has_value());
  EXPECT_THAT(device.error().message, HasSubstr("device v: fd"));
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
}

// --- vhost-net over a tap ---

class VhostNet : public ::testing::Test {
 protected:
  static constexpr std::uint16_t kProtocol = 0x88b5;  // for local experiments

  void SetUp() override {
    UniqueFd vhost(::open("/dev/vhost-net", O_RDWR | O_CLOEXEC));
    if (!vhost.valid()) {
      GTEST_SKIP() << "no /dev/vhost-net here";
    }
    name_ = "wv" + std::to_string(::getpid() % 100000);
    auto tap = TapBackend::open(name_, 1);
    if (!tap) {
      GTEST_SKIP() << tap.error().message;
    }
    harness_ = std::make_unique<DeviceHarness>([&](EventLoop& loop, const GuestMemory& memory)
                                                   -> std::unique_ptr<VirtioDevice> {
      Netdev netdev;
      netdev.backend = *std::move(tap);
      netdev.vhost_fds.push_back(std::move(vhost));
      return VirtioNet::create(loop, memory, {.id = "n"}, std::move(netdev), entropy_, log_, clock_).value();
    });
    host_ = UniqueFd(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(kProtocol)));
    sockaddr_ll address{};
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(kProtocol);
    address.sll_ifindex = static_cast<int>(::if_nametoindex(name_.c_str()));
    ASSERT_EQ(::bind(host_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  static Bytes frame(std::uint8_t seed) {
    Bytes bytes = make_frame(200, seed);
    std::fill_n(bytes.begin(), 6, std::uint8_t{0xff});
    bytes[6] = 0x52;
    bytes[12] = kProtocol >> 8;
    bytes[13] = kProtocol & 0xff;
    return bytes;
  }
  void transmit(std::uint8_t seed) {
    const Bytes bytes = with_header(frame(seed));
    harness_->queue(1).add(
        ChainBuilder().readable(harness_->guest().allocate(bytes), static_cast<std::uint32_t>(bytes.size())));
    harness_->notify(1);
  }
  bool host_receives(std::uint8_t seed) {
    pollfd wait{.fd = host_.get(), .events = POLLIN, .revents = 0};
    std::array<std::uint8_t, 2048> bytes{};
    if (::poll(&wait, 1, 3000) != 1) {
      return false;
    }
    const ssize_t size = ::recv(host_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    return size == 200 && Bytes(bytes.begin(), bytes.begin() + 200) == frame(seed);
  }
  void offer(int count) {
    for (int i = 0; i < count; ++i) {
      const Gpa at = harness_->guest().allocate(2048, 64);
      buffers_[harness_->queue(0).add(ChainBuilder().writable(at, 2048))] = at;
    }
    harness_->notify(0);
  }
  // Other frames (router solicitations) may come in between.
  bool guest_receives(std::uint8_t seed) {
    while (const auto used = harness_->wait_used(0, 3000)) {
      const Bytes got = harness_->guest().read(buffers_.at(used->head), used->written);
      if (got.size() == 212 && std::equal(got.begin() + 12, got.end(), frame(seed).begin())) {
        return true;
      }
    }
    return false;
  }

  std::string name_;
  FixedEntropy entropy_;
  SystemClock clock_;
  Log log_{-1};
  std::unique_ptr<DeviceHarness> harness_;
  UniqueFd host_;
  std::map<std::uint32_t, Gpa> buffers_;
};

TEST_F(VhostNet, MovesFramesAcrossPausesAndResets) {
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(harness_->activate({.queue_size = 64}).has_value());
    EXPECT_TRUE(harness_->device().kicks_handled_elsewhere());
    buffers_.clear();
    offer(16);
    transmit(1);
    EXPECT_TRUE(host_receives(1));
    EXPECT_TRUE(harness_->wait_used(1).has_value());
    (void)harness_->guest().take_dirty_pages();
    const Bytes to_guest = frame(2);
    ASSERT_EQ(::send(host_.get(), to_guest.data(), to_guest.size(), 0), 200);
    EXPECT_TRUE(guest_receives(2));
    EXPECT_GT(harness_->interrupts().used(0), 0U);

    harness_->pause();
    const Queue* rx = harness_->device().queue(0);
    ASSERT_NE(rx, nullptr);
    EXPECT_EQ(rx->next_available(), harness_->queue(0).used_index()) << "nothing is in flight";
    // What the kernel wrote is known.
    const auto dirty = harness_->guest().take_dirty_pages();
    const auto page_of = [&](Gpa gpa) { return (gpa - harness_->guest().base()) / kPageSize; };
    EXPECT_TRUE(dirty[page_of(harness_->queue(0).used_ring())]);
    EXPECT_TRUE(dirty[page_of(buffers_.begin()->second)]);
    transmit(3);
    harness_->resume();
    EXPECT_TRUE(host_receives(3)) << "a notification that came while paused is not lost";
    const Bytes again = frame(4);
    ASSERT_EQ(::send(host_.get(), again.data(), again.size(), 0), 200);
    EXPECT_TRUE(guest_receives(4));
    harness_->reset();
    harness_->guest().clear();
  }
}

TEST_F(VhostNet, ServesTheControlQueue) {
  ASSERT_TRUE(harness_->activate().has_value());
  const Gpa at = harness_->guest().allocate(Bytes{1, 1, 2, 3, 4, 5, 6, 7});
  const Gpa status = harness_->guest().allocate(Bytes{0x77});
  harness_->submit(2, ChainBuilder().readable(at, 8).writable(status, 1));
  ASSERT_TRUE(harness_->wait_used(2).has_value());
  EXPECT_EQ(harness_->guest().read(status, 1)[0], 0);
  EXPECT_EQ(harness_->read_config<std::uint16_t>(0), 0x0302);
}

TEST_F(VhostNet, AHostileRingAsksForAReset) {
  ASSERT_TRUE(harness_->activate().has_value());
  harness_->queue(1).set_available_index(5000);
  harness_->notify(1);
  EXPECT_TRUE(harness_->pump_until([&] { return harness_->interrupts().broken(); }));
  harness_->reset();
  ASSERT_TRUE(harness_->activate().has_value());
  transmit(9);
  EXPECT_TRUE(host_receives(9));
}

// --- vhost-vsock ---

TEST(VhostVsock, AProgramOfTheHostReachesTheGuest) {
  const auto loop = EventLoop::create().value();
  Log log(-1);
  const SystemClock clock;
  const auto cid = 1000 + static_cast<std::uint64_t>(::getpid());
  Result<std::unique_ptr<VhostVsock>> made = fail("not made");
  DeviceHarness* harness = nullptr;
  FakeGuest guest;
  {
    EventLoop& probe_loop = *loop;
    made = VhostVsock::create(probe_loop, guest.memory(), {.id = "v", .guest_cid = cid}, log, clock);
    if (!made) {
      GTEST_SKIP() << made.error().message;
    }
    const auto second =
        VhostVsock::create(probe_loop, guest.memory(), {.id = "w", .guest_cid = cid}, log, clock);
    ASSERT_FALSE(second.has_value());
    EXPECT_THAT(second.error().message, HasSubstr("in use"));
    made->reset();
  }
  DeviceHarness real(
      [&](EventLoop& its_loop, const GuestMemory& memory) -> std::unique_ptr<VirtioDevice> {
        return VhostVsock::create(its_loop, memory, {.id = "v", .guest_cid = cid}, log, clock).value();
      },
      &guest);
  harness = &real;
  ASSERT_TRUE(harness->activate().has_value());
  EXPECT_EQ(harness->read_config<std::uint64_t>(0), cid);
  std::vector<Gpa> at(8);
  std::map<std::uint32_t, Gpa> buffers;
  for (Gpa& gpa : at) {
    gpa = guest.allocate(4096);
    buffers[harness->queue(0).add(ChainBuilder().writable(gpa, 4096))] = gpa;
  }
  harness->notify(0);
  const UniqueFd program(::socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  ASSERT_TRUE(program.valid());
  sockaddr_vm address{};
  address.svm_family = AF_VSOCK;
  address.svm_cid = static_cast<unsigned int>(cid);
  address.svm_port = 77;
  ASSERT_EQ(::connect(program.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), -1);
  ASSERT_EQ(errno, EINPROGRESS);
  const auto used = harness->wait_used(0);
  ASSERT_TRUE(used.has_value());
  const Bytes bytes = guest.read(buffers.at(used->head), used->written);
  ASSERT_EQ(bytes.size(), kVsockHeaderSize);
  VsockHeader header = VsockHeader::parse(std::span(bytes).first<kVsockHeaderSize>());
  EXPECT_EQ(header.op, VsockOp::kRequest);
  EXPECT_EQ(header.dst_cid, cid);
  EXPECT_EQ(header.dst_port, 77U);
  std::swap(header.src_cid, header.dst_cid);
  std::swap(header.src_port, header.dst_port);
  header.op = VsockOp::kResponse;
  header.buf_alloc = 65536;
  harness->queue(1).add(ChainBuilder().readable(guest.allocate(header.bytes()), kVsockHeaderSize));
  harness->notify(1);
  pollfd wait{.fd = program.get(), .events = POLLOUT, .revents = 0};
  EXPECT_EQ(::poll(&wait, 1, 3000), 1);
  EXPECT_EQ(wait.revents, POLLOUT);
  ASSERT_EQ(::send(program.get(), "hello", 5, 0), 5);
  const auto data = harness->wait_used(0);
  ASSERT_TRUE(data.has_value());
  EXPECT_EQ(guest.read_text(buffers.at(data->head) + kVsockHeaderSize, 5), "hello");
  harness->pause();
  harness->resume();
  ASSERT_EQ(::send(program.get(), "again", 5, 0), 5);
  EXPECT_TRUE(harness->wait_used(0).has_value());
  harness->reset();
}

}  // namespace
}  // namespace wisp::test
