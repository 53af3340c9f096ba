#include "virtio/vsock.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <chrono>
#include <fstream>
#include <thread>

#include "virtio/vsock_kit.h"

namespace wisp::test {
namespace {

using ::testing::HasSubstr;
using namespace std::string_literals;

constexpr std::uint32_t kHostPort = 52;
constexpr std::uint32_t kGuestPort = 1234;

bool is_idle(EventLoop& loop) {
  int wakes = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(60);
  while (std::chrono::steady_clock::now() < end) {
    loop.run_once(20);
    ++wakes;
  }
  return wakes <= 8;
}

Bytes bytes_of(std::string_view text) {
  return {text.begin(), text.end()};
}

Bytes pattern(std::size_t size, std::uint32_t seed = 0) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<std::uint8_t>((i + seed) * 31 + ((i + seed) >> 8));
  }
  return bytes;
}

void write_all(int fd, const Bytes& bytes) {
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
}

void write_text(int fd, std::string_view text) {
  write_all(fd, bytes_of(text));
}

// What is there to read now; "<end>" at the end of the stream.
std::string read_text(int fd) {
  std::string text(4096, '\0');
  const ssize_t size = ::recv(fd, text.data(), text.size(), MSG_DONTWAIT);
  if (size == 0) {
    return "<end>";
  }
  text.resize(size > 0 ? static_cast<std::size_t>(size) : 0);
  return text;
}

// Waits until something can be read.
std::string wait_text(VsockKit& kit, int fd) {
  std::string text;
  (void)kit.harness->pump_until([&] { return !(text = read_text(fd)).empty(); }, 3000);
  return text;
}

struct Stream {
  UniqueFd peer;  // the host program's end
  std::uint32_t guest_port = 0;
  std::uint32_t host_port = 0;
};

// The guest connects to a program of the host.
Stream connect_out(VsockKit& kit, int listener, std::uint32_t guest_port = kGuestPort) {
  kit.send(kit.packet(VsockOp::kRequest, guest_port, kHostPort));
  const auto response = kit.wait();
  EXPECT_TRUE(response.has_value());
  if (response) {
    EXPECT_EQ(response->header.op, VsockOp::kResponse);
    EXPECT_EQ(response->header.dst_port, guest_port);
  }
  return {UniqueFd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC)), guest_port, kHostPort};
}

// A program of the host connects to the guest.
Stream connect_in(VsockKit& kit, std::uint32_t guest_port = kGuestPort) {
  Stream stream{connect_unix(kit.path), guest_port, 0};
  write_text(stream.peer.get(), "CONNECT " + std::to_string(guest_port) + "\n");
  const auto request = kit.wait();
  EXPECT_TRUE(request && request->header.op == VsockOp::kRequest);
  if (request) {
    stream.host_port = request->header.src_port;
    kit.send(kit.packet(VsockOp::kResponse, guest_port, stream.host_port));
    EXPECT_EQ(wait_text(kit, stream.peer.get()), "OK " + std::to_string(stream.host_port) + "\n");
  }
  return stream;
}

// --- streams ---

TEST(VirtioVsock, ConfigurationSpace) {
  VsockKit kit;
  EXPECT_EQ(kit.harness->read_config<std::uint64_t>(0), VsockKit::kCid);
  EXPECT_EQ(kit.harness->read_config<std::uint32_t>(6), 0U);
  EXPECT_EQ(kit.harness->read_config<std::uint64_t>(UINT64_MAX - 3), 0U);
  kit.harness->write_config<std::uint64_t>(0, 7);
  EXPECT_EQ(kit.harness->read_config<std::uint64_t>(0), VsockKit::kCid);
}

TEST(VirtioVsock, TheGuestConnectsAndTalks) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  ASSERT_TRUE(stream.peer.valid());
  kit.send_data(kGuestPort, kHostPort, bytes_of("hello"));
  EXPECT_EQ(read_text(stream.peer.get()), "hello");
  write_text(stream.peer.get(), "world");
  const auto packet = kit.wait();
  ASSERT_TRUE(packet && packet->header.op == VsockOp::kRw);
  EXPECT_EQ(packet->payload, bytes_of("world"));
  EXPECT_EQ(packet->header.length, 5U);
  EXPECT_EQ(packet->header.src_cid, kVsockHostCid);
  EXPECT_EQ(packet->header.dst_cid, VsockKit::kCid);
  EXPECT_EQ(packet->header.src_port, kHostPort);
  EXPECT_EQ(packet->header.type, kVsockTypeStream);
  EXPECT_EQ(packet->header.fwd_cnt, 5U);
  EXPECT_TRUE(is_idle(kit.harness->loop()));
}

