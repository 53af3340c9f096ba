#include "block/thread_engine.h"

#include <pthread.h>

#include <csignal>
#include <latch>
#include <system_error>

namespace wisp {

Result<std::unique_ptr<ThreadEngine>> ThreadEngine::create(const EngineFiles& files, std::uint32_t workers,
                                                           const std::function<Result<void>()>& started) {
  WISP_ASSIGN(UniqueFd event, make_eventfd());
  std::unique_ptr<ThreadEngine> engine(new ThreadEngine(files, std::move(event)));
  WISP_TRY(engine->start(workers, started));
  return engine;
}

Result<void> ThreadEngine::start(std::uint32_t workers, const std::function<Result<void>()>& started) {
  // Signals belong to the main thread.
  sigset_t all{};
  sigset_t before{};
  sigfillset(&all);
  // But not what an instruction of its own raises, or no handler would hear of it.
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGABRT}) {
    sigdelset(&all, signal);
  }
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = 0;
  std::latch running(static_cast<std::ptrdiff_t>(workers));
  Result<void> result;
  try {
    for (std::uint32_t i = 0; i < workers; ++i) {
      workers_.emplace_back([this, &running, &started, &result] {
        if (auto done = started ? started() : Result<void>{}; !done) {
          const std::lock_guard lock(mutex_);
          result = std::move(done);
          stop_ = true;
        }
        running.count_down();  // last use of what start() owns
        work();
      });
      pthread_setname_np(workers_.back().native_handle(), "wisp-block");
    }
  } catch (const std::system_error& system) {
    error = system.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  running.count_down(static_cast<std::ptrdiff_t>(workers - workers_.size()));
  running.wait();
  if (error != 0) {
    return fail_errno(error, "cannot start a worker thread");
  }
  return result;
}

ThreadEngine::~ThreadEngine() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  more_.notify_all();
  for (std::thread& worker : workers_) {
    worker.join();
  }
}

void ThreadEngine::queue(IoTask& task) {
  queued_.push(task);
  ++queued_count_;
}

bool ThreadEngine::submit() {
  if (queued_count_ == 0) {
    return true;
  }
  {
    const std::lock_guard lock(mutex_);
    ready_.append(queued_);
  }
  if (queued_count_ == 1) {
    more_.notify_one();
  } else {
    more_.notify_all();
  }
  queued_count_ = 0;
  return true;
}

IoTask* ThreadEngine::reap() {
  if (reaped_.empty()) {
    // The count goes first: a task that finishes in between sets it again.
    drain_eventfd(event_.get());
    const std::lock_guard lock(mutex_);
    reaped_.append(finished_);
  }
  return reaped_.pop();
}

void ThreadEngine::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    more_.wait(lock, [this] { return stop_ || !ready_.empty(); });
    if (stop_) {
      return;
    }
    IoTask* const task = ready_.pop();
    lock.unlock();
    task->result = run_task(files_, *task);
    lock.lock();
    const bool first = finished_.empty();
    finished_.push(*task);
    if (first) {
      signal_eventfd(event_.get());
    }
  }
}

}  // namespace wisp
