// A file descriptor with one owner, closed when the owner goes.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <utility>

#include "base/error.h"

namespace wisp {

class UniqueFd final {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      reset(other.release());
    }
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  [[nodiscard]] int get() const { return fd_; }
  [[nodiscard]] bool valid() const { return fd_ >= 0; }
  [[nodiscard]] int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1) {
    if (fd_ >= 0) {
      ::close(fd_);
    }
    fd_ = fd;
  }
  // A second descriptor of the same open file, close-on-exec.
  [[nodiscard]] Result<UniqueFd> duplicate() const;

 private:
  int fd_ = -1;
};

// A non-blocking close-on-exec eventfd with count 0.
[[nodiscard]] Result<UniqueFd> make_eventfd();
// Adds one to an eventfd; never blocks (a full counter already says what there is to say).
void signal_eventfd(int fd);
// The same for one that another process has too: that may have filled the counter and made the file blocking.
// A full counter is left as it is, since it says already what there is to say. Filling it in the moment
// between that look and the write holds the caller until a signal or the other process's read.
void signal_shared_eventfd(int fd);
// Takes the eventfd's count and sets it to 0; returns 0 where there was nothing. Never blocks, whatever
// another process that has it did to the file's flags.
std::uint64_t drain_eventfd(int fd);

}  // namespace wisp
