#include "virtio/net.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "base/bytes.h"
#include "virtio/vhost_abi.h"

namespace wisp {
namespace {

// 5.1.3
constexpr std::uint64_t kChecksum = 1ULL << 0;
constexpr std::uint64_t kGuestChecksum = 1ULL << 1;
constexpr std::uint64_t kControlGuestOffloads = 1ULL << 2;
constexpr std::uint64_t kMtu = 1ULL << 3;
constexpr std::uint64_t kMac = 1ULL << 5;
constexpr std::uint64_t kGuestTso4 = 1ULL << 7;
constexpr std::uint64_t kGuestTso6 = 1ULL << 8;
constexpr std::uint64_t kGuestEcn = 1ULL << 9;
constexpr std::uint64_t kGuestUfo = 1ULL << 10;
constexpr std::uint64_t kHostTso4 = 1ULL << 11;
constexpr std::uint64_t kHostTso6 = 1ULL << 12;
constexpr std::uint64_t kHostEcn = 1ULL << 13;
constexpr std::uint64_t kHostUfo = 1ULL << 14;
constexpr std::uint64_t kMergeableBuffers = 1ULL << 15;
constexpr std::uint64_t kStatus = 1ULL << 16;
constexpr std::uint64_t kControlQueue = 1ULL << 17;
constexpr std::uint64_t kControlRx = 1ULL << 18;
constexpr std::uint64_t kMultiQueue = 1ULL << 22;
constexpr std::uint64_t kControlMacAddress = 1ULL << 23;

constexpr std::uint64_t kGuestOffloads = kGuestChecksum | kGuestTso4 | kGuestTso6 | kGuestEcn | kGuestUfo;

// 5.1.6.5
constexpr std::uint8_t kOk = 0;
constexpr std::uint8_t kError = 1;
constexpr std::uint8_t kClassRx = 0;
constexpr std::uint8_t kLastRxCommand =
    1;  // promiscuous, all multicast; the rest needs a feature not offered
constexpr std::uint8_t kClassMac = 1;
constexpr std::uint8_t kMacTableSet = 0;
constexpr std::uint8_t kMacAddressSet = 1;
constexpr std::uint8_t kClassMultiQueue = 4;
constexpr std::uint8_t kMultiQueuePairsSet = 0;
constexpr std::uint8_t kClassGuestOffloads = 5;
constexpr std::uint8_t kGuestOffloadsSet = 0;

constexpr std::uint16_t kLinkUp = 1;
constexpr std::uint16_t kControlQueueSize = 64;
constexpr int kCommandsPerCall = 64;
constexpr std::uint16_t kMinMtu = 68;
constexpr std::uint32_t kStateVersion = 1;

constexpr std::array kSpecs{
    PropertySpec{.name = "netdev", .help = "id of the -netdev to use", .required = true},
    PropertySpec{
        .name = "mac", .kind = PropertyKind::kMac, .help = "address of the guest", .default_text = "random"},
    PropertySpec{.name = "mq",
                 .kind = PropertyKind::kBool,
                 .help = "offer all queue pairs of the netdev",
                 .default_text = "on"},
    PropertySpec{.name = "queue-size",
                 .kind = PropertyKind::kUint,
                 .help = "entries of each queue, a power of two",
                 .default_text = "256",
                 .minimum = 16,
                 .maximum = kMaxQueueSize},
    PropertySpec{.name = "host_mtu",
                 .kind = PropertyKind::kUint,
                 .help = "MTU told to the guest",
                 .minimum = kMinMtu,
                 .maximum = 65535},
    PropertySpec{.name = "iothread", .help = "id of the -object iothread that serves the device"},
    PropertySpec{.name = "rx-iothread",
                 .help = "accepted for compatibility",
                 .ignored_because = "one thread serves both directions: use iothread="},
    PropertySpec{.name = "tx-iothread",
                 .help = "accepted for compatibility",
                 .ignored_because = "one thread serves both directions: use iothread="},
};

std::uint64_t guest_bits(const NetOffloads& offloads) {
  std::uint64_t bits = offloads.checksum ? kGuestChecksum : 0;
  bits |= offloads.tso4 ? kGuestTso4 : 0;
  bits |= offloads.tso6 ? kGuestTso6 : 0;
  bits |= offloads.ecn ? kGuestEcn : 0;
  bits |= offloads.ufo ? kGuestUfo : 0;
  return bits;
}

std::uint64_t host_bits(const NetOffloads& offloads) {
  std::uint64_t bits = offloads.checksum ? kChecksum : 0;
  bits |= offloads.tso4 ? kHostTso4 : 0;
  bits |= offloads.tso6 ? kHostTso6 : 0;
  bits |= offloads.ecn ? kHostEcn : 0;
  bits |= offloads.ufo ? kHostUfo : 0;
  return bits;
}

NetOffloads from_guest_bits(std::uint64_t bits) {
  return {.checksum = (bits & kGuestChecksum) != 0,
          .tso4 = (bits & kGuestTso4) != 0,
          .tso6 = (bits & kGuestTso6) != 0,
          .ecn = (bits & kGuestEcn) != 0,
          .ufo = (bits & kGuestUfo) != 0};
}

// Segmentation needs checksums left to the other side (5.1.3.1), whatever a driver negotiates.
NetOffloads from_host_bits(std::uint64_t bits) {
  const bool checksum = (bits & kChecksum) != 0;
  return {.checksum = checksum,
          .tso4 = checksum && (bits & kHostTso4) != 0,
          .tso6 = checksum && (bits & kHostTso6) != 0,
          .ecn = checksum && (bits & kHostEcn) != 0,
          .ufo = checksum && (bits & kHostUfo) != 0};
}

Result<MacAddress> random_mac(EntropySource& entropy) {
  MacAddress mac{0x52, 0x54, 0x00};
  WISP_TRY(entropy.fill(std::span(mac).subspan(3)));
  return mac;
}

}  // namespace

constinit const std::span<const PropertySpec> kVirtioNetProperties = kSpecs;

Result<MacAddress> parse_mac(std::string_view text) {
  const auto bytes = parse_mac_bytes(text);
  if (!bytes) {
    return fail("mac={} is not a MAC address such as 52:54:00:12:34:56", text);
  }
  const MacAddress& mac = *bytes;
  if ((mac[0] & 1) != 0) {
    return fail("mac={} is a group address: the first byte must be even", text);
  }
  if (mac == MacAddress{}) {
    return fail("mac={} is the zero address, no card can have it", text);
  }
  return mac;
}

Result<VirtioNetOptions> parse_virtio_net_options(std::string id, const PropertySet& properties) {
  VirtioNetOptions options;
  if (const auto mac = properties.find_string("mac")) {
    WISP_ASSIGN(options.mac, parse_mac(*mac));
  }
  options.mq = properties.get_bool("mq", true);
  options.queue_size = static_cast<std::uint16_t>(properties.get_uint("queue-size", options.queue_size));
  if (!std::has_single_bit(options.queue_size)) {
    return fail("queue-size={} is not a power of two", options.queue_size);
  }
  options.host_mtu = static_cast<std::uint16_t>(properties.get_uint("host_mtu", 0));
  options.id = std::move(id);
  return options;
}

VirtioNet::VirtioNet(EventLoop& loop, const GuestMemory& memory, VirtioNetOptions options,
                     std::unique_ptr<NetBackend> backend, Log& log, const Clock& clock)
    : VirtioDevice(loop, memory),
      options_(std::move(options)),
      birth_mac_(*options_.mac),
      backend_(std::move(backend)),
      log_(log),
      log_gate_(clock),
      max_pairs_(options_.mq ? backend_->queue_pairs() : std::uint16_t{1}) {
  state_.mac = birth_mac_;
  queue_sizes_.assign(std::size_t{2} * max_pairs_, options_.queue_size);
  queue_sizes_.push_back(kControlQueueSize);
  for (std::uint16_t i = 0; i < max_pairs_; ++i) {
    pairs_.push_back(
        std::make_unique<NetQueuePair>(static_cast<NetPairOwner&>(*this), strand(), *backend_, counters_, i));
  }
}

Result<std::unique_ptr<VirtioNet>> VirtioNet::create(EventLoop& loop, const GuestMemory& memory,
                                                     const VirtioNetOptions& options, Netdev netdev,
                                                     EntropySource& entropy, Log& log, const Clock& clock) {
  VirtioNetOptions settled = options;
  if (!settled.mac) {
    WISP_ASSIGN(settled.mac, random_mac(entropy));
  }
  std::unique_ptr<VirtioNet> device(
      new VirtioNet(loop, memory, std::move(settled), std::move(netdev.backend), log, clock));
  if (!netdev.vhost_fds.empty()) {
    WISP_TRY(device->take_vhost(std::move(netdev.vhost_fds)));
  }
  device->settle_features();
  return device;
}

VirtioNet::~VirtioNet() {
  const std::lock_guard lock(strand().mutex());
  reset();
}

void VirtioNet::settle_features() {
  features_ = kMac | kStatus | kControlQueue | kControlRx | kControlMacAddress | kMergeableBuffers;
  const NetOffloads offloads = backend_->offloads();
  features_ |= guest_bits(offloads) | host_bits(offloads);
  features_ |= offloads.checksum ? kControlGuestOffloads : 0;
  features_ |= options_.host_mtu != 0 ? kMtu : 0;
  features_ |= max_pairs_ > 1 ? kMultiQueue : 0;
  for (const auto& vhost : vhosts_) {
    if ((vhost->features() & kMergeableBuffers) == 0) {
      features_ &= ~kMergeableBuffers;
    }
  }
}

// 5.1.4
void VirtioNet::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::array<std::uint8_t, 12> config{};
  std::ranges::copy(state_.mac, config.begin());
  store_le(&config[6], link_up() ? kLinkUp : std::uint16_t{0});
  store_le(&config[8], max_pairs_);
  store_le(&config[10], options_.host_mtu);
  read_config_bytes(config, offset, data);
}

