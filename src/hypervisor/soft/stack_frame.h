// What events and far calls push, checked as a whole before any of it is written, on the present stack or on
// one that is yet to be switched to.
#pragma once

#include <array>
#include <cstdint>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/descriptor.h"

namespace wisp::soft {

class StackFrame final {
 public:
  // `address_size` is the stack's: 8 in 64-bit code, else by the B bit of `ss`. `item`: bytes of each value.
  StackFrame(const Segment& ss, std::uint64_t sp, std::uint32_t address_size, std::uint32_t item)
      : ss_(ss), sp_(sp), address_size_(address_size), item_(item) {}

  // The topmost value comes last. At most kMost.
  void push(std::uint64_t value) { values_[count_++] = value; }

  // Checks the limit, or the canonical form: false with #SS(error_code).
  [[nodiscard]] bool place(Cpu& cpu, std::uint32_t error_code);
  // Writes it, or nothing of it; after place().
  [[nodiscard]] bool write(Core& core, As as);
  // rSP below the frame; what lies above a 16-bit stack pointer is as it was.
  [[nodiscard]] std::uint64_t sp() const;

  static constexpr std::size_t kMost = 40;  // 31 parameters of a call gate and four words

 private:
  [[nodiscard]] std::uint64_t mask() const { return size_mask(address_size_); }
  [[nodiscard]] std::uint64_t linear(std::uint64_t offset) const { return (ss_.base + offset) & 0xffffffff; }

  const Segment ss_;
  const std::uint64_t sp_;
  const std::uint32_t address_size_;
  const std::uint32_t item_;
  std::array<std::uint64_t, kMost> values_{};
  std::size_t count_ = 0;
};

// rSP after a switch to another stack: all of it in 64-bit code, else by the B bit of SS.
inline void set_stack_pointer(Cpu& cpu, std::uint64_t sp) {
  set_sized(cpu, kRsp, stack_address_size(cpu), sp);
}

}  // namespace wisp::soft
