#include "virtio/vsock.h"

#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/unique_fd.h"

namespace wisp {
namespace {

constexpr int kPacketsPerCall = 64;
constexpr std::uint32_t kStateVersion = 1;
// 5.10.6.7
constexpr std::array<std::uint8_t, 4> kTransportReset{0, 0, 0, 0};

constexpr std::array kSpecs{
    PropertySpec{.name = "guest-cid",
                 .kind = PropertyKind::kUint,
                 .help = "context id of the guest",
                 .required = true,
                 .minimum = kVsockMinGuestCid,
                 .maximum = kVsockMaxGuestCid},
    PropertySpec{.name = "path",
                 .help = "Unix socket for programs of the host; the guest's port P leads to PATH_P",
                 .required = true,
                 .maximum = VsockListener::kMaxPathSize},
    PropertySpec{.name = "iothread", .help = "id of the -object iothread that serves the device"},
};

}  // namespace

constinit const std::span<const PropertySpec> kVirtioVsockProperties = kSpecs;

Result<VirtioVsockOptions> parse_virtio_vsock_options(std::string id, const PropertySet& properties) {
  VirtioVsockOptions options;
  options.guest_cid = properties.get_uint("guest-cid", options.guest_cid);
  options.path = properties.get_string("path");
  options.id = std::move(id);
  return options;
}

Result<std::unique_ptr<VirtioVsock>> VirtioVsock::create(EventLoop& loop, const GuestMemory& memory,
                                                         const VirtioVsockOptions& options, Log& log,
                                                         const Clock& clock) {
  if (options.guest_cid < kVsockMinGuestCid || options.guest_cid > kVsockMaxGuestCid) {
    return fail("device {}: guest-cid={} is out of range, expected {} to {}", options.id, options.guest_cid,
                kVsockMinGuestCid, kVsockMaxGuestCid);
  }
  std::unique_ptr<VirtioVsock> device(new VirtioVsock(loop, memory, options, log, clock));
  auto mux = VsockMux::create(device->strand(), clock, options.guest_cid, options.path,
                              [raw = device.get()] { raw->process_rx(); });
  if (!mux) {
    return with_context("device " + options.id, mux.error());
  }
  device->mux_ = *std::move(mux);
  return device;
}

VirtioVsock::~VirtioVsock() {
  const std::lock_guard lock(strand().mutex());
  if (mux_ != nullptr) {
    reset();
    mux_.reset();
  }
}

void VirtioVsock::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::array<std::uint8_t, 8> config{};
  store_le(config.data(), options_.guest_cid);
  read_config_bytes(config, offset, data);
}

void VirtioVsock::write_config(std::uint64_t /*offset*/, std::span<const std::uint8_t> /*data*/) {}

Result<void> VirtioVsock::activate(VirtioActivation activation) {
  interrupts_ = activation.interrupts;
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    queues_[i] = std::move(activation.queues.at(i));
    kick_fds_[i] = activation.kick_fds.at(i);
  }
  rx_stalled_ = tx_stalled_ = false;
  mux_->start();
  process_event();
  return {};
}

void VirtioVsock::notify(std::uint16_t queue) {
  if (interrupts_ == nullptr) {
    return;
  }
  switch (queue) {
    case kRx:
      process_rx();
      break;
    case kTx:
      process_tx();
      break;
    case kEvent:
      process_event();
      break;
    default:
      break;
  }
}

void VirtioVsock::reset() {
  mux_->stop();
  for (auto& queue : queues_) {
    queue.reset();
  }
  interrupts_ = nullptr;
  transport_reset_ = false;
}

const Queue* VirtioVsock::queue(std::uint16_t index) const {
  return index < queues_.size() && queues_[index] ? &*queues_[index] : nullptr;
}

void VirtioVsock::on_pause() {
  mux_->hold();
}

void VirtioVsock::on_resume() {
  mux_->unhold();
  VirtioDevice::on_resume();
}

void VirtioVsock::queue_broken(std::uint16_t index) {
  if (log_gate_.open()) {
    log_.warning("device {}: the driver broke the rules of queue {}", options_.id, index);
  }
  // Nothing can be told the driver any more: it must start anew.
  mux_->stop();
  interrupts_->needs_reset();
}

