// A kernel image as the loaders read it: bounded reads from a file or, for tests and fuzzing, from memory.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"

namespace wisp {

class ImageReader final {
 public:
  // `fd` is borrowed and must be a regular file; anything else is an error that says what it is.
  [[nodiscard]] static Result<ImageReader> from_fd(int fd);
  // The bytes are borrowed. Such an image can be parsed but not loaded.
  [[nodiscard]] static ImageReader from_bytes(std::span<const std::uint8_t> bytes);

  [[nodiscard]] std::uint64_t size() const { return size_; }
  // -1 for an image in memory.
  [[nodiscard]] int fd() const { return fd_; }

  // Fills `out` from `offset`; an error where the file ends before.
  [[nodiscard]] Result<void> read(std::uint64_t offset, std::span<std::uint8_t> out) const;
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  [[nodiscard]] Result<T> load(std::uint64_t offset) const {
    T value{};
    WISP_TRY(read(offset, std::span(reinterpret_cast<std::uint8_t*>(&value), sizeof value)));
    return value;
  }
  // The first bytes, at most `limit`, fewer where the file is shorter.
  [[nodiscard]] Result<std::vector<std::uint8_t>> head(std::size_t limit) const;

 private:
  ImageReader(int fd, std::span<const std::uint8_t> bytes, std::uint64_t size)
      : fd_(fd), bytes_(bytes), size_(size) {}
  int fd_;
  std::span<const std::uint8_t> bytes_;
  std::uint64_t size_;
};

// Opens a kernel or initrd for reading, close-on-exec, without waiting on a FIFO or terminal.
[[nodiscard]] Result<UniqueFd> open_image(const std::string& path);

}  // namespace wisp
