#include "devices/i8042.h"

#include <algorithm>

namespace wisp {
namespace {

constexpr std::uint64_t kData = 0;
constexpr std::uint64_t kStatusCommand = 4;
constexpr std::uint8_t kStatusInputFull = 1U << 1;
constexpr std::uint8_t kCommandWriteOutputPort = 0xd1;
constexpr std::uint8_t kOutputPortNotReset = 1U << 0;
// 0xf0-0xff pulse those of the output port's low four lines whose bit is 0.
constexpr std::uint8_t kCommandPulse = 0xf0;
constexpr std::uint32_t kVersion = 1;

}  // namespace

void I8042::io_read(std::uint64_t offset, std::span<std::uint8_t> data) {
  for (std::uint8_t& byte : data) {
    byte = offset++ == kStatusCommand ? static_cast<std::uint8_t>(~kStatusInputFull) : std::uint8_t{0xff};
  }
}

bool I8042::write_byte(std::uint64_t offset, std::uint8_t value) {
  if (offset == kStatusCommand) {
    output_port_next_ = value == kCommandWriteOutputPort;
    return value >= kCommandPulse && (value & kOutputPortNotReset) == 0;
  }
  if (offset == kData && output_port_next_) {
    output_port_next_ = false;
    return (value & kOutputPortNotReset) == 0;
  }
  return false;
}

void I8042::io_write(std::uint64_t offset, std::span<const std::uint8_t> data) {
  bool reset = false;
  {
    const std::lock_guard lock(mutex_);
    for (const std::uint8_t byte : data) {
      reset = write_byte(offset++, byte) || reset;
    }
  }
  if (reset && on_reset_) {
    on_reset_();
  }
}

void I8042::reset() {
  const std::lock_guard lock(mutex_);
  output_port_next_ = false;
}

StateRecord I8042::save() const {
  const std::lock_guard lock(mutex_);
  StateWriter writer;
  writer.put(output_port_next_);
  return {.name = std::string(name()), .version = kVersion, .bytes = writer.take()};
}

Result<void> I8042::load(const StateRecord& record) {
  WISP_TRY(check_version(record, kVersion));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const bool output_port_next, reader.get<bool>());
  const std::lock_guard lock(mutex_);
  output_port_next_ = output_port_next;
  return {};
}

}  // namespace wisp
