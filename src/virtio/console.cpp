#include "virtio/console.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "base/bytes.h"
#include "virtio/console_port.h"

namespace wisp {
namespace {

constexpr std::uint64_t kFeatureSize = 1ULL << 0;
constexpr std::uint64_t kFeatureMultiport = 1ULL << 1;
constexpr std::uint64_t kFeatureEmergencyWrite = 1ULL << 2;

constexpr std::uint16_t kQueueSize = 128;
constexpr std::uint16_t kControlReceive = 2;  // to the driver
constexpr std::uint16_t kControlTransmit = 3;
constexpr int kChainsPerTurn = 64;
constexpr std::size_t kBytesPerTurn = 64 * 1024;
constexpr std::size_t kCopySize = 4096;
constexpr std::size_t kMaxNameSize = 255;
constexpr std::uint64_t kConfigSize = 12;
constexpr std::uint64_t kConfigEmergencyWrite = 8;

// Control events (5.3.6.2).
constexpr std::uint16_t kEventDeviceReady = 0;
constexpr std::uint16_t kEventDeviceAdd = 1;
constexpr std::uint16_t kEventPortReady = 3;
constexpr std::uint16_t kEventConsolePort = 4;
constexpr std::uint16_t kEventResize = 5;
constexpr std::uint16_t kEventPortOpen = 6;
constexpr std::uint16_t kEventPortName = 7;
constexpr std::size_t kMessageSize = 8;  // le32 id, le16 event, le16 value

}  // namespace

struct VirtioConsole::ControlMessage {
  std::uint32_t id = 0;
  std::uint16_t event = 0;
  std::uint16_t value = 0;
};

VirtioConsolePortOptions virtio_console_port_options(const std::string& id, bool console,
                                                     const PropertySet& properties) {
  VirtioConsolePortOptions options{.id = id,
                                   .chardev = properties.get_string("chardev"),
                                   .name = properties.get_string("name"),
                                   .console = console};
  if (const auto nr = properties.find_uint("nr")) {
    options.nr = static_cast<std::uint32_t>(*nr);
  }
  return options;
}

VirtioConsole::VirtioConsole(EventLoop& loop, const GuestMemory& memory, VirtioConsoleOptions options,
                             Log& log, const Clock& clock)
    : VirtioDevice(loop, memory), options_(std::move(options)), log_(log), gate_(clock) {}

Result<std::unique_ptr<VirtioConsole>> VirtioConsole::create(EventLoop& loop, const GuestMemory& memory,
                                                             const VirtioConsoleOptions& options,
                                                             std::vector<VirtioConsolePort> ports, Log& log,
                                                             const Clock& clock) {
  std::unique_ptr<VirtioConsole> device(new VirtioConsole(loop, memory, options, log, clock));
  std::array<bool, kVirtioConsoleMaxPorts> taken{};
  for (const VirtioConsolePort& port : ports) {
    WISP_ASSERT(port.backend != nullptr);
    const VirtioConsolePortOptions& wanted = port.options;
    if (wanted.name.size() > kMaxNameSize) {
      return fail("port {}: name has {} bytes, at most {} are possible", wanted.id, wanted.name.size(),
                  kMaxNameSize);
    }
    if (!wanted.nr) {
      continue;
    }
    if (*wanted.nr >= kVirtioConsoleMaxPorts) {
      return fail("port {}: nr={} is too high, use 0 to {}", wanted.id, *wanted.nr,
                  kVirtioConsoleMaxPorts - 1);
    }
    if (*wanted.nr == 0 && !wanted.console) {
      return fail("port {}: nr=0 is for a virtconsole, use 1 to {}", wanted.id, kVirtioConsoleMaxPorts - 1);
    }
    if (std::exchange(taken[*wanted.nr], true)) {
      return fail("port {}: nr={} is taken by another port", wanted.id, *wanted.nr);
    }
  }
  for (VirtioConsolePort& port : ports) {
    std::uint32_t nr = port.options.nr.value_or(port.options.console ? 0 : 1);
    if (!port.options.nr) {
      while (nr < kVirtioConsoleMaxPorts && taken[nr]) {
        ++nr;
      }
      if (nr == kVirtioConsoleMaxPorts) {
        return fail("port {}: all {} port numbers are taken", port.options.id, kVirtioConsoleMaxPorts);
      }
      taken[nr] = true;
    }
    device->ports_.push_back(std::make_unique<Port>(*device, std::move(port), nr));
  }
  std::ranges::sort(device->ports_, {}, [](const auto& port) { return port->nr; });
  const std::uint32_t count = device->ports_.empty() ? 1 : device->ports_.back()->nr + 1;
  device->queue_sizes_.assign(2 * (count + 1), kQueueSize);
  for (const auto& port : device->ports_) {
    std::tie(port->columns, port->rows) = port->backend.size();
    port->backend.set_receiver(port.get());
  }
  return device;
}

VirtioConsole::~VirtioConsole() {
  for (const auto& port : ports_) {
    port->backend.set_receiver(nullptr);
  }
}

template <typename... Args>
void VirtioConsole::guest_error(fmt::format_string<Args...> format, Args&&... args) {
  if (log_.wants(LogLevel::kWarning) && gate_.open()) {
    log_.write(LogLevel::kWarning, fmt::format("{} {}: ", name(), options_.id) +
                                       fmt::format(format, std::forward<Args>(args)...));
  }
}

std::uint64_t VirtioConsole::features() const {
  return kFeatureSize | kFeatureMultiport | kFeatureEmergencyWrite;
}

bool VirtioConsole::multiport() const {
  return active_ && (active_->features & kFeatureMultiport) != 0;
}

VirtioConsole::Port* VirtioConsole::find_port(std::uint32_t nr) const {
  const auto found = std::ranges::find(ports_, nr, [](const auto& port) { return port->nr; });
  return found == ports_.end() ? nullptr : found->get();
}

void VirtioConsole::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::array<std::uint8_t, kConfigSize> bytes{};
  if (const Port* console = find_port(0)) {
    store_le(bytes.data(), console->columns);
    store_le(bytes.data() + 2, console->rows);
  }
  store_le(bytes.data() + 4, static_cast<std::uint32_t>(queue_sizes_.size() / 2 - 1));
  read_config_bytes(bytes, offset, data);
}

