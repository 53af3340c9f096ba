// Time that is counted in instructions: a nanosecond for each that the machine's one processor retires, and
// what it skips while it is idle. The same inputs give the same run.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "base/clock.h"
#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/soft_clock.h"

namespace wisp::soft {

class VirtualClock final : public SoftClock, public Clock {
 public:
  // One count for each nanosecond.
  static constexpr std::uint64_t kTscKhz = 1'000'000;
  // When the guest starts: 2020-01-01 00:00:00 UTC.
  static constexpr std::uint64_t kStartOfTime = 1'577'836'800ULL * 1'000'000'000;

  // The processor whose instructions count; before anybody asks for the time.
  void attach(const Cpu& cpu) { cpu_ = &cpu; }
  // The calling thread is the processor's: it sees the time to the instruction, others as of its last look.
  void enter_thread() { thread_.store(std::this_thread::get_id(), std::memory_order_relaxed); }
  // Idle time passes. By the processor's thread.
  void skip(std::uint64_t ns) { skipped_ns_ += ns; }

  [[nodiscard]] std::uint64_t now_ns() const override;
  [[nodiscard]] std::uint64_t tsc() const override { return now_ns(); }
  [[nodiscard]] std::uint64_t tsc_khz() const override { return kTscKhz; }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return kStartOfTime + now_ns(); }
  [[nodiscard]] std::uint64_t monotonic_ns() const override { return now_ns(); }

 private:
  const Cpu* cpu_ = nullptr;
  std::uint64_t skipped_ns_ = 0;  // the processor's thread only
  std::atomic<std::thread::id> thread_{};
  mutable std::atomic<std::uint64_t> seen_ns_ = 0;
};

}  // namespace wisp::soft
