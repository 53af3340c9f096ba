#include "hypervisor/soft/virtual_clock.h"

namespace wisp::soft {

std::uint64_t VirtualClock::now_ns() const {
  if (cpu_ == nullptr || thread_.load(std::memory_order_relaxed) != std::this_thread::get_id()) {
    return seen_ns_.load(std::memory_order_relaxed);
  }
  const std::uint64_t now = cpu_->retired() + skipped_ns_;
  seen_ns_.store(now, std::memory_order_relaxed);
  return now;
}

}  // namespace wisp::soft
