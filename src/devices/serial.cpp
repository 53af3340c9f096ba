#include "devices/serial.h"

#include <algorithm>
#include <utility>

namespace wisp {
namespace {

constexpr std::uint32_t kVersion = 1;

// Registers; 0 and 1 are the divisor latch while the divisor latch access bit is set.
constexpr std::uint64_t kData = 0;
constexpr std::uint64_t kInterruptEnable = 1;
constexpr std::uint64_t kInterruptIdentity = 2;  // read
constexpr std::uint64_t kFifoControl = 2;        // write
constexpr std::uint64_t kLineControl = 3;
constexpr std::uint64_t kModemControl = 4;
constexpr std::uint64_t kLineStatus = 5;
constexpr std::uint64_t kModemStatus = 6;
constexpr std::uint64_t kScratch = 7;

constexpr std::uint8_t kIerReceived = 1U << 0;
constexpr std::uint8_t kIerTransmitEmpty = 1U << 1;
constexpr std::uint8_t kIerLineStatus = 1U << 2;
constexpr std::uint8_t kIerModemStatus = 1U << 3;
constexpr std::uint8_t kIerMask = 0x0f;

constexpr std::uint8_t kIirModemStatus = 0x00;
constexpr std::uint8_t kIirNone = 0x01;
constexpr std::uint8_t kIirTransmitEmpty = 0x02;
constexpr std::uint8_t kIirReceived = 0x04;
constexpr std::uint8_t kIirLineStatus = 0x06;
constexpr std::uint8_t kIirTimeout = 0x0c;
constexpr std::uint8_t kIirFifoEnabled = 0xc0;

constexpr std::uint8_t kFcrEnable = 1U << 0;
constexpr std::uint8_t kFcrClearReceive = 1U << 1;
constexpr std::uint8_t kFcrClearTransmit = 1U << 2;
constexpr std::uint8_t kFcrKept = 0xc9;  // trigger level, DMA mode, enable
constexpr std::array<std::size_t, 4> kTriggerLevels{1, 4, 8, 14};

constexpr std::uint8_t kLcrBreak = 1U << 6;
constexpr std::uint8_t kLcrDivisorLatch = 1U << 7;

constexpr std::uint8_t kMcrDtr = 1U << 0;
constexpr std::uint8_t kMcrRts = 1U << 1;
constexpr std::uint8_t kMcrOut1 = 1U << 2;
constexpr std::uint8_t kMcrOut2 = 1U << 3;
constexpr std::uint8_t kMcrLoop = 1U << 4;
constexpr std::uint8_t kMcrMask = 0x1f;

constexpr std::uint8_t kLsrDataReady = 1U << 0;
constexpr std::uint8_t kLsrOverrun = 1U << 1;
constexpr std::uint8_t kLsrBreak = 1U << 4;
constexpr std::uint8_t kLsrErrors = 0x1e;
constexpr std::uint8_t kLsrTransmitHoldingEmpty = 1U << 5;
constexpr std::uint8_t kLsrTransmitterEmpty = 1U << 6;
constexpr std::uint8_t kLsrFifoError = 1U << 7;

constexpr std::uint8_t kMsrCts = 1U << 4;
constexpr std::uint8_t kMsrDsr = 1U << 5;
constexpr std::uint8_t kMsrRi = 1U << 6;
constexpr std::uint8_t kMsrDcd = 1U << 7;
constexpr std::uint8_t kMsrDeltas = 0x0f;
constexpr std::uint8_t kMsrTrailingRi = 1U << 2;
// The other end is there and ready.
constexpr std::uint8_t kMsrConnected = kMsrCts | kMsrDsr | kMsrDcd;

// The modem inputs as the loop feeds them from the modem outputs.
std::uint8_t looped_inputs(std::uint8_t modem_control) {
  std::uint8_t inputs = 0;
  inputs |= (modem_control & kMcrRts) != 0 ? kMsrCts : 0;
  inputs |= (modem_control & kMcrDtr) != 0 ? kMsrDsr : 0;
  inputs |= (modem_control & kMcrOut1) != 0 ? kMsrRi : 0;
  inputs |= (modem_control & kMcrOut2) != 0 ? kMsrDcd : 0;
  return inputs;
}

}  // namespace

template <typename T>
T Serial::Fifo<T>::pop() {
  const T first = items[0];
  std::copy(items.begin() + 1, items.begin() + static_cast<std::ptrdiff_t>(count), items.begin());
  --count;
  return first;
}

Serial::Serial(std::unique_ptr<IrqLine> irq, CharBackend* backend) : irq_(std::move(irq)), backend_(backend) {
  state_.modem_status = kMsrConnected;
  if (backend_ != nullptr) {
    backend_->set_receiver(this);
  }
}

Serial::~Serial() {
  // Without the lock: this waits for a callback that may be waiting for it.
  if (backend_ != nullptr) {
    backend_->set_receiver(nullptr);
  }
}

bool Serial::fifo_enabled() const {
  return (state_.fifo_control & kFcrEnable) != 0;
}

bool Serial::loopback() const {
  return (state_.modem_control & kMcrLoop) != 0;
}

std::size_t Serial::receive_room() const {
  const std::size_t size = fifo_enabled() ? kFifoSize : 1;
  return size - std::min(size, state_.receive.count);
}

std::uint8_t Serial::line_status() const {
  std::uint8_t status = state_.line_errors;
  if (state_.receive.count > 0) {
    status |= kLsrDataReady;
  }
  if (state_.transmit.count == 0) {
    status |= kLsrTransmitHoldingEmpty | kLsrTransmitterEmpty;
  }
  if (fifo_enabled()) {
    const auto in_fifo = std::span(state_.receive.items).first(state_.receive.count);
    if (std::ranges::any_of(in_fifo, [](const Received& received) { return received.errors != 0; })) {
      status |= kLsrFifoError;
    }
  }
  return status;
}

std::uint8_t Serial::causes() const {
  std::uint8_t pending = 0;
  if (state_.line_errors != 0) {
    pending |= kIerLineStatus;
  }
  if (state_.receive.count > 0) {
    pending |= kIerReceived;
  }
  if (state_.transmit_interrupt) {
    pending |= kIerTransmitEmpty;
  }
  if ((state_.modem_status & kMsrDeltas) != 0) {
    pending |= kIerModemStatus;
  }
  return pending & state_.interrupt_enable;
}

std::uint8_t Serial::interrupt_identity() const {
  const std::uint8_t pending = causes();
  std::uint8_t identity = kIirNone;
  if ((pending & kIerLineStatus) != 0) {
    identity = kIirLineStatus;
  } else if ((pending & kIerReceived) != 0) {
    // Below the trigger level the time-out of four characters has always passed already.
    const bool triggered =
        !fifo_enabled() || state_.receive.count >= kTriggerLevels[state_.fifo_control >> 6];
    identity = triggered ? kIirReceived : kIirTimeout;
  } else if ((pending & kIerTransmitEmpty) != 0) {
    identity = kIirTransmitEmpty;
  } else if ((pending & kIerModemStatus) != 0) {
    identity = kIirModemStatus;
  }
  return fifo_enabled() ? identity | kIirFifoEnabled : identity;
}

// The pin sees edges only, and a guest's handler may serve one cause and return: each change of the set of
// causes that leaves one pending is an edge of its own. One edge too many finds no cause and does no harm,
// one too few would hang the guest's driver.
void Serial::update_irq() {
  const std::uint8_t now = causes();
  const bool sent_again = transmitter_emptied_ && (now & kIerTransmitEmpty) != 0;
  if (now != 0 && (now != told_causes_ || sent_again)) {
    irq_->pulse();
  }
  told_causes_ = now;
  transmitter_emptied_ = false;
}

void Serial::show_head_errors() {
  if (state_.receive.count > 0) {
    Received& head = state_.receive.items[0];
    state_.line_errors |= head.errors;
  }
}

void Serial::take_in(Received received) {
  if (receive_room() == 0) {
    state_.line_errors |= kLsrOverrun;
    if (fifo_enabled()) {
      return;  // the FIFO keeps what it has
    }
    state_.receive.count = 0;  // without it, the newer character replaces the older one
  }
  state_.receive.push(received);
  if (state_.receive.count == 1) {
    show_head_errors();
  }
}

std::uint8_t Serial::pop_received() {
  if (state_.receive.count == 0) {
    return 0;
  }
  const std::uint8_t value = state_.receive.pop().value;
  show_head_errors();
  return value;
}

void Serial::resume_input_if_room() {
  if (input_stopped_ && backend_ != nullptr && !loopback() && receive_room() > 0) {
    input_stopped_ = false;
    backend_->resume_input();
  }
}

void Serial::flush_transmit() {
  if (state_.transmit.count == 0) {
    return;
  }
  std::size_t sent = state_.transmit.count;
  if (backend_ != nullptr) {
    sent = std::min(sent, backend_->write(std::span(state_.transmit.items).first(state_.transmit.count)));
  }
  auto& fifo = state_.transmit;
  std::copy(fifo.items.begin() + static_cast<std::ptrdiff_t>(sent),
            fifo.items.begin() + static_cast<std::ptrdiff_t>(fifo.count), fifo.items.begin());
  fifo.count -= sent;
  if (fifo.count == 0) {
    transmitter_empty();
  }
}

void Serial::transmitter_empty() {
  state_.transmit_interrupt = true;
  transmitter_emptied_ = true;
}

void Serial::transmit(std::uint8_t value) {
  state_.transmit_interrupt = false;
  if (loopback()) {
    take_in({value, 0});
    if (state_.transmit.count == 0) {
      transmitter_empty();
    }
    return;
  }
  if (state_.transmit.count == kFifoSize) {
    // The guest did not wait for THRE.
    return;
  }
  state_.transmit.push(value);
  flush_transmit();
}

void Serial::write_fifo_control(std::uint8_t value) {
  const bool enable = (value & kFcrEnable) != 0;
  const bool toggled = enable != fifo_enabled();
  if (!enable) {
    value = 0;  // the other bits count only together with it
  }
  if (toggled || (value & kFcrClearReceive) != 0) {
    state_.receive.count = 0;
  }
  if ((toggled || (value & kFcrClearTransmit) != 0) && state_.transmit.count > 0) {
    state_.transmit.count = 0;
    transmitter_empty();
  }
  state_.fifo_control = value & kFcrKept;
}

void Serial::write_modem_control(std::uint8_t value) {
  state_.modem_control = value & kMcrMask;
  const std::uint8_t before = state_.modem_status;
  const std::uint8_t inputs = loopback() ? looped_inputs(state_.modem_control) : kMsrConnected;
  const std::uint8_t changed = (before ^ inputs) & 0xf0;
  std::uint8_t deltas = changed >> 4;
  if ((inputs & kMsrRi) != 0) {
    deltas &= static_cast<std::uint8_t>(~kMsrTrailingRi);  // the ring indicator counts when it ends
  }
  state_.modem_status = inputs | (before & kMsrDeltas) | deltas;
}

std::uint8_t Serial::read_register(std::uint64_t offset) {
  const bool divisor_latch = (state_.line_control & kLcrDivisorLatch) != 0;
  switch (offset) {
    case kData:
      return divisor_latch ? static_cast<std::uint8_t>(state_.divisor) : pop_received();
    case kInterruptEnable:
      return divisor_latch ? static_cast<std::uint8_t>(state_.divisor >> 8) : state_.interrupt_enable;
    case kInterruptIdentity: {
      const std::uint8_t identity = interrupt_identity();
      if ((identity & 0x0f) == kIirTransmitEmpty) {
        state_.transmit_interrupt = false;
      }
      return identity;
    }
    case kLineControl:
      return state_.line_control;
    case kModemControl:
      return state_.modem_control;
    case kLineStatus: {
      const std::uint8_t status = line_status();
      state_.line_errors = 0;
      if (state_.receive.count > 0) {
        state_.receive.items[0].errors = 0;
      }
      return status;
    }
    case kModemStatus: {
      const std::uint8_t status = state_.modem_status;
      state_.modem_status &= static_cast<std::uint8_t>(~kMsrDeltas);
      return status;
    }
    case kScratch:
      return state_.scratch;
    default:
      return 0xff;
  }
}

void Serial::write_register(std::uint64_t offset, std::uint8_t value) {
  const bool divisor_latch = (state_.line_control & kLcrDivisorLatch) != 0;
  switch (offset) {
    case kData:
      if (divisor_latch) {
        state_.divisor = static_cast<std::uint16_t>((state_.divisor & 0xff00) | value);
      } else {
        transmit(value);
      }
      break;
    case kInterruptEnable:
      if (divisor_latch) {
        state_.divisor = static_cast<std::uint16_t>((state_.divisor & 0x00ff) | value << 8);
        break;
      }
      // Enabling it with an empty transmitter is an interrupt at once: how drivers start sending.
      if ((value & ~state_.interrupt_enable & kIerTransmitEmpty) != 0 && state_.transmit.count == 0) {
        state_.transmit_interrupt = true;
      }
      state_.interrupt_enable = value & kIerMask;
      break;
    case kFifoControl:
      write_fifo_control(value);
      break;
    case kLineControl:
      if ((value & ~state_.line_control & kLcrBreak) != 0 && loopback()) {
        take_in({0, kLsrBreak});
      }
      state_.line_control = value;
      break;
    case kModemControl:
      write_modem_control(value);
      break;
    case kScratch:
      state_.scratch = value;
      break;
    default:
      break;  // line and modem status are for the factory test
  }
}

void Serial::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (std::uint8_t& byte : data) {
    byte = read_register(offset++);
  }
  resume_input_if_room();
  update_irq();
}

