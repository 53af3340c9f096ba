// The answers of a vhost-user back end are the input: handshake, start, stop and start again over them.
#include <sys/socket.h>

#include <array>
#include <chrono>
#include <vector>

#include "base/bytes.h"
#include "virtio/support/fake_guest.h"
#include "virtio/support/fake_queue.h"
#include "virtio/vhost.h"
#include "virtio/vhost_user.h"

namespace {

using namespace wisp;
using wisp::test::FakeGuest;
using wisp::test::FakeQueue;

constexpr VhostUserTimeouts kTimeouts{.connect = std::chrono::milliseconds(0),
                                      .handshake = std::chrono::milliseconds(20),
                                      .exchange = std::chrono::milliseconds(20)};

// One byte says which request is answered and whether its header is right; then come the header's flags and
// size where it is not, then the payload, cut to what is there.
std::vector<std::uint8_t> answers(std::span<const std::uint8_t> input) {
  std::vector<std::uint8_t> stream;
  const auto take = [&](std::size_t size) {
    const auto part = input.first(std::min(size, input.size()));
    input = input.subspan(part.size());
    return part;
  };
  while (!input.empty() && stream.size() < 4096) {
    const std::uint8_t kind = take(1)[0];
    std::array<std::uint8_t, kVhostUserHeaderSize> header{};
    store_le(header.data(), std::uint32_t{kind & 0x1fU});
    store_le(header.data() + 4, kVhostUserVersion | kVhostUserReply);
    store_le(header.data() + 8, 8U);
    if ((kind & 0x80) != 0) {
      const auto raw = take(8);
      std::copy(raw.begin(), raw.end(), header.begin() + 4);
    }
    stream.insert(stream.end(), header.begin(), header.end());
    const auto payload = take(8);
    stream.insert(stream.end(), payload.begin(), payload.end());
    // Acknowledgements are many: a byte of zeroes' worth each.
    if ((kind & 0x40) != 0) {
      stream.resize(stream.size() + 8 - payload.size());
    }
  }
  return stream;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static FakeGuest guest({{FakeGuest::kBase, 1U << 20}}, FakeGuest::Backing::kShared);
  guest.clear();
  std::array<int, 2> pair{-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()) != 0) {
    return 0;
  }
  const UniqueFd peer(pair[1]);
  const auto stream = answers({data, size});
  (void)!::send(peer.get(), stream.data(), stream.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  (void)::shutdown(peer.get(), SHUT_WR);
  auto channel = VhostUserChannel::adopt(UniqueFd(pair[0]), "fuzz");
  auto vhost = VhostUser::handshake(std::move(*channel), 2, kTimeouts);
  if (!vhost) {
    return 0;
  }
  const UniqueFd event = make_eventfd().value();
  std::vector<Queue> queues;
  for (int i = 0; i < 2; ++i) {
    const FakeQueue fake(guest, 16);
    queues.push_back(Queue::activate(fake.config(), guest.memory(), kVhostNeededFeatures).value());
  }
  std::vector<VhostUserQueue> running;
  for (std::uint32_t i = 0; i < 2; ++i) {
    running.push_back({.index = i,
                       .queue = &queues[i],
                       .kick_fd = event.get(),
                       .call_fd = event.get(),
                       .error_fd = event.get()});
  }
  for (int round = 0; round < 2; ++round) {
    const bool was_usable = (*vhost)->usable();
    const bool started = (*vhost)->start(kVhostNeededFeatures, guest.memory(), running).has_value();
    const bool stopped = started && (*vhost)->stop(running).has_value();
    if ((started && !was_usable) || (!stopped && (*vhost)->usable())) {
      __builtin_trap();  // an error ends the connection, and nothing begins it again
    }
  }
  (void)(*vhost)->check_alive();
  return 0;
}
