// Arithmetic on numbers from outside: the result is empty where it would not fit.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>

namespace wisp {

template <std::unsigned_integral T>
[[nodiscard]] constexpr std::optional<T> checked_add(T a, T b) {
  T sum{};
  return __builtin_add_overflow(a, b, &sum) ? std::nullopt : std::optional<T>(sum);
}

template <std::unsigned_integral T>
[[nodiscard]] constexpr std::optional<T> checked_mul(T a, T b) {
  T product{};
  return __builtin_mul_overflow(a, b, &product) ? std::nullopt : std::optional<T>(product);
}

// The value as type To, where To can hold it.
template <std::integral To, std::integral From>
[[nodiscard]] constexpr std::optional<To> checked_cast(From value) {
  To cast{};
  return __builtin_add_overflow(value, From{0}, &cast) ? std::nullopt : std::optional<To>(cast);
}

// `alignment` is a power of two.
[[nodiscard]] constexpr bool is_aligned(std::uint64_t value, std::uint64_t alignment) {
  return (value & (alignment - 1)) == 0;
}
[[nodiscard]] constexpr std::uint64_t align_down(std::uint64_t value, std::uint64_t alignment) {
  return value & ~(alignment - 1);
}
[[nodiscard]] constexpr std::optional<std::uint64_t> align_up(std::uint64_t value, std::uint64_t alignment) {
  const auto sum = checked_add(value, alignment - 1);
  return sum ? std::optional(align_down(*sum, alignment)) : std::nullopt;
}

// Whether [start, start + size) lies within [0, limit) without wrapping.
[[nodiscard]] constexpr bool range_within(std::uint64_t start, std::uint64_t size, std::uint64_t limit) {
  return size <= limit && start <= limit - size;
}

}  // namespace wisp
