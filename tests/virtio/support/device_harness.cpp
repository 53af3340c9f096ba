#include "virtio/support/device_harness.h"

#include <algorithm>
#include <chrono>

namespace wisp::test {

FakeInterrupts::FakeInterrupts(std::size_t queues) : used_(queues), call_fds_(queues) {}

void FakeInterrupts::queue_used(std::uint16_t queue) {
  ++used_.at(queue);
}

Result<int> FakeInterrupts::call_fd(std::uint16_t queue) {
  if (!call_fds_.at(queue).valid()) {
    WISP_ASSIGN(call_fds_.at(queue), make_eventfd());
  }
  return call_fds_.at(queue).get();
}

std::uint64_t FakeInterrupts::used(std::uint16_t queue) {
  if (call_fds_.at(queue).valid()) {
    used_.at(queue) += drain_eventfd(call_fds_.at(queue).get());
  }
  return used_.at(queue);
}

void FakeInterrupts::clear() {
  for (std::uint16_t i = 0; std::size_t{i} < used_.size(); ++i) {
    static_cast<void>(used(i));
    used_[i] = 0;
  }
  config_ = 0;
  needs_reset_ = 0;
}

DeviceHarness::DeviceHarness(const Factory& factory, FakeGuest* guest)
    : own_guest_(guest == nullptr ? std::make_unique<FakeGuest>() : nullptr),
      guest_(guest == nullptr ? own_guest_.get() : guest),
      loop_(EventLoop::create().value()),
      device_(factory(*loop_, guest_->memory())) {
  const std::size_t count = device_->queue_sizes().size();
  interrupts_ = std::make_unique<FakeInterrupts>(count);
  for (std::size_t i = 0; i < count; ++i) {
    kick_fds_.push_back(make_eventfd().value());
  }
}

DeviceHarness::~DeviceHarness() {
  if (active_) {
    reset();
  }
}

Result<void> DeviceHarness::activate(const Setup& setup) {
  const std::lock_guard lock(device_->strand().mutex());
  VirtioActivation activation;
  activation.features = (device_->features() & setup.features) | kVirtioFeatureVersion1 |
                        (setup.event_idx ? kVirtioFeatureEventIdx : 0) |
                        (setup.indirect ? kVirtioFeatureIndirectDesc : 0);
  activation.interrupts = interrupts_.get();
  queues_.clear();
  for (std::uint16_t i = 0; std::size_t{i} < device_->queue_sizes().size(); ++i) {
    queues_.push_back(std::make_unique<FakeQueue>(
        *guest_, std::min(setup.queue_size, device_->queue_sizes()[i]), setup.event_idx));
    drain_eventfd(kick_fds_[i].get());
    activation.kick_fds.push_back(kick_fds_[i].get());
    if (std::ranges::find(setup.unset, i) != setup.unset.end()) {
      activation.queues.emplace_back(std::nullopt);
      continue;
    }
    WISP_ASSIGN(Queue queue, Queue::activate(queues_[i]->config(), guest_->memory(), activation.features));
    activation.queues.emplace_back(std::move(queue));
  }
  active_ = true;
  return device_->activate(std::move(activation));
}

void DeviceHarness::reset() {
  const std::lock_guard lock(device_->strand().mutex());
  device_->reset();
  active_ = false;
}

void DeviceHarness::pause() {
  const std::lock_guard lock(device_->strand().mutex());
  device_->pause();
}

void DeviceHarness::resume() {
  const std::lock_guard lock(device_->strand().mutex());
  device_->resume();
}

void DeviceHarness::notify(std::uint16_t queue) {
  const std::lock_guard lock(device_->strand().mutex());
  if (device_->kicks_handled_elsewhere()) {
    signal_eventfd(kick_fds_.at(queue).get());
  } else if (!device_->paused()) {
    device_->notify(queue);
  }
}

std::uint16_t DeviceHarness::submit(std::uint16_t queue, const ChainBuilder& chain) {
  const std::uint16_t head = queues_.at(queue)->add(chain);
  if (queues_.at(queue)->take_notify_wish()) {
    notify(queue);
  }
  return head;
}

bool DeviceHarness::handle_kicks() {
  bool any = false;
  if (!active_ || device_->kicks_handled_elsewhere() || device_->paused()) {
    return false;
  }
  for (std::uint16_t i = 0; std::size_t{i} < kick_fds_.size(); ++i) {
    if (drain_eventfd(kick_fds_[i].get()) > 0) {
      any = true;
      notify(i);
    }
  }
  return any;
}

void DeviceHarness::pump(int rounds) {
  // The loop does not say whether it did anything; a few quiet rounds stand for quiet.
  int quiet = 0;
  for (int i = 0; i < rounds && quiet < 4; ++i) {
    loop_->run_once(0);
    quiet = handle_kicks() ? 0 : quiet + 1;
  }
}

bool DeviceHarness::pump_until(const std::function<bool()>& condition, int timeout_ms) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) {
      return false;
    }
    if (!handle_kicks()) {
      loop_->run_once(1);
    }
  }
  return true;
}

std::optional<FakeQueue::Used> DeviceHarness::wait_used(std::uint16_t queue, int timeout_ms) {
  std::optional<FakeQueue::Used> used;
  static_cast<void>(pump_until(
      [&] {
        used = queues_.at(queue)->take_used();
        return used.has_value();
      },
      timeout_ms));
  return used;
}

}  // namespace wisp::test
