// Memory for generated code, mapped twice: one mapping to write it, one to run it. No page is ever both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/error.h"

namespace wisp::soft {

class CodeMemory final {
 public:
  // `size` in bytes, a multiple of the page size; takes host memory only as it is written.
  [[nodiscard]] static Result<CodeMemory> create(std::size_t size);
  CodeMemory(CodeMemory&& other) noexcept;
  CodeMemory& operator=(CodeMemory&&) = delete;
  ~CodeMemory();

  [[nodiscard]] std::size_t size() const { return size_; }
  // The bytes, to write.
  [[nodiscard]] std::uint8_t* writable() const { return writable_; }
  // The same bytes, to run.
  [[nodiscard]] const std::uint8_t* executable() const { return executable_; }
  [[nodiscard]] std::uint8_t* writable_of(const std::uint8_t* code) const {
    return writable_ + (code - executable_);
  }
  // Has the host provide the memory from `prepared`, which moves on, to `end` at once, rather than page by
  // page as it is touched; an advice.
  void prepare(std::size_t& prepared, std::size_t end);
  [[nodiscard]] bool holds(std::uint64_t address) const {
    const auto start = reinterpret_cast<std::uint64_t>(executable_);
    return address >= start && address - start < size_;
  }

 private:
  CodeMemory(std::uint8_t* writable, const std::uint8_t* executable, std::size_t size)
      : writable_(writable), executable_(executable), size_(size) {}
  std::uint8_t* writable_;
  const std::uint8_t* executable_;
  std::size_t size_;
};

}  // namespace wisp::soft