void VirtioVsock::interrupt(std::uint16_t index) {
  if (queues_[index]->take_interrupt_wish()) {
    interrupts_->queue_used(index);
  }
}

void VirtioVsock::process_rx() {
  std::optional<Queue>& rx = queues_[kRx];
  if (!rx || rx->broken() || paused()) {
    return;
  }
  bool stalled = false;
  rx->disable_notifications();
  for (int packets = 0; mux_->has_output() && !stalled; ++packets) {
    if (packets == kPacketsPerCall) {
      signal_eventfd(kick_fds_[kRx]);
      break;
    }
    const PopResult popped = rx->pop(rx_chain_);
    if (popped == PopResult::kBroken) {
      queue_broken(kRx);
      return;
    }
    if (popped == PopResult::kEmpty) {
      // Ask to be told of new buffers, and anew after each look that found some.
      stalled = !rx->enable_notifications();
      continue;
    }
    if (rx_chain_.writable_size() < kVsockHeaderSize) {
      rx->push(rx_chain_, 0);
      continue;
    }
    const std::uint32_t size = mux_->produce(rx_chain_);
    if (size == 0) {
      rx->undo_pop(rx_chain_);
      break;
    }
    rx->push(rx_chain_, size);
  }
  if (stalled && !std::exchange(rx_stalled_, true)) {
    mux_->settle();
  } else if (!stalled) {
    rx_stalled_ = false;
  }
  interrupt(kRx);
  // Answers went out: there is room for more of them.
  if (tx_stalled_ && mux_->can_handle()) {
    tx_stalled_ = false;
    signal_eventfd(kick_fds_[kTx]);
  }
}

void VirtioVsock::process_tx() {
  std::optional<Queue>& tx = queues_[kTx];
  if (!tx || tx->broken() || paused()) {
    return;
  }
  tx->disable_notifications();
  for (int packets = 0;; ++packets) {
    if (!mux_->can_handle()) {
      tx_stalled_ = true;
      break;
    }
    if (packets == kPacketsPerCall) {
      signal_eventfd(kick_fds_[kTx]);
      break;
    }
    const PopResult popped = tx->pop(chain_);
    if (popped == PopResult::kBroken) {
      queue_broken(kTx);
      return;
    }
    if (popped == PopResult::kEmpty) {
      if (tx->enable_notifications()) {
        tx->disable_notifications();
        continue;
      }
      break;
    }
    std::array<std::uint8_t, kVsockHeaderSize> bytes{};
    if (chain_.read(0, bytes) == bytes.size()) {
      const VsockHeader header = VsockHeader::parse(bytes);
      if (header.length <= chain_.readable_size() - kVsockHeaderSize) {
        mux_->handle(header, chain_);
      }
    }
    tx->push(chain_, 0);
  }
  interrupt(kTx);
  process_rx();
}

void VirtioVsock::process_event() {
  std::optional<Queue>& events = queues_[kEvent];
  if (!events || events->broken() || paused() || !transport_reset_) {
    return;
  }
  for (int tries = 0; transport_reset_ && tries < kPacketsPerCall; ++tries) {
    const PopResult popped = events->pop(chain_);
    if (popped == PopResult::kBroken) {
      queue_broken(kEvent);
      return;
    }
    if (popped == PopResult::kEmpty) {
      if (!events->enable_notifications()) {
        break;
      }
      continue;
    }
    const std::size_t written = chain_.write(0, kTransportReset);
    events->push(chain_, static_cast<std::uint32_t>(written));
    transport_reset_ = written != kTransportReset.size();
  }
  interrupt(kEvent);
}

StateRecord VirtioVsock::save() const {
  return {.name = "virtio-vsock", .version = kStateVersion, .bytes = {}};
}

Result<void> VirtioVsock::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kStateVersion));
  if (!record.bytes.empty()) {
    return fail("saved state of virtio-vsock has {} bytes too many", record.bytes.size());
  }
  transport_reset_ = true;
  return {};
}

}  // namespace wisp
