// KVM's paravirtual clock (Documentation/virt/kvm/x86/msr.rst of the kernel): a structure in guest memory
// from which the guest computes nanoseconds by its time-stamp counter, and the wall time at their zero.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>

#include "hypervisor/soft/soft_clock.h"

namespace wisp::soft {

namespace msr {
inline constexpr std::uint32_t kKvmWallClockOld = 0x11;
inline constexpr std::uint32_t kKvmSystemTimeOld = 0x12;
inline constexpr std::uint32_t kKvmWallClock = 0x4b564d00;
inline constexpr std::uint32_t kKvmSystemTime = 0x4b564d01;
}  // namespace msr

// How counts of a time-stamp counter become nanoseconds: shifted left by `shift` (right where negative), then
// times `multiplier` / 2^32.
struct TscScale {
  std::uint32_t multiplier = 0;
  std::int8_t shift = 0;
};
[[nodiscard]] TscScale tsc_scale(std::uint64_t tsc_khz);
[[nodiscard]] std::uint64_t scale_tsc(std::uint64_t tsc, const TscScale& scale);

// The clock of one VM. It starts at 0 and runs with the machine's time-stamp counter, so that all processors
// have the same. Thread-safe.
class KvmClock final {
 public:
  explicit KvmClock(const SoftClock& clock);
  [[nodiscard]] std::uint64_t now_ns() const;
  // Goes on from `ns`; the processors must then write their structures again.
  void set(std::uint64_t ns);

  // Writes bytes of guest memory; false where there is no RAM.
  using Write = std::function<bool(std::uint64_t gpa, const void* bytes, std::uint32_t size)>;
  // What a processor whose counter is the machine's plus `tsc_offset` wrote to its system time MSR: bit 0
  // switches on, the rest is the address. `stopped` tells the guest that it stood still since the last time.
  // False: there is no RAM.
  bool publish(std::uint64_t msr_value, std::uint64_t tsc_offset, bool stopped, const Write& write) const;
  // What was written to the wall clock MSR: the address.
  bool publish_wall_clock(std::uint64_t gpa, const Write& write) const;

 private:
  const SoftClock& clock_;
  const TscScale scale_;
  mutable std::mutex mutex_;
  std::uint64_t start_tsc_;  // of the machine, when the clock showed start_ns_
  std::uint64_t start_ns_ = 0;
};

}  // namespace wisp::soft
