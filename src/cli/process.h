// What a machine's process does for itself: going to the background, its pidfile, its signals.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/unique_fd.h"

namespace wisp {

// -daemonize. The foreground process waits until the one in the background is ready() and then ends with
// status 0; where that one ends before, with its status. Errors until then are written by the background
// process to the same standard error.
class Daemon final {
 public:
  // Returns in the background process only, as leader of its own session. Before any thread is started.
  [[nodiscard]] static Result<Daemon> start();
  // Lets go of the terminal and of the foreground process.
  [[nodiscard]] Result<void> ready();

 private:
  explicit Daemon(UniqueFd pipe) : pipe_(std::move(pipe)) {}
  UniqueFd pipe_;
};

// Makes what the C library takes for threads small: a host runs thousands of these processes. Before any
// thread is started; what fails leaves the library's ways.
void keep_memory_small();
// Gives what the heap has free back to the host, once start-up is over.
void give_free_memory_back();

// Lets the process have as many descriptors as it may: a guest's many streams must not take those that
// control needs.
void allow_many_files();

// A file with the process id and a newline; locked, and removed at the end if it is still the same.
class PidFile final {
 public:
  // In the process that shall hold it. Errors: held by another process, not a regular file, not writable.
  [[nodiscard]] static Result<std::unique_ptr<PidFile>> create(const std::string& path);
  PidFile(const PidFile&) = delete;
  PidFile& operator=(const PidFile&) = delete;
  ~PidFile();

 private:
  PidFile(std::string path, UniqueFd fd, dev_t device, ino_t inode)
      : path_(std::move(path)), fd_(std::move(fd)), device_(device), inode_(inode) {}
  const std::string path_;
  const UniqueFd fd_;
  const dev_t device_;
  const ino_t inode_;
};

// From here on an exception, abort() or SIGQUIT that ends the process puts a raw terminal back first. (A call
// that the system-call filter refuses ends the process without asking any handler: that terminal stays raw.)
[[nodiscard]] Result<void> restore_terminal_on_deadly_signals();

// SIGTERM, SIGINT, SIGHUP and SIGWINCH as calls on the event loop; SIGPIPE and SIGXFSZ are ignored, since the
// calls that raise them fail as well (a disk past RLIMIT_FSIZE gives the guest an error). Made before any
// thread is started, so that all threads have them blocked.
class Signals final {
 public:
  [[nodiscard]] static Result<std::unique_ptr<Signals>> create(EventLoop& loop,
                                                               std::function<void(int signal)> on_signal);

 private:
  Signals() = default;
  UniqueFd fd_;
  Watch watch_;
};

}  // namespace wisp