TEST(VirtioVsock, AProgramOfTheHostConnectsAndMayTalkAhead) {
  VsockKit kit;
  kit.activate();
  const UniqueFd peer = connect_unix(kit.path);
  write_text(peer.get(), "CONNECT 1234\nearly");
  const auto request = kit.wait();
  ASSERT_TRUE(request && request->header.op == VsockOp::kRequest);
  EXPECT_EQ(request->header.dst_port, 1234U);
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  const std::uint32_t port = request->header.src_port;
  kit.send(kit.packet(VsockOp::kResponse, 1234, port));
  EXPECT_EQ(wait_text(kit, peer.get()), "OK " + std::to_string(port) + "\n");
  const auto packet = kit.wait();
  ASSERT_TRUE(packet && packet->header.op == VsockOp::kRw);
  EXPECT_EQ(packet->payload, bytes_of("early"));
  kit.send_data(1234, port, bytes_of("answer"));
  EXPECT_EQ(wait_text(kit, peer.get()), "answer");
}

TEST(VirtioVsock, RefusalsReachBothSides) {
  VsockKit kit;
  kit.activate();
  kit.send(kit.packet(VsockOp::kRequest, kGuestPort, 999));
  EXPECT_EQ(kit.wait_op(), VsockOp::kRst) << "nobody listens at PATH_999";
  const UniqueFd peer = connect_unix(kit.path);
  write_text(peer.get(), "CONNECT 77\n");
  const auto request = kit.wait();
  ASSERT_TRUE(request.has_value());
  kit.send(kit.packet(VsockOp::kRst, 77, request->header.src_port));
  EXPECT_EQ(wait_text(kit, peer.get()), "<end>");
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

TEST(VirtioVsock, HandshakesThatAreNone) {
  VsockKit kit;
  kit.activate();
  for (const std::string& text :
       {"\n"s, "CONNECT\n"s, "CONNECT \n"s, "CONNECT x\n"s, "CONNECT -1\n"s, "CONNECT 1 \n"s,
        "CONNECT 4294967296\n"s, "connect 1\n"s, std::string(40, 'A'), "CONNECT 1\0\n"s,
        "CONNECT 000000000000000000000000000001\n"s}) {
    const UniqueFd peer = connect_unix(kit.path);
    write_text(peer.get(), text);
    // Bytes that were never read make the end a reset.
    EXPECT_TRUE(kit.harness->pump_until([&] {
      char byte = 0;
      const ssize_t got = ::recv(peer.get(), &byte, 1, MSG_DONTWAIT);
      return got == 0 || (got < 0 && errno == ECONNRESET);
    })) << text;
    EXPECT_EQ(kit.device().connection_count(), 0U);
  }
  const UniqueFd gone = connect_unix(kit.path);
  kit.harness->pump();
  EXPECT_EQ(kit.device().connection_count(), 1U);
}

TEST(VirtioVsock, ASlowHandshakeIsServedAndASilentOneEnds) {
  VsockKit kit;
  kit.activate();
  const UniqueFd slow = connect_unix(kit.path);
  for (const char c : "CONNECT 4294967295\r"s) {
    write_text(slow.get(), std::string(1, c));
    kit.harness->pump();
  }
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  write_text(slow.get(), "\n");
  const auto request = kit.wait();
  ASSERT_TRUE(request && request->header.op == VsockOp::kRequest);
  EXPECT_EQ(request->header.dst_port, 4294967295U);

  const UniqueFd silent = connect_unix(kit.path);
  kit.harness->pump();
  EXPECT_EQ(kit.device().connection_count(), 2U);
  kit.clock.shift_ns += 6'000'000'000;
  EXPECT_EQ(wait_text(kit, silent.get()), "<end>");
  EXPECT_EQ(wait_text(kit, slow.get()), "<end>") << "the guest never answered";
  EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

// --- ends ---

TEST(VirtioVsock, ThePeerEndsAfterItsLastWords) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  Stream stream = connect_out(kit, listener.get());
  write_all(stream.peer.get(), pattern(10000));
  stream.peer.reset();
  Bytes seen;
  std::optional<Packet> packet;
  while ((packet = kit.wait()) && packet->header.op == VsockOp::kRw) {
    seen.insert(seen.end(), packet->payload.begin(), packet->payload.end());
  }
  EXPECT_EQ(seen, pattern(10000));
  ASSERT_TRUE(packet && packet->header.op == VsockOp::kShutdown);
  EXPECT_EQ(packet->header.flags, kVsockNoReceive | kVsockNoSend);
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  kit.send(kit.packet(VsockOp::kRst, kGuestPort, kHostPort));
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

TEST(VirtioVsock, AGuestThatDoesNotAnswerTheEndIsCutOff) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  Stream stream = connect_out(kit, listener.get());
  stream.peer.reset();
  EXPECT_EQ(kit.wait_op(), VsockOp::kShutdown);
  kit.send_data(kGuestPort, kHostPort, bytes_of("to nobody"));
  kit.clock.shift_ns += 6'000'000'000;
  EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

TEST(VirtioVsock, EachDirectionEndsAlone) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  // The guest first.
  Stream stream = connect_out(kit, listener.get());
  VsockHeader end = kit.packet(VsockOp::kShutdown, kGuestPort, kHostPort);
  end.flags = kVsockNoSend;
  kit.send_data(kGuestPort, kHostPort, bytes_of("question"));
  kit.send(end);
  EXPECT_EQ(wait_text(kit, stream.peer.get()), "question");
  EXPECT_EQ(wait_text(kit, stream.peer.get()), "<end>");
  write_text(stream.peer.get(), "answer");
  const auto answer = kit.wait();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->payload, bytes_of("answer"));
  stream.peer.reset();
  EXPECT_EQ(kit.wait_op(), VsockOp::kShutdown);
  end.flags = kVsockNoSend | kVsockNoReceive;
  kit.send(end);
  EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
  EXPECT_EQ(kit.device().connection_count(), 0U);

  // The peer first.
  Stream other = connect_out(kit, listener.get(), kGuestPort + 1);
  ::shutdown(other.peer.get(), SHUT_WR);
  const auto shutdown = kit.wait();
  ASSERT_TRUE(shutdown && shutdown->header.op == VsockOp::kShutdown);
  EXPECT_EQ(shutdown->header.flags, kVsockNoSend);
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  kit.send_data(kGuestPort + 1, kHostPort, bytes_of("still here"));
  EXPECT_EQ(wait_text(kit, other.peer.get()), "still here");
  other.peer.reset();
  kit.harness->pump();
  const auto full = kit.wait();
  ASSERT_TRUE(full && full->header.op == VsockOp::kShutdown);
  EXPECT_EQ(full->header.flags, kVsockNoReceive | kVsockNoSend);
}

