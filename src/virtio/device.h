// What a virtio device is to its transport, and a transport to its device (virtio 1.2, section 2).
//
// Locking: every function of a VirtioDevice is called with strand().mutex() held, by the transport (vCPU
// threads), by the event loop's callbacks that the device registered through its strand, or by control.
// Devices therefore take no lock of their own, and must not call back into code that waits for another
// thread.
//
// Life: activate() at DRIVER_OK, reset() back. In between, pause() and resume() frame a snapshot. A restored
// device sees load(), then activate() with queues that stand where they stood, all while paused.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/state.h"
#include "memory/guest_memory.h"
#include "virtio/queue.h"

namespace wisp {

// How a device reaches its driver; implemented by transports. Thread-safe.
class VirtioInterrupts {
 public:
  virtual ~VirtioInterrupts() = default;
  // Buffers of this queue were used. The device asks Queue::take_interrupt_wish() first.
  virtual void queue_used(std::uint16_t queue) = 0;
  // The configuration space changed (2.3).
  virtual void config_changed() = 0;
  // The device met something it cannot go on from: sets DEVICE_NEEDS_RESET and tells the driver (2.1.2).
  virtual void needs_reset() = 0;
  // An eventfd whose signal acts as queue_used(queue): for vhost. Borrowed.
  [[nodiscard]] virtual Result<int> call_fd(std::uint16_t queue) = 0;
};

// What a device gets when the driver sets DRIVER_OK. Queues the driver left unset are empty.
struct VirtioActivation {
  std::uint64_t features = 0;  // negotiated
  std::vector<std::optional<Queue>> queues;
  VirtioInterrupts* interrupts = nullptr;  // valid until reset() returns
  std::vector<int> kick_fds;  // one eventfd per queue, signalled by the driver's notification; borrowed
};

class VirtioDevice {
 public:
  VirtioDevice(EventLoop& loop, const GuestMemory& memory) : memory_(memory), strand_(loop) {}
  VirtioDevice(const VirtioDevice&) = delete;
  VirtioDevice& operator=(const VirtioDevice&) = delete;
  virtual ~VirtioDevice() = default;

  [[nodiscard]] Strand& strand() { return strand_; }
  [[nodiscard]] const GuestMemory& memory() const { return memory_; }

  // Fixed at birth.
  [[nodiscard]] virtual std::string_view name() const = 0;    // "virtio-blk"
  [[nodiscard]] virtual std::uint32_t device_id() const = 0;  // virtio 1.2 section 5
  [[nodiscard]] virtual std::uint64_t features()
      const = 0;  // device-specific bits; the transport adds the ring's
  [[nodiscard]] virtual std::span<const std::uint16_t> queue_sizes() const = 0;  // maximum of each queue

  // Device configuration space (2.5). `offset + data.size()` may lie beyond its end: bytes there read as zero
  // and writes there are dropped. Any width.
  virtual void read_config(std::uint64_t offset, std::span<std::uint8_t> data) = 0;
  virtual void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) = 0;

  // DRIVER_OK. On an error the transport sets DEVICE_NEEDS_RESET and logs it.
  [[nodiscard]] virtual Result<void> activate(VirtioActivation activation) = 0;
  // The driver notified this queue. Work per call is bounded: a device that has more to do signals its
  // kick_fd. Not called while paused.
  virtual void notify(std::uint16_t queue) = 0;
  // Back to the state before activate(): on return nothing of the device touches guest memory or interrupts
  // any more; requests in flight were completed, cancelled or drained.
  virtual void reset() = 0;
  // Whether something outside (the kernel's vhost) reads kick_fds, so that the transport must not.
  [[nodiscard]] virtual bool kicks_handled_elsewhere() const { return false; }

  // Holds the device still, for a snapshot or for a stopped machine: on return nothing is in flight, and
  // until resume() the device touches neither guest memory nor interrupts. Idempotent, in any state.
  void pause() {
    if (!paused_) {
      paused_ = true;
      on_pause();
    }
  }
  // Takes up work again. Notifications that came while paused were not told: every queue is looked at.
  void resume() {
    if (paused_) {
      paused_ = false;
      on_resume();
    }
  }
  [[nodiscard]] bool paused() const { return paused_; }
  // The running queue, for saving where it stands; null where it is not active.
  [[nodiscard]] virtual const Queue* queue(std::uint16_t index) const = 0;

  // Why the device's state cannot be saved, where something outside this process holds a part of it. To be
  // asked before a snapshot is begun.
  [[nodiscard]] virtual Result<void> check_saveable() const { return {}; }
  // The device's own state (not rings or transport registers, which the transport saves). Called while
  // paused. load() comes before activate(), which must keep what was loaded.
  [[nodiscard]] virtual StateRecord save() const = 0;
  [[nodiscard]] virtual Result<void> load(const StateRecord& record) = 0;

 protected:
  // Finishes or takes back what is in flight: requests under way are waited for, chains kept for later
  // (receive buffers) are given back with Queue::undo_pop(), newest first; back ends and timers are stilled.
  virtual void on_pause() = 0;
  // By default looks at every active queue, as if each had been notified.
  virtual void on_resume();

 private:
  const GuestMemory& memory_;
  Strand strand_;
  bool paused_ = false;
};

// Answers a read of a packed configuration struct at any offset and width.
void read_config_bytes(std::span<const std::uint8_t> config, std::uint64_t offset,
                       std::span<std::uint8_t> data);

}  // namespace wisp