void Serial::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (const std::uint8_t byte : data) {
    write_register(offset++, byte);
  }
  resume_input_if_room();
  update_irq();
}

void Serial::receive_break() {
  const std::lock_guard lock(mutex_);
  if (!loopback()) {
    take_in({0, kLsrBreak});
    update_irq();
  }
}

std::size_t Serial::can_receive() {
  const std::lock_guard lock(mutex_);
  // In the loop the other end is cut off; its characters wait.
  const std::size_t room = loopback() ? 0 : receive_room();
  input_stopped_ = room == 0;
  return room;
}

void Serial::receive(std::span<const std::uint8_t> bytes) {
  const std::lock_guard lock(mutex_);
  for (const std::uint8_t byte : bytes) {
    take_in({byte, 0});
  }
  update_irq();
}

void Serial::writable() {
  const std::lock_guard lock(mutex_);
  flush_transmit();
  update_irq();
}

void Serial::reset() {
  const std::lock_guard lock(mutex_);
  state_ = State{};
  state_.modem_status = kMsrConnected;
  resume_input_if_room();
  update_irq();
}

StateRecord Serial::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(state_.interrupt_enable);
  writer.put(state_.fifo_control);
  writer.put(state_.line_control);
  writer.put(state_.modem_control);
  writer.put(state_.modem_status);
  writer.put(state_.line_errors);
  writer.put(state_.scratch);
  writer.put(state_.divisor);
  writer.put(state_.transmit_interrupt);
  writer.put(static_cast<std::uint8_t>(state_.receive.count));
  for (const Received& received : std::span(state_.receive.items).first(state_.receive.count)) {
    writer.put(received.value);
    writer.put(received.errors);
  }
  writer.put_bytes(std::span(state_.transmit.items).first(state_.transmit.count));
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> Serial::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  State state;
  WISP_ASSIGN(state.interrupt_enable, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.fifo_control, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.line_control, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.modem_control, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.modem_status, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.line_errors, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.scratch, reader.get<std::uint8_t>());
  WISP_ASSIGN(state.divisor, reader.get<std::uint16_t>());
  WISP_ASSIGN(state.transmit_interrupt, reader.get<bool>());
  state.interrupt_enable &= kIerMask;
  state.fifo_control &= (state.fifo_control & kFcrEnable) != 0 ? kFcrKept : std::uint8_t{0};
  state.modem_control &= kMcrMask;
  state.line_errors &= kLsrErrors;
  const std::uint8_t room = (state.fifo_control & kFcrEnable) != 0 ? kFifoSize : 1;
  WISP_ASSIGN(const std::uint8_t count, reader.get_at_most<std::uint8_t>(room, "received characters"));
  for (std::uint8_t i = 0; i < count; ++i) {
    WISP_ASSIGN(const std::uint8_t value, reader.get<std::uint8_t>());
    WISP_ASSIGN(const std::uint8_t errors, reader.get<std::uint8_t>());
    state.receive.push({value, static_cast<std::uint8_t>(errors & kLsrErrors)});
  }
  WISP_ASSIGN(const auto transmit, reader.get_bytes(kFifoSize));
  for (const std::uint8_t value : transmit) {
    state.transmit.push(value);
  }
  const std::lock_guard lock(mutex_);
  state_ = state;
  // Whatever was pending is told anew, and what could not be sent is tried again.
  told_causes_ = 0;
  flush_transmit();
  resume_input_if_room();
  update_irq();
  return {};
}

}  // namespace wisp
