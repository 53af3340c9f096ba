// A network back end under the test's control, and what a network driver does.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "net/netdev.h"
#include "virtio/net.h"
#include "virtio/support/device_harness.h"

namespace wisp::test {

using Bytes = std::vector<std::uint8_t>;

// Same bytes at every call: a device's random choices become known.
class FixedEntropy final : public EntropySource {
 public:
  [[nodiscard]] Result<void> fill(std::span<std::uint8_t> buffer) override {
    for (std::uint8_t& byte : buffer) {
      byte = 0xab;
    }
    return {};
  }
};

class FakeNetBackend final : public NetBackend {
 public:
  explicit FakeNetBackend(bool vnet_header = true, std::uint16_t pairs = 1)
      : vnet_header_(vnet_header), incoming_(pairs) {
    for (std::uint16_t i = 0; i < pairs; ++i) {
      readable_.push_back(make_eventfd().value());
    }
  }

  // The outside sends a frame to the guest (with its header where there are headers).
  void inject(Bytes frame, std::uint16_t pair = 0) {
    incoming_[pair].push_back(std::move(frame));
    signal_eventfd(readable_[pair].get());
  }
  void close() {
    closed_ = true;
    for (const UniqueFd& fd : readable_) {
      signal_eventfd(fd.get());
    }
  }
  [[nodiscard]] std::size_t waiting(std::uint16_t pair = 0) const { return incoming_[pair].size(); }
  struct Sent {
    std::uint16_t pair;
    Bytes bytes;
    std::size_t pieces;
  };
  std::vector<Sent> sent;
  int receive_calls = 0;
  NetOffloads guest_offloads;
  std::uint16_t active_pairs = 0;

  [[nodiscard]] std::uint16_t queue_pairs() const override {
    return static_cast<std::uint16_t>(incoming_.size());
  }
  [[nodiscard]] bool has_vnet_header() const override { return vnet_header_; }
  [[nodiscard]] NetOffloads offloads() const override {
    return vnet_header_ ? NetOffloads{true, true, true, true, true} : NetOffloads{};
  }
  [[nodiscard]] Result<void> set_offloads(const NetOffloads& offloads) override {
    guest_offloads = offloads;
    return {};
  }
  [[nodiscard]] Result<void> set_active_pairs(std::uint16_t pairs) override {
    active_pairs = pairs;
    return {};
  }
  [[nodiscard]] NetIo send(std::uint16_t pair, std::span<const iovec> frame) override {
    if (closed_) {
      return NetIo::kClosed;
    }
    Bytes bytes(iovecs_size(frame));
    copy_from_iovecs(frame, 0, bytes);
    sent.push_back({pair, std::move(bytes), frame.size()});
    return NetIo::kDone;
  }
  [[nodiscard]] NetReceived receive(std::uint16_t pair, std::span<const iovec> buffers) override {
    ++receive_calls;
    if (incoming_[pair].empty()) {
      drain_eventfd(readable_[pair].get());
      return {closed_ ? NetIo::kClosed : NetIo::kAgain, 0};
    }
    const Bytes frame = std::move(incoming_[pair].front());
    incoming_[pair].pop_front();
    return {NetIo::kDone, copy_to_iovecs(frame, buffers)};
  }
  [[nodiscard]] int poll_fd(std::uint16_t pair) const override { return readable_[pair].get(); }
  [[nodiscard]] std::string description() const override { return "fake"; }

 private:
  const bool vnet_header_;
  bool closed_ = false;
  std::vector<std::deque<Bytes>> incoming_;
  std::vector<UniqueFd> readable_;
};

inline Bytes make_frame(std::size_t size, std::uint8_t seed) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<std::uint8_t>(seed + i * 13 + i / 251);
  }
  return bytes;
}

inline Bytes with_header(const Bytes& frame, const VirtioNetHeader& header = {}) {
  Bytes bytes(sizeof header);
  std::memcpy(bytes.data(), &header, sizeof header);
  bytes.insert(bytes.end(), frame.begin(), frame.end());
  return bytes;
}

// A network device on a harness, with the environment it needs.
class NetKit final {
 public:
  explicit NetKit(std::unique_ptr<NetBackend> backend, VirtioNetOptions options = {},
                  FakeGuest* guest = nullptr)
      : log(-1, LogLevel::kError),
        harness(
            [&](EventLoop& loop, const GuestMemory& memory) -> std::unique_ptr<VirtioDevice> {
              Netdev netdev;
              netdev.backend = std::move(backend);
              return VirtioNet::create(loop, memory, options, std::move(netdev), entropy, log, clock).value();
            },
            guest) {}

  [[nodiscard]] VirtioNet& device() { return harness.device_as<VirtioNet>(); }

  FixedEntropy entropy;
  SystemClock clock;
  Log log;
  DeviceHarness harness;
};

}  // namespace wisp::test