TEST(VirtioVsock, APeerThatStopsReadingIsToldToTheGuest) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  ::shutdown(stream.peer.get(), SHUT_RD);
  kit.send_data(kGuestPort, kHostPort, bytes_of("x"));
  const auto packet = kit.wait();
  ASSERT_TRUE(packet && packet->header.op == VsockOp::kShutdown);
  EXPECT_EQ(packet->header.flags, kVsockNoReceive);
  write_text(stream.peer.get(), "but I still talk");
  const auto data = kit.wait();
  ASSERT_TRUE(data.has_value());
  EXPECT_EQ(data->payload, bytes_of("but I still talk"));
}

TEST(VirtioVsock, WhatAFinishedGuestWroteStillReachesASlowPeer) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  Bytes all;
  // Fill the socket, and some of the buffer behind it.
  for (std::uint32_t i = 0; i < 100; ++i) {
    const Bytes part = pattern(4096, i * 4096);
    kit.send_data(kGuestPort, kHostPort, part);
    all.insert(all.end(), part.begin(), part.end());
  }
  VsockHeader end = kit.packet(VsockOp::kShutdown, kGuestPort, kHostPort);
  end.flags = kVsockNoSend | kVsockNoReceive;
  kit.send(end);
  VsockOp op = kit.wait_op();
  while (op == VsockOp::kCreditUpdate) {
    op = kit.wait_op();
  }
  EXPECT_EQ(op, VsockOp::kRst) << "the guest is done at once";
  EXPECT_EQ(kit.device().connection_count(), 1U);
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  Bytes seen;
  EXPECT_TRUE(kit.harness->pump_until([&] {
    Bytes chunk(65536);
    const ssize_t size = ::recv(stream.peer.get(), chunk.data(), chunk.size(), MSG_DONTWAIT);
    if (size > 0) {
      seen.insert(seen.end(), chunk.begin(), chunk.begin() + size);
    }
    return size == 0;
  }));
  EXPECT_TRUE(seen == all);
  EXPECT_EQ(kit.device().connection_count(), 0U);
  // The ports could be used again meanwhile.
  const Stream again = connect_out(kit, listener.get());
  EXPECT_TRUE(again.peer.valid());
}

// --- credit ---