void VirtioNet::write_config(std::uint64_t /*offset*/, std::span<const std::uint8_t> /*data*/) {
  // Nothing is writable: the address is set by the control queue.
}

Result<void> VirtioNet::activate(VirtioActivation activation) {
  interrupts_ = activation.interrupts;
  negotiated_ = activation.features;
  kick_fds_ = std::move(activation.kick_fds);
  const bool multi_queue = (negotiated_ & kMultiQueue) != 0;
  control_index_ = multi_queue ? static_cast<std::uint16_t>(2 * max_pairs_) : std::uint16_t{2};
  if ((negotiated_ & kControlQueue) != 0) {
    control_ = std::move(activation.queues.at(control_index_));
    control_kick_ = kick_fds_.at(control_index_);
  }
  if (!std::exchange(state_loaded_, false)) {
    state_.active_pairs = 1;
    state_.guest_offloads = negotiated_ & kGuestOffloads;
  }
  state_.guest_offloads &= negotiated_ & kGuestOffloads;
  state_.active_pairs = multi_queue ? std::min(state_.active_pairs, max_pairs_) : std::uint16_t{1};

  const std::uint16_t pairs = multi_queue ? max_pairs_ : std::uint16_t{1};
  if (!vhosts_.empty()) {
    vhost_queues_.clear();
    for (std::size_t i = 0; i < std::size_t{2} * pairs; ++i) {
      vhost_queues_.push_back(std::move(activation.queues.at(i)));
    }
    if (control_) {
      WISP_ASSIGN(control_watch_, strand().watch(control_kick_, EPOLLIN, [this](std::uint32_t) {
        drain_eventfd(control_kick_);
        process_control();
      }));
    }
    if (!paused()) {
      WISP_TRY(start_vhost());
    }
    return apply_state();
  }
  const NetQueuePair::Negotiated negotiated{.mergeable = (negotiated_ & kMergeableBuffers) != 0,
                                            .transmit = from_host_bits(negotiated_)};
  for (std::size_t i = 0; i < pairs; ++i) {
    WISP_TRY(pairs_[i]->start(std::move(activation.queues.at(2 * i)),
                              std::move(activation.queues.at(2 * i + 1)), kick_fds_.at(2 * i),
                              kick_fds_.at(2 * i + 1), *interrupts_, negotiated));
  }
  return apply_state();
}

