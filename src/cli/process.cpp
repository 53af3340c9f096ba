#include "cli/process.h"

#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <utility>

#include "chardev/terminal.h"

namespace wisp {
namespace {

constexpr int kMaxPidFileTries = 8;
constexpr std::size_t kThreadStack = 1 << 20;  // bytes

// In the foreground process: never returns.
[[noreturn]] void wait_for_background(pid_t child, const UniqueFd& pipe) {
  char byte = 0;
  ssize_t got = 0;
  do {
    got = ::read(pipe.get(), &byte, 1);
  } while (got < 0 && errno == EINTR);
  if (got == 1) {
    ::_exit(0);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  ::_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

}  // namespace

void keep_memory_small() {
#ifdef __GLIBC__
  // One heap for all threads: the paths that run often allocate nothing.
  ::mallopt(M_ARENA_MAX, 1);
  // Stacks without a whole aligned huge page in them, which the kernel would fill on the first touch.
  pthread_attr_t attributes;
  if (::pthread_getattr_default_np(&attributes) == 0) {
    if (::pthread_attr_setstacksize(&attributes, kThreadStack) == 0) {
      (void)::pthread_setattr_default_np(&attributes);
    }
    ::pthread_attr_destroy(&attributes);
  }
#endif
}

void give_free_memory_back() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

void allow_many_files() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    (void)::setrlimit(RLIMIT_NOFILE, &limit);
  }
}

Result<Daemon> Daemon::start() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
    return fail_errno(errno, "-daemonize: cannot create a pipe");
  }
  UniqueFd in(ends[0]);
  UniqueFd out(ends[1]);
  const pid_t child = ::fork();
  if (child < 0) {
    return fail_errno(errno, "-daemonize: cannot start a process");
  }
  if (child > 0) {
    out.reset();
    wait_for_background(child, in);
  }
  ::setsid();
  return Daemon(std::move(out));
}

Result<void> Daemon::ready() {
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null.valid()) {
    return fail_errno(errno, "-daemonize: cannot open /dev/null");
  }
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::dup2(null.get(), fd) < 0) {
      return fail_errno(errno, "-daemonize: cannot leave the terminal");
    }
  }
  const char byte = 0;
  [[maybe_unused]] const ssize_t written = ::write(pipe_.get(), &byte, 1);
  pipe_.reset();
  return {};
}

Result<std::unique_ptr<PidFile>> PidFile::create(const std::string& path) {
  for (int tries = 0; tries < kMaxPidFileTries; ++tries) {
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0644));
    struct stat status{};
    if (!fd.valid() || ::fstat(fd.get(), &status) != 0) {
      return fail_errno(errno, "-pidfile: cannot write '{}'", path);
    }
    if (!S_ISREG(status.st_mode)) {
      return fail("-pidfile: '{}' exists and is not a regular file; name another path", path);
    }
    struct flock lock{};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    if (::fcntl(fd.get(), F_OFD_SETLK, &lock) != 0) {
      if (errno == EAGAIN || errno == EACCES) {
        return fail(
            "-pidfile: '{}' is held by another running process; name another path or end that process", path);
      }
      return fail_errno(errno, "-pidfile: cannot lock '{}'", path);
    }
    // The former holder may have removed the file between our open and our lock.
    struct stat now{};
    if (::stat(path.c_str(), &now) != 0 || now.st_ino != status.st_ino || now.st_dev != status.st_dev) {
      continue;
    }
    const std::string text = fmt::format("{}\n", ::getpid());
    if (::ftruncate(fd.get(), 0) != 0 ||
        ::pwrite(fd.get(), text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
      const int error = errno;
      ::unlink(path.c_str());
      return fail_errno(error, "-pidfile: cannot write '{}'", path);
    }
    return std::unique_ptr<PidFile>(new PidFile(path, std::move(fd), status.st_dev, status.st_ino));
  }
  return fail("-pidfile: '{}' keeps being replaced by other processes; name another path", path);
}

PidFile::~PidFile() {
  struct stat status{};
  if (::lstat(path_.c_str(), &status) == 0 && status.st_dev == device_ && status.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

Result<void> restore_terminal_on_deadly_signals() {
  struct sigaction action{};
  action.sa_handler = [](int signal) {
    restore_terminal();
    // By then with its default action; an exception comes again by itself, but not what kill() sent.
    (void)::raise(signal);
  };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  // Among them SIGTTOU, by which a background process is held that touches its terminal.
  ::sigfillset(&action.sa_mask);
  for (const int signal : {SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV}) {
    struct sigaction present{};
    if (::sigaction(signal, nullptr, &present) != 0) {
      return fail_errno(errno, "cannot read the action of signal {}", signal);
    }
    if (present.sa_handler == SIG_DFL && ::sigaction(signal, &action, nullptr) != 0) {
      return fail_errno(errno, "cannot set the action of signal {}", signal);
    }
  }
  return {};
}

Result<std::unique_ptr<Signals>> Signals::create(EventLoop& loop, std::function<void(int signal)> on_signal) {
  std::unique_ptr<Signals> signals(new Signals());
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGWINCH}) {
    sigaddset(&set, signal);
  }
  if (::pthread_sigmask(SIG_BLOCK, &set, nullptr) != 0 || ::signal(SIGPIPE, SIG_IGN) == SIG_ERR ||
      ::signal(SIGXFSZ, SIG_IGN) == SIG_ERR) {
    return fail_errno(errno, "cannot set the signals up");
  }
  signals->fd_ = UniqueFd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals->fd_.valid()) {
    return fail_errno(errno, "cannot create a signalfd");
  }
  const int fd = signals->fd_.get();
  WISP_ASSIGN(signals->watch_, loop.watch(fd, EPOLLIN, [fd, tell = std::move(on_signal)](std::uint32_t) {
    signalfd_siginfo info{};
    if (::read(fd, &info, sizeof info) == sizeof info) {
      tell(static_cast<int>(info.ssi_signo));
    }
  }));
  return signals;
}

}  // namespace wisp
