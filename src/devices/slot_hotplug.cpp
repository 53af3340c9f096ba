#include "devices/slot_hotplug.h"

#include "base/bytes.h"
#include "boot/acpi_layout.h"

namespace wisp {
namespace {

using Registers = SlotHotplugRegisters;
constexpr std::uint32_t kVersion = 1;

}  // namespace

void SlotHotplug::set_initial(std::uint64_t present) {
  const std::lock_guard lock(mutex_);
  present_ = present;
}

void SlotHotplug::set_present(std::uint64_t present) {
  {
    const std::lock_guard lock(mutex_);
    changed_ |= present_ ^ present;
    present_ = present;
  }
  notify_();
}

void SlotHotplug::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::uint32_t value = 0;
  if (data.size() == sizeof value) {
    const std::lock_guard lock(mutex_);
    switch (offset) {
      case Registers::kPresent0:
        value = static_cast<std::uint32_t>(present_);
        break;
      case Registers::kPresent1:
        value = static_cast<std::uint32_t>(present_ >> 32);
        break;
      case Registers::kChanged0:
        value = static_cast<std::uint32_t>(changed_);
        break;
      case Registers::kChanged1:
        value = static_cast<std::uint32_t>(changed_ >> 32);
        break;
      default:
        break;
    }
  }
  u64_to_bytes(value, data);
}

void SlotHotplug::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  if (data.size() != sizeof(std::uint32_t)) {
    return;
  }
  const std::uint64_t value = bytes_to_u64(data);
  const std::lock_guard lock(mutex_);
  if (offset == Registers::kChanged0) {
    changed_ &= ~value;
  } else if (offset == Registers::kChanged1) {
    changed_ &= ~(value << 32);
  }
}

void SlotHotplug::reset() {
  const std::lock_guard lock(mutex_);
  changed_ = 0;
}

StateRecord SlotHotplug::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(present_);
  writer.put(changed_);
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> SlotHotplug::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const std::uint64_t present, reader.get<std::uint64_t>());
  WISP_ASSIGN(const std::uint64_t changed, reader.get<std::uint64_t>());
  const std::lock_guard lock(mutex_);
  present_ = present;
  changed_ = changed;
  return {};
}

}  // namespace wisp
