// Runs a VirtioDevice behind the MMIO transport, driven by register accesses as a guest makes them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "virtio/mmio_transport.h"
#include "virtio/support/fake_guest.h"
#include "virtio/support/fake_queue.h"

namespace wisp::test {

// What a FakeIrqLine counted; outlives the transport that owns the line.
struct IrqCount {
  std::atomic<std::uint64_t> pulses = 0;
};

class FakeIrqLine final : public IrqLine {
 public:
  explicit FakeIrqLine(IrqCount& count) : count_(count) {}
  void pulse() override { ++count_.pulses; }
  void set_level(bool) override {}
  [[nodiscard]] int event_fd() const override { return -1; }

 private:
  IrqCount& count_;
};

class MmioHarness final {
 public:
  using Factory = std::function<std::unique_ptr<VirtioDevice>(EventLoop& loop, const GuestMemory& memory)>;

  explicit MmioHarness(const Factory& factory)
      : MmioHarness(factory, {FakeGuest::kBase, FakeGuest::kDefaultSize}) {}
  MmioHarness(const Factory& factory, FakeGuest::Range ram);
  MmioHarness(const MmioHarness&) = delete;
  MmioHarness& operator=(const MmioHarness&) = delete;
  ~MmioHarness();

  [[nodiscard]] FakeGuest& guest() { return guest_; }
  [[nodiscard]] EventLoop& loop() { return *loop_; }
  [[nodiscard]] MmioTransport& transport() { return *transport_; }
  [[nodiscard]] VirtioDevice& device() { return transport_->device(); }
  [[nodiscard]] std::uint64_t pulses() const { return irq_.pulses; }
  // Bytes logged so far.
  [[nodiscard]] std::uint64_t logged() const;
  // Another device of the same kind behind another transport, on the same guest memory: what a restore loads.
  [[nodiscard]] std::shared_ptr<MmioTransport> make_twin();

  [[nodiscard]] std::uint32_t read(std::uint64_t offset);
  void write(std::uint64_t offset, std::uint32_t value);
  [[nodiscard]] std::uint64_t offered_features();
  [[nodiscard]] std::uint16_t queue_count() const { return queue_count_; }

  struct Setup {
    std::uint64_t without_features = 0;  // offered features that the driver does not take
    std::uint16_t queue_size = 16;       // cut to each queue's maximum
  };
  // The driver's initialisation (3.1.1) with new rings for all queues; returns the status read back.
  std::uint32_t start(const Setup& setup);
  std::uint32_t start() { return start(Setup{}); }
  // The steps of it.
  void negotiate(std::uint64_t features);
  void place_queue(std::uint16_t index, const QueueConfig& config, bool ready = true);
  [[nodiscard]] FakeQueue& queue(std::uint16_t index) { return *queues_.at(index); }
  // Lays out new rings, or zeroes those of the same shape.
  void make_queues(std::uint16_t size, bool event_idx);
  // Writes QueueNotify.
  void kick(std::uint16_t queue) { write(virtio_mmio::kQueueNotify, queue); }
  void pump(int rounds = 8);
  [[nodiscard]] bool broken() { return (read(virtio_mmio::kStatus) & kVirtioStatusNeedsReset) != 0; }

 private:
  [[nodiscard]] std::shared_ptr<MmioTransport> make_transport();
  FakeGuest guest_;
  std::unique_ptr<EventLoop> loop_;
  SystemClock clock_;
  UniqueFd log_fd_;
  Log log_;
  Factory factory_;
  IrqCount irq_;
  std::shared_ptr<MmioTransport> transport_;
  std::uint16_t queue_count_ = 0;
  std::vector<std::unique_ptr<FakeQueue>> queues_;
  std::uint16_t queues_size_ = 0;
  bool queues_event_idx_ = false;
};

}  // namespace wisp::test
