// Messages of the vhost-user protocol (docs/interop/vhost-user.rst of QEMU) over a Unix socket: framing,
// descriptors and deadlines of the front end's side.
//
// The peer is another process and not trusted: an answer is taken only with the request, the flags and the
// size that are due, descriptors that come with it are never received, and nothing waits beyond its deadline.
// After any failure the connection is shut down, so that an answer that comes late is not taken for another.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/unique_fd.h"

namespace wisp {

// "Front-end message types".
enum class VhostUserRequest : std::uint32_t {
  kGetFeatures = 1,
  kSetFeatures = 2,
  kSetOwner = 3,
  kSetMemTable = 5,
  kSetVringNum = 8,
  kSetVringAddr = 9,
  kSetVringBase = 10,
  kGetVringBase = 11,
  kSetVringKick = 12,
  kSetVringCall = 13,
  kSetVringErr = 14,
  kGetProtocolFeatures = 15,
  kSetProtocolFeatures = 16,
  kGetQueueNum = 17,
  kSetVringEnable = 18,
};
[[nodiscard]] std::string_view to_string(VhostUserRequest request);

// "Header": request, flags and payload size, 32 bits each.
inline constexpr std::size_t kVhostUserHeaderSize = 12;
inline constexpr std::uint32_t kVhostUserVersion = 1;  // bits 0 and 1 of the flags
inline constexpr std::uint32_t kVhostUserVersionMask = 3;
inline constexpr std::uint32_t kVhostUserReply = 1U << 2;
inline constexpr std::uint32_t kVhostUserNeedReply = 1U << 3;

inline constexpr std::size_t kVhostUserMaxFds = 8;

// Not thread-safe.
class VhostUserChannel final {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  // Connects to the socket at `path`, where another process listens; waits until `deadline` for one that does
  // not listen yet.
  [[nodiscard]] static Result<VhostUserChannel> connect(const std::string& path, Deadline deadline);
  // A stream socket that is connected already; made non-blocking. `peer` is for messages.
  [[nodiscard]] static Result<VhostUserChannel> adopt(UniqueFd socket, std::string peer);
  VhostUserChannel(VhostUserChannel&&) noexcept = default;
  VhostUserChannel& operator=(VhostUserChannel&&) noexcept = default;

  // -1 after close(). To be watched for the peer's end, with check_alive().
  [[nodiscard]] int fd() const { return socket_.get(); }
  [[nodiscard]] const std::string& peer() const { return peer_; }

  // Sends one message, with at most kVhostUserMaxFds descriptors (which stay the caller's).
  [[nodiscard]] Result<void> send(VhostUserRequest request, std::uint32_t flags,
                                  std::span<const std::uint8_t> payload, std::span<const int> fds,
                                  Deadline deadline);
  // The answer to `request`, whose payload has exactly the size of `payload`.
  [[nodiscard]] Result<void> receive(VhostUserRequest request, std::span<std::uint8_t> payload,
                                     Deadline deadline);

  // Between messages: an error where the peer is gone, or said something unasked. Does not wait.
  [[nodiscard]] Result<void> check_alive();
  // Whether nothing failed so far.
  [[nodiscard]] bool usable() const { return usable_; }
  // Ends the connection for both sides; the descriptor stays, as somebody may watch it.
  void shut_down();
  // The descriptor must not be watched any more.
  void close();

 private:
  VhostUserChannel(UniqueFd socket, std::string peer) : socket_(std::move(socket)), peer_(std::move(peer)) {}
  [[nodiscard]] Result<void> wait(short events, VhostUserRequest request, Deadline deadline);
  [[nodiscard]] Result<void> read_exactly(std::span<std::uint8_t> bytes, VhostUserRequest request,
                                          Deadline deadline);
  template <typename... Args>
  [[nodiscard]] std::unexpected<Error> broken(fmt::format_string<Args...> format, Args&&... args);
  [[nodiscard]] std::unexpected<Error> peer_closed(VhostUserRequest request);
  [[nodiscard]] Result<void> check_usable() const;

  UniqueFd socket_;
  std::string peer_;
  bool usable_ = true;
};

}  // namespace wisp
