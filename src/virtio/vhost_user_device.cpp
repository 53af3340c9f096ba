#include "virtio/vhost_user_device.h"

#include <utility>

namespace wisp {
namespace {

constexpr std::uint32_t kConnectionEvents = EPOLLIN | EPOLLRDHUP;
constexpr std::uint32_t kStateVersion = 1;

}  // namespace

// While an answer is awaited, it is not the event loop's to look at: the loop would only wait for the strand.
class VhostUserDevice::QuietConnection final {
 public:
  explicit QuietConnection(Watch& watch) : watch_(watch) {
    if (watch_.active()) {
      watch_.set_events(0);
    }
  }
  QuietConnection(const QuietConnection&) = delete;
  QuietConnection& operator=(const QuietConnection&) = delete;
  ~QuietConnection() {
    if (watch_.active()) {
      watch_.set_events(kConnectionEvents);
    }
  }

 private:
  Watch& watch_;
};

VhostUserDevice::VhostUserDevice(EventLoop& loop, const GuestMemory& memory, std::string id,
                                 std::uint64_t device_features, std::vector<std::uint16_t> queue_sizes,
                                 std::unique_ptr<VhostUser> vhost, Log& log, const Clock& clock)
    : VirtioDevice(loop, memory),
      id_(std::move(id)),
      device_features_(device_features),
      queue_sizes_(std::move(queue_sizes)),
      vhost_(std::move(vhost)),
      log_(log),
      log_gate_(clock),
      queues_(queue_sizes_.size()) {}

VhostUserDevice::~VhostUserDevice() {
  const std::lock_guard lock(strand().mutex());
  reset();
  connection_watch_.stop();
}

Result<void> VhostUserDevice::watch_connection() {
  WISP_ASSIGN(connection_watch_,
              strand().watch(vhost_->fd(), kConnectionEvents, [this](std::uint32_t) { connection_ready(); }));
  return {};
}

Result<void> VhostUserDevice::activate(VirtioActivation activation) {
  WISP_ASSERT(activation.queues.size() == queue_sizes_.size());
  interrupts_ = activation.interrupts;
  negotiated_ = activation.features;
  queues_ = std::move(activation.queues);
  kick_fds_ = std::move(activation.kick_fds);
  if (!paused()) {
    WISP_TRY(start());
  }
  return {};
}

Result<std::vector<VhostUserQueue>> VhostUserDevice::running_queues() {
  std::vector<VhostUserQueue> queues;
  for (std::uint16_t i = 0; std::size_t{i} < queues_.size(); ++i) {
    // A driver may leave queues out, as Linux does where it has fewer CPUs.
    if (queues_[i]) {
      WISP_ASSIGN(const int call_fd, interrupts_->call_fd(i));
      queues.push_back({.index = i,
                        .queue = &*queues_[i],
                        .kick_fd = kick_fds_.at(i),
                        .call_fd = call_fd,
                        .error_fd = error_.get()});
    }
  }
  return queues;
}

Result<void> VhostUserDevice::start() {
  // A new one each time, as the peer can do what it likes to one that it was given.
  WISP_ASSIGN(error_, make_eventfd());
  WISP_ASSIGN(error_watch_, strand().watch(error_.get(), EPOLLIN, [this](std::uint32_t) { queue_broken(); }));
  WISP_ASSIGN(const auto queues, running_queues());
  const QuietConnection quiet(connection_watch_);
  running_ = true;
  if (Result<void> started = vhost_->start(negotiated_, memory(), queues); !started) {
    connection_lost(started.error());
    return started;
  }
  // The driver may have filled the queues while nobody listened.
  for (const VhostUserQueue& queue : queues) {
    signal_shared_eventfd(queue.kick_fd);
  }
  return {};
}

void VhostUserDevice::stop() {
  error_watch_.stop();
  if (!running_) {
    return;
  }
  const QuietConnection quiet(connection_watch_);
  Result<void> stopped;
  if (auto queues = running_queues(); !queues) {
    stopped = std::unexpected(std::move(queues).error());
  } else {
    stopped = vhost_->stop(*queues);
  }
  if (!stopped) {
    connection_lost(stopped.error());
    return;
  }
  running_ = false;
  mark_all_dirty();
}

void VhostUserDevice::notify(std::uint16_t queue) {
  if (running_ && queue < kick_fds_.size()) {
    signal_shared_eventfd(kick_fds_[queue]);
  }
}

void VhostUserDevice::reset() {
  stop();
  for (auto& queue : queues_) {
    queue.reset();
  }
  kick_fds_.clear();
  interrupts_ = nullptr;
}

const Queue* VhostUserDevice::queue(std::uint16_t index) const {
  return index < queues_.size() && queues_[index] ? &*queues_[index] : nullptr;
}

void VhostUserDevice::on_pause() {
  stop();
}

void VhostUserDevice::on_resume() {
  if (interrupts_ == nullptr) {
    return;
  }
  const Result<void> started = start();
  if (!started) {
    if (log_gate_.open()) {
      log_.error("device {}: cannot go on after a pause: {}", id_, started.error().message);
    }
    interrupts_->needs_reset();
  }
}

void VhostUserDevice::connection_ready() {
  if (const Result<void> alive = vhost_->check_alive(); !alive) {
    connection_lost(alive.error());
  }
}

void VhostUserDevice::connection_lost(const Error& reason) {
  error_watch_.stop();
  if (std::exchange(running_, false)) {
    mark_all_dirty();
  }
  if (connection_watch_.active()) {  // else it was lost before
    log_.error("device {}: {}; the device is dead until the machine is started anew", id_, reason.message);
    connection_watch_.stop();
    vhost_->close();
  }
  // One that is paused says so when it is to go on.
  if (interrupts_ != nullptr && !paused()) {
    interrupts_->needs_reset();
  }
}

void VhostUserDevice::queue_broken() {
  error_watch_.stop();
  if (log_gate_.open()) {
    log_.warning("device {}: the driver broke the rules of a queue", id_);
  }
  if (interrupts_ != nullptr) {
    interrupts_->needs_reset();
  }
}

void VhostUserDevice::mark_all_dirty() {
  for (const GuestMemoryBlock& block : memory().blocks()) {
    memory().mark_dirty(block.gpa, block.size);
  }
}

Result<void> VhostUserDevice::check_saveable() const {
  return fail(
      "device {}: a snapshot cannot hold what its vhost-user back end keeps; remove the device, or start the "
      "machine without it",
      id_);
}

StateRecord VhostUserDevice::save() const {
  return {.name = std::string(name()), .version = kStateVersion, .bytes = {}};
}

Result<void> VhostUserDevice::load(const StateRecord& /*record*/) {
  return fail("device {}: a vhost-user back end cannot take up from a snapshot", id_);
}

}  // namespace wisp
