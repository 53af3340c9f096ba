// Little-endian numbers in byte buffers; the layout of every device register and on-disk structure here.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <span>

namespace wisp {

static_assert(std::endian::native == std::endian::little, "Wisp runs on x86-64 only");

// The number in the first sizeof(T) bytes of `bytes`, which must be that long.
template <std::integral T>
[[nodiscard]] inline T load_le(const void* bytes) {
  T value{};
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

template <std::integral T>
inline void store_le(void* bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

// A register access of 1 to 8 bytes as one number; missing bytes are zero.
[[nodiscard]] inline std::uint64_t bytes_to_u64(std::span<const std::uint8_t> bytes) {
  std::uint64_t value = 0;
  std::memcpy(&value, bytes.data(), bytes.size() < sizeof value ? bytes.size() : sizeof value);
  return value;
}

// The low bytes of `value`, as many as `bytes` holds; bytes past the eighth become zero.
inline void u64_to_bytes(std::uint64_t value, std::span<std::uint8_t> bytes) {
  const std::size_t size = bytes.size() < sizeof value ? bytes.size() : sizeof value;
  std::memcpy(bytes.data(), &value, size);
  for (std::uint8_t& rest : bytes.subspan(size)) {
    rest = 0;
  }
}

}  // namespace wisp