TEST(VirtioVsock, KeepsToTheGuestsCredit) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.buf_alloc = 10000;
  kit.count_forwarded = false;
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  const Bytes all = pattern(45000);
  write_all(stream.peer.get(), all);
  Bytes seen;
  for (std::uint32_t round = 1; seen.size() < all.size(); ++round) {
    ASSERT_LE(round, 6U);
    std::optional<Packet> packet;
    while ((packet = kit.wait()) && packet->header.op == VsockOp::kRw) {
      seen.insert(seen.end(), packet->payload.begin(), packet->payload.end());
      if (seen.size() == all.size()) {
        break;
      }
    }
    EXPECT_EQ(seen.size(), std::min(std::size_t{round} * 10000, all.size()));
    if (seen.size() < all.size()) {
      ASSERT_TRUE(packet && packet->header.op == VsockOp::kCreditRequest);
      EXPECT_TRUE(is_idle(kit.harness->loop())) << "one request is enough";
      EXPECT_FALSE(kit.take().has_value());
      kit.fwd_cnt[{kGuestPort, kHostPort}] = round * 10000;
      kit.send(kit.packet(VsockOp::kCreditUpdate, kGuestPort, kHostPort));
    }
  }
  EXPECT_TRUE(seen == all);
}

TEST(VirtioVsock, APeerThatHangsHoldsTheGuestBack) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  // As a well-behaved guest: never more than the credit that was given.
  std::uint32_t window = 256 * 1024;
  std::uint32_t forwarded = 0;
  std::uint32_t sent = 0;
  const auto send_all = [&] {
    while (sent - forwarded + 4096 <= window) {
      kit.send_data(kGuestPort, kHostPort, pattern(4096, sent));
      sent += 4096;
      while (const auto packet = kit.take()) {
        ASSERT_EQ(packet->header.op, VsockOp::kCreditUpdate);
        window = packet->header.buf_alloc;
        forwarded = packet->header.fwd_cnt;
      }
    }
  };
  send_all();
  EXPECT_LT(sent, 2U << 20) << "the socket of the host and the window are bounded";
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  Bytes seen;
  const std::uint32_t total = 4U << 20;
  EXPECT_TRUE(kit.harness->pump_until(
      [&] {
        Bytes chunk(65536);
        const ssize_t size = ::recv(stream.peer.get(), chunk.data(), chunk.size(), MSG_DONTWAIT);
        if (size > 0) {
          seen.insert(seen.end(), chunk.begin(), chunk.begin() + size);
        }
        while (const auto packet = kit.take()) {
          EXPECT_EQ(packet->header.op, VsockOp::kCreditUpdate);
          forwarded = packet->header.fwd_cnt;
        }
        if (sent < total) {
          send_all();
        }
        return seen.size() >= total;
      },
      20000));
  EXPECT_TRUE(Bytes(seen.begin(), seen.begin() + total) == pattern(total));
}

TEST(VirtioVsock, MoreThanTheCreditIsTheEnd) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  VsockOp op = VsockOp::kInvalid;
  for (int i = 0; i < 64 && op != VsockOp::kRst; ++i) {
    kit.send_data(kGuestPort, kHostPort, pattern(65536));
    while (const auto packet = kit.take()) {
      op = packet->header.op;
    }
  }
  EXPECT_EQ(op, VsockOp::kRst);
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

TEST(VirtioVsock, LiesAboutCreditAreTheEnd) {
  for (const std::uint32_t lie : {1U, 0x7fffffffU, 0x80000000U, 0xffffffffU}) {
    VsockKit kit;
    const UniqueFd listener = listen_unix(kit.path + "_52");
    kit.activate();
    const Stream stream = connect_out(kit, listener.get());
    VsockHeader header = kit.packet(VsockOp::kCreditUpdate, kGuestPort, kHostPort);
    header.fwd_cnt = lie;  // nothing was sent yet
    kit.send(header);
    EXPECT_EQ(kit.wait_op(), VsockOp::kRst) << lie;
    EXPECT_EQ(wait_text(kit, stream.peer.get()), "<end>");
  }
}

TEST(VirtioVsock, ACreditRequestIsAnswered) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  kit.send_data(kGuestPort, kHostPort, pattern(100));
  kit.send(kit.packet(VsockOp::kCreditRequest, kGuestPort, kHostPort));
  const auto packet = kit.wait();
  ASSERT_TRUE(packet && packet->header.op == VsockOp::kCreditUpdate);
  EXPECT_EQ(packet->header.fwd_cnt, 100U);
  EXPECT_EQ(packet->header.buf_alloc, 256U * 1024);
}

// --- hostile guests ---

