#include "chardev/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

namespace wisp {
namespace {

// A signal handler can know only what is static. The first, where there are several: it saw the mode that was
// there before any of them.
// NOLINTNEXTLINE(cppcoreguidelines-avoid-non-const-global-variables)
constinit std::atomic<RawTerminal*> first_raw = nullptr;

}  // namespace

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
  std::unique_ptr<RawTerminal> terminal(new RawTerminal(fd, former));
  RawTerminal* none = nullptr;
  first_raw.compare_exchange_strong(none, terminal.get());
  return terminal;
}

RawTerminal::~RawTerminal() {
  RawTerminal* self = this;
  first_raw.compare_exchange_strong(self, nullptr);
  restore();
}

void RawTerminal::restore() noexcept {
  if (raw_.exchange(false)) {
    const int saved_errno = errno;
    ::tcsetattr(fd_, TCSANOW, &former_);
    errno = saved_errno;
  }
}

void restore_terminal() noexcept {
  if (RawTerminal* terminal = first_raw.load(); terminal != nullptr) {
    terminal->restore();
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
