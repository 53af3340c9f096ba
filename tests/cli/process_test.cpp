#include "cli/process.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "chardev/terminal.h"
#include "sandbox/seccomp.h"
#include "support/sanitized.h"

namespace wisp {
namespace {

class ProcessTest : public testing::Test {
 protected:
  ProcessTest() {
    char name[] = "/tmp/wisp-process-XXXXXX";
    directory_ = ::mkdtemp(name);
    path_ = directory_ + "/pid";
  }
  ~ProcessTest() override { std::filesystem::remove_all(directory_); }
  [[nodiscard]] std::string text() const {
    std::ifstream file(path_);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::string directory_;
  std::string path_;
};

TEST_F(ProcessTest, AsManyDescriptorsAsTheHostAllows) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few{.rlim_cur = 64, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  allow_many_files();
  rlimit after{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &after), 0);
  EXPECT_EQ(after.rlim_cur, before.rlim_max);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST_F(ProcessTest, PidFileHoldsThePidAndGoesAtTheEnd) {
  {
    const auto pidfile = PidFile::create(path_);
    ASSERT_TRUE(pidfile.has_value());
    EXPECT_EQ(text(), std::to_string(::getpid()) + "\n");
  }
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(ProcessTest, AHeldPidFileIsRefusedAndKept) {
  const auto first = PidFile::create(path_);
  ASSERT_TRUE(first.has_value());
  const auto second = PidFile::create(path_);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().message, "-pidfile: '" + path_ +
                                        "' is held by another running process; name another path or end that "
                                        "process");
  EXPECT_EQ(text(), std::to_string(::getpid()) + "\n");
}

TEST_F(ProcessTest, AStalePidFileIsOverwrittenWhole) {
  std::ofstream(path_) << "12345678901234567890\nmore\n";
  const auto pidfile = PidFile::create(path_);
  ASSERT_TRUE(pidfile.has_value());
  EXPECT_EQ(text(), std::to_string(::getpid()) + "\n");
}

TEST_F(ProcessTest, SomebodyElsesPidFileIsKept) {
  {
    const auto pidfile = PidFile::create(path_);
    ASSERT_TRUE(pidfile.has_value());
    std::filesystem::remove(path_);
    std::ofstream(path_) << "1\n";
  }
  EXPECT_EQ(text(), "1\n");
}

TEST_F(ProcessTest, APidFileIsNeverADirectoryLinkOrDevice) {
  EXPECT_FALSE(PidFile::create(directory_).has_value());
  EXPECT_FALSE(PidFile::create(directory_ + "/no/such/place").has_value());
  EXPECT_THAT(PidFile::create("/dev/null").error().message, testing::HasSubstr("is not a regular file"));
  std::ofstream(directory_ + "/victim") << "precious";
  std::filesystem::create_symlink(directory_ + "/victim", path_);
  EXPECT_FALSE(PidFile::create(path_).has_value());
  std::filesystem::rename(directory_ + "/victim", path_);
  EXPECT_EQ(text(), "precious");
}

// Runs `work` in a child and gives its exit status.
int status_of_child(const std::function<int()>& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(work());
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(ProcessTest, TheForegroundEndsWellOnceTheBackgroundIsReady) {
  // The background process tells through a pipe that it lives on in a session of its own.
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const UniqueFd in(ends[0]);
  UniqueFd out(ends[1]);
  EXPECT_EQ(status_of_child([&] {
              auto daemon = Daemon::start();
              if (!daemon || !daemon->ready()) {
                return 9;
              }
              struct stat input{};
              struct stat null{};
              ::fstat(STDIN_FILENO, &input);
              ::stat("/dev/null", &null);
              const bool good = ::getsid(0) == ::getpid() && input.st_rdev == null.st_rdev;
              [[maybe_unused]] const ssize_t written = ::write(out.get(), good ? "y" : "n", 1);
              return 7;
            }),
            0);
  out.reset();
  char answer = 0;
  EXPECT_EQ(::read(in.get(), &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
}

TEST_F(ProcessTest, TheForegroundFailsAsTheBackgroundDid) {
  EXPECT_EQ(status_of_child([] {
              const auto daemon = Daemon::start();
              return daemon ? 2 : 9;
            }),
            2);
  EXPECT_EQ(status_of_child([] {
              const auto daemon = Daemon::start();
              std::raise(SIGKILL);
              return daemon ? 0 : 9;
            }),
            1);
}

// In a session of its own, whose leader outlives the process that dies: the terminal's hangup would reset its
// mode.
int die_on_terminal(int slave, ThreadKind kind, int signal) {
  if (::setsid() < 0 || ::ioctl(slave, TIOCSCTTY, 0) != 0) {
    return 10;
  }
  termios before{};
  ::tcgetattr(slave, &before);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto terminal = RawTerminal::enter(slave, false);
    termios during{};
    ::tcgetattr(slave, &during);
    if (terminal == nullptr || (during.c_lflag & ICANON) != 0 || !restore_terminal_on_deadly_signals() ||
        !install_seccomp(kind)) {
      ::_exit(11);
    }
    (void)::raise(signal);
    ::_exit(12);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != signal) {
    return 13;
  }
  termios after{};
  ::tcgetattr(slave, &after);
  return after.c_lflag == before.c_lflag && after.c_iflag == before.c_iflag ? 42 : 14;
}

TEST_F(ProcessTest, ADeadlySignalPutsTheTerminalBack) {
  WISP_SKIP_IF_SANITIZED();
  for (const ThreadKind kind :
       {ThreadKind::kMain, ThreadKind::kVcpu, ThreadKind::kIo, ThreadKind::kWorker, ThreadKind::kEngine}) {
    for (const int signal : {SIGSEGV, SIGABRT}) {
      int master = -1;
      int slave = -1;
      ASSERT_EQ(::openpty(&master, &slave, nullptr, nullptr, nullptr), 0);
      const UniqueFd master_fd(master);
      const UniqueFd slave_fd(slave);
      EXPECT_EQ(status_of_child([&] { return die_on_terminal(slave, kind, signal); }), 42)
          << thread_kind_name(kind) << " signal " << signal;
    }
  }
}

TEST_F(ProcessTest, SignalsArriveOnTheLoop) {
  EXPECT_EQ(status_of_child([] {
              const auto loop = *EventLoop::create();
              int last = 0;
              const auto signals = Signals::create(*loop, [&](int signal) { last = signal; });
              if (!signals) {
                return 1;
              }
              for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGWINCH}) {
                ::kill(::getpid(), signal);
                loop->run_once(1000);
                if (last != signal) {
                  return 2;
                }
              }
              std::array<int, 2> ends{};
              if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
                return 3;
              }
              ::close(ends[0]);
              const UniqueFd file(::memfd_create("limited", MFD_CLOEXEC));
              const rlimit one{.rlim_cur = 1, .rlim_max = 1};
              if (!file.valid() || ::setrlimit(RLIMIT_FSIZE, &one) != 0) {
                return 4;
              }
              // Neither SIGPIPE nor SIGXFSZ ends us.
              if (::write(ends[1], "x", 1) >= 0 || errno != EPIPE) {
                return 5;
              }
              return ::pwrite(file.get(), "x", 1, 1) < 0 && errno == EFBIG ? 42 : 6;
            }),
            42);
}

}  // namespace
}  // namespace wisp
