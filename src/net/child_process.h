// A helper program with one owner: it ends, and is reaped, when the owner goes.
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"

namespace wisp {

class ChildProcess final {
 public:
  // Runs `program` (searched in PATH where it has no '/') with standard input and output on /dev/null,
  // standard error on `error_fd` and `inherited_fd` as descriptor 3; no other descriptor, the default signal
  // actions and an empty signal mask.
  [[nodiscard]] static Result<std::unique_ptr<ChildProcess>> spawn(const std::string& program,
                                                                   const std::vector<std::string>& arguments,
                                                                   int inherited_fd, int error_fd);
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  // Kills and reaps it.
  ~ChildProcess();

  [[nodiscard]] pid_t pid() const { return pid_; }
  // How it ended ("exit status 1", "signal 9"), once it did; never blocks.
  [[nodiscard]] std::optional<std::string> ended();

 private:
  explicit ChildProcess(pid_t pid) : pid_(pid) {}
  const pid_t pid_;
  std::optional<std::string> ended_;  // set: reaped, pid_ may belong to somebody else
};

}  // namespace wisp
