#include "devices/debug_exit.h"

#include <algorithm>

#include "base/bytes.h"

namespace wisp {
namespace {

constexpr std::uint32_t kVersion = 1;

}  // namespace

void DebugExit::io_read(std::uint64_t /*offset*/, std::span<std::uint8_t> data) {
  std::ranges::fill(data, std::uint8_t{0});
}

void DebugExit::io_write(std::uint64_t /*offset*/, std::span<const std::uint8_t> data) {
  if (on_exit_) {
    on_exit_(static_cast<std::uint32_t>(bytes_to_u64(data) << 1) | 1);
  }
}

StateRecord DebugExit::save() const {
  return {.name = std::string(name()), .version = kVersion, .bytes = {}};
}

Result<void> DebugExit::load(const StateRecord& record) {
  return check_version(record, kVersion);
}

}  // namespace wisp
