#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "net/dgram_backend.h"
#include "net/stream_net_backend.h"

namespace wisp {
namespace {

using ::testing::HasSubstr;

struct Pair {
  UniqueFd ours;
  UniqueFd theirs;
};

Pair make_pair_of(int type) {
  std::array<int, 2> fds{};
  EXPECT_EQ(::socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, fds.data()), 0);
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

std::vector<std::uint8_t> pattern(std::size_t size, std::uint8_t seed) {
  std::vector<std::uint8_t> bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<std::uint8_t>(seed + i * 7);
  }
  return bytes;
}

std::vector<std::uint8_t> wire(std::span<const std::uint8_t> frame) {
  std::vector<std::uint8_t> bytes(4);
  store_le(bytes.data(), htonl(static_cast<std::uint32_t>(frame.size())));
  bytes.insert(bytes.end(), frame.begin(), frame.end());
  return bytes;
}

NetIo send_frame(NetBackend& backend, std::vector<std::uint8_t> frame) {
  const std::array<iovec, 2> pieces{
      {{frame.data(), frame.size() / 2}, {frame.data() + frame.size() / 2, frame.size() - frame.size() / 2}}};
  return backend.send(0, pieces);
}

struct Received {
  NetIo status;
  std::vector<std::uint8_t> frame;
};

Received receive_frame(NetBackend& backend, std::size_t room = kMaxFrameSize + 1) {
  std::vector<std::uint8_t> bytes(room);
  const iovec piece{bytes.data(), bytes.size()};
  const NetReceived got = backend.receive(0, std::span(&piece, 1));
  bytes.resize(got.size);
  return {got.status, std::move(bytes)};
}

std::size_t read_some(int fd, std::vector<std::uint8_t>& into) {
  std::array<std::uint8_t, 65536> chunk;
  const ssize_t size = ::recv(fd, chunk.data(), chunk.size(), MSG_DONTWAIT);
  if (size > 0) {
    into.insert(into.end(), chunk.begin(), chunk.begin() + size);
  }
  return size > 0 ? static_cast<std::size_t>(size) : 0;
}

TEST(StreamNetBackend, FramesSmallOnesInOneWrite) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  std::vector<std::uint8_t> expected;
  for (std::uint8_t i = 0; i < 10; ++i) {
    const auto frame = pattern(60U + i, i);
    ASSERT_EQ(send_frame(*backend, frame), NetIo::kDone);
    const auto bytes = wire(frame);
    expected.insert(expected.end(), bytes.begin(), bytes.end());
  }
  std::vector<std::uint8_t> seen;
  EXPECT_EQ(read_some(pair.theirs.get(), seen), 0U) << "small frames wait for flush()";
  ASSERT_EQ(backend->flush(0), NetIo::kDone);
  EXPECT_EQ(read_some(pair.theirs.get(), seen), expected.size());
  EXPECT_EQ(seen, expected);
}

TEST(StreamNetBackend, KeepsTheOrderOfFramesWhenThePeerIsSlow) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const int buffer = 4096;
  ASSERT_EQ(::setsockopt(pair.ours.get(), SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer), 0);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  std::vector<std::uint8_t> expected;
  std::vector<std::uint8_t> seen;
  int refused = 0;
  for (unsigned int i = 0; i < 200; ++i) {
    const std::size_t size = i % 3 == 0 ? kMaxFrameSize : i % 3 == 1 ? 60 : 9000 + i;
    const auto frame = pattern(size, static_cast<std::uint8_t>(i));
    while (send_frame(*backend, frame) == NetIo::kAgain) {
      ++refused;
      // One byte at a time now and then: frames and prefixes break at every place.
      std::array<std::uint8_t, 7> few;
      const ssize_t got = ::recv(pair.theirs.get(), few.data(), few.size(), MSG_DONTWAIT);
      if (got > 0) {
        seen.insert(seen.end(), few.begin(), few.begin() + got);
      }
      read_some(pair.theirs.get(), seen);
    }
    const auto bytes = wire(frame);
    expected.insert(expected.end(), bytes.begin(), bytes.end());
  }
  while (backend->flush(0) == NetIo::kAgain || seen.size() < expected.size()) {
    ASSERT_GT(read_some(pair.theirs.get(), seen), 0U);
  }
  EXPECT_GT(refused, 0);
  EXPECT_TRUE(seen == expected);
}