Result<void> VirtioNet::apply_state() {
  if (backend_closed_) {
    return {};
  }
  WISP_TRY(backend_->set_offloads(from_guest_bits(state_.guest_offloads)));
  WISP_TRY(backend_->set_active_pairs(state_.active_pairs));
  for (std::size_t i = 0; i < pairs_.size(); ++i) {
    pairs_[i]->set_receiving(vhosts_.empty() && i < state_.active_pairs);
  }
  return {};
}

void VirtioNet::notify(std::uint16_t queue) {
  if (interrupts_ == nullptr) {
    return;
  }
  if (queue == control_index_) {
    process_control();
  } else if (vhosts_.empty() && queue < 2 * pairs_.size()) {
    NetQueuePair& pair = *pairs_[queue / 2];
    if (queue % 2 == 0) {
      pair.process_rx();
    } else {
      pair.process_tx();
    }
  }
}

void VirtioNet::reset() {
  control_watch_.stop();
  stop_vhost();
  vhost_queues_.clear();
  for (const auto& pair : pairs_) {
    pair->stop();
  }
  control_.reset();
  if (std::exchange(interrupts_, nullptr) != nullptr && !backend_closed_) {
    // What comes before the next driver is there must suit any driver.
    const Result<void> plain = backend_->set_offloads({});
    if (!plain && log_gate_.open()) {
      log_.error("device {}: {}", options_.id, plain.error().message);
    }
  }
  negotiated_ = 0;
  state_ = {.mac = birth_mac_};
  state_loaded_ = false;
}

