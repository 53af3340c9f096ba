// The length-prefixed framing that passt and QEMU's stream back end speak, from a hostile peer: what comes
// out must be what a plain reading of the bytes gives, however they are cut.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "net/stream_net_backend.h"

namespace {

using wisp::NetIo;

// The frames before the first bad length, and whether there is one.
std::vector<std::vector<std::uint8_t>> expected_frames(std::span<const std::uint8_t> bytes, bool& broken) {
  std::vector<std::vector<std::uint8_t>> frames;
  broken = false;
  while (bytes.size() >= 4) {
    const std::size_t size = ntohl(wisp::load_le<std::uint32_t>(bytes.data()));
    if (size == 0 || size > wisp::kMaxFrameSize) {
      broken = true;
      break;
    }
    if (bytes.size() - 4 < size) {
      break;
    }
    frames.emplace_back(bytes.begin() + 4, bytes.begin() + 4 + static_cast<std::ptrdiff_t>(size));
    bytes = bytes.subspan(4 + size);
  }
  return frames;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2 || size > 100000) {
    return 0;
  }
  const std::size_t cut = 1 + data[0];
  const std::span<const std::uint8_t> bytes(data + 1, size - 1);
  bool broken = false;
  const auto expected = expected_frames(bytes, broken);

  std::array<int, 2> fds{};
  WISP_ASSERT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds.data()) == 0);
  wisp::UniqueFd peer(fds[1]);
  const auto backend = wisp::StreamNetBackend::create(wisp::UniqueFd(fds[0]), "fuzz").value();
  std::vector<std::vector<std::uint8_t>> frames;
  std::vector<std::uint8_t> buffer(wisp::kMaxFrameSize);
  bool closed = false;
  const auto receive_all = [&] {
    // Two refusals in a row: the first may only say that the last read had emptied the socket.
    for (int refused = 0; refused < 2 && !closed;) {
      const std::array<iovec, 2> pieces{{{buffer.data(), 7}, {buffer.data() + 7, buffer.size() - 7}}};
      const wisp::NetReceived got = backend->receive(0, pieces);
      if (got.status == NetIo::kDone) {
        frames.emplace_back(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(got.size));
      }
      closed = got.status == NetIo::kClosed;
      refused += got.status == NetIo::kAgain ? 1 : 0;
    }
  };
  for (std::size_t at = 0; at < bytes.size() && !closed; at += cut) {
    const auto part = bytes.subspan(at, std::min(cut, bytes.size() - at));
    (void)::send(peer.get(), part.data(), part.size(), MSG_NOSIGNAL);
    receive_all();
  }
  WISP_ASSERT(frames == expected);
  WISP_ASSERT(closed == broken);
  peer.reset();
  closed = false;
  receive_all();
  WISP_ASSERT(closed);
  return 0;
}
