// A thread that runs an event loop for the devices that name it.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "base/error.h"
#include "base/event_loop.h"

namespace wisp {

class IoThread final {
 public:
  // `on_start` runs on the new thread before anything else (names, system-call filters); its error is given
  // back.
  [[nodiscard]] static Result<std::unique_ptr<IoThread>> start(std::string id,
                                                               const std::function<Result<void>()>& on_start);
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;
  // Stops the loop and joins.
  ~IoThread();

  // The same ahead of time: what the loop serves may then be destroyed on any thread. The loop stays usable
  // as an object.
  void stop();

  [[nodiscard]] const std::string& id() const { return id_; }
  [[nodiscard]] EventLoop& loop() { return *loop_; }
  [[nodiscard]] pid_t thread_id() const { return thread_id_; }

 private:
  IoThread(std::string id, std::unique_ptr<EventLoop> loop) : id_(std::move(id)), loop_(std::move(loop)) {}
  const std::string id_;
  const std::unique_ptr<EventLoop> loop_;
  pid_t thread_id_ = 0;
  std::thread thread_;
};

}  // namespace wisp
