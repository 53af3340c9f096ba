#include "hypervisor/soft/ioapic.h"

#include "base/bytes.h"

namespace wisp::soft {
namespace {

constexpr std::uint32_t kWindowSelect = 0x00;
constexpr std::uint32_t kWindowData = 0x10;
constexpr std::uint32_t kWindowEoi = 0x40;

constexpr std::uint64_t kEntryMasked = 1ULL << 16;
constexpr std::uint64_t kEntryLevel = 1ULL << 15;
constexpr std::uint64_t kEntryRemoteIrr = 1ULL << 14;
constexpr std::uint64_t kEntryDeliveryStatus = 1ULL << 12;
constexpr std::uint64_t kEntryLogical = 1ULL << 11;
constexpr std::uint64_t kEntryReadOnly = kEntryRemoteIrr | kEntryDeliveryStatus;
// Bits 55:49 carry destination bits 14:8 (extended destination id).
constexpr std::uint64_t kEntryWritable = 0xfffe00000001afffULL;

}  // namespace

void IoApic::reset() {
  const std::lock_guard lock(mutex_);
  entries_.fill(kEntryMasked);
  levels_ = 0;
  id_ = 0;
  select_ = 0;
}

std::uint32_t IoApic::read_register() const {
  switch (select_) {
    case 0:
      return id_ << 24;
    case 1:
      return (kIoApicPins - 1) << 16 | 0x20;
    case 2:
      return id_ << 24;
    default:
      break;
  }
  const std::uint32_t index = (select_ - 0x10U) >> 1;
  if (select_ < 0x10 || index >= kIoApicPins) {
    return 0;
  }
  return static_cast<std::uint32_t>((select_ & 1) != 0 ? entries_[index] >> 32 : entries_[index]);
}

void IoApic::write_register(std::uint32_t value) {
  if (select_ == 0) {
    id_ = (value >> 24) & 0xf;
    return;
  }
  const std::uint32_t pin = (select_ - 0x10U) >> 1;
  if (select_ < 0x10 || pin >= kIoApicPins) {
    return;
  }
  std::uint64_t& entry = entries_[pin];
  std::uint64_t next = (select_ & 1) != 0 ? (entry & 0xffffffffULL) | static_cast<std::uint64_t>(value) << 32
                                          : (entry & ~0xffffffffULL) | value;
  next = (next & kEntryWritable) | (entry & kEntryReadOnly);
  if (!level_triggered(next)) {
    next &= ~kEntryRemoteIrr;
  }
  entry = next;
  service(pin);
}

// Level-triggered in effect: NMI, INIT and the like are edges whatever their trigger mode says
// (82093AA, 3.2.4).
bool IoApic::level_triggered(std::uint64_t entry) {
  const auto mode = static_cast<DeliveryMode>((entry >> 8) & 7);
  return (entry & kEntryLevel) != 0 &&
         (mode == DeliveryMode::kFixed || mode == DeliveryMode::kLowestPriority);
}

bool IoApic::send(std::uint64_t entry) const {
  const bool logical = (entry & kEntryLogical) != 0;
  const auto destination = static_cast<std::uint32_t>(((entry >> 56) & 0xff) | ((entry >> 49) & 0x7f) << 8);
  return bus_.deliver({.mode = static_cast<DeliveryMode>((entry >> 8) & 7),
                       .vector = static_cast<std::uint8_t>(entry),
                       .level_triggered = level_triggered(entry),
                       .logical = logical,
                       .destination = widen_destination(destination, logical)});
}

void IoApic::service(std::uint32_t pin) {
  std::uint64_t& entry = entries_[pin];
  if (!level_triggered(entry) || (levels_ & (1U << pin)) == 0 ||
      (entry & (kEntryRemoteIrr | kEntryMasked)) != 0) {
    return;
  }
  // Remote IRR says that a local APIC took it; where none did, the request stands.
  if (send(entry)) {
    entry |= kEntryRemoteIrr;
  }
}

void IoApic::pulse(std::uint32_t pin) {
  if (pin >= kIoApicPins) {
    return;
  }
  const std::lock_guard lock(mutex_);
  levels_ &= ~(1U << pin);
  change(pin, true);
  change(pin, false);
}

void IoApic::set_level(std::uint32_t pin, bool high) {
  if (pin >= kIoApicPins) {
    return;
  }
  const std::lock_guard lock(mutex_);
  change(pin, high);
}

void IoApic::change(std::uint32_t pin, bool high) {
  const std::uint32_t bit = 1U << pin;
  const bool rising = high && (levels_ & bit) == 0;
  levels_ = high ? levels_ | bit : levels_ & ~bit;
  const std::uint64_t entry = entries_[pin];
  if (level_triggered(entry)) {
    service(pin);
  } else if (rising && (entry & kEntryMasked) == 0) {
    send(entry);
  }
}

void IoApic::eoi(std::uint8_t vector) {
  const std::lock_guard lock(mutex_);
  for (std::uint32_t pin = 0; pin < kIoApicPins; ++pin) {
    std::uint64_t& entry = entries_[pin];
    if ((entry & 0xff) == vector && (entry & kEntryLevel) != 0 && (entry & kEntryRemoteIrr) != 0) {
      entry &= ~kEntryRemoteIrr;
      service(pin);
    }
  }
}

void IoApic::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  std::uint32_t value = 0;
  if (offset == kWindowSelect) {
    value = select_;
  } else if (offset == kWindowData) {
    value = read_register();
  }
  u64_to_bytes(value, data);
}

void IoApic::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  const auto value = static_cast<std::uint32_t>(bytes_to_u64(data));
  if (offset == kWindowEoi) {
    eoi(static_cast<std::uint8_t>(value));
    return;
  }
  const std::lock_guard lock(mutex_);
  if (offset == kWindowSelect) {
    select_ = static_cast<std::uint8_t>(value);
  } else if (offset == kWindowData) {
    write_register(value);
  }
}

void IoApic::save(StateWriter& writer) const {
  const std::lock_guard lock(mutex_);
  for (const std::uint64_t entry : entries_) {
    writer.put(entry);
  }
  writer.put(levels_);
  writer.put(id_);
  writer.put(select_);
}

Result<void> IoApic::load(StateReader& reader) {
  std::array<std::uint64_t, kIoApicPins> entries{};
  for (std::uint64_t& entry : entries) {
    WISP_ASSIGN(entry, reader.get<std::uint64_t>());
    entry &= kEntryWritable | (level_triggered(entry) ? kEntryRemoteIrr : 0);
  }
  WISP_ASSIGN(const auto levels,
              reader.get_at_most<std::uint32_t>((1U << kIoApicPins) - 1, "I/O APIC pin mask"));
  WISP_ASSIGN(const auto id, reader.get_at_most<std::uint32_t>(15, "I/O APIC id"));
  WISP_ASSIGN(const auto select, reader.get<std::uint8_t>());
  const std::lock_guard lock(mutex_);
  entries_ = entries;
  levels_ = levels;
  id_ = id;
  select_ = select;
  return {};
}

}  // namespace wisp::soft
