#include "virtio/vhost_user_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "base/bytes.h"

namespace wisp {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kConnectPause{10};
constexpr std::size_t kMaxPayload = 512;  // of what is sent: a memory table of 8 regions needs 264

// For poll(2): rounded up, so that the wait does not end before the deadline.
int milliseconds_until(VhostUserChannel::Deadline deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<decltype(left)>(left, 0, 3'600'000));
}

}  // namespace

std::string_view to_string(VhostUserRequest request) {
  switch (request) {
    case VhostUserRequest::kGetFeatures:
      return "GET_FEATURES";
    case VhostUserRequest::kSetFeatures:
      return "SET_FEATURES";
    case VhostUserRequest::kSetOwner:
      return "SET_OWNER";
    case VhostUserRequest::kSetMemTable:
      return "SET_MEM_TABLE";
    case VhostUserRequest::kSetVringNum:
      return "SET_VRING_NUM";
    case VhostUserRequest::kSetVringAddr:
      return "SET_VRING_ADDR";
    case VhostUserRequest::kSetVringBase:
      return "SET_VRING_BASE";
    case VhostUserRequest::kGetVringBase:
      return "GET_VRING_BASE";
    case VhostUserRequest::kSetVringKick:
      return "SET_VRING_KICK";
    case VhostUserRequest::kSetVringCall:
      return "SET_VRING_CALL";
    case VhostUserRequest::kSetVringErr:
      return "SET_VRING_ERR";
    case VhostUserRequest::kGetProtocolFeatures:
      return "GET_PROTOCOL_FEATURES";
    case VhostUserRequest::kSetProtocolFeatures:
      return "SET_PROTOCOL_FEATURES";
    case VhostUserRequest::kGetQueueNum:
      return "GET_QUEUE_NUM";
    case VhostUserRequest::kSetVringEnable:
      return "SET_VRING_ENABLE";
  }
  return "unknown";
}

Result<VhostUserChannel> VhostUserChannel::connect(const std::string& path, Deadline deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return fail("socket path '{}' has {} bytes, expected 1 to {}", path, path.size(),
                sizeof address.sun_path - 1);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket.valid()) {
    return fail_errno(errno, "cannot create a Unix socket");
  }
  while (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    const int error = errno;
    // Not started yet, or busy with others.
    const bool may_come = error == ENOENT || error == ECONNREFUSED || error == EAGAIN || error == EINTR;
    if (!may_come || Clock::now() >= deadline) {
      return fail_errno(error, "cannot connect to the vhost-user socket {} (does its server run?)", path);
    }
    if (error != EINTR) {
      std::this_thread::sleep_for(kConnectPause);
    }
  }
  return VhostUserChannel(std::move(socket), path);
}

Result<VhostUserChannel> VhostUserChannel::adopt(UniqueFd socket, std::string peer) {
  const int flags = ::fcntl(socket.get(), F_GETFL);
  if (flags < 0 || ::fcntl(socket.get(), F_SETFL, flags | O_NONBLOCK) < 0) {
    return fail_errno(errno, "fd {} is not a usable socket", socket.get());
  }
  return VhostUserChannel(std::move(socket), std::move(peer));
}

template <typename... Args>
std::unexpected<Error> VhostUserChannel::broken(fmt::format_string<Args...> format, Args&&... args) {
  shut_down();
  return with_context(peer_, Error{fmt::format(format, std::forward<Args>(args)...)});
}

std::unexpected<Error> VhostUserChannel::peer_closed(VhostUserRequest request) {
  return broken("the back end closed the connection at {}", to_string(request));
}

Result<void> VhostUserChannel::check_usable() const {
  if (!usable_) {
    return fail("{}: the connection to the back end is gone", peer_);
  }
  return {};
}

Result<void> VhostUserChannel::wait(short events, VhostUserRequest request, Deadline deadline) {
  pollfd state{.fd = socket_.get(), .events = events, .revents = 0};
  for (;;) {
    const int ready = ::poll(&state, 1, milliseconds_until(deadline));
    if (ready > 0) {
      return {};  // errors are told by the call that follows
    }
    if (ready < 0 && errno != EINTR) {
      return broken("waiting at {} failed: {}", to_string(request), errno_text(errno));
    }
    if (Clock::now() >= deadline) {
      return broken("the back end does not answer ({})", to_string(request));
    }
  }
}

