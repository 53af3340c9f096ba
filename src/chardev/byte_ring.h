// A bounded queue of bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

namespace wisp {

class ByteRing final {
 public:
  explicit ByteRing(std::size_t capacity)
      : bytes_(std::make_unique_for_overwrite<std::uint8_t[]>(capacity)), capacity_(capacity) {}

  [[nodiscard]] std::size_t capacity() const { return capacity_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::size_t room() const { return capacity_ - size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }

  // Takes as many as fit; returns how many.
  std::size_t push(std::span<const std::uint8_t> bytes) {
    const std::size_t count = std::min(bytes.size(), room());
    std::size_t done = 0;
    while (done < count) {
      const std::size_t at = (start_ + size_) % capacity_;
      const std::size_t step = std::min(count - done, capacity_ - at);
      std::memcpy(bytes_.get() + at, bytes.data() + done, step);
      size_ += step;
      done += step;
    }
    return count;
  }
  // Copies the oldest bytes without taking them; returns how many.
  std::size_t peek(std::span<std::uint8_t> out) const {
    const std::size_t count = std::min(out.size(), size_);
    std::size_t done = 0;
    while (done < count) {
      const std::size_t at = (start_ + done) % capacity_;
      const std::size_t step = std::min(count - done, capacity_ - at);
      std::memcpy(out.data() + done, bytes_.get() + at, step);
      done += step;
    }
    return count;
  }
  // Forgets the oldest `count` bytes (at most all).
  void drop(std::size_t count) {
    count = std::min(count, size_);
    start_ = (start_ + count) % capacity_;
    size_ -= count;
  }
  void clear() { drop(size_); }

 private:
  const std::unique_ptr<std::uint8_t[]> bytes_;
  const std::size_t capacity_;
  std::size_t start_ = 0;
  std::size_t size_ = 0;
};

}  // namespace wisp
