// Copies between private buffers and guest RAM, which other vCPUs write at any time: each guest byte is
// touched once, and an aligned number of 2, 4 or 8 bytes is copied whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/checked.h"

namespace wisp {

template <typename T>
inline bool copy_number_in(void* out, const std::uint8_t* guest) {
  if (!is_aligned(reinterpret_cast<std::uintptr_t>(guest), sizeof(T))) {
    return false;
  }
  const T value = __atomic_load_n(static_cast<const T*>(static_cast<const void*>(guest)), __ATOMIC_RELAXED);
  std::memcpy(out, &value, sizeof value);
  return true;
}

template <typename T>
inline bool copy_number_out(std::uint8_t* guest, const void* in) {
  if (!is_aligned(reinterpret_cast<std::uintptr_t>(guest), sizeof(T))) {
    return false;
  }
  T value{};
  std::memcpy(&value, in, sizeof value);
  __atomic_store_n(static_cast<T*>(static_cast<void*>(guest)), value, __ATOMIC_RELAXED);
  return true;
}

inline void copy_from_guest(std::uint8_t* out, const std::uint8_t* guest, std::size_t size) {
  bool done = false;
  switch (size) {
    case 2:
      done = copy_number_in<std::uint16_t>(out, guest);
      break;
    case 4:
      done = copy_number_in<std::uint32_t>(out, guest);
      break;
    case 8:
      done = copy_number_in<std::uint64_t>(out, guest);
      break;
    default:
      break;
  }
  if (!done) {
    std::memcpy(out, guest, size);
  }
}

inline void copy_to_guest(std::uint8_t* guest, const std::uint8_t* in, std::size_t size) {
  bool done = false;
  switch (size) {
    case 2:
      done = copy_number_out<std::uint16_t>(guest, in);
      break;
    case 4:
      done = copy_number_out<std::uint32_t>(guest, in);
      break;
    case 8:
      done = copy_number_out<std::uint64_t>(guest, in);
      break;
    default:
      break;
  }
  if (!done) {
    std::memcpy(guest, in, size);
  }
}

}  // namespace wisp