Result<void> VhostUserChannel::send(VhostUserRequest request, std::uint32_t flags,
                                    std::span<const std::uint8_t> payload, std::span<const int> fds,
                                    Deadline deadline) {
  WISP_TRY(check_usable());
  WISP_ASSERT(payload.size() <= kMaxPayload && fds.size() <= kVhostUserMaxFds);
  std::array<std::uint8_t, kVhostUserHeaderSize + kMaxPayload> message;
  store_le(message.data(), std::to_underlying(request));
  store_le(message.data() + 4, kVhostUserVersion | flags);
  store_le(message.data() + 8, static_cast<std::uint32_t>(payload.size()));
  std::ranges::copy(payload, message.begin() + kVhostUserHeaderSize);

  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * kVhostUserMaxFds)> control{};
  const std::size_t size = kVhostUserHeaderSize + payload.size();
  std::size_t sent = 0;
  while (sent < size) {
    iovec part{.iov_base = message.data() + sent, .iov_len = size - sent};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    if (sent == 0 && !fds.empty()) {
      // They go with the first byte.
      header.msg_control = control.data();
      header.msg_controllen = CMSG_SPACE(fds.size_bytes());
      cmsghdr* rights = CMSG_FIRSTHDR(&header);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(fds.size_bytes());
      std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
    }
    const ssize_t count = ::sendmsg(socket_.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count > 0) {
      sent += static_cast<std::size_t>(count);
    } else if (count < 0 && errno == EAGAIN) {
      WISP_TRY(wait(POLLOUT, request, deadline));
    } else if (count < 0 && (errno == EPIPE || errno == ECONNRESET)) {
      return peer_closed(request);
    } else if (count == 0 || errno != EINTR) {
      return broken("sending {} failed: {}", to_string(request), errno_text(errno));
    }
  }
  return {};
}

Result<void> VhostUserChannel::read_exactly(std::span<std::uint8_t> bytes, VhostUserRequest request,
                                            Deadline deadline) {
  while (!bytes.empty()) {
    // Without room for control messages, the kernel closes descriptors that come along.
    const ssize_t count = ::recv(socket_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (count > 0) {
      bytes = bytes.subspan(static_cast<std::size_t>(count));
      // A peer that sends byte by byte gets no more time than another.
      if (!bytes.empty() && Clock::now() >= deadline) {
        return broken("the back end does not answer ({})", to_string(request));
      }
    } else if (count == 0 || errno == ECONNRESET) {
      return peer_closed(request);
    } else if (errno == EAGAIN) {
      WISP_TRY(wait(POLLIN, request, deadline));
    } else if (errno != EINTR) {
      return broken("receiving the answer to {} failed: {}", to_string(request), errno_text(errno));
    }
  }
  return {};
}

Result<void> VhostUserChannel::receive(VhostUserRequest request, std::span<std::uint8_t> payload,
                                       Deadline deadline) {
  WISP_TRY(check_usable());
  std::array<std::uint8_t, kVhostUserHeaderSize> header{};
  WISP_TRY(read_exactly(header, request, deadline));
  const auto got_request = load_le<std::uint32_t>(header.data());
  const auto flags = load_le<std::uint32_t>(header.data() + 4);
  const auto size = load_le<std::uint32_t>(header.data() + 8);
  if (got_request != std::to_underlying(request) || (flags & kVhostUserReply) == 0) {
    return broken("the back end answered {} with message {} (flags {:#x})", to_string(request), got_request,
                  flags);
  }
  if ((flags & kVhostUserVersionMask) != kVhostUserVersion) {
    return broken("the back end speaks version {} of vhost-user, expected {}", flags & kVhostUserVersionMask,
                  kVhostUserVersion);
  }
  if (size != payload.size()) {
    return broken("the back end answered {} with {} bytes, expected {}", to_string(request), size,
                  payload.size());
  }
  return read_exactly(payload, request, deadline);
}

Result<void> VhostUserChannel::check_alive() {
  WISP_TRY(check_usable());
  std::uint8_t byte = 0;
  const ssize_t count = ::recv(socket_.get(), &byte, sizeof byte, MSG_PEEK | MSG_DONTWAIT);
  if (count > 0) {
    return broken("the back end sent a message that nobody asked for");
  }
  if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
    return broken("the back end closed the connection");
  }
  return {};
}

void VhostUserChannel::shut_down() {
  usable_ = false;
  (void)::shutdown(socket_.get(), SHUT_RDWR);
}

void VhostUserChannel::close() {
  usable_ = false;
  socket_.reset();
}

}  // namespace wisp
