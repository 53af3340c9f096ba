// Frames as datagrams: one frame, one message of a connected socket (SOCK_DGRAM or SOCK_SEQPACKET).
#pragma once

#include <memory>
#include <string>

#include "base/error.h"
#include "base/unique_fd.h"
#include "net/net_backend.h"

namespace wisp {

class DgramBackend final : public NetBackend {
 public:
  // Takes a connected socket over; refuses what is no such socket.
  [[nodiscard]] static Result<std::unique_ptr<DgramBackend>> create(UniqueFd socket);

  [[nodiscard]] NetIo send(std::uint16_t pair, std::span<const iovec> frame) override;
  [[nodiscard]] NetReceived receive(std::uint16_t pair, std::span<const iovec> buffers) override;
  [[nodiscard]] int poll_fd(std::uint16_t pair) const override;
  [[nodiscard]] std::string description() const override { return "datagram socket"; }

 private:
  DgramBackend(UniqueFd socket, bool connection) : socket_(std::move(socket)), connection_(connection) {}
  const UniqueFd socket_;
  const bool connection_;  // an empty message means that the peer is gone
};

}  // namespace wisp