const Queue* VirtioNet::queue(std::uint16_t index) const {
  if (interrupts_ == nullptr) {
    return nullptr;
  }
  if (control_ && index == control_index_) {
    return &*control_;
  }
  if (!vhosts_.empty()) {
    return index < vhost_queues_.size() && vhost_queues_[index] ? &*vhost_queues_[index] : nullptr;
  }
  if (index >= 2 * pairs_.size()) {
    return nullptr;
  }
  return index % 2 == 0 ? pairs_[index / 2]->rx() : pairs_[index / 2]->tx();
}

void VirtioNet::on_pause() {
  stop_vhost();
  for (const auto& pair : pairs_) {
    pair->hold();
  }
}

void VirtioNet::on_resume() {
  for (const auto& pair : pairs_) {
    pair->unhold();
  }
  if (!vhosts_.empty()) {
    if (interrupts_ == nullptr) {
      return;
    }
    const Result<void> started = start_vhost();
    if (!started) {
      log_.error("device {}: cannot go on after a pause: {}", options_.id, started.error().message);
      interrupts_->needs_reset();
      return;
    }
    process_control();
    return;
  }
  VirtioDevice::on_resume();
}

void VirtioNet::set_link(bool up) {
  const bool before = link_up();
  link_up_ = up;
  for (const auto& pair : pairs_) {
    pair->set_link(up);
  }
  if (before != link_up() && interrupts_ != nullptr) {
    interrupts_->config_changed();
    if (up) {
      VirtioDevice::on_resume();
    }
  }
}

void VirtioNet::backend_closed() {
  if (std::exchange(backend_closed_, true)) {
    return;
  }
  log_.warning("device {}: link down: {}", options_.id, backend_->failure());
  if (link_up_ && interrupts_ != nullptr) {
    interrupts_->config_changed();
  }
}

void VirtioNet::queue_broken(std::uint16_t queue) {
  if (log_gate_.open()) {
    log_.warning("device {}: the driver broke the rules of queue {}", options_.id, queue);
  }
  if (interrupts_ != nullptr) {
    interrupts_->needs_reset();
  }
}