void VirtioConsole::write_config(std::uint64_t offset, std::span<const std::uint8_t> data) {
  // One character at any time, even before the device is set up (5.3.4.2).
  Port* console = find_port(0);
  if (console != nullptr && offset <= kConfigEmergencyWrite && kConfigEmergencyWrite - offset < data.size()) {
    static_cast<void>(
        console->backend.write(data.subspan(static_cast<std::size_t>(kConfigEmergencyWrite - offset), 1)));
  }
}

Result<void> VirtioConsole::activate(VirtioActivation activation) {
  active_ = std::move(activation);
  return {};
}

Queue* VirtioConsole::usable_queue(std::uint16_t index) {
  return active_ && index < active_->queues.size() && active_->queues[index] ? &*active_->queues[index]
                                                                             : nullptr;
}

const Queue* VirtioConsole::queue(std::uint16_t index) const {
  return active_ && index < active_->queues.size() && active_->queues[index] ? &*active_->queues[index]
                                                                             : nullptr;
}

bool VirtioConsole::pop(std::uint16_t index, DescriptorChain& chain) {
  Queue& queue = *usable_queue(index);
  for (int tries = 0; tries < 2; ++tries) {
    switch (queue.pop(chain)) {
      case PopResult::kChain:
        return true;
      case PopResult::kBroken:
        active_->interrupts->needs_reset();
        return false;
      case PopResult::kEmpty:
        if (!queue.enable_notifications()) {
          return false;
        }
    }
  }
  // Emptied twice in one go by nobody but this device: the driver plays with its index.
  signal_eventfd(active_->kick_fds[index]);
  return false;
}

void VirtioConsole::interrupt(std::uint16_t index) {
  if (usable_queue(index)->take_interrupt_wish()) {
    active_->interrupts->queue_used(index);
  }
}

void VirtioConsole::notify(std::uint16_t queue) {
  if (paused() || usable_queue(queue) == nullptr) {
    return;
  }
  if (queue == kControlReceive) {
    send_control();
    return;
  }
  if (queue == kControlTransmit) {
    receive_control();
    return;
  }
  Port* port = find_port(queue < kControlReceive ? 0 : queue / 2U - 1);
  if (port == nullptr) {
    return;
  }
  if (queue == port->transmit_queue()) {
    transmit(*port);
  } else {
    port->resume_input();
  }
}

