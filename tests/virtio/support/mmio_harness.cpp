#include "virtio/support/mmio_harness.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>

namespace wisp::test {

using namespace virtio_mmio;

MmioHarness::MmioHarness(const Factory& factory, FakeGuest::Range ram)
    : guest_({ram}),
      loop_(EventLoop::create().value()),
      log_fd_(::memfd_create("log", MFD_CLOEXEC)),
      log_(log_fd_.get(), LogLevel::kWarning),
      factory_(factory),
      transport_(make_transport()),
      queue_count_(static_cast<std::uint16_t>(transport_->device().queue_sizes().size())) {}

MmioHarness::~MmioHarness() {
  transport_.reset();
}

std::shared_ptr<MmioTransport> MmioHarness::make_transport() {
  return MmioTransport::create(factory_(*loop_, guest_.memory()), std::make_unique<FakeIrqLine>(irq_), log_,
                               clock_)
      .value();
}

std::shared_ptr<MmioTransport> MmioHarness::make_twin() {
  return make_transport();
}

std::uint64_t MmioHarness::logged() const {
  struct stat status{};
  WISP_ASSERT(::fstat(log_fd_.get(), &status) == 0);
  return static_cast<std::uint64_t>(status.st_size);
}

std::uint32_t MmioHarness::read(std::uint64_t offset) {
  std::uint32_t value = 0;
  transport_->io_read(offset, std::span(reinterpret_cast<std::uint8_t*>(&value), sizeof value));
  return value;
}

void MmioHarness::write(std::uint64_t offset, std::uint32_t value) {
  transport_->io_write(offset, std::span(reinterpret_cast<const std::uint8_t*>(&value), sizeof value));
}

std::uint64_t MmioHarness::offered_features() {
  write(kDeviceFeaturesSel, 1);
  const std::uint64_t high = read(kDeviceFeatures);
  write(kDeviceFeaturesSel, 0);
  return high << 32 | read(kDeviceFeatures);
}

void MmioHarness::negotiate(std::uint64_t features) {
  write(kStatus, 0);
  write(kStatus, kVirtioStatusAcknowledge);
  write(kStatus, kVirtioStatusAcknowledge | kVirtioStatusDriver);
  write(kDriverFeaturesSel, 0);
  write(kDriverFeatures, static_cast<std::uint32_t>(features));
  write(kDriverFeaturesSel, 1);
  write(kDriverFeatures, static_cast<std::uint32_t>(features >> 32));
  write(kStatus, read(kStatus) | kVirtioStatusFeaturesOk);
}

void MmioHarness::place_queue(std::uint16_t index, const QueueConfig& config, bool ready) {
  write(kQueueSel, index);
  write(kQueueNum, config.size);
  write(kQueueDescLow, static_cast<std::uint32_t>(config.descriptor_table));
  write(kQueueDescHigh, static_cast<std::uint32_t>(config.descriptor_table >> 32));
  write(kQueueDriverLow, static_cast<std::uint32_t>(config.available_ring));
  write(kQueueDriverHigh, static_cast<std::uint32_t>(config.available_ring >> 32));
  write(kQueueDeviceLow, static_cast<std::uint32_t>(config.used_ring));
  write(kQueueDeviceHigh, static_cast<std::uint32_t>(config.used_ring >> 32));
  if (ready) {
    write(kQueueReady, 1);
  }
}

void MmioHarness::make_queues(std::uint16_t size, bool event_idx) {
  if (!queues_.empty() && queues_size_ == size && queues_event_idx_ == event_idx) {
    for (const auto& queue : queues_) {
      queue->reset();
    }
    return;
  }
  queues_.clear();
  queues_size_ = size;
  queues_event_idx_ = event_idx;
  for (std::uint16_t i = 0; i < queue_count_; ++i) {
    queues_.push_back(
        std::make_unique<FakeQueue>(guest_, std::min(size, device().queue_sizes()[i]), event_idx));
  }
}

std::uint32_t MmioHarness::start(const Setup& setup) {
  const std::uint64_t features = offered_features() & ~setup.without_features;
  negotiate(features);
  make_queues(setup.queue_size, (features & kVirtioFeatureEventIdx) != 0);
  for (std::uint16_t i = 0; i < queue_count_; ++i) {
    place_queue(i, queues_[i]->config());
  }
  write(kStatus, read(kStatus) | kVirtioStatusDriverOk);
  return read(kStatus);
}

void MmioHarness::pump(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    loop_->run_once(0);
  }
}

}  // namespace wisp::test
