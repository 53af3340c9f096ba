// An epoll event loop with timers. One thread runs it; any thread may add, change or remove what it watches.
#pragma once

#include <sys/epoll.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "base/error.h"
#include "base/unique_fd.h"

namespace wisp {

class EventLoop;

// What keeps a descriptor watched. Destroying it, or calling stop(), ends the watch.
//
// Lifetime rule: with a guard mutex, stop() called with that mutex held guarantees that the callback is not
// running and will not run again. Without a guard, stop() gives that guarantee on the loop's own thread only,
// or while that stands still.
class Watch final {
 public:
  Watch() = default;
  Watch(Watch&&) noexcept = default;
  Watch& operator=(Watch&& other) noexcept;
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch() { stop(); }

  void stop();
  // Changes the epoll events waited for; 0 keeps the watch but waits for nothing (errors are still told).
  void set_events(std::uint32_t events);
  [[nodiscard]] bool active() const { return state_ != nullptr; }

 private:
  friend class EventLoop;
  struct State;
  explicit Watch(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

// A one-shot timer on CLOCK_MONOTONIC that can be set again and again; the same lifetime rule as Watch.
class Timer final {
 public:
  Timer() = default;
  Timer(Timer&&) noexcept = default;
  // The old watch ends before its descriptor's number can be given to somebody else.
  Timer& operator=(Timer&& other) noexcept {
    watch_ = std::move(other.watch_);
    fd_ = std::move(other.fd_);
    return *this;
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() = default;
  // Fires once, `delay_ns` from now, in place of what was set before.
  void arm(std::uint64_t delay_ns);
  void disarm();

 private:
  friend class EventLoop;
  Timer(UniqueFd fd, Watch watch) : fd_(std::move(fd)), watch_(std::move(watch)) {}
  UniqueFd fd_;
  Watch watch_;
};

class EventLoop final {
 public:
  // Called with the epoll events that came.
  using Callback = std::function<void(std::uint32_t events)>;

  [[nodiscard]] static Result<std::unique_ptr<EventLoop>> create();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;
  ~EventLoop();

  // Watches a borrowed descriptor (level-triggered). `guard`, where given, is held during each callback and
  // must outlive the watch. The callback may stop its own watch.
  [[nodiscard]] Result<Watch> watch(int fd, std::uint32_t events, Callback callback,
                                    std::mutex* guard = nullptr);
  [[nodiscard]] Result<Timer> timer(std::function<void()> callback, std::mutex* guard = nullptr);

  // Runs `task` on the loop's thread, soon; from any thread. Tasks still queued when the loop is destroyed
  // are dropped.
  void post(std::function<void()> task);

  // Handles events until stop(). Returns at once where stop() came first.
  void run();
  // Handles what is ready, waiting at most `timeout_ms` (-1: without end, 0: not at all) for a first event.
  void run_once(int timeout_ms);
  // Ends run(), from any thread or callback.
  void stop();
  [[nodiscard]] bool stopping() const;

 private:
  struct Impl;
  explicit EventLoop(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<Impl> impl_;
  friend class Watch;
};

// One event loop and one lock: what a device's callbacks run under. All calls into the device (from vCPU
// threads, the loop and control) are made with the lock held, so the device itself needs none.
class Strand final {
 public:
  explicit Strand(EventLoop& loop) : loop_(loop) {}
  Strand(const Strand&) = delete;
  Strand& operator=(const Strand&) = delete;

  [[nodiscard]] EventLoop& loop() { return loop_; }
  [[nodiscard]] std::mutex& mutex() { return mutex_; }
  [[nodiscard]] Result<Watch> watch(int fd, std::uint32_t events, EventLoop::Callback callback) {
    return loop_.watch(fd, events, std::move(callback), &mutex_);
  }
  [[nodiscard]] Result<Timer> timer(std::function<void()> callback) {
    return loop_.timer(std::move(callback), &mutex_);
  }

 private:
  EventLoop& loop_;
  std::mutex mutex_;
};

}  // namespace wisp