void VirtioConsole::transmit(Port& port) {
  const std::uint16_t index = port.transmit_queue();
  Queue* queue = usable_queue(index);
  if (queue == nullptr || paused() || port.output_blocked) {
    return;
  }
  std::array<std::uint8_t, kCopySize> bytes;
  std::size_t moved = 0;
  int chains = 0;
  while (chains < kChainsPerTurn && moved < kBytesPerTurn) {
    if (!port.transmit_held && !pop(index, port.transmit_chain)) {
      interrupt(index);
      return;
    }
    port.transmit_held = true;
    const std::size_t count = port.transmit_chain.read(port.transmit_offset, bytes);
    if (count == 0) {
      queue->push(port.transmit_chain, 0);
      port.transmit_held = false;
      port.transmit_offset = 0;
      ++chains;
      continue;
    }
    const std::size_t taken = port.backend.write(std::span(bytes).first(count));
    port.transmit_offset += taken;
    moved += taken;
    if (taken < count) {
      port.output_blocked = true;  // writable() takes it up again
      interrupt(index);
      return;
    }
  }
  interrupt(index);
  signal_eventfd(active_->kick_fds[index]);  // others first
}

void VirtioConsole::receive_control() {
  Queue& queue = *usable_queue(kControlTransmit);
  int chains = 0;
  while (chains < kChainsPerTurn && pop(kControlTransmit, chain_)) {
    std::array<std::uint8_t, kMessageSize> bytes{};
    const std::size_t count = chain_.read(0, bytes);
    queue.push(chain_, 0);
    ++chains;
    if (count < kMessageSize) {
      guest_error("the driver sent a control message of {} bytes, too short", count);
      continue;
    }
    handle_control({.id = load_le<std::uint32_t>(bytes.data()),
                    .event = load_le<std::uint16_t>(bytes.data() + 4),
                    .value = load_le<std::uint16_t>(bytes.data() + 6)});
  }
  interrupt(kControlTransmit);
  send_control();
  if (chains == kChainsPerTurn) {
    signal_eventfd(active_->kick_fds[kControlTransmit]);
  }
}

void VirtioConsole::handle_control(const ControlMessage& message) {
  if (!multiport()) {
    return;
  }
  if (message.event == kEventDeviceReady) {
    for (const auto& port : ports_) {
      port->pending = message.value == 1 ? Port::kTellAdd : std::uint8_t{0};
    }
    return;
  }
  Port* port = find_port(message.id);
  if (port == nullptr) {
    guest_error("the driver sent event {} for port {}, which is not there", message.event, message.id);
    return;
  }
  switch (message.event) {
    case kEventPortReady:
      port->ready = message.value == 1;
      if (!port->ready) {
        guest_error("the driver could not set up port {}", message.id);
        return;
      }
      port->pending = static_cast<std::uint8_t>(
          port->pending | (port->options.console ? Port::kTellConsole : 0) |
          (port->options.console && port->columns != 0 ? Port::kTellSize : 0) |
          (port->options.name.empty() ? 0 : Port::kTellName) | (port->host_open() ? Port::kTellOpen : 0));
      return;
    case kEventPortOpen:
      port->guest_open = message.value == 1;
      if (port->guest_open) {
        port->resume_input();
      }
      return;
    default:
      guest_error("the driver sent unknown control event {}", message.event);
  }
}

// Sends as much of what is pending as the driver has buffers for. What is told are states, not events, so
// that nothing piles up while it has none.
void VirtioConsole::send_control() {
  if (!multiport() || paused() || usable_queue(kControlReceive) == nullptr) {
    return;
  }
  Queue& queue = *usable_queue(kControlReceive);
  bool any = false;
  // Every port is added before anything else is said about one.
  for (const bool adding : {true, false}) {
    for (const auto& port : ports_) {
      while (true) {
        const std::uint8_t bits = adding ? port->pending & Port::kTellAdd : port->pending;
        if (bits == 0) {
          break;
        }
        if (!pop(kControlReceive, chain_)) {
          if (any) {
            interrupt(kControlReceive);
          }
          return;
        }
        const auto bit = static_cast<std::uint8_t>(bits & -bits);
        std::array<std::uint8_t, kMessageSize + kMaxNameSize> message{};
        const std::size_t size = build_message(*port, bit, message);
        port->pending = static_cast<std::uint8_t>(port->pending & ~bit);
        const std::size_t written = chain_.write(0, std::span(message).first(size));
        if (written < size) {
          guest_error("the driver gave {} bytes for a control message of {}", written, size);
        }
        queue.push(chain_, static_cast<std::uint32_t>(written));
        any = true;
      }
    }
  }
  if (any) {
    interrupt(kControlReceive);
  }
}

