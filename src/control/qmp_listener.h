// A listening socket for QMP. Inside this room only.
#pragma once

#include <sys/types.h>

#include <string>

#include "base/error.h"
#include "base/unique_fd.h"
#include "control/launch_config.h"

namespace wisp {

// Unix sockets are made with mode 0600. A socket file whose owner is gone is replaced; one that still answers
// is an error, and so is any other kind of file. The file is removed at the end if it is still the same.
class QmpListener final {
 public:
  [[nodiscard]] static Result<QmpListener> open(const QmpEndpoint& endpoint);
  QmpListener(QmpListener&& other) noexcept;
  QmpListener& operator=(QmpListener&&) = delete;
  QmpListener(const QmpListener&) = delete;
  QmpListener& operator=(const QmpListener&) = delete;
  ~QmpListener();

  [[nodiscard]] int fd() const { return fd_.get(); }
  // "unix:PATH" or "tcp:HOST:PORT".
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] bool wait() const { return wait_; }

 private:
  QmpListener() = default;
  UniqueFd fd_;
  std::string name_;
  std::string path_;  // to be removed; empty for TCP
  dev_t device_ = 0;
  ino_t inode_ = 0;
  bool wait_ = false;
};

}  // namespace wisp