TEST(VirtioVsock, PacketsOfNoConnection) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  for (const VsockOp op :
       {VsockOp::kInvalid, VsockOp::kResponse, VsockOp::kShutdown, VsockOp::kRw, VsockOp::kCreditUpdate,
        VsockOp::kCreditRequest, static_cast<VsockOp>(8), static_cast<VsockOp>(0xffff)}) {
    kit.send(kit.packet(op, 7, 8));
    const auto answer = kit.wait();
    ASSERT_TRUE(answer && answer->header.op == VsockOp::kRst);
    EXPECT_EQ(answer->header.src_port, 8U);
    EXPECT_EQ(answer->header.dst_port, 7U);
  }
  for (int i = 0; i < 1000; ++i) {
    kit.send(kit.packet(VsockOp::kRst, 7, 8));
  }
  VsockHeader wrong = kit.packet(VsockOp::kRequest, 7, kHostPort);
  wrong.src_cid = 43;
  kit.send(wrong);
  EXPECT_FALSE(kit.take().has_value()) << "neither RSTs nor packets in another's name are answered";
  wrong = kit.packet(VsockOp::kRequest, 7, kHostPort);
  wrong.dst_cid = 5;
  kit.send(wrong);
  auto answer = kit.wait();
  ASSERT_TRUE(answer && answer->header.op == VsockOp::kRst);
  EXPECT_EQ(answer->header.src_cid, 5U);
  wrong = kit.packet(VsockOp::kRequest, 7, kHostPort);
  wrong.type = 2;
  kit.send(wrong);
  answer = kit.wait();
  ASSERT_TRUE(answer && answer->header.op == VsockOp::kRst);
  EXPECT_EQ(answer->header.type, 2);
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

TEST(VirtioVsock, PacketsThatDoNotFitTheConnectionEndIt) {
  for (const VsockOp op :
       {VsockOp::kInvalid, VsockOp::kRequest, VsockOp::kResponse, static_cast<VsockOp>(8)}) {
    VsockKit kit;
    const UniqueFd listener = listen_unix(kit.path + "_52");
    kit.activate();
    const Stream stream = connect_out(kit, listener.get());
    kit.send(kit.packet(op, kGuestPort, kHostPort));
    EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
    EXPECT_EQ(wait_text(kit, stream.peer.get()), "<end>");
    EXPECT_EQ(kit.device().connection_count(), 0U);
  }
  // Before the guest accepted.
  for (const VsockOp op : {VsockOp::kRw, VsockOp::kShutdown, VsockOp::kCreditUpdate, VsockOp::kRequest}) {
    VsockKit kit;
    kit.activate();
    const UniqueFd peer = connect_unix(kit.path);
    write_text(peer.get(), "CONNECT 9\n");
    const auto request = kit.wait();
    ASSERT_TRUE(request.has_value());
    kit.send(kit.packet(op, 9, request->header.src_port));
    EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
    EXPECT_EQ(wait_text(kit, peer.get()), "<end>");
  }
  // Data after the guest said that none would come.
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  VsockHeader end = kit.packet(VsockOp::kShutdown, kGuestPort, kHostPort);
  end.flags = kVsockNoSend;
  kit.send(end);
  kit.send_data(kGuestPort, kHostPort, bytes_of("zombie"));
  EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
}

TEST(VirtioVsock, LengthsThatLieAreDropped) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  for (const std::uint32_t length : {6U, 65536U, 0x7fffffffU, 0xffffffffU}) {
    VsockHeader header = kit.packet(VsockOp::kRw, kGuestPort, kHostPort);
    header.length = length;
    kit.send(header, bytes_of("short"));
  }
  EXPECT_EQ(read_text(stream.peer.get()), "");
  // More payload than the header says: the rest is nothing.
  VsockHeader header = kit.packet(VsockOp::kRw, kGuestPort, kHostPort);
  header.length = 2;
  kit.send(header, bytes_of("okXXX"));
  EXPECT_EQ(read_text(stream.peer.get()), "ok");
  // Less than a header, and no readable part at all.
  for (const std::uint32_t size : {1U, 43U}) {
    kit.harness->submit(1, ChainBuilder().readable(kit.guest.allocate(64), size));
    EXPECT_TRUE(kit.harness->wait_used(1).has_value());
  }
  kit.harness->submit(1, ChainBuilder().writable(kit.guest.allocate(64), 64));
  EXPECT_TRUE(kit.harness->wait_used(1).has_value());
  EXPECT_FALSE(kit.harness->interrupts().broken());
}

TEST(VirtioVsock, AnswersThatNobodyReadsHoldTheGuestBack) {
  VsockKit kit;
  kit.activate(0);
  const VsockHeader header = kit.packet(VsockOp::kRw, 1, 2);
  const auto head = header.bytes();
  const Gpa at = kit.guest.allocate(head);
  std::uint32_t used = 0;
  for (int i = 0; i < 255; ++i) {
    kit.harness->queue(1).add(ChainBuilder().readable(at, kVsockHeaderSize));
  }
  kit.harness->notify(1);
  kit.harness->pump();
  while (kit.harness->queue(1).take_used()) {
    ++used;
  }
  EXPECT_EQ(used, 255U);
  for (int i = 0; i < 255; ++i) {
    kit.harness->queue(1).add(ChainBuilder().readable(at, kVsockHeaderSize));
  }
  kit.harness->notify(1);
  kit.harness->pump();
  while (kit.harness->queue(1).take_used()) {
    ++used;
  }
  EXPECT_LT(used, 300U) << "the device stopped taking packets";
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  kit.refill = true;
  kit.offer(32);
  int resets = 0;
  EXPECT_TRUE(kit.harness->pump_until([&] {
    while (kit.take()) {
      ++resets;
    }
    return resets == 510;
  }));
}