std::size_t VirtioConsole::build_message(Port& port, std::uint8_t bit, std::span<std::uint8_t> out) const {
  const auto fill = [&](std::uint16_t event, std::uint16_t value) {
    store_le(out.data(), port.nr);
    store_le(out.data() + 4, event);
    store_le(out.data() + 6, value);
    return kMessageSize;
  };
  switch (bit) {
    case Port::kTellAdd:
      return fill(kEventDeviceAdd, 1);
    case Port::kTellConsole:
      return fill(kEventConsolePort, 1);
    case Port::kTellSize:
      fill(kEventResize, 0);
      // Columns first (5.3.6.4). Linux had them the other way round before 6.15 and the stable kernels of
      // then.
      store_le(out.data() + kMessageSize, port.columns);
      store_le(out.data() + kMessageSize + 2, port.rows);
      return kMessageSize + 4;
    case Port::kTellName:
      fill(kEventPortName, 1);
      std::ranges::copy(port.options.name, out.begin() + kMessageSize);
      return kMessageSize + port.options.name.size();
    default:
      return fill(kEventPortOpen, port.host_open() ? 1 : 0);
  }
}

void VirtioConsole::reset() {
  for (const auto& port : ports_) {
    port->forget();
  }
  active_.reset();
  restored_ = false;
}

void VirtioConsole::on_pause() {
  for (const auto& port : ports_) {
    if (port->transmit_held) {
      usable_queue(port->transmit_queue())->undo_pop(port->transmit_chain);
      port->transmit_held = false;  // transmit_offset says how far it was written
    }
    if (port->receive_held) {
      usable_queue(port->receive_queue())->undo_pop(port->receive_chain);
      port->receive_held = false;
    }
  }
}

void VirtioConsole::on_resume() {
  for (const auto& port : ports_) {
    port->output_blocked = false;
    if (restored_) {
      port->tell(Port::kTellOpen);
    }
  }
  restored_ = false;
  VirtioDevice::on_resume();
}

StateRecord VirtioConsole::save() const {
  StateWriter writer;
  writer.put(static_cast<std::uint32_t>(ports_.size()));
  for (const auto& port : ports_) {
    writer.put(port->nr);
    writer.put(port->ready);
    writer.put(port->guest_open);
    writer.put(port->pending);
    writer.put(static_cast<std::uint64_t>(port->transmit_offset));
  }
  return {.name = std::string(name()), .version = 1, .bytes = writer.take()};
}

Result<void> VirtioConsole::load(const StateRecord& record) {
  WISP_TRY(check_version(record, 1));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const std::uint32_t count, reader.get<std::uint32_t>());
  if (count != ports_.size()) {
    return fail("saved state has {} ports, this device {}", count, ports_.size());
  }
  for (const auto& port : ports_) {
    WISP_ASSIGN(const std::uint32_t nr, reader.get<std::uint32_t>());
    if (nr != port->nr) {
      return fail("saved state has port {} where this device has port {}", nr, port->nr);
    }
    WISP_ASSIGN(port->ready, reader.get<bool>());
    WISP_ASSIGN(port->guest_open, reader.get<bool>());
    WISP_ASSIGN(port->pending, reader.get_at_most<std::uint8_t>(Port::kTellAll, "pending messages"));
    WISP_ASSIGN(port->transmit_offset, reader.get_at_most<std::uint64_t>(UINT32_MAX, "bytes sent"));
  }
  if (!reader.empty()) {
    return fail("saved state goes on behind its end");
  }
  restored_ = true;
  return {};
}

}  // namespace wisp
