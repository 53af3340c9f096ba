#include "chardev/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

namespace wisp {

std::unique_ptr<RawTerminal> RawTerminal::enter(int fd, bool keep_signals) {
  termios former{};
  if (::tcgetattr(fd, &former) != 0 || ::tcgetpgrp(fd) != ::getpgrp()) {
    return nullptr;
  }
  termios raw = former;
  ::cfmakeraw(&raw);
  raw.c_oflag |= OPOST;
  if (keep_signals) {
    raw.c_lflag |= ISIG;
  }
  if (::tcsetattr(fd, TCSANOW, &raw) != 0) {
    return nullptr;
  }
  return std::unique_ptr<RawTerminal>(new RawTerminal(fd, former));
}

void RawTerminal::restore() noexcept {
  if (raw_.exchange(false)) {
    const int saved_errno = errno;
    ::tcsetattr(fd_, TCSANOW, &former_);
    errno = saved_errno;
  }
}

std::pair<std::uint16_t, std::uint16_t> terminal_size(int fd) {
  winsize size{};
  if (::ioctl(fd, TIOCGWINSZ, &size) != 0) {
    return {0, 0};
  }
  return {size.ws_col, size.ws_row};
}

}  // namespace wisp