TEST(VirtioVsock, TinyReceiveBuffersNeitherSpinNorCarryData) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate(1);
  const Stream stream = connect_out(kit, listener.get());
  kit.refill = false;
  EXPECT_FALSE(kit.take().has_value());
  VsockKit small;
  const UniqueFd other = listen_unix(small.path + "_52");
  small.activate(0);
  small.refill = false;
  small.offer(8, 10);  // too small for a header
  small.offer(8, 44);  // for a header only
  small.send(small.packet(VsockOp::kRequest, kGuestPort, kHostPort));
  const UniqueFd peer(::accept4(other.get(), nullptr, nullptr, SOCK_CLOEXEC));
  ASSERT_TRUE(peer.valid());
  write_text(peer.get(), "data");
  small.harness->pump();
  EXPECT_TRUE(is_idle(small.harness->loop()));
  int empty = 0;
  while (const auto packet = small.take()) {
    EXPECT_TRUE(packet->payload.empty());
    ++empty;
  }
  EXPECT_EQ(empty, 16);
  small.offer(1, 100);
  const auto packet = small.wait();
  ASSERT_TRUE(packet.has_value());
  EXPECT_EQ(packet->payload, bytes_of("data"));
}

TEST(VirtioVsock, ABrokenQueueAsksForAReset) {
  for (const std::uint16_t queue : std::array<std::uint16_t, 2>{0, 1}) {
    VsockKit kit;
    const UniqueFd listener = listen_unix(kit.path + "_52");
    kit.refill = false;
    kit.activate(1);
    const Stream stream = connect_out(kit, listener.get());
    kit.harness->queue(queue).set_available_index(5000);
    kit.send(kit.packet(VsockOp::kCreditRequest, kGuestPort, kHostPort));
    kit.harness->notify(queue);
    kit.harness->pump();
    EXPECT_TRUE(kit.harness->interrupts().broken());
    EXPECT_TRUE(is_idle(kit.harness->loop()));
    EXPECT_EQ(read_text(stream.peer.get()), "<end>");
    kit.harness->reset();
    kit.refill = true;
    kit.activate();
    EXPECT_TRUE(connect_out(kit, listener.get()).peer.valid());
  }
}

// --- many ---

TEST(VirtioVsock, ThousandsOfConnectionsOneAfterAnother) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  for (std::uint32_t i = 0; i < 3000; ++i) {
    const Stream stream = i % 2 == 0 ? connect_out(kit, listener.get(), i) : connect_in(kit, i);
    ASSERT_TRUE(stream.peer.valid());
    kit.send_data(i, stream.host_port, pattern(100, i));
    write_text(stream.peer.get(), wait_text(kit, stream.peer.get()));
    const auto echo = kit.wait();
    ASSERT_TRUE(echo && echo->payload == pattern(100, i));
    VsockHeader end = kit.packet(VsockOp::kShutdown, i, stream.host_port);
    end.flags = kVsockNoSend | kVsockNoReceive;
    kit.send(end);
    ASSERT_EQ(kit.wait_op(), VsockOp::kRst);
  }
  EXPECT_EQ(kit.device().connection_count(), 0U);
}

TEST(VirtioVsock, ATableThatIsFullRefusesAndRecovers) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52", 2000);
  kit.activate();
  std::vector<UniqueFd> peers;
  for (std::uint32_t i = 0; i < VsockMux::kMaxConnections; ++i) {
    kit.send(kit.packet(VsockOp::kRequest, 10000 + i, kHostPort));
    ASSERT_EQ(kit.wait_op(), VsockOp::kResponse) << i;
    peers.emplace_back(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  }
  kit.send(kit.packet(VsockOp::kRequest, 1, kHostPort));
  EXPECT_EQ(kit.wait_op(), VsockOp::kRst);
  const UniqueFd waiting = connect_unix(kit.path);
  write_text(waiting.get(), "CONNECT 5\n");
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  EXPECT_EQ(kit.device().connection_count(), VsockMux::kMaxConnections);
  // All talk at once; all are heard.
  for (const UniqueFd& peer : peers) {
    write_text(peer.get(), "here");
  }
  std::map<std::uint32_t, int> heard;
  EXPECT_TRUE(kit.harness->pump_until([&] {
    while (const auto packet = kit.take()) {
      EXPECT_EQ(packet->payload, bytes_of("here"));
      ++heard[packet->header.dst_port];
    }
    return heard.size() == VsockMux::kMaxConnections;
  }));
  kit.send(kit.packet(VsockOp::kRst, 10000, kHostPort));
  const auto request = kit.wait();
  ASSERT_TRUE(request && request->header.op == VsockOp::kRequest) << "the one that waited is served";
  EXPECT_EQ(request->header.dst_port, 5U);
}

