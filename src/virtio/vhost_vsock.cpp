#include "virtio/vhost_vsock.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/bytes.h"
#include "base/checked.h"
#include "virtio/vhost_abi.h"
#include "virtio/vsock_packet.h"

namespace wisp {
namespace {

constexpr const char* kPath = "/dev/vhost-vsock";
constexpr std::uint64_t kSeqPacket = 1ULL << 1;  // 5.10.3
constexpr std::uint32_t kStateVersion = 1;
constexpr std::array<std::uint8_t, 4> kTransportReset{0, 0, 0, 0};
constexpr int kEventsPerCall = 64;

constexpr std::array kSpecs{
    PropertySpec{.name = "guest-cid",
                 .kind = PropertyKind::kUint,
                 .help = "context id of the guest",
                 .required = true,
                 .minimum = kVsockMinGuestCid,
                 .maximum = kVsockMaxGuestCid},
    PropertySpec{.name = "vhostfd", .help = "descriptor of an opened /dev/vhost-vsock"},
};

}  // namespace

constinit const std::span<const PropertySpec> kVhostVsockProperties = kSpecs;

Result<VhostVsockOptions> parse_vhost_vsock_options(std::string id, const PropertySet& properties) {
  VhostVsockOptions options;
  options.guest_cid = properties.get_uint("guest-cid", options.guest_cid);
  if (const auto text = properties.find_string("vhostfd")) {
    const auto number = parse_uint(*text);
    const auto fd = number ? checked_cast<int>(*number) : std::nullopt;
    if (!fd) {
      return fail("vhostfd={} is not a descriptor number", *text);
    }
    options.vhost_fd = *fd;
  }
  options.id = std::move(id);
  return options;
}

Result<std::unique_ptr<VhostVsock>> VhostVsock::create(EventLoop& loop, const GuestMemory& memory,
                                                       const VhostVsockOptions& options, Log& log,
                                                       const Clock& clock) {
  UniqueFd fd(options.vhost_fd);
  if (fd.valid()) {
    (void)::fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
  } else {
    fd.reset(::open(kPath, O_RDWR | O_CLOEXEC));
    if (!fd.valid()) {
      return fail_errno(errno,
                        "device {}: cannot open {} (load the module: modprobe vhost_vsock, or use "
                        "virtio-vsock-device with path=)",
                        options.id, kPath);
    }
  }
  auto vhost = VhostKernel::create(std::move(fd), kPath);
  if (!vhost) {
    return with_context("device " + options.id, vhost.error());
  }
  std::uint64_t cid = options.guest_cid;
  const Result<void> set = (*vhost)->call(VHOST_VSOCK_SET_GUEST_CID, &cid, "VHOST_VSOCK_SET_GUEST_CID");
  if (!set) {
    return fail("device {}: guest-cid={} is in use by another machine, or not allowed ({})", options.id,
                options.guest_cid, set.error().message);
  }
  std::unique_ptr<VhostVsock> device(new VhostVsock(loop, memory, options, *std::move(vhost), log, clock));
  WISP_ASSIGN(device->error_, make_eventfd());
  return device;
}

VhostVsock::~VhostVsock() {
  const std::lock_guard lock(strand().mutex());
  reset();
}

std::uint64_t VhostVsock::features() const {
  return vhost_->features() & kSeqPacket;
}

void VhostVsock::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::array<std::uint8_t, 8> config{};
  store_le(config.data(), options_.guest_cid);
  read_config_bytes(config, offset, data);
}

void VhostVsock::write_config(std::uint64_t /*offset*/, std::span<const std::uint8_t> /*data*/) {}

Result<void> VhostVsock::activate(VirtioActivation activation) {
  interrupts_ = activation.interrupts;
  negotiated_ = activation.features;
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    queues_[i] = std::move(activation.queues.at(i));
    kick_fds_[i] = activation.kick_fds.at(i);
  }
  WISP_ASSIGN(event_watch_, strand().watch(kick_fds_[kEvent], EPOLLIN, [this](std::uint32_t) {
    drain_eventfd(kick_fds_[kEvent]);
    process_event();
  }));
  if (!paused()) {
    WISP_TRY(start());
  }
  return {};
}