// --- control queue ---

void VirtioNet::process_control() {
  if (!control_ || control_->broken() || paused()) {
    return;
  }
  for (int commands = 0;; ++commands) {
    if (commands == kCommandsPerCall) {
      signal_eventfd(control_kick_);
      break;
    }
    const PopResult popped = control_->pop(control_chain_);
    if (popped == PopResult::kEmpty) {
      if (control_->enable_notifications()) {
        continue;
      }
      break;
    }
    if (popped == PopResult::kBroken) {
      queue_broken(control_index_);
      return;
    }
    const std::array<std::uint8_t, 1> status{run_command(control_chain_) ? kOk : kError};
    const std::size_t written = control_chain_.write(0, status);
    control_->push(control_chain_, static_cast<std::uint32_t>(written));
  }
  if (control_->take_interrupt_wish()) {
    interrupts_->queue_used(control_index_);
  }
}

bool VirtioNet::run_command(const DescriptorChain& chain) {
  std::array<std::uint8_t, 2 + 8> bytes{};
  const std::size_t size = chain.read(0, bytes);
  if (size < 2 || chain.writable_size() < 1) {
    return false;
  }
  const std::size_t data_size = chain.readable_size() - 2;
  const std::uint8_t* data = &bytes[2];
  const std::uint8_t command = bytes[1];
  switch (bytes[0]) {
    case kClassRx:
      // Filters are best effort (5.1.6.5.1): frames for others do not come through a back end of one guest.
      return command <= kLastRxCommand && data_size >= 1 && (negotiated_ & kControlRx) != 0;
    case kClassMac:
      if (command == kMacTableSet) {
        return (negotiated_ & kControlRx) != 0 && set_mac_table(chain);
      }
      if (command == kMacAddressSet && data_size == 6 && (negotiated_ & kControlMacAddress) != 0 &&
          (data[0] & 1) == 0) {
        std::copy_n(data, 6, state_.mac.begin());
        return true;
      }
      return false;
    case kClassMultiQueue: {
      const auto pairs = load_le<std::uint16_t>(data);
      if (command != kMultiQueuePairsSet || data_size < 2 || (negotiated_ & kMultiQueue) == 0 || pairs == 0 ||
          pairs > max_pairs_) {
        return false;
      }
      state_.active_pairs = pairs;
      return apply_state().has_value();
    }
    case kClassGuestOffloads: {
      const auto offloads = load_le<std::uint64_t>(data);
      if (command != kGuestOffloadsSet || data_size < 8 || (negotiated_ & kControlGuestOffloads) == 0 ||
          (offloads & ~(negotiated_ & kGuestOffloads)) != 0) {
        return false;
      }
      state_.guest_offloads = offloads;
      return apply_state().has_value();
    }
    default:
      return false;
  }
}

// Two lists, each a 32-bit count and that many addresses; checked, not kept.
bool VirtioNet::set_mac_table(const DescriptorChain& chain) const {
  std::uint64_t at = 2;
  for (int list = 0; list < 2; ++list) {
    std::array<std::uint8_t, 4> count{};
    if (chain.read(at, count) != count.size()) {
      return false;
    }
    at += count.size() + 6ULL * load_le<std::uint32_t>(count.data());
    if (at > chain.readable_size()) {
      return false;
    }
  }
  return true;
}

// --- the kernel's vhost-net ---

Result<void> VirtioNet::take_vhost(std::vector<UniqueFd> fds) {
  if (fds.size() < max_pairs_) {
    return fail("device {}: {} vhost descriptors for {} queue pairs", options_.id, fds.size(), max_pairs_);
  }
  fds.resize(max_pairs_);
  for (UniqueFd& fd : fds) {
    WISP_ASSIGN(auto vhost, VhostKernel::create(std::move(fd), "/dev/vhost-net"));
    vhosts_.push_back(std::move(vhost));
  }
  WISP_ASSIGN(vhost_error_, make_eventfd());
  return {};
}