TEST(VirtioVsock, OneLoudStreamDoesNotSilenceAnother) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate(4);
  const Stream loud = connect_out(kit, listener.get(), 1);
  const Stream quiet = connect_out(kit, listener.get(), 2);
  write_all(loud.peer.get(), pattern(100000));
  kit.harness->loop().run_once(100);
  write_text(quiet.peer.get(), "psst");
  kit.harness->loop().run_once(100);
  int before = 0;
  while (true) {
    const auto packet = kit.wait();
    ASSERT_TRUE(packet.has_value());
    if (packet->header.dst_port == 2) {
      break;
    }
    ++before;
  }
  EXPECT_LE(before, 8);
}

// --- life cycle ---

TEST(VirtioVsock, AResetCutsStreamsAndServesAgain) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  const UniqueFd before = connect_unix(kit.path);
  ASSERT_TRUE(before.valid()) << "programs may connect before the driver is there";
  write_text(before.get(), "CONNECT 5\n");
  kit.harness->pump();
  kit.activate();
  EXPECT_EQ(kit.wait_op(), VsockOp::kRequest);
  const Stream stream = connect_out(kit, listener.get());
  write_text(stream.peer.get(), "unread");
  kit.harness->reset();
  EXPECT_EQ(kit.device().connection_count(), 0U);
  EXPECT_EQ(read_text(before.get()), "<end>");
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  kit.activate();
  EXPECT_TRUE(connect_in(kit).peer.valid());
}

TEST(VirtioVsock, APauseHoldsEverything) {
  VsockKit kit;
  const UniqueFd listener = listen_unix(kit.path + "_52");
  kit.activate();
  const Stream stream = connect_out(kit, listener.get());
  kit.harness->pause();
  write_text(stream.peer.get(), "later");
  const UniqueFd other = connect_unix(kit.path);
  write_text(other.get(), "CONNECT 5\n");
  kit.harness->pump();
  EXPECT_TRUE(is_idle(kit.harness->loop()));
  EXPECT_FALSE(kit.take().has_value());
  EXPECT_EQ(kit.harness->device().queue(0)->in_flight(), 0U);
  kit.harness->resume();
  const auto first = kit.wait();
  const auto second = kit.wait();
  ASSERT_TRUE(first && second);
  const bool data_first = first->header.op == VsockOp::kRw;
  EXPECT_EQ((data_first ? second : first)->header.op, VsockOp::kRequest);
  EXPECT_EQ((data_first ? first : second)->payload, bytes_of("later"));
}

TEST(VirtioVsock, ARestoredDriverHearsThatItsStreamsAreGone) {
  VsockKit kit;
  kit.activate();
  kit.harness->pause();
  const StateRecord record = kit.device().save();
  VsockKit other;
  ASSERT_TRUE(other.device().load(record).has_value());
  other.activate();
  EXPECT_EQ(other.harness->queue(2).used_index(), 0) << "no buffer for the event yet";
  const Gpa at = other.guest.allocate(Bytes{9, 9, 9, 9, 9, 9, 9, 9});
  other.harness->submit(2, ChainBuilder().writable(at, 8));
  const auto used = other.harness->wait_used(2);
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->written, 4U);
  EXPECT_EQ(other.guest.load<std::uint32_t>(at), 0U) << "transport reset";
  other.harness->submit(2, ChainBuilder().writable(at, 8));
  other.harness->pump();
  EXPECT_EQ(other.harness->queue(2).used_index(), 1) << "told once";
  StateRecord damaged = record;
  damaged.version = 9;
  EXPECT_FALSE(other.device().load(damaged).has_value());
  damaged = record;
  damaged.bytes = {1};
  EXPECT_FALSE(other.device().load(damaged).has_value());
}

