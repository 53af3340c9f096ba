// The bytes in which a part saves its state: little-endian numbers and length-prefixed byte strings in the
// order in which they are put. A loaded state is hostile input: every get is bounded.
// Nothing takes snapshots yet: the tests alone save and load.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"

namespace wisp {

class StateWriter final {
 public:
  template <typename T>
    requires std::integral<T> || std::is_enum_v<T>
  void put(T value) {
    append(std::span(reinterpret_cast<const std::uint8_t*>(&value), sizeof value));
  }
  void put_bytes(std::span<const std::uint8_t> bytes);
  void put_string(std::string_view text);
  [[nodiscard]] const std::vector<std::uint8_t>& bytes() const { return bytes_; }
  [[nodiscard]] std::vector<std::uint8_t> take() { return std::move(bytes_); }

 private:
  void append(std::span<const std::uint8_t> bytes);
  std::vector<std::uint8_t> bytes_;
};

class StateReader final {
 public:
  explicit StateReader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}
  template <typename T>
    requires std::integral<T>
  [[nodiscard]] Result<T> get() {
    if (bytes_.size() < sizeof(T)) {
      return fail("saved state ends early");
    }
    T value{};
    if constexpr (std::same_as<T, bool>) {
      value = bytes_[0] != 0;
    } else {
      value = load_le<T>(bytes_.data());
    }
    bytes_ = bytes_.subspan(sizeof(T));
    return value;
  }
  // A number no greater than `limit`.
  template <typename T>
    requires std::unsigned_integral<T>
  [[nodiscard]] Result<T> get_at_most(T limit, std::string_view what) {
    WISP_ASSIGN(const T value, get<T>());
    if (value > limit) {
      return fail("saved state has {} {}, more than {}", what, value, limit);
    }
    return value;
  }
  // A view into the record; at most `limit` bytes.
  [[nodiscard]] Result<std::span<const std::uint8_t>> get_bytes(std::size_t limit);
  [[nodiscard]] Result<std::string> get_string(std::size_t limit);
  [[nodiscard]] bool empty() const { return bytes_.empty(); }

 private:
  std::span<const std::uint8_t> bytes_;
};

// What one part of a machine saves: its name, the version of its layout, its bytes.
struct StateRecord {
  std::string name;
  std::uint32_t version = 1;
  std::vector<std::uint8_t> bytes;
};

// Fails where the record's version is none of 1..newest.
[[nodiscard]] Result<void> check_version(const StateRecord& record, std::uint32_t newest);

}  // namespace wisp