TEST(StreamNetBackend, ReassemblesFramesThatComeByteByByte) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  const auto frame = pattern(70, 3);
  const auto bytes = wire(frame);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    EXPECT_EQ(receive_frame(*backend).status, NetIo::kAgain);
    ASSERT_EQ(::send(pair.theirs.get(), &bytes[i], 1, 0), 1);
  }
  // The last look may have known the socket as empty.
  Received got = receive_frame(*backend);
  if (got.status == NetIo::kAgain) {
    got = receive_frame(*backend);
  }
  EXPECT_EQ(got.status, NetIo::kDone);
  EXPECT_EQ(got.frame, frame);
}

TEST(StreamNetBackend, ManyFramesInOneSegmentAllCome) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  std::vector<std::uint8_t> bytes;
  for (std::uint8_t i = 0; i < 100; ++i) {
    const auto one = wire(pattern(14U + i, i));
    bytes.insert(bytes.end(), one.begin(), one.end());
  }
  ASSERT_EQ(::send(pair.theirs.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  for (std::uint8_t i = 0; i < 100; ++i) {
    const Received got = receive_frame(*backend);
    ASSERT_EQ(got.status, NetIo::kDone);
    ASSERT_EQ(got.frame, pattern(14U + i, i));
  }
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kAgain);
}

TEST(StreamNetBackend, LongFramesLoseTheirEndOnly) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  auto bytes = wire(pattern(1000, 1));
  const auto next = wire(pattern(20, 2));
  bytes.insert(bytes.end(), next.begin(), next.end());
  ASSERT_EQ(::send(pair.theirs.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  const Received cut = receive_frame(*backend, 100);
  EXPECT_EQ(cut.status, NetIo::kDone);
  EXPECT_EQ(cut.frame.size(), 100U);
  EXPECT_EQ(receive_frame(*backend).frame, pattern(20, 2));
}

class BadLength : public ::testing::TestWithParam<std::uint32_t> {};

TEST_P(BadLength, ClosesForGood) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  const auto good = wire(pattern(20, 1));
  ASSERT_GT(::send(pair.theirs.get(), good.data(), good.size(), 0), 0);
  const std::uint32_t length = htonl(GetParam());
  ASSERT_EQ(::send(pair.theirs.get(), &length, sizeof length, 0), 4);
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kDone);
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kClosed);
  EXPECT_THAT(backend->failure(), HasSubstr("frame length of " + std::to_string(GetParam())));
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kClosed);
  EXPECT_EQ(send_frame(*backend, pattern(60, 1)), NetIo::kClosed);
  EXPECT_EQ(backend->flush(0), NetIo::kClosed);
  char byte = 0;
  EXPECT_EQ(::recv(pair.theirs.get(), &byte, 1, MSG_DONTWAIT), 0) << "the peer is told";
}

INSTANTIATE_TEST_SUITE_P(StreamNetBackend, BadLength,
                         ::testing::Values(0U, static_cast<std::uint32_t>(kMaxFrameSize + 1), 0x7fffffffU,
                                           0xffffffffU));

TEST(StreamNetBackend, ADeadPeerIsAClosedLink) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  const auto frame = wire(pattern(20, 1));
  ASSERT_GT(::send(pair.theirs.get(), frame.data(), frame.size(), 0), 0);
  ASSERT_EQ(::send(pair.theirs.get(), "\0\0", 2, 0), 2) << "and half a prefix";
  pair.theirs.reset();
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kDone) << "what it sent before still comes";
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kAgain);
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kClosed);
  EXPECT_EQ(send_frame(*backend, pattern(60, 1)), NetIo::kClosed);
}

TEST(StreamNetBackend, SendingToADeadPeerCloses) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  pair.theirs.reset();
  EXPECT_EQ(send_frame(*backend, pattern(9000, 1)), NetIo::kClosed);
}

