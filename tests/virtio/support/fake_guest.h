// A small guest memory for tests, with a bump allocator for what a driver would allocate.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "memory/guest_memory.h"

namespace wisp::test {

// RAM in one or more blocks, all with dirty tracking. Each block is followed by an unmapped host page, so
// that a device that runs past its end crashes the test.
class FakeGuest final {
 public:
  struct Range {
    Gpa gpa = 0;
    std::uint64_t size = 0;  // a multiple of the page size
  };
  static constexpr Gpa kBase = 0x10000;  // the default block starts here: address 0 is not RAM
  static constexpr std::uint64_t kDefaultSize = 4ULL << 20;

  // Shared RAM is memory that another process could map, with a descriptor for each block.
  enum class Backing : std::uint8_t { kPrivate, kShared };

  FakeGuest() : FakeGuest({{kBase, kDefaultSize}}) {}
  explicit FakeGuest(std::vector<Range> ranges, Backing backing = Backing::kPrivate);
  FakeGuest(const FakeGuest&) = delete;
  FakeGuest& operator=(const FakeGuest&) = delete;
  ~FakeGuest();

  [[nodiscard]] const GuestMemory& memory() const { return memory_; }
  // Start and end (exclusive) of the first block.
  [[nodiscard]] Gpa base() const { return ranges_.front().gpa; }
  [[nodiscard]] Gpa end() const { return ranges_.front().gpa + ranges_.front().size; }

  // Unused RAM of the first block; aborts the test where there is no more.
  [[nodiscard]] Gpa allocate(std::uint64_t size, std::uint64_t alignment = 16);
  // Allocates and fills.
  [[nodiscard]] Gpa allocate(std::span<const std::uint8_t> bytes);
  // Forgets all allocations and zeroes all RAM.
  void clear();

  // Abort where the range is not RAM: the test itself is wrong then.
  void write(Gpa gpa, std::span<const std::uint8_t> bytes);
  void write(Gpa gpa, std::string_view text);
  [[nodiscard]] std::vector<std::uint8_t> read(Gpa gpa, std::size_t size) const;
  [[nodiscard]] std::string read_text(Gpa gpa, std::size_t size) const;
  template <typename T>
  void store(Gpa gpa, const T& value) {
    write(gpa, std::span(reinterpret_cast<const std::uint8_t*>(&value), sizeof value));
  }
  template <typename T>
  [[nodiscard]] T load(Gpa gpa) const {
    return memory_.load<T>(gpa).value();
  }
  // Whether any page was written (by the device or by this class) since the last take, for each page of the
  // first block.
  [[nodiscard]] std::vector<bool> take_dirty_pages();

 private:
  std::vector<Range> ranges_;
  std::vector<GuestMemoryBlock> blocks_;
  GuestMemory memory_;
  Gpa next_ = 0;
};

}  // namespace wisp::test
