#include "devices/pc_testdev.h"

#include <algorithm>

#include "base/bytes.h"

namespace wisp {
namespace {

constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kFlushStart = 4;
constexpr std::uint64_t kFlushEnd = 8;

constexpr std::uint16_t kItemSignature = 0x00;
constexpr std::uint16_t kItemInterface = 0x01;
constexpr std::uint16_t kItemRamSize = 0x03;
constexpr std::uint16_t kItemCpus = 0x05;
constexpr std::uint16_t kItemMaxCpus = 0x0f;

}  // namespace

// --- TestRegister

void TestRegister::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < data.size(); ++i) {
    const std::uint64_t at = offset + i;
    data[i] = at >= kFlushStart && at < kFlushEnd ? 0xff : bytes_[at % 4];
  }
}

void TestRegister::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < data.size(); ++i) {
    const std::uint64_t at = offset + i;
    if (at < kFlushStart || at >= kFlushEnd) {
      bytes_[at % 4] = data[i];
    }
  }
}

void TestRegister::reset() {
  const std::lock_guard lock(mutex_);
  bytes_ = {};
}

StateRecord TestRegister::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(load_le<std::uint32_t>(bytes_.data()));
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> TestRegister::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const auto value, reader.get<std::uint32_t>());
  if (!reader.empty()) {
    return fail("saved test register has bytes behind its end");
  }
  const std::lock_guard lock(mutex_);
  store_le(bytes_.data(), value);
  return {};
}

// --- TestIrqLines

void TestIrqLines::set(std::uint32_t levels) {
  for (std::uint32_t i = 0; i < lines_.size(); ++i) {
    if (((levels ^ levels_) >> i & 1) != 0) {
      lines_[i]->set_level((levels >> i & 1) != 0);
    }
  }
  levels_ = levels;
}

void TestIrqLines::io_read(std::uint64_t /*offset*/, std::span<std::uint8_t> data) {
  std::ranges::fill(data, std::uint8_t{0xff});
}

void TestIrqLines::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  if (data.size() != 1 || offset >= lines_.size()) {
    return;
  }
  const std::lock_guard lock(mutex_);
  const std::uint32_t bit = 1U << offset;
  set(data[0] != 0 ? levels_ | bit : levels_ & ~bit);
}

void TestIrqLines::reset() {
  const std::lock_guard lock(mutex_);
  set(0);
}

StateRecord TestIrqLines::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(levels_);
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> TestIrqLines::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const auto levels, reader.get<std::uint32_t>());
  if (!reader.empty() || levels >> kTestIrqCount != 0) {
    return fail("saved test interrupt lines {:#x} are more than {}", levels, kTestIrqCount);
  }
  const std::lock_guard lock(mutex_);
  set(levels);
  return {};
}

// --- TestMemory

void TestMemory::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(offset), data.size(), data.begin());
}

void TestMemory::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  std::ranges::copy(data, bytes_.begin() + static_cast<std::ptrdiff_t>(offset));
}

void TestMemory::reset() {
  const std::lock_guard lock(mutex_);
  std::ranges::fill(bytes_, std::uint8_t{0});
}

StateRecord TestMemory::save() const {
  const std::lock_guard lock(mutex_);
  return {.name = std::string(name()), .version = kVersion, .bytes = bytes_};
}

Result<void> TestMemory::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  if (record.bytes.size() != kTestMemorySize) {
    return fail("saved test memory has {} bytes in place of {}", record.bytes.size(), kTestMemorySize);
  }
  const std::lock_guard lock(mutex_);
  bytes_ = record.bytes;
  return {};
}

// --- FirmwareConfig

FirmwareConfig::Item FirmwareConfig::item() const {
  switch (selected_) {
    case kItemSignature:
      return {0x554d4551, 4};  // "QEMU", as the interface has it
    case kItemInterface:
      return {1, 4};  // ports alone, no DMA
    case kItemRamSize:
      return {facts_.ram_size, 8};
    case kItemCpus:
      return {facts_.cpus, 2};
    case kItemMaxCpus:
      return {facts_.max_cpus, 2};
    default:
      return {};
  }
}

void FirmwareConfig::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::ranges::fill(data, std::uint8_t{0});
  if (offset != 1 || data.empty()) {
    return;
  }
  const std::lock_guard lock(mutex_);
  const Item chosen = item();
  if (position_ < chosen.size) {
    data[0] = static_cast<std::uint8_t>(chosen.value >> (8 * position_));
    ++position_;
  }
}

void FirmwareConfig::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  if (offset != 0 || data.size() != 2) {
    return;
  }
  const std::lock_guard lock(mutex_);
  selected_ = load_le<std::uint16_t>(data.data());
  position_ = 0;
}

void FirmwareConfig::reset() {
  const std::lock_guard lock(mutex_);
  selected_ = 0;
  position_ = 0;
}

StateRecord FirmwareConfig::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(selected_);
  writer.put(position_);
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> FirmwareConfig::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const auto selected, reader.get<std::uint16_t>());
  WISP_ASSIGN(const auto position, reader.get<std::uint32_t>());
  if (!reader.empty()) {
    return fail("saved firmware configuration has bytes behind its end");
  }
  const std::lock_guard lock(mutex_);
  selected_ = selected;
  position_ = std::min(position, 8U);
  return {};
}

}  // namespace wisp
