#include "chardev/pty_backend.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <termios.h>

#include <array>
#include <cerrno>

#include "chardev/terminal.h"

namespace wisp {
namespace {

constexpr std::uint64_t kLookNs = 500'000'000;

}  // namespace

Result<std::unique_ptr<PtyBackend>> PtyBackend::create(const CharConfig& config, EventLoop& loop, Log& log) {
  std::unique_ptr<PtyBackend> backend(new PtyBackend(loop, log, config));
  WISP_TRY(backend->start());
  WISP_TRY(backend->open());
  WISP_TRY(backend->notice_openings());
  return backend;
}

PtyBackend::~PtyBackend() {
  shut_down([this] {
    opened_.stop();
    look_again_ = Timer();
  });
}

Result<void> PtyBackend::open() {
  master_ = UniqueFd(::posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC));
  if (!master_.valid()) {
    return fail_errno(errno, "chardev {}: cannot open a pseudo-terminal", id());
  }
  std::array<char, 128> name{};
  if (::grantpt(master_.get()) != 0 || ::unlockpt(master_.get()) != 0 ||
      ::ptsname_r(master_.get(), name.data(), name.size()) != 0) {
    return fail_errno(errno, "chardev {}: cannot unlock the pseudo-terminal", id());
  }
  path_ = name.data();
  // Raw from the start: an echo would send the guest its own output. Opening and closing it also makes the
  // master say "hung up", as it will whenever nobody is there.
  const UniqueFd slave(::open(path_.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC));
  termios mode{};
  if (!slave.valid() || ::tcgetattr(slave.get(), &mode) != 0) {
    return fail_errno(errno, "chardev {}: cannot open {}", id(), path_);
  }
  ::cfmakeraw(&mode);
  if (::tcsetattr(slave.get(), TCSANOW, &mode) != 0) {
    return fail_errno(errno, "chardev {}: cannot set the mode of {}", id(), path_);
  }
  return {};
}

Result<void> PtyBackend::notice_openings() {
  inotify_ = UniqueFd(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (inotify_.valid() && ::inotify_add_watch(inotify_.get(), path_.c_str(), IN_OPEN) >= 0) {
    auto watched = watch(inotify_.get(), EPOLLIN, [this](std::uint32_t) {
      std::array<std::uint8_t, 4096> events;
      while (::read(inotify_.get(), events.data(), events.size()) > 0) {
      }
      look_for_peer();
    });
    WISP_TRY(watched);
    opened_ = *std::move(watched);
    return {};
  }
  inotify_.reset();
  WISP_ASSIGN(look_again_, timer([this] { look_for_peer(); }));
  look_again_.arm(kLookNs);
  return {};
}

void PtyBackend::look_for_peer() {
  if (is_connected()) {
    return;
  }
  pollfd state{.fd = master_.get(), .events = POLLIN, .revents = 0};
  ::poll(&state, 1, 0);
  // Somebody may have come, written and gone already.
  if ((state.revents & POLLHUP) == 0 || (state.revents & POLLIN) != 0) {
    auto in = master_.duplicate();
    auto out = master_.duplicate();
    if (in.has_value() && out.has_value()) {
      attach(*std::move(in), *std::move(out));
      return;
    }
    log().warning("chardev {}: no descriptor left for {}", id(), path_);
  }
  if (!inotify_.valid()) {
    look_again_.arm(kLookNs);
  }
}

void PtyBackend::peer_gone() {
  look_for_peer();
}

std::pair<std::uint16_t, std::uint16_t> PtyBackend::size() const {
  return terminal_size(master_.get());
}

}  // namespace wisp
