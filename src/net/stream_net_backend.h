// Frames over a stream socket: a big-endian 32-bit length, then the frame. What passt and QEMU's
// `-netdev stream` speak.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/error.h"
#include "base/unique_fd.h"
#include "net/net_backend.h"

namespace wisp {

class StreamNetBackend final : public NetBackend {
 public:
  // Takes a connected stream socket over; refuses what is no such socket.
  [[nodiscard]] static Result<std::unique_ptr<StreamNetBackend>> create(UniqueFd socket,
                                                                        std::string description);
  // Connects to a listening Unix socket.
  [[nodiscard]] static Result<std::unique_ptr<StreamNetBackend>> connect(const std::string& path);

  [[nodiscard]] NetIo send(std::uint16_t pair, std::span<const iovec> frame) override;
  [[nodiscard]] NetIo flush(std::uint16_t pair) override;
  [[nodiscard]] NetReceived receive(std::uint16_t pair, std::span<const iovec> buffers) override;
  [[nodiscard]] int poll_fd(std::uint16_t pair) const override;
  [[nodiscard]] std::string description() const override { return description_; }
  [[nodiscard]] std::string failure() override { return failure_; }

 private:
  StreamNetBackend(UniqueFd socket, std::string description);
  NetIo close(std::string failure);
  // Whether a whole frame waits in the input buffer; its size in `size`. False also for a length that breaks
  // the protocol, which `broken` tells.
  [[nodiscard]] bool next_frame(std::size_t& size, bool& broken) const;

  static constexpr std::size_t kPrefixSize = 4;
  static constexpr std::size_t kBufferSize = 2 * (kPrefixSize + kMaxFrameSize);

  const UniqueFd socket_;
  const std::string description_;
  bool closed_ = false;
  std::string failure_ = "the peer closed the connection";
  // Bytes received and not yet given out: [in_begin_, in_end_). Untouched pages cost nothing.
  std::unique_ptr<std::uint8_t[]> in_;
  std::size_t in_begin_ = 0;
  std::size_t in_end_ = 0;
  bool in_drained_ = false;  // the last read emptied the socket
  // Bytes taken and not yet sent: [out_begin_, out_end_).
  std::unique_ptr<std::uint8_t[]> out_;
  std::size_t out_begin_ = 0;
  std::size_t out_end_ = 0;
};

}  // namespace wisp
