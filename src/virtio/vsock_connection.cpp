#include "virtio/vsock_connection.h"

#include <sys/socket.h>

#include <cerrno>

#include "net/frame.h"

namespace wisp {
namespace {

// A buffer that grew beyond this is given back when it is empty.
constexpr std::size_t kKeptCapacity = 16UL * 1024;

}  // namespace

Result<UniqueFd> make_unix_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) {
    return fail_errno(errno, "cannot create a Unix socket");
  }
  return fd;
}

sockaddr_un unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

int connect_unix_socket(int fd, const std::string& path) {
  const sockaddr_un address = unix_address(path);
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0 : errno;
}

VsockConnection::Written VsockConnection::receive(std::span<const iovec> data, std::uint32_t size) {
  received_ += size;
  if (discarding_) {
    forwarded_ += size;
    return Written::kOk;
  }
  std::size_t sent = 0;
  if (!has_unsent() && size > 0) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(data.data());
    message.msg_iovlen = data.size();
    const ssize_t result = ::sendmsg(socket.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (result < 0 && errno != EAGAIN && errno != EINTR && errno != ENOBUFS) {
      return Written::kPeerGone;
    }
    sent = result > 0 ? static_cast<std::size_t>(result) : 0;
    forwarded_ += static_cast<std::uint32_t>(sent);
  }
  const std::size_t rest = size - sent;
  if (rest > 0) {
    if (unsent_begin_ > 0) {
      unsent_.erase(unsent_.begin(), unsent_.begin() + static_cast<std::ptrdiff_t>(unsent_begin_));
      unsent_begin_ = 0;
    }
    const std::size_t at = unsent_.size();
    unsent_.resize(at + rest);
    copy_from_iovecs(data, sent, std::span(unsent_).subspan(at));
  }
  return Written::kOk;
}

VsockConnection::Written VsockConnection::flush() {
  while (has_unsent()) {
    const ssize_t result = ::send(socket.get(), unsent_.data() + unsent_begin_,
                                  unsent_.size() - unsent_begin_, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (result < 0) {
      if (errno == EINTR) {
        continue;
      }
      return errno == EAGAIN || errno == ENOBUFS ? Written::kOk : Written::kPeerGone;
    }
    unsent_begin_ += static_cast<std::size_t>(result);
    forwarded_ += static_cast<std::uint32_t>(result);
  }
  unsent_begin_ = 0;
  unsent_.clear();
  if (unsent_.capacity() > kKeptCapacity) {
    unsent_.shrink_to_fit();
  }
  return Written::kOk;
}

void VsockConnection::discard_output() {
  discarding_ = true;
  forwarded_ = received_;
  unsent_begin_ = 0;
  unsent_ = {};
}

bool VsockConnection::update_credit(std::uint32_t buf_alloc, std::uint32_t fwd_cnt) {
  // What the guest has used up only grows, and never beyond what it was sent.
  if (sent_ - fwd_cnt > sent_ - peer_forwarded_) {
    return false;
  }
  const std::uint32_t before = credit();
  peer_window_ = buf_alloc;
  peer_forwarded_ = fwd_cnt;
  if (credit() > before) {
    credit_asked = false;
  }
  return true;
}

VsockHeader VsockConnection::header(VsockOp op, std::uint64_t guest_cid) {
  told_forwarded_ = forwarded_;
  return {.src_cid = kVsockHostCid,
          .dst_cid = guest_cid,
          .src_port = host_port,
          .dst_port = guest_port,
          .op = op,
          .buf_alloc = window,
          .fwd_cnt = forwarded_};
}

}  // namespace wisp
