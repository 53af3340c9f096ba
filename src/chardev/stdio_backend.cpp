#include "chardev/stdio_backend.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <string_view>

namespace wisp {
namespace {

constexpr std::string_view kHelp =
    "\n"
    "control-A x  end the virtual machine\n"
    "control-A b  send a break (the magic SysRq key of Linux)\n"
    "control-A control-A  send control-A\n"
    "control-A h  this help\n";

}  // namespace

Result<std::unique_ptr<StdioBackend>> StdioBackend::create(const CharConfig& config, int input, int output,
                                                           EventLoop& loop, Log& log) {
  std::unique_ptr<StdioBackend> backend(new StdioBackend(loop, log, config, output));
  WISP_TRY(backend->start());
  WISP_ASSIGN(UniqueFd in, backend->open_private(input, O_RDONLY));
  WISP_ASSIGN(UniqueFd out, backend->open_private(output, O_WRONLY));
  backend->terminal_ = RawTerminal::enter(input, !config.escape);
  if (config.escape) {
    backend->set_up_escape(config);
  }
  backend->attach_first(std::move(in), std::move(out));
  return backend;
}

StdioBackend::StdioBackend(EventLoop& loop, Log& log, const CharConfig& config, int output)
    : StreamBackend(loop, log, config.id), output_(output) {}

StdioBackend::~StdioBackend() {
  shut_down();
  terminal_.reset();
  for (const SharedFlags& shared : shared_flags_) {
    ::fcntl(shared.fd, F_SETFL, shared.flags);
  }
}

// A non-blocking descriptor of the same file. O_NONBLOCK belongs to the open file, which a terminal's other
// programs share, so terminals and pipes are opened anew; only where that is not possible it is set and taken
// back at the end.
Result<UniqueFd> StdioBackend::open_private(int fd, int access) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) {
    return fail_errno(errno, "chardev {}: standard {} is not open", id(),
                      access == O_RDONLY ? "input" : "output");
  }
  if (S_ISCHR(info.st_mode) || S_ISFIFO(info.st_mode)) {
    UniqueFd reopened(
        ::open(fmt::format("/proc/self/fd/{}", fd).c_str(), access | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
    if (reopened.valid()) {
      return reopened;
    }
  }
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (!copy.valid()) {
    return fail_errno(errno, "chardev {}: cannot duplicate descriptor {}", id(), fd);
  }
  if (!S_ISREG(info.st_mode)) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags >= 0 && (flags & O_NONBLOCK) == 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0) {
      shared_flags_.push_back({fd, flags});
    }
  }
  return copy;
}

void StdioBackend::set_up_escape(const CharConfig& config) {
  set_escape_filter(std::make_unique<EscapeFilter>(EscapeFilter::Actions{
      .quit = config.on_quit,
      .send_break =
          [this] {
            if (receiver() != nullptr) {
              receiver()->receive_break();
            }
          },
      .help = [this] { write(std::span(reinterpret_cast<const std::uint8_t*>(kHelp.data()), kHelp.size())); },
  }));
}

}  // namespace wisp