Result<void> VhostVsock::start() {
  if (!queues_[0] || !queues_[1]) {
    return fail("the driver left a data queue of the vsock device out");
  }
  drain_eventfd(error_.get());
  WISP_ASSIGN(error_watch_, strand().watch(error_.get(), EPOLLIN, [this](std::uint32_t) {
    drain_eventfd(error_.get());
    queue_broken();
  }));
  WISP_TRY(vhost_->configure(negotiated_, memory()));
  running_ = true;
  for (std::uint32_t i = 0; i < kDataQueues; ++i) {
    WISP_ASSIGN(const int call_fd, interrupts_->call_fd(static_cast<std::uint16_t>(i)));
    WISP_TRY(vhost_->start_queue(i, *queues_[i], kick_fds_[i], call_fd, error_.get()));
  }
  int on = 1;
  WISP_TRY(vhost_->call(VHOST_VSOCK_SET_RUNNING, &on, "VHOST_VSOCK_SET_RUNNING"));
  // The driver may have filled the queues while nobody listened.
  for (std::uint32_t i = 0; i < kDataQueues; ++i) {
    signal_eventfd(kick_fds_[i]);
  }
  process_event();
  return {};
}

void VhostVsock::stop() {
  error_watch_.stop();
  if (!std::exchange(running_, false)) {
    return;
  }
  int off = 0;
  Result<void> stopped = vhost_->call(VHOST_VSOCK_SET_RUNNING, &off, "VHOST_VSOCK_SET_RUNNING");
  for (std::uint32_t i = 0; stopped && i < kDataQueues; ++i) {
    stopped = vhost_->stop_queue(i, *queues_[i]);
  }
  if (!stopped && log_gate_.open()) {
    log_.error("device {}: {}", options_.id, stopped.error().message);
  }
  vhost_->collect_dirty(memory());
}

void VhostVsock::notify(std::uint16_t queue) {
  if (queue == kEvent && interrupts_ != nullptr) {
    process_event();
  }
}

void VhostVsock::reset() {
  event_watch_.stop();
  stop();
  for (auto& queue : queues_) {
    queue.reset();
  }
  interrupts_ = nullptr;
  transport_reset_ = false;
}

const Queue* VhostVsock::queue(std::uint16_t index) const {
  return index < queues_.size() && queues_[index] ? &*queues_[index] : nullptr;
}

void VhostVsock::on_pause() {
  stop();
}

void VhostVsock::on_resume() {
  if (interrupts_ == nullptr) {
    return;
  }
  const Result<void> started = start();
  if (!started) {
    log_.error("device {}: cannot go on after a pause: {}", options_.id, started.error().message);
    interrupts_->needs_reset();
  }
}

void VhostVsock::queue_broken() {
  if (log_gate_.open()) {
    log_.warning("device {}: the driver broke the rules of a queue", options_.id);
  }
  if (interrupts_ != nullptr) {
    interrupts_->needs_reset();
  }
}

void VhostVsock::process_event() {
  std::optional<Queue>& events = queues_[kEvent];
  if (!events || events->broken() || paused() || !transport_reset_) {
    return;
  }
  DescriptorChain chain;
  for (int tries = 0; transport_reset_ && tries < kEventsPerCall; ++tries) {
    const PopResult popped = events->pop(chain);
    if (popped == PopResult::kBroken) {
      queue_broken();
      return;
    }
    if (popped == PopResult::kEmpty) {
      if (!events->enable_notifications()) {
        break;
      }
      continue;
    }
    const std::size_t written = chain.write(0, kTransportReset);
    events->push(chain, static_cast<std::uint32_t>(written));
    transport_reset_ = written != kTransportReset.size();
  }
  if (events->take_interrupt_wish()) {
    interrupts_->queue_used(kEvent);
  }
}

StateRecord VhostVsock::save() const {
  return {.name = "virtio-vsock", .version = kStateVersion, .bytes = {}};
}

Result<void> VhostVsock::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kStateVersion));
  if (!record.bytes.empty()) {
    return fail("saved state of virtio-vsock has {} bytes too many", record.bytes.size());
  }
  transport_reset_ = true;
  return {};
}

}  // namespace wisp
