#include "devices/power.h"

#include <utility>

namespace wisp {
namespace {

constexpr std::uint8_t kSleepEnable = 1U << 5;
constexpr std::uint8_t kSleepTypeMask = 7U << 2;
constexpr std::uint32_t kVersion = 1;

}  // namespace

PowerDevice::PowerDevice(std::unique_ptr<IrqLine> irq, PowerCallbacks callbacks)
    : irq_(std::move(irq)), callbacks_(std::move(callbacks)) {}

void PowerDevice::raise(std::uint32_t events) {
  const std::lock_guard lock(mutex_);
  set_events(events_ | (events & kPowerEventAll));
}

void PowerDevice::set_events(std::uint32_t events) {
  events_ = events;
  irq_->set_level(events_ != 0);
}

std::uint8_t PowerDevice::read_byte(std::uint64_t offset) {
  if (offset < kPowerEventSelector + sizeof events_) {
    const std::uint64_t shift = (offset - kPowerEventSelector) * 8;
    const auto shown = static_cast<std::uint8_t>(events_ >> shift);
    if (shown != 0) {
      set_events(events_ & ~(std::uint32_t{shown} << shift));
    }
    return shown;
  }
  if (offset == kPowerSleepControl) {
    return sleep_control_;
  }
  // Sleep status: the machine never sleeps, so it never wakes.
  return 0;
}

void PowerDevice::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (std::uint8_t& byte : data) {
    byte = read_byte(offset++);
  }
}

void PowerDevice::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  bool shutdown = false;
  bool reset = false;
  {
    const std::lock_guard lock(mutex_);
    for (const std::uint8_t byte : data) {
      if (offset == kPowerSleepControl) {
        // SLP_EN is write-only.
        sleep_control_ = byte & kSleepTypeMask;
        shutdown = shutdown || ((byte & kSleepEnable) != 0 && sleep_control_ >> 2 == kPowerSleepTypeS5);
      } else if (offset == kPowerReset) {
        reset = reset || byte == kPowerResetValue;
      }
      ++offset;
    }
  }
  if (shutdown && callbacks_.shutdown) {
    callbacks_.shutdown();
  }
  if (reset && callbacks_.reset) {
    callbacks_.reset();
  }
}

void PowerDevice::reset() {
  const std::lock_guard lock(mutex_);
  sleep_control_ = 0;
  set_events(0);
}

StateRecord PowerDevice::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(events_);
  writer.put(sleep_control_);
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> PowerDevice::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const std::uint32_t events, reader.get<std::uint32_t>());
  WISP_ASSIGN(const std::uint8_t sleep_control, reader.get<std::uint8_t>());
  const std::lock_guard lock(mutex_);
  sleep_control_ = sleep_control & kSleepTypeMask;
  set_events(events & kPowerEventAll);
  return {};
}

}  // namespace wisp
