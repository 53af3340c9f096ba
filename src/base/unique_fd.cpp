#include "base/unique_fd.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include <cerrno>

namespace wisp {
namespace {

bool ready(int fd, short events) {
  pollfd state{.fd = fd, .events = events, .revents = 0};
  return ::poll(&state, 1, 0) == 1 && (state.revents & events) != 0;
}

}  // namespace

Result<UniqueFd> UniqueFd::duplicate() const {
  const int copy = ::fcntl(fd_, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) {
    return fail_errno(errno, "cannot duplicate file descriptor {}", fd_);
  }
  return UniqueFd(copy);
}

Result<UniqueFd> make_eventfd() {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    return fail_errno(errno, "cannot create an eventfd");
  }
  return UniqueFd(fd);
}

void signal_eventfd(int fd) {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(fd, &one, sizeof one);
}

void signal_shared_eventfd(int fd) {
  if (ready(fd, POLLOUT)) {
    signal_eventfd(fd);
  }
}

std::uint64_t drain_eventfd(int fd) {
  std::uint64_t count = 0;
  const iovec part{.iov_base = &count, .iov_len = sizeof count};
  ssize_t got = ::preadv2(fd, &part, 1, -1, RWF_NOWAIT);
  if (got < 0 && (errno == EOPNOTSUPP || errno == ENOSYS) && ready(fd, POLLIN)) {
    got = ::read(fd, &count, sizeof count);  // Linux before 5.8
  }
  return got == sizeof count ? count : 0;
}

}  // namespace wisp