TEST(StreamNetBackend, RefusesFramesNoWireCouldCarry) {
  Pair pair = make_pair_of(SOCK_STREAM);
  const auto backend = StreamNetBackend::create(std::move(pair.ours), "test").value();
  EXPECT_EQ(send_frame(*backend, {}), NetIo::kDropped);
  EXPECT_EQ(send_frame(*backend, pattern(kMaxFrameSize + 1, 1)), NetIo::kDropped);
  std::uint8_t byte = 0;
  const std::vector<iovec> pieces(kMaxFrameIovecs + 1, iovec{&byte, 1});
  EXPECT_EQ(backend->send(0, pieces), NetIo::kDropped);
  EXPECT_EQ(backend->send(0, std::span(pieces).first(kMaxFrameIovecs)), NetIo::kDone);
}

TEST(StreamNetBackend, ConnectsToAListeningSocketAndSaysWhyNot) {
  std::string dir = "/tmp/wisp-net-XXXXXX";
  ASSERT_NE(::mkdtemp(dir.data()), nullptr);
  const std::string path = dir + "/s";
  const auto missing = StreamNetBackend::connect(path);
  ASSERT_FALSE(missing.has_value());
  EXPECT_THAT(missing.error().message, HasSubstr(path));
  EXPECT_FALSE(StreamNetBackend::connect(std::string(200, 'x')).has_value());
  EXPECT_FALSE(StreamNetBackend::connect("").has_value());

  const UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(listener.get(), 1), 0);
  const auto backend = StreamNetBackend::connect(path);
  ASSERT_TRUE(backend.has_value()) << backend.error().message;
  ASSERT_EQ(send_frame(**backend, pattern(60, 9)), NetIo::kDone);
  ASSERT_EQ((*backend)->flush(0), NetIo::kDone);
  const UniqueFd peer(::accept(listener.get(), nullptr, nullptr));
  std::vector<std::uint8_t> seen;
  EXPECT_EQ(read_some(peer.get(), seen), 64U);
  ::unlink(path.c_str());
  ::rmdir(dir.c_str());
}

TEST(SocketBackends, RefuseTheWrongKindOfDescriptor) {
  EXPECT_FALSE(StreamNetBackend::create(make_pair_of(SOCK_DGRAM).ours, "x").has_value());
  EXPECT_FALSE(DgramBackend::create(make_pair_of(SOCK_STREAM).ours).has_value());
  EXPECT_FALSE(StreamNetBackend::create(UniqueFd(::open("/dev/null", O_RDWR)), "x").has_value());
  EXPECT_FALSE(DgramBackend::create(UniqueFd(::open("/dev/null", O_RDWR))).has_value());
  EXPECT_FALSE(DgramBackend::create(UniqueFd()).has_value());
}

class Dgram : public ::testing::TestWithParam<int> {};

TEST_P(Dgram, OneFrameIsOneMessage) {
  Pair pair = make_pair_of(GetParam());
  const auto backend = DgramBackend::create(std::move(pair.ours)).value();
  const auto peer = DgramBackend::create(std::move(pair.theirs)).value();
  EXPECT_EQ(receive_frame(*backend).status, NetIo::kAgain);
  for (const std::size_t size : {std::size_t{14}, std::size_t{1514}, kMaxFrameSize}) {
    ASSERT_EQ(send_frame(*peer, pattern(size, 5)), NetIo::kDone);
    const Received got = receive_frame(*backend);
    EXPECT_EQ(got.status, NetIo::kDone);
    EXPECT_EQ(got.frame, pattern(size, 5));
  }
}

TEST_P(Dgram, AFullSocketSaysAgainAndADeadPeerNeverBlocks) {
  Pair pair = make_pair_of(GetParam());
  const auto backend = DgramBackend::create(std::move(pair.ours)).value();
  NetIo status = NetIo::kDone;
  for (int i = 0; i < 10000 && status == NetIo::kDone; ++i) {
    status = send_frame(*backend, pattern(1514, 1));
  }
  EXPECT_EQ(status, NetIo::kAgain);
  pair.theirs.reset();
  status = send_frame(*backend, pattern(60, 1));
  EXPECT_TRUE(status == NetIo::kDropped || status == NetIo::kClosed);
  EXPECT_NE(receive_frame(*backend).status, NetIo::kDone);
}

INSTANTIATE_TEST_SUITE_P(SocketBackends, Dgram, ::testing::Values(SOCK_DGRAM, SOCK_SEQPACKET));

}  // namespace
}  // namespace wisp