TEST(VirtioVsockPath, IsRemovedAndNotTakenFromOthers) {
  const TempDir dir;
  const std::string path = dir.file("s");
  const auto make = [&](const std::string& at) {
    static SystemClock clock;
    static Log log(-1, LogLevel::kError);
    static FakeGuest guest;
    static auto loop = EventLoop::create().value();
    return VirtioVsock::create(*loop, guest.memory(), {.id = "v", .guest_cid = 3, .path = at}, log, clock);
  };
  struct stat there{};
  {
    const auto device = make(path);
    ASSERT_TRUE(device.has_value());
    EXPECT_EQ(::stat(path.c_str(), &there), 0);
    const auto second = make(path);
    ASSERT_FALSE(second.has_value());
    EXPECT_THAT(second.error().message, HasSubstr(path));
    EXPECT_EQ(::stat(path.c_str(), &there), 0) << "the first one's socket stays";
  }
  EXPECT_NE(::stat(path.c_str(), &there), 0);
  {
    const UniqueFd stale = listen_unix(path);
  }
  EXPECT_TRUE(make(path).has_value()) << "a socket that nobody serves is replaced";
  std::ofstream(path) << "precious";
  EXPECT_FALSE(make(path).has_value());
  std::string text;
  std::ifstream(path) >> text;
  EXPECT_EQ(text, "precious");
  EXPECT_FALSE(make("").has_value());
  EXPECT_FALSE(make(dir.file(std::string(100, 'x'))).has_value());
  EXPECT_FALSE(make(dir.file("no/such/dir")).has_value());
  {
    const std::string moved = dir.file("m");
    const auto device = make(moved);
    ASSERT_TRUE(device.has_value());
    ::unlink(moved.c_str());
    std::ofstream(moved) << "another's";
  }
  EXPECT_EQ(::stat(dir.file("m").c_str(), &there), 0) << "what took our place is not ours to remove";
}

TEST(VirtioVsockOptions, ComeFromProperties) {
  PropertySet set;
  set.set("guest-cid", std::uint64_t{77});
  set.set("path", std::string("/run/v"));
  const auto options = parse_virtio_vsock_options("v0", set).value();
  EXPECT_EQ(options.guest_cid, 77U);
  EXPECT_EQ(options.path, "/run/v");
  const PropertySpec* cid = find_property(kVirtioVsockProperties, "guest-cid");
  ASSERT_NE(cid, nullptr);
  EXPECT_FALSE(parse_property(*cid, "2").has_value());
  EXPECT_FALSE(parse_property(*cid, "4294967295").has_value());
  EXPECT_TRUE(parse_property(*cid, "3").has_value());
}

// The event loop, the driver and programs of the host on threads of their own.
TEST(VirtioVsock, EchoAcrossThreads) {
  VsockKit kit;
  kit.activate(64);
  std::thread loop([&] { kit.harness->loop().run(); });
  constexpr int kStreams = 4;
  constexpr std::size_t kSize = 200000;
  std::vector<std::thread> programs;
  programs.reserve(kStreams);
  std::array<std::size_t, kStreams> echoed{};
  for (std::uint32_t i = 0; i < kStreams; ++i) {
    programs.emplace_back([&, i] {
      const UniqueFd peer = connect_unix(kit.path);
      ASSERT_TRUE(peer.valid());
      write_text(peer.get(), "CONNECT " + std::to_string(100 + i) + "\n");
      std::string ok(64, '\0');
      EXPECT_GT(::recv(peer.get(), ok.data(), ok.size(), 0), 0);
      std::thread writer([&] { write_all(peer.get(), pattern(kSize, i)); });
      Bytes seen;
      while (seen.size() < kSize) {
        Bytes chunk(65536);
        const ssize_t size = ::recv(peer.get(), chunk.data(), chunk.size(), 0);
        if (size <= 0) {
          break;
        }
        seen.insert(seen.end(), chunk.begin(), chunk.begin() + size);
      }
      writer.join();
      EXPECT_TRUE(seen == pattern(kSize, i));
      echoed[i] = seen.size();
    });
  }
  // The guest: answers requests and echoes.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  std::size_t total = 0;
  while (total < kStreams * kSize && std::chrono::steady_clock::now() < deadline) {
    const auto packet = kit.take();
    if (!packet) {
      kit.harness->notify(0);
      continue;
    }
    const VsockHeader& header = packet->header;
    if (header.op == VsockOp::kRequest) {
      kit.send(kit.packet(VsockOp::kResponse, header.dst_port, header.src_port));
    } else if (header.op == VsockOp::kRw) {
      total += header.length;
      kit.send_data(header.dst_port, header.src_port, packet->payload);
    } else if (header.op == VsockOp::kCreditRequest) {
      kit.send(kit.packet(VsockOp::kCreditUpdate, header.dst_port, header.src_port));
    }
  }
  for (std::thread& program : programs) {
    program.join();
  }
  EXPECT_EQ(total, kStreams * kSize);
  kit.harness->loop().stop();
  loop.join();
}

}  // namespace
}  // namespace wisp::test
