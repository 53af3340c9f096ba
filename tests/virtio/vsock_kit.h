// The guest's side of the socket device: builds packets, gives buffers, reads what comes.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "virtio/support/device_harness.h"
#include "virtio/vsock.h"

namespace wisp::test {

using Bytes = std::vector<std::uint8_t>;

// A clock that tests move by hand, on top of the real one.
class ShiftedClock final : public Clock {
 public:
  [[nodiscard]] std::uint64_t monotonic_ns() const override { return real_.monotonic_ns() + shift_ns; }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return real_.realtime_ns(); }
  std::uint64_t shift_ns = 0;

 private:
  SystemClock real_;
};

class TempDir final {
 public:
  TempDir() { WISP_ASSERT(::mkdtemp(path_.data()) != nullptr); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  // In memory where possible: sockets on a disk cost its journal.
  std::string path_ = (::access("/dev/shm", W_OK) == 0 ? std::string("/dev/shm") : std::string("/tmp")) +
                      "/wisp-vsock-XXXXXX";
};

inline sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

// -1 where nobody listens.
inline UniqueFd connect_unix(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const sockaddr_un address = address_of(path);
  if (!fd.valid() || ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    fd.reset();
  }
  return fd;
}

inline UniqueFd listen_unix(const std::string& path, int backlog = 1100) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const sockaddr_un address = address_of(path);
  WISP_ASSERT(fd.valid() &&
              ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  WISP_ASSERT(::listen(fd.get(), backlog) == 0);
  return fd;
}

struct Packet {
  VsockHeader header;
  Bytes payload;
};

class VsockKit final {
 public:
  static constexpr std::uint64_t kCid = 42;
  static constexpr std::uint32_t kBufferSize = 4096;

  explicit VsockKit(std::uint64_t guest_size = 32ULL << 20)
      : guest({{FakeGuest::kBase, guest_size}}), path(dir.file("v")), log(-1, LogLevel::kError) {
    harness = std::make_unique<DeviceHarness>(
        [&](EventLoop& loop, const GuestMemory& memory) -> std::unique_ptr<VirtioDevice> {
          return VirtioVsock::create(loop, memory, {.id = "vsock0", .guest_cid = kCid, .path = path}, log,
                                     clock)
              .value();
        },
        &guest);
  }

  [[nodiscard]] VirtioVsock& device() { return harness->device_as<VirtioVsock>(); }

  // With `buffers` receive buffers given.
  void activate(int buffers = 32, std::uint16_t queue_size = 256) {
    WISP_ASSERT(harness->activate({.queue_size = queue_size}).has_value());
    scratch_ = guest.allocate(128UL * 1024);
    buffer_at_.clear();
    offer(buffers);
  }
  void offer(int count, std::uint32_t size = kBufferSize) {
    for (int i = 0; i < count; ++i) {
      const Gpa at = guest.allocate(size);
      give(at, size);
    }
    harness->notify(0);
  }
  // Sends one packet and takes its buffer back.
  void send(const VsockHeader& header, const Bytes& payload = {}) {
    Bytes bytes(kVsockHeaderSize);
    const auto head = header.bytes();
    std::copy(head.begin(), head.end(), bytes.begin());
    bytes.insert(bytes.end(), payload.begin(), payload.end());
    guest.write(scratch_, bytes);
    ChainBuilder chain;
    chain.readable(scratch_, kVsockHeaderSize);
    if (!payload.empty()) {
      chain.readable(scratch_ + kVsockHeaderSize, static_cast<std::uint32_t>(payload.size()));
    }
    harness->queue(1).add(chain);
    harness->notify(1);
    while (harness->queue(1).take_used()) {
    }
  }
  // A packet of this guest to the host.
  [[nodiscard]] VsockHeader packet(VsockOp op, std::uint32_t guest_port, std::uint32_t host_port) const {
    return {.src_cid = kCid,
            .dst_cid = kVsockHostCid,
            .src_port = guest_port,
            .dst_port = host_port,
            .op = op,
            .buf_alloc = buf_alloc,
            .fwd_cnt = fwd_cnt[{guest_port, host_port}]};
  }
  void send_data(std::uint32_t guest_port, std::uint32_t host_port, const Bytes& payload) {
    VsockHeader header = packet(VsockOp::kRw, guest_port, host_port);
    header.length = static_cast<std::uint32_t>(payload.size());
    send(header, payload);
  }
  // The next packet from the device, whose buffer goes back to it at once; empty where there is none (yet).
  std::optional<Packet> take() {
    const auto used = harness->queue(0).take_used();
    if (!used) {
      return std::nullopt;
    }
    const auto [at, size] = buffer_at_.at(used->head);
    const Bytes bytes = guest.read(at, used->written);
    if (refill) {
      give(at, size);
      harness->notify(0);
    }
    if (bytes.size() < kVsockHeaderSize) {
      return Packet{};
    }
    Packet packet;
    packet.header = VsockHeader::parse(std::span(bytes).first<kVsockHeaderSize>());
    packet.payload.assign(bytes.begin() + kVsockHeaderSize, bytes.end());
    if (packet.header.op == VsockOp::kRw && count_forwarded) {
      fwd_cnt[{packet.header.dst_port, packet.header.src_port}] += packet.header.length;
    }
    return packet;
  }
  std::optional<Packet> wait(int timeout_ms = 3000) {
    std::optional<Packet> packet;
    (void)harness->pump_until([&] { return (packet = take()).has_value(); }, timeout_ms);
    return packet;
  }
  // The operation of the next packet; kInvalid where none comes.
  VsockOp wait_op(int timeout_ms = 3000) {
    const auto packet = wait(timeout_ms);
    return packet ? packet->header.op : VsockOp::kInvalid;
  }

  TempDir dir;
  FakeGuest guest;
  std::string path;
  Log log;
  ShiftedClock clock;
  std::unique_ptr<DeviceHarness> harness;
  std::uint32_t buf_alloc = 256 * 1024;  // what the guest promises
  mutable std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint32_t> fwd_cnt;
  bool refill = true;
  bool count_forwarded = true;

 private:
  void give(Gpa at, std::uint32_t size) {
    buffer_at_[harness->queue(0).add(ChainBuilder().writable(at, size))] = {at, size};
  }
  Gpa scratch_ = 0;
  std::map<std::uint32_t, std::pair<Gpa, std::uint32_t>> buffer_at_;
};

}  // namespace wisp::test
