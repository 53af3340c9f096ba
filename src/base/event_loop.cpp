#include "base/event_loop.h"

#include <sys/timerfd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <unordered_map>
#include <utility>
#include <vector>

namespace wisp {

struct Watch::State {
  State(std::shared_ptr<EventLoop::Impl> owner, int watched, EventLoop::Callback on_event, std::mutex* lock)
      : loop(std::move(owner)), fd(watched), callback(std::move(on_event)), guard(lock) {}
  const std::shared_ptr<EventLoop::Impl> loop;
  const int fd;
  std::uint64_t id = 0;
  const EventLoop::Callback callback;
  std::mutex* const guard;
  std::atomic<bool> active = true;
};

struct EventLoop::Impl {
  UniqueFd epoll;
  UniqueFd wake;
  std::atomic<bool> stop = false;
  std::mutex mutex;  // guards what follows; never held during a callback
  std::unordered_map<std::uint64_t, std::shared_ptr<Watch::State>> watches;
  std::uint64_t next_id = 1;
  std::vector<std::function<void()>> tasks;
};

namespace {

constexpr std::uint64_t kWakeId = 0;
constexpr std::size_t kEventsPerWait = 64;

}  // namespace

Watch& Watch::operator=(Watch&& other) noexcept {
  if (this != &other) {
    stop();
    state_ = std::move(other.state_);
  }
  return *this;
}

void Watch::stop() {
  if (state_ == nullptr) {
    return;
  }
  const std::shared_ptr<State> state = std::exchange(state_, nullptr);
  state->active.store(false, std::memory_order_release);
  EventLoop::Impl& loop = *state->loop;
  const std::lock_guard lock(loop.mutex);
  if (loop.watches.erase(state->id) > 0) {
    ::epoll_ctl(loop.epoll.get(), EPOLL_CTL_DEL, state->fd, nullptr);
  }
}

void Watch::set_events(std::uint32_t events) {
  if (state_ == nullptr) {
    return;
  }
  epoll_event event{.events = events, .data = {.u64 = state_->id}};
  ::epoll_ctl(state_->loop->epoll.get(), EPOLL_CTL_MOD, state_->fd, &event);
}

void Timer::arm(std::uint64_t delay_ns) {
  // A zero value would disarm.
  const std::uint64_t delay = delay_ns == 0 ? 1 : delay_ns;
  itimerspec spec{};
  spec.it_value.tv_sec = static_cast<time_t>(delay / 1'000'000'000);
  spec.it_value.tv_nsec = static_cast<long>(delay % 1'000'000'000);
  ::timerfd_settime(fd_.get(), 0, &spec, nullptr);
}

void Timer::disarm() {
  const itimerspec spec{};
  ::timerfd_settime(fd_.get(), 0, &spec, nullptr);
}

Result<std::unique_ptr<EventLoop>> EventLoop::create() {
  auto impl = std::make_shared<Impl>();
  impl->epoll = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
  if (!impl->epoll.valid()) {
    return fail_errno(errno, "cannot create an epoll instance");
  }
  WISP_ASSIGN(impl->wake, make_eventfd());
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakeId}};
  if (::epoll_ctl(impl->epoll.get(), EPOLL_CTL_ADD, impl->wake.get(), &event) != 0) {
    return fail_errno(errno, "cannot watch the event loop's own eventfd");
  }
  return std::unique_ptr<EventLoop>(new EventLoop(std::move(impl)));
}

EventLoop::~EventLoop() {
  std::unordered_map<std::uint64_t, std::shared_ptr<Watch::State>> watches;
  std::vector<std::function<void()>> tasks;
  {
    const std::lock_guard lock(impl_->mutex);
    watches.swap(impl_->watches);
    tasks.swap(impl_->tasks);
  }
}

Result<Watch> EventLoop::watch(int fd, std::uint32_t events, Callback callback, std::mutex* guard) {
  auto state = std::make_shared<Watch::State>(impl_, fd, std::move(callback), guard);
  const std::lock_guard lock(impl_->mutex);
  state->id = impl_->next_id++;
  epoll_event event{.events = events, .data = {.u64 = state->id}};
  if (::epoll_ctl(impl_->epoll.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    return fail_errno(errno, "cannot watch file descriptor {}", fd);
  }
  impl_->watches.emplace(state->id, state);
  return Watch(std::move(state));
}

Result<Timer> EventLoop::timer(std::function<void()> callback, std::mutex* guard) {
  UniqueFd fd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!fd.valid()) {
    return fail_errno(errno, "cannot create a timer");
  }
  const int raw = fd.get();
  WISP_ASSIGN(Watch timer_watch,
              watch(
                  raw, EPOLLIN,
                  [raw, run = std::move(callback)](std::uint32_t) {
                    std::uint64_t expirations = 0;
                    // Nothing to read: the timer was set anew after it fired.
                    if (::read(raw, &expirations, sizeof expirations) == sizeof expirations) {
                      run();
                    }
                  },
                  guard));
  return Timer(std::move(fd), std::move(timer_watch));
}

void EventLoop::post(std::function<void()> task) {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->tasks.push_back(std::move(task));
  }
  signal_eventfd(impl_->wake.get());
}

void EventLoop::run() {
  while (!stopping()) {
    run_once(-1);
  }
}

void EventLoop::run_once(int timeout_ms) {
  std::array<epoll_event, kEventsPerWait> events;
  const int count =
      ::epoll_wait(impl_->epoll.get(), events.data(), static_cast<int>(events.size()), timeout_ms);
  for (int i = 0; i < count; ++i) {
    const epoll_event& event = events[static_cast<std::size_t>(i)];
    const std::uint64_t id = event.data.u64;  // a copy: the struct is packed
    if (id == kWakeId) {
      drain_eventfd(impl_->wake.get());
      continue;
    }
    std::shared_ptr<Watch::State> state;
    {
      const std::lock_guard lock(impl_->mutex);
      const auto found = impl_->watches.find(id);
      if (found == impl_->watches.end()) {
        continue;
      }
      state = found->second;
    }
    std::unique_lock<std::mutex> guard;
    if (state->guard != nullptr) {
      guard = std::unique_lock(*state->guard);
    }
    if (state->active.load(std::memory_order_acquire)) {
      state->callback(event.events);
    }
  }
  std::vector<std::function<void()>> tasks;
  {
    const std::lock_guard lock(impl_->mutex);
    tasks.swap(impl_->tasks);
  }
  for (const auto& task : tasks) {
    task();
  }
}

void EventLoop::stop() {
  impl_->stop.store(true, std::memory_order_release);
  signal_eventfd(impl_->wake.get());
}

bool EventLoop::stopping() const {
  return impl_->stop.load(std::memory_order_acquire);
}

}  // namespace wisp
