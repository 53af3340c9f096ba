// aio=threads: a few workers that make blocking system calls.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "block/io_engine.h"

namespace wisp {

class ThreadEngine final : public IoEngine {
 public:
  // Starts the workers, at least one. The files are borrowed. Each worker calls `started` (which may be
  // empty) before all else; its error is create()'s.
  [[nodiscard]] static Result<std::unique_ptr<ThreadEngine>> create(
      const EngineFiles& files, std::uint32_t workers, const std::function<Result<void>()>& started = {});
  // Joins the workers.
  ~ThreadEngine() override;

  void queue(IoTask& task) override;
  [[nodiscard]] bool submit() override;
  [[nodiscard]] IoTask* reap() override;
  [[nodiscard]] int event_fd() const override { return event_.get(); }

 private:
  ThreadEngine(const EngineFiles& files, UniqueFd event) : files_(files), event_(std::move(event)) {}
  [[nodiscard]] Result<void> start(std::uint32_t workers, const std::function<Result<void>()>& started);
  void work();

  const EngineFiles files_;
  const UniqueFd event_;
  Fifo<IoTask> queued_;  // the owner's side: not yet shown to the workers
  Fifo<IoTask> reaped_;  // the owner's side: taken from finished_
  std::uint32_t queued_count_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable more_;
  Fifo<IoTask> ready_;
  Fifo<IoTask> finished_;
  bool stop_ = false;

  std::vector<std::thread> workers_;
};

}  // namespace wisp
