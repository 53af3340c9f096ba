// What notices a guest that reaches host memory outside its own: generated code is not instrumented, so
// guest RAM stands between pages that nobody may touch, and among memory whose content is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace wisp::fuzz {

// Host memory with inaccessible memory on both sides.
class GuardedBlock final {
 public:
  explicit GuardedBlock(std::size_t size);
  ~GuardedBlock();
  GuardedBlock(const GuardedBlock&) = delete;
  GuardedBlock& operator=(const GuardedBlock&) = delete;
  [[nodiscard]] std::uint8_t* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  // Zeroes again.
  void clear();

 private:
  std::size_t size_;
  std::uint8_t* data_;
};

// Blocks of a known pattern, at some distance of one another.
class Canaries final {
 public:
  Canaries();
  // Aborts where a byte was changed.
  void check() const;

 private:
  std::vector<std::uint8_t*> blocks_;
};

// A page fault of generated code is reported and written down as any crash is, though the engine's handler
// comes first. Once, after the engine has installed its own.
void watch_page_faults();

}  // namespace wisp::fuzz
