#include "hypervisor/soft/stack_frame.h"

#include <cstring>

namespace wisp::soft {
namespace {

constexpr std::size_t kAtOnce = 64;  // of Mmu::write()

}  // namespace

std::uint64_t StackFrame::sp() const {
  const std::uint64_t below = sp_ - count_ * item_;
  return address_size_ == 2 ? (sp_ & ~mask()) | (below & mask()) : below & mask();
}

bool StackFrame::place(Cpu& cpu, std::uint32_t error_code) {
  if (address_size_ == 8) {
    if (!canonical(sp()) || !canonical(sp_ - 1)) {
      return cpu.raise(vec::kSs, error_code);
    }
    return true;
  }
  std::uint64_t at = sp_ & mask();
  for (std::size_t i = 0; i < count_; ++i) {
    at = (at - item_) & mask();
    if (!inside_limit(ss_, at, item_)) {
      return cpu.raise(vec::kSs, error_code);
    }
  }
  return true;
}

bool StackFrame::write(Core& core, As as) {
  const std::size_t size = count_ * item_;
  if (address_size_ == 8 && size <= kAtOnce) {
    std::array<std::uint8_t, kAtOnce> bytes;
    for (std::size_t i = 0; i < count_; ++i) {
      std::memcpy(bytes.data() + size - (i + 1) * item_, &values_[i], item_);
    }
    return core.mmu.write(sp(), bytes.data(), static_cast<std::uint32_t>(size), as);
  }
  for (const bool probing : {true, false}) {
    std::uint64_t at = sp_;
    for (std::size_t i = 0; i < count_; ++i) {
      at = (at - item_) & mask();
      const std::uint64_t where = address_size_ == 8 ? at : linear(at);
      const bool done = probing ? core.mmu.probe(where, item_, Access::kWrite, as)
                                : core.mmu.write(where, &values_[i], item_, as);
      if (!done) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace wisp::soft
