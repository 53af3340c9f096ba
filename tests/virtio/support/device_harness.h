// Runs a VirtioDevice without any transport: activates it with FakeQueues and pumps its event loop.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "virtio/device.h"
#include "virtio/support/fake_guest.h"
#include "virtio/support/fake_queue.h"

namespace wisp::test {

// Counts what a device tells its driver. Thread-safe.
class FakeInterrupts final : public VirtioInterrupts {
 public:
  explicit FakeInterrupts(std::size_t queues);
  void queue_used(std::uint16_t queue) override;
  void config_changed() override { ++config_; }
  void needs_reset() override { ++needs_reset_; }
  [[nodiscard]] Result<int> call_fd(std::uint16_t queue) override;

  // Interrupts of this queue so far; what came through call_fd is counted too.
  [[nodiscard]] std::uint64_t used(std::uint16_t queue);
  [[nodiscard]] std::uint64_t config() const { return config_; }
  [[nodiscard]] bool broken() const { return needs_reset_ > 0; }
  void clear();

 private:
  std::vector<std::atomic<std::uint64_t>> used_;
  std::vector<UniqueFd> call_fds_;
  std::atomic<std::uint64_t> config_ = 0;
  std::atomic<std::uint64_t> needs_reset_ = 0;
};

class DeviceHarness final {
 public:
  using Factory = std::function<std::unique_ptr<VirtioDevice>(EventLoop& loop, const GuestMemory& memory)>;

  // The guest memory is this harness's own unless one is given (borrowed).
  explicit DeviceHarness(const Factory& factory) : DeviceHarness(factory, nullptr) {}
  DeviceHarness(const Factory& factory, FakeGuest* guest);
  ~DeviceHarness();
  DeviceHarness(const DeviceHarness&) = delete;
  DeviceHarness& operator=(const DeviceHarness&) = delete;

  [[nodiscard]] FakeGuest& guest() { return *guest_; }
  [[nodiscard]] EventLoop& loop() { return *loop_; }
  [[nodiscard]] VirtioDevice& device() { return *device_; }
  template <typename T>
  [[nodiscard]] T& device_as() {
    return static_cast<T&>(*device_);
  }
  [[nodiscard]] FakeInterrupts& interrupts() { return *interrupts_; }

  struct Setup {
    // Device features the driver takes; VERSION_1 is added.
    std::uint64_t features = ~0ULL;
    bool event_idx = false;
    bool indirect = true;
    std::uint16_t queue_size = 16;       // of each queue, cut to the device's maximum
    std::vector<std::uint16_t> unset{};  // queues that the driver leaves out
  };
  // Lays out new rings for every queue and activates. Also after reset().
  [[nodiscard]] Result<void> activate(const Setup& setup);
  [[nodiscard]] Result<void> activate() { return activate(Setup{}); }
  void reset();
  void pause();
  void resume();
  // The rings of the last activate().
  [[nodiscard]] FakeQueue& queue(std::uint16_t index) { return *queues_.at(index); }

  // Calls the device as the transport would, under its lock. notify() does nothing while paused.
  void notify(std::uint16_t queue);
  template <typename T>
  [[nodiscard]] T read_config(std::uint64_t offset) {
    T value{};
    const std::lock_guard lock(device_->strand().mutex());
    device_->read_config(offset, std::span(reinterpret_cast<std::uint8_t*>(&value), sizeof value));
    return value;
  }
  template <typename T>
  void write_config(std::uint64_t offset, T value) {
    const std::lock_guard lock(device_->strand().mutex());
    device_->write_config(offset, std::span(reinterpret_cast<const std::uint8_t*>(&value), sizeof value));
  }
  // Publishes the chain and notifies if the device asked for it.
  std::uint16_t submit(std::uint16_t queue, const ChainBuilder& chain);
  // Runs the event loop (and signalled kick_fds) until nothing is ready any more, or for `rounds` rounds.
  void pump(int rounds = 64);
  // Pumps, waiting in between, until `condition` holds; false after `timeout_ms`.
  [[nodiscard]] bool pump_until(const std::function<bool()>& condition, int timeout_ms = 5000);
  // Pumps until the queue has a used element and takes it; empty after the timeout.
  std::optional<FakeQueue::Used> wait_used(std::uint16_t queue, int timeout_ms = 5000);

 private:
  bool handle_kicks();
  std::unique_ptr<FakeGuest> own_guest_;
  FakeGuest* guest_;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<VirtioDevice> device_;
  std::unique_ptr<FakeInterrupts> interrupts_;
  std::vector<std::unique_ptr<FakeQueue>> queues_;
  std::vector<UniqueFd> kick_fds_;
  bool active_ = false;
};

}  // namespace wisp::test
