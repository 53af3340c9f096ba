#include "base/unique_fd.h"

#include <fcntl.h>
#include <sys/eventfd.h>

#include <cerrno>

namespace wisp {

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

std::uint64_t drain_eventfd(int fd) {
  std::uint64_t count = 0;
  return ::read(fd, &count, sizeof count) == sizeof count ? count : 0;
}

}  // namespace wisp
