#include "net/stream_net_backend.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/bytes.h"

namespace wisp {
namespace {

// A frame of this size or more is not copied to wait for others.
constexpr std::size_t kDirectSize = 8192;

}  // namespace

StreamNetBackend::StreamNetBackend(UniqueFd socket, std::string description)
    : socket_(std::move(socket)),
      description_(std::move(description)),
      in_(std::make_unique_for_overwrite<std::uint8_t[]>(kBufferSize)),
      out_(std::make_unique_for_overwrite<std::uint8_t[]>(kBufferSize)) {}

Result<std::unique_ptr<StreamNetBackend>> StreamNetBackend::create(UniqueFd socket, std::string description) {
  int type = 0;
  socklen_t size = sizeof type;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_TYPE, &type, &size) != 0) {
    return fail_errno(errno, "fd {} is not a socket", socket.get());
  }
  if (type != SOCK_STREAM) {
    return fail("fd {} is a datagram socket, expected a stream socket (use -netdev dgram)", socket.get());
  }
  (void)::fcntl(socket.get(), F_SETFD, FD_CLOEXEC);
  return std::unique_ptr<StreamNetBackend>(new StreamNetBackend(std::move(socket), std::move(description)));
}

Result<std::unique_ptr<StreamNetBackend>> StreamNetBackend::connect(const std::string& path) {
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
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return fail_errno(errno, "cannot connect to the socket {} (is its server running?)", path);
  }
  return create(std::move(socket), "stream " + path);
}

int StreamNetBackend::poll_fd(std::uint16_t /*pair*/) const {
  return socket_.get();
}

NetIo StreamNetBackend::close(std::string failure) {
  failure_ = std::move(failure);
  closed_ = true;
  // Not closed yet: whoever watches the descriptor must be able to end its watch first.
  ::shutdown(socket_.get(), SHUT_RDWR);
  return NetIo::kClosed;
}

NetIo StreamNetBackend::flush(std::uint16_t /*pair*/) {
  if (closed_) {
    return NetIo::kClosed;
  }
  while (out_begin_ < out_end_) {
    const ssize_t sent =
        ::send(socket_.get(), out_.get() + out_begin_, out_end_ - out_begin_, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0) {
      out_begin_ += static_cast<std::size_t>(sent);
    } else if (errno == EAGAIN) {
      return NetIo::kAgain;
    } else if (errno != EINTR) {
      return close("cannot send: " + errno_text(errno));
    }
  }
  out_begin_ = out_end_ = 0;
  return NetIo::kDone;
}

NetIo StreamNetBackend::send(std::uint16_t pair, std::span<const iovec> frame) {
  if (closed_) {
    return NetIo::kClosed;
  }
  const std::size_t size = iovecs_size(frame);
  if (size == 0 || size > kMaxFrameSize || frame.size() > kMaxFrameIovecs) {
    return NetIo::kDropped;
  }
  std::array<std::uint8_t, kPrefixSize> prefix{};
  store_le(prefix.data(), htonl(static_cast<std::uint32_t>(size)));

  if (out_end_ > 0 && (size >= kDirectSize || out_end_ + kPrefixSize + size > kBufferSize)) {
    const NetIo flushed = flush(pair);
    if (flushed != NetIo::kDone) {
      return flushed;
    }
  }
  std::size_t sent = 0;
  if (size >= kDirectSize) {
    std::array<iovec, kMaxFrameIovecs + 1> parts;
    parts[0] = {prefix.data(), prefix.size()};
    std::memcpy(&parts[1], frame.data(), frame.size_bytes());
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = frame.size() + 1;
    const ssize_t result = ::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (result < 0) {
      return errno == EAGAIN || errno == EINTR ? NetIo::kAgain : close("cannot send: " + errno_text(errno));
    }
    sent = static_cast<std::size_t>(result);
  }
  // A frame that was begun must be ended before the next: its rest waits here.
  if (sent < kPrefixSize) {
    std::memcpy(out_.get() + out_end_, prefix.data() + sent, kPrefixSize - sent);
    out_end_ += kPrefixSize - sent;
    sent = kPrefixSize;
  }
  const std::size_t rest = kPrefixSize + size - sent;
  out_end_ += copy_from_iovecs(frame, sent - kPrefixSize, std::span(out_.get() + out_end_, rest));
  return NetIo::kDone;
}

bool StreamNetBackend::next_frame(std::size_t& size, bool& broken) const {
  broken = false;
  if (in_end_ - in_begin_ < kPrefixSize) {
    return false;
  }
  size = ntohl(load_le<std::uint32_t>(in_.get() + in_begin_));
  broken = size == 0 || size > kMaxFrameSize;
  return !broken && in_end_ - in_begin_ - kPrefixSize >= size;
}

NetReceived StreamNetBackend::receive(std::uint16_t /*pair*/, std::span<const iovec> buffers) {
  std::size_t size = 0;
  bool broken = false;
  while (!next_frame(size, broken)) {
    if (broken) {
      return {close(fmt::format("the peer sent a frame length of {}, expected 1 to {}", size, kMaxFrameSize)),
              0};
    }
    if (closed_) {
      return {NetIo::kClosed, 0};
    }
    if (std::exchange(in_drained_, false)) {
      return {NetIo::kAgain, 0};
    }
    if (in_begin_ > 0) {
      std::memmove(in_.get(), in_.get() + in_begin_, in_end_ - in_begin_);
      in_end_ -= in_begin_;
      in_begin_ = 0;
    }
    const std::size_t room = kBufferSize - in_end_;
    const ssize_t got = ::recv(socket_.get(), in_.get() + in_end_, room, MSG_DONTWAIT);
    if (got > 0) {
      in_end_ += static_cast<std::size_t>(got);
      in_drained_ = static_cast<std::size_t>(got) < room;
    } else if (got == 0) {
      return {close("the peer closed the connection"), 0};
    } else if (errno == EAGAIN) {
      return {NetIo::kAgain, 0};
    } else if (errno != EINTR) {
      return {close("cannot receive: " + errno_text(errno)), 0};
    }
  }
  in_begin_ += kPrefixSize;
  const std::size_t copied = copy_to_iovecs(std::span(in_.get() + in_begin_, size), buffers);
  in_begin_ += size;
  if (in_begin_ == in_end_) {
    in_begin_ = in_end_ = 0;
  }
  return {NetIo::kDone, copied};
}

}  // namespace wisp
