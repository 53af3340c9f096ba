// What a fuzzer hands over, taken piece by piece.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace wisp::fuzz {

class Input final {
 public:
  Input(const std::uint8_t* data, std::size_t size) : bytes_(data, size) {}
  // The next bytes; zeroes where there are no more.
  template <typename T>
  T get() {
    T value{};
    const std::size_t size = std::min(sizeof value, bytes_.size());
    std::memcpy(&value, bytes_.data(), size);
    bytes_ = bytes_.subspan(size);
    return value;
  }
  std::uint8_t byte() { return get<std::uint8_t>(); }
  [[nodiscard]] std::span<const std::uint8_t> take(std::size_t size) {
    const auto part = bytes_.first(std::min(size, bytes_.size()));
    bytes_ = bytes_.subspan(part.size());
    return part;
  }
  [[nodiscard]] bool empty() const { return bytes_.empty(); }

 private:
  std::span<const std::uint8_t> bytes_;
};

}  // namespace wisp::fuzz
