#include "virtio/mmio_transport.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <utility>

#include "base/bytes.h"

namespace wisp {
namespace {

using namespace virtio_mmio;

constexpr std::uint32_t kMagic = 0x74726976;   // "virt"
constexpr std::uint32_t kVendor = 0x50534957;  // "WISP"
constexpr std::size_t kConfigSize = kVirtioMmioSize - kConfig;
constexpr std::uint32_t kStateVersion = 1;
constexpr std::uint32_t kDriverStatusBits = kVirtioStatusAcknowledge | kVirtioStatusDriver |
                                            kVirtioStatusDriverOk | kVirtioStatusFeaturesOk |
                                            kVirtioStatusFailed;
constexpr std::size_t kMaxDeviceState = 16ULL << 20;

std::uint32_t half(std::uint64_t value, bool high) {
  return static_cast<std::uint32_t>(high ? value >> 32 : value);
}

std::uint64_t with_half(std::uint64_t value, bool high, std::uint32_t part) {
  return high ? (value & 0xffff'ffff) | (std::uint64_t{part} << 32)
              : (value & ~std::uint64_t{0xffff'ffff}) | part;
}

}  // namespace

// Atomic members are used without the strand's lock; all others under it.
struct MmioTransport::State {
  State(Log& to, const Clock& clock) : log(to), gate(clock) {}
  Log& log;
  LogGate gate;
  std::uint64_t offered = 0;  // features
  std::atomic<std::uint32_t> status = 0;
  std::atomic<std::uint32_t> interrupts = 0;
  std::atomic<std::uint32_t> generation = 0;
  std::array<std::uint8_t, kConfigSize> seen_config{};  // when the generation was last read
  bool active = false;
  std::uint32_t device_features_sel = 0;
  std::uint32_t driver_features_sel = 0;
  std::uint64_t driver_features = 0;
  std::uint32_t queue_sel = 0;
  std::vector<QueueConfig> queues;
  std::vector<UniqueFd> kick_fds;
  std::vector<Watch> kick_watches;
  std::vector<UniqueFd> call_fds;
  std::vector<Watch> call_watches;
};

Result<std::shared_ptr<MmioTransport>> MmioTransport::create(std::unique_ptr<VirtioDevice>&& device,
                                                             std::unique_ptr<IrqLine> irq, Log& log,
                                                             const Clock& clock) {
  std::vector<UniqueFd> kick_fds(device->queue_sizes().size());
  for (UniqueFd& kick_fd : kick_fds) {
    WISP_ASSIGN(kick_fd, make_eventfd());
  }
  std::shared_ptr<MmioTransport> transport(new MmioTransport(std::move(device), std::move(irq), log, clock));
  State& state = *transport->state_;
  state.kick_fds = std::move(kick_fds);
  for (const std::uint16_t size : transport->device_->queue_sizes()) {
    state.queues.push_back({.max_size = size});
  }
  state.kick_watches.resize(state.queues.size());
  state.call_fds.resize(state.queues.size());
  state.call_watches.resize(state.queues.size());
  return transport;
}

MmioTransport::MmioTransport(std::unique_ptr<VirtioDevice> device, std::unique_ptr<IrqLine> irq, Log& log,
                             const Clock& clock)
    : device_(std::move(device)), irq_(std::move(irq)), state_(std::make_unique<State>(log, clock)) {
  state_->offered =
      device_->features() | kVirtioFeatureVersion1 | kVirtioFeatureIndirectDesc | kVirtioFeatureEventIdx;
}

MmioTransport::~MmioTransport() {
  if (device_ == nullptr) {
    return;
  }
  const std::lock_guard lock(device_->strand().mutex());
  reset_locked();
}

template <typename... Args>
void MmioTransport::guest_error(fmt::format_string<Args...> format, Args&&... args) {
  if (state_->log.wants(LogLevel::kWarning) && state_->gate.open()) {
    state_->log.write(LogLevel::kWarning,
                      std::string(device_->name()) + ": " + fmt::format(format, std::forward<Args>(args)...));
  }
}

void MmioTransport::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  if (offset >= kConfig) {
    const std::lock_guard lock(device_->strand().mutex());
    device_->read_config(offset - kConfig, data);
    return;
  }
  if (data.size() != sizeof(std::uint32_t) || offset % sizeof(std::uint32_t) != 0) {
    std::ranges::fill(data, std::uint8_t{0});
    return;
  }
  if (offset == kInterruptStatus) {
    u64_to_bytes(state_->interrupts.load(), data);
    return;
  }
  const std::lock_guard lock(device_->strand().mutex());
  u64_to_bytes(read_register(offset), data);
}

std::uint32_t MmioTransport::read_register(std::uint64_t offset) {
  const State& state = *state_;
  switch (offset) {
    case kMagicValue:
      return kMagic;
    case kVersion:
      return 2;
    case kDeviceId:
      return device_->device_id();
    case kVendorId:
      return kVendor;
    case kDeviceFeatures:
      return state.device_features_sel > 1 ? 0 : half(state.offered, state.device_features_sel == 1);
    case kQueueNumMax:
      return state.queue_sel < state.queues.size() ? state.queues[state.queue_sel].max_size : 0;
    case kQueueReady:
      return state.queue_sel < state.queues.size() && state.queues[state.queue_sel].ready ? 1 : 0;
    case kStatus:
      return state.status.load();
    case kShmLenLow:
    case kShmLenHigh:
    case kShmBaseLow:
    case kShmBaseHigh:
      return 0xffff'ffff;  // no shared memory regions (4.2.2.1)
    case kConfigGeneration:
      return config_generation();
    default:
      return 0;
  }
}

// Counts announced changes, and those that nobody announced because the driver was not there yet.
std::uint32_t MmioTransport::config_generation() {
  std::array<std::uint8_t, kConfigSize> config;
  device_->read_config(0, config);
  if (config != state_->seen_config) {
    state_->seen_config = config;
    ++state_->generation;
  }
  return state_->generation.load();
}

void MmioTransport::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  if (offset >= kConfig) {
    const std::lock_guard lock(device_->strand().mutex());
    device_->write_config(offset - kConfig, data);
    return;
  }
  if (data.size() != sizeof(std::uint32_t) || offset % sizeof(std::uint32_t) != 0) {
    return;
  }
  const auto value = static_cast<std::uint32_t>(bytes_to_u64(data));
  switch (offset) {
    case kQueueNotify:
      // As the engine's doorbell would do it; the device does its work on the event loop.
      if (value < state_->kick_fds.size()) {
        signal_eventfd(state_->kick_fds[value].get());
      }
      return;
    case kInterruptAck:
      // The line is an edge: what came up between the driver's look at the status and this write needs one of
      // its own.
      if ((state_->interrupts.fetch_and(~value) & ~value) != 0) {
        irq_->pulse();
      }
      return;
    default: {
      const std::lock_guard lock(device_->strand().mutex());
      write_register(offset, value);
    }
  }
}

void MmioTransport::write_register(std::uint64_t offset, std::uint32_t value) {
  State& state = *state_;
  switch (offset) {
    case kDeviceFeaturesSel:
      state.device_features_sel = value;
      return;
    case kDriverFeaturesSel:
      state.driver_features_sel = value;
      return;
    case kDriverFeatures:
      if ((state.status.load() & kVirtioStatusFeaturesOk) != 0) {
        guest_error("the driver changed its features after FEATURES_OK, which is ignored");
      } else if (state.driver_features_sel <= 1) {
        state.driver_features = with_half(state.driver_features, state.driver_features_sel == 1, value);
      }
      return;
    case kQueueSel:
      state.queue_sel = value;
      return;
    case kStatus:
      write_status(value);
      return;
    default:
      write_queue_register(offset, value);
  }
}

void MmioTransport::write_queue_register(std::uint64_t offset, std::uint32_t value) {
  State& state = *state_;
  if (offset < kQueueNum || offset > kQueueDeviceHigh || state.queue_sel >= state.queues.size()) {
    return;
  }
  QueueConfig& queue = state.queues[state.queue_sel];
  if ((state.status.load() & kVirtioStatusDriverOk) != 0 || (queue.ready && offset != kQueueReady)) {
    guest_error("the driver wrote register {:#x} of queue {} in use, which is ignored", offset,
                state.queue_sel);
    return;
  }
  switch (offset) {
    case kQueueNum:
      queue.size = value <= 0xffff ? static_cast<std::uint16_t>(value) : std::uint16_t{0};
      return;
    case kQueueReady:
      queue.ready = value == 1;
      return;
    case kQueueDescLow:
    case kQueueDescHigh:
      queue.descriptor_table = with_half(queue.descriptor_table, offset == kQueueDescHigh, value);
      return;
    case kQueueDriverLow:
    case kQueueDriverHigh:
      queue.available_ring = with_half(queue.available_ring, offset == kQueueDriverHigh, value);
      return;
    case kQueueDeviceLow:
    case kQueueDeviceHigh:
      queue.used_ring = with_half(queue.used_ring, offset == kQueueDeviceHigh, value);
      return;
    default:
      return;
  }
}

bool MmioTransport::features_acceptable() {
  const std::uint64_t unknown = state_->driver_features & ~state_->offered;
  if (unknown != 0) {
    guest_error("the driver took features {:#x} that were not offered", unknown);
    return false;
  }
  if ((state_->driver_features & kVirtioFeatureVersion1) == 0) {
    guest_error("the driver does not take VIRTIO_F_VERSION_1: legacy drivers are not served");
    return false;
  }
  return true;
}

void MmioTransport::write_status(std::uint32_t value) {
  State& state = *state_;
  if (value == 0) {
    reset_locked();
    return;
  }
  const std::uint32_t now = state.status.load() & kDriverStatusBits;
  value &= kDriverStatusBits;
  if ((now & ~value) != 0) {
    guest_error("the driver cleared status bits {:#x} without a reset, which is ignored", now & ~value);
    return;
  }
  std::uint32_t added = value & ~now;
  // Each step stands on the one before (3.1.1).
  constexpr std::uint32_t kBeforeFeatures = kVirtioStatusAcknowledge | kVirtioStatusDriver;
  if ((added & kVirtioStatusFeaturesOk) != 0 &&
      ((value & kBeforeFeatures) != kBeforeFeatures || !features_acceptable())) {
    added &= ~kVirtioStatusFeaturesOk;
  }
  if ((added & kVirtioStatusDriverOk) != 0 && ((now | added) & kVirtioStatusFeaturesOk) == 0) {
    guest_error("the driver set DRIVER_OK without FEATURES_OK, which is ignored");
    added &= ~kVirtioStatusDriverOk;
  }
  state.status.fetch_or(added);
  if ((added & kVirtioStatusDriverOk) == 0 || (value & kVirtioStatusFailed) != 0) {
    return;
  }
  if (Result<void> activated = activate(nullptr); !activated) {
    guest_error("cannot start: {}", activated.error().message);
    needs_reset();
  }
}

Result<void> MmioTransport::activate(StateReader* positions) {
  State& state = *state_;
  VirtioActivation activation;
  activation.features = state.driver_features;
  activation.interrupts = this;
  for (std::size_t i = 0; i < state.queues.size(); ++i) {
    activation.kick_fds.push_back(state.kick_fds[i].get());
    if (!state.queues[i].ready) {
      activation.queues.emplace_back();
      continue;
    }
    Result<Queue> queue = Queue::activate(state.queues[i], device_->memory(), state.driver_features);
    if (!queue) {
      return with_context("queue " + std::to_string(i), queue.error());
    }
    if (positions != nullptr) {
      WISP_TRY(queue->load(*positions));
    }
    activation.queues.emplace_back(*std::move(queue));
  }
  Result<void> activated = device_->activate(std::move(activation));
  for (std::uint16_t i = 0; activated && i < state.queues.size() && !device_->kicks_handled_elsewhere();
       ++i) {
    Result<Watch> watch =
        device_->strand().watch(state.kick_fds[i].get(), EPOLLIN, [this, i](std::uint32_t) { kicked(i); });
    if (!watch) {
      activated = std::unexpected(watch.error());
    } else {
      state.kick_watches[i] = *std::move(watch);
    }
  }
  if (!activated) {
    stop_watches();
    device_->reset();
    return activated;
  }
  state.active = true;
  return {};
}

void MmioTransport::kicked(std::uint16_t queue) {
  drain_eventfd(state_->kick_fds[queue].get());
  // A paused device looks at all queues when it resumes; a broken one has nothing more to do.
  if (state_->active && !device_->paused() && (state_->status.load() & kVirtioStatusNeedsReset) == 0) {
    device_->notify(queue);
  }
}

void MmioTransport::stop_watches() {
  for (Watch& watch : state_->kick_watches) {
    watch.stop();
  }
  for (Watch& watch : state_->call_watches) {
    watch.stop();
  }
  for (UniqueFd& fd : state_->call_fds) {
    fd.reset();
  }
}

void MmioTransport::reset_locked() {
  State& state = *state_;
  device_->reset();
  state.active = false;
  stop_watches();
  for (const UniqueFd& fd : state.kick_fds) {
    drain_eventfd(fd.get());
  }
  state.status = 0;
  state.interrupts = 0;
  state.device_features_sel = state.driver_features_sel = state.queue_sel = 0;
  state.driver_features = 0;
  for (QueueConfig& queue : state.queues) {
    queue = {.max_size = queue.max_size};
  }
}

void MmioTransport::reset() {
  const std::lock_guard lock(device_->strand().mutex());
  reset_locked();
}

void MmioTransport::pause() {
  const std::lock_guard lock(device_->strand().mutex());
  device_->pause();
}

void MmioTransport::resume() {
  {
    const std::lock_guard lock(device_->strand().mutex());
    device_->resume();
  }
  if (state_->interrupts.load() != 0) {
    irq_->pulse();
  }
}

std::vector<IoEvent> MmioTransport::io_events() const {
  std::vector<IoEvent> events;
  for (std::size_t i = 0; i < state_->kick_fds.size(); ++i) {
    events.push_back({.offset = kQueueNotify, .size = 4, .value = i, .fd = state_->kick_fds[i].get()});
  }
  return events;
}

void MmioTransport::raise(std::uint32_t bits) {
  state_->interrupts.fetch_or(bits);
  irq_->pulse();
}

void MmioTransport::queue_used(std::uint16_t /*queue*/) {
  raise(kInterruptUsed);
}

void MmioTransport::config_changed() {
  ++state_->generation;
  raise(kInterruptConfig);
}

void MmioTransport::needs_reset() {
  const std::uint32_t before = state_->status.fetch_or(kVirtioStatusNeedsReset);
  // Told once, and only to a driver that is there (2.1.2).
  if ((before & kVirtioStatusNeedsReset) == 0 && (before & kVirtioStatusDriverOk) != 0) {
    config_changed();
  }
}

Result<int> MmioTransport::call_fd(std::uint16_t queue) {
  WISP_ASSERT(queue < state_->call_fds.size());
  UniqueFd& fd = state_->call_fds[queue];
  if (!fd.valid()) {
    WISP_ASSIGN(UniqueFd made, make_eventfd());
    WISP_ASSIGN(state_->call_watches[queue],
                device_->strand().watch(made.get(), EPOLLIN, [this, queue](std::uint32_t) {
                  drain_eventfd(state_->call_fds[queue].get());
                  queue_used(queue);
                }));
    fd = std::move(made);
  }
  return fd.get();
}

StateRecord MmioTransport::save() {
  const std::lock_guard lock(device_->strand().mutex());
  const bool was_paused = device_->paused();
  device_->pause();
  State& state = *state_;
  StateWriter writer;
  writer.put(state.status.load());
  writer.put(state.interrupts.load());
  writer.put(state.generation.load());
  writer.put(state.device_features_sel);
  writer.put(state.driver_features_sel);
  writer.put(state.driver_features);
  writer.put(state.queue_sel);
  writer.put(static_cast<std::uint32_t>(state.queues.size()));
  for (const QueueConfig& queue : state.queues) {
    writer.put(queue.size);
    writer.put(queue.ready);
    writer.put(queue.descriptor_table);
    writer.put(queue.available_ring);
    writer.put(queue.used_ring);
  }
  StateWriter positions;
  for (std::uint16_t i = 0; state.active && i < state.queues.size(); ++i) {
    if (state.queues[i].ready) {
      const Queue* queue = device_->queue(i);
      WISP_ASSERT(queue != nullptr);
      queue->save(positions);
    }
  }
  writer.put(state.active);
  writer.put_bytes(positions.bytes());
  const StateRecord device = device_->save();
  writer.put_string(device.name);
  writer.put(device.version);
  writer.put_bytes(device.bytes);
  if (!was_paused) {
    device_->resume();
  }
  return {.name = std::string(device_->name()), .version = kStateVersion, .bytes = writer.take()};
}

Result<void> MmioTransport::load(const StateRecord& record) {
  const std::lock_guard lock(device_->strand().mutex());
  const bool was_paused = device_->paused();
  device_->pause();
  reset_locked();
  Result<void> loaded = load_locked(record);
  if (!loaded) {
    reset_locked();
    loaded = with_context(std::string(device_->name()), loaded.error());
  }
  if (!was_paused) {
    device_->resume();
  }
  return loaded;
}

Result<void> MmioTransport::load_locked(const StateRecord& record) {
  State& state = *state_;
  if (record.name != device_->name()) {
    return fail("saved state is of a {}", record.name);
  }
  WISP_TRY(check_version(record, kStateVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const std::uint32_t status, reader.get<std::uint32_t>());
  WISP_ASSIGN(const std::uint32_t interrupts, reader.get<std::uint32_t>());
  WISP_ASSIGN(const std::uint32_t generation, reader.get<std::uint32_t>());
  if ((status & ~(kDriverStatusBits | kVirtioStatusNeedsReset)) != 0 ||
      (interrupts & ~(kInterruptUsed | kInterruptConfig)) != 0) {
    return fail("saved state has unknown status {:#x} or interrupts {:#x}", status, interrupts);
  }
  WISP_ASSIGN(state.device_features_sel, reader.get<std::uint32_t>());
  WISP_ASSIGN(state.driver_features_sel, reader.get<std::uint32_t>());
  WISP_ASSIGN(state.driver_features, reader.get<std::uint64_t>());
  if ((status & kVirtioStatusFeaturesOk) != 0 && ((state.driver_features & ~state.offered) != 0 ||
                                                  (state.driver_features & kVirtioFeatureVersion1) == 0)) {
    return fail("saved state uses features {:#x}, of which only {:#x} are offered here",
                state.driver_features, state.offered);
  }
  WISP_ASSIGN(state.queue_sel, reader.get<std::uint32_t>());
  WISP_ASSIGN(const std::uint32_t count, reader.get<std::uint32_t>());
  if (count != state.queues.size()) {
    return fail("saved state has {} queues, this device {}", count, state.queues.size());
  }
  for (QueueConfig& queue : state.queues) {
    WISP_ASSIGN(queue.size, reader.get<std::uint16_t>());
    WISP_ASSIGN(queue.ready, reader.get<bool>());
    WISP_ASSIGN(queue.descriptor_table, reader.get<std::uint64_t>());
    WISP_ASSIGN(queue.available_ring, reader.get<std::uint64_t>());
    WISP_ASSIGN(queue.used_ring, reader.get<std::uint64_t>());
  }
  WISP_ASSIGN(const bool active, reader.get<bool>());
  constexpr std::uint32_t kRunning = kVirtioStatusFeaturesOk | kVirtioStatusDriverOk;
  if (active && (status & kRunning) != kRunning) {
    return fail("saved state is active with status {:#x}", status);
  }
  WISP_ASSIGN(const auto position_bytes, reader.get_bytes(state.queues.size() * 2 * sizeof(std::uint16_t)));
  StateReader positions(position_bytes);
  StateRecord device;
  WISP_ASSIGN(device.name, reader.get_string(256));
  WISP_ASSIGN(device.version, reader.get<std::uint32_t>());
  WISP_ASSIGN(const auto bytes, reader.get_bytes(kMaxDeviceState));
  device.bytes.assign(bytes.begin(), bytes.end());
  if (!reader.empty()) {
    return fail("saved state goes on behind its end");
  }
  state.generation = generation;
  state.status = status;
  WISP_TRY(device_->load(device));
  if (active) {
    WISP_TRY(activate(&positions));
  }
  state.interrupts = interrupts;
  return {};
}

}  // namespace wisp