Result<void> VirtioNet::start_vhost_pair(std::uint16_t pair) {
  VhostKernel& vhost = *vhosts_[pair];
  WISP_TRY(vhost.configure(negotiated_, memory()));
  for (std::uint32_t i = 0; i < 2; ++i) {
    const auto index = static_cast<std::uint16_t>(2U * pair + i);
    if (!vhost_queues_[index]) {
      continue;
    }
    WISP_ASSIGN(const int call_fd, interrupts_->call_fd(index));
    WISP_TRY(vhost.start_queue(i, *vhost_queues_[index], kick_fds_[index], call_fd, vhost_error_.get()));
    vhost_vring_file backend{.index = i, .fd = backend_->vhost_backend_fd(pair)};
    WISP_TRY(vhost.call(VHOST_NET_SET_BACKEND, &backend, "VHOST_NET_SET_BACKEND"));
    // The driver may have filled the queue while nobody listened.
    signal_eventfd(kick_fds_[index]);
  }
  return {};
}

Result<void> VirtioNet::start_vhost() {
  drain_eventfd(vhost_error_.get());
  WISP_ASSIGN(vhost_error_watch_, strand().watch(vhost_error_.get(), EPOLLIN, [this](std::uint32_t) {
    drain_eventfd(vhost_error_.get());
    queue_broken(0);
  }));
  vhost_running_ = true;
  for (std::uint16_t pair = 0; std::size_t{2} * pair < vhost_queues_.size(); ++pair) {
    WISP_TRY(start_vhost_pair(pair));
  }
  return {};
}

void VirtioNet::stop_vhost() {
  vhost_error_watch_.stop();
  if (!std::exchange(vhost_running_, false)) {
    return;
  }
  for (std::size_t index = 0; index < vhost_queues_.size(); ++index) {
    VhostKernel& vhost = *vhosts_[index / 2];
    if (!vhost_queues_[index]) {
      continue;
    }
    vhost_vring_file none{.index = static_cast<unsigned int>(index % 2), .fd = -1};
    Result<void> stopped = vhost.call(VHOST_NET_SET_BACKEND, &none, "VHOST_NET_SET_BACKEND");
    if (stopped) {
      stopped = vhost.stop_queue(none.index, *vhost_queues_[index]);
    }
    if (!stopped && log_gate_.open()) {
      log_.error("device {}: {}", options_.id, stopped.error().message);
    }
  }
  for (std::size_t pair = 0; 2 * pair < vhost_queues_.size(); ++pair) {
    vhosts_[pair]->collect_dirty(memory());
  }
}

// --- state ---

StateRecord VirtioNet::save() const {
  StateWriter writer;
  for (const std::uint8_t byte : state_.mac) {
    writer.put(byte);
  }
  writer.put(state_.active_pairs);
  writer.put(state_.guest_offloads);
  writer.put(link_up_);
  return {.name = "virtio-net", .version = kStateVersion, .bytes = writer.take()};
}

Result<void> VirtioNet::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kStateVersion));
  StateReader reader(record.bytes);
  DriverState state;
  for (std::uint8_t& byte : state.mac) {
    WISP_ASSIGN(byte, reader.get<std::uint8_t>());
  }
  WISP_ASSIGN(state.active_pairs, reader.get_at_most<std::uint16_t>(max_pairs_, "active queue pairs"));
  WISP_ASSIGN(state.guest_offloads, reader.get<std::uint64_t>());
  WISP_ASSIGN(const bool link_up, reader.get<bool>());
  if (state.active_pairs == 0 || (state.guest_offloads & ~kGuestOffloads) != 0) {
    return fail("saved state of virtio-net has {} active queue pairs and offloads {:#x}", state.active_pairs,
                state.guest_offloads);
  }
  if ((state.guest_offloads & ~features_) != 0) {
    return fail("saved state of virtio-net uses offloads {:#x} that the netdev does not have",
                state.guest_offloads & ~features_);
  }
  state_ = state;
  state_loaded_ = true;
  set_link(link_up);
  return {};
}

}  // namespace wisp
