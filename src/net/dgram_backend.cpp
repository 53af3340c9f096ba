#include "net/dgram_backend.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace wisp {

Result<std::unique_ptr<DgramBackend>> DgramBackend::create(UniqueFd socket) {
  int type = 0;
  socklen_t size = sizeof type;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_TYPE, &type, &size) != 0) {
    return fail_errno(errno, "fd {} is not a socket", socket.get());
  }
  if (type != SOCK_DGRAM && type != SOCK_SEQPACKET) {
    return fail("fd {} is a stream socket, expected a datagram socket (use -netdev stream)", socket.get());
  }
  (void)::fcntl(socket.get(), F_SETFD, FD_CLOEXEC);
  return std::unique_ptr<DgramBackend>(new DgramBackend(std::move(socket), type == SOCK_SEQPACKET));
}

int DgramBackend::poll_fd(std::uint16_t /*pair*/) const {
  return socket_.get();
}

NetIo DgramBackend::send(std::uint16_t /*pair*/, std::span<const iovec> frame) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(frame.data());
  message.msg_iovlen = frame.size();
  if (::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
    return NetIo::kDone;
  }
  switch (errno) {
    case EAGAIN:
    case EINTR:
      return NetIo::kAgain;
    case EPIPE:
    case EBADF:
      return NetIo::kClosed;
    default:  // nobody listens, too long, no memory: as on a wire, the frame is lost
      return NetIo::kDropped;
  }
}

NetReceived DgramBackend::receive(std::uint16_t /*pair*/, std::span<const iovec> buffers) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(buffers.data());
  message.msg_iovlen = buffers.size();
  // An unreachable peer shows as one ECONNREFUSED per frame sent: skip over a bounded number of them.
  for (int attempt = 0; attempt < 16; ++attempt) {
    const ssize_t size = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT);
    if (size > 0 || (size == 0 && !connection_)) {
      return {NetIo::kDone, static_cast<std::size_t>(size)};
    }
    if (size < 0 && errno == ECONNREFUSED) {
      continue;
    }
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
      return {NetIo::kAgain, 0};
    }
    return {NetIo::kClosed, 0};
  }
  return {NetIo::kDropped, 0};
}

}  // namespace wisp
