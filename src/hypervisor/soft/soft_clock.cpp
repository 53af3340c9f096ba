#include "hypervisor/soft/soft_clock.h"

#include <cpuid.h>
#include <x86intrin.h>

#include <algorithm>
#include <array>
#include <ctime>

namespace wisp::soft {
namespace {

constexpr std::uint64_t kNsPerSecond = 1'000'000'000;
constexpr std::uint64_t kNsPerMs = 1'000'000;

std::uint64_t read_clock(clockid_t id) {
  timespec now{};
  ::clock_gettime(id, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * kNsPerSecond + static_cast<std::uint64_t>(now.tv_nsec);
}

struct Leaf {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf host_cpuid(std::uint32_t leaf) {
  Leaf out;
  const std::uint32_t range = leaf & 0xc0000000;
  // __get_cpuid_max() takes the ranges of processors, not that of hypervisors.
  std::uint32_t most = 0;
  if (range == 0x40000000) {
    Leaf features;
    __cpuid(1, features.eax, features.ebx, features.ecx, features.edx);
    if ((features.ecx & (1U << 31)) == 0) {
      return out;
    }
    Leaf first;
    __cpuid(0x40000000, first.eax, first.ebx, first.ecx, first.edx);
    most = first.eax;
  } else {
    most = __get_cpuid_max(range, nullptr);
  }
  if (most >= leaf) {
    __cpuid(leaf, out.eax, out.ebx, out.ecx, out.edx);
  }
  return out;
}

bool invariant_tsc() {
  return (host_cpuid(0x80000007).edx & (1U << 8)) != 0;
}

// What the processor or the hypervisor under it states; 0: nothing. Leaf 0x16 is left out, since it gives a
// rounded figure for the label.
std::uint64_t stated_khz() {
  const Leaf ratio = host_cpuid(0x15);
  if (ratio.eax != 0 && ratio.ebx != 0 && ratio.ecx != 0) {
    return multiply_divide(ratio.ecx, ratio.ebx, ratio.eax) / 1000;
  }
  return host_cpuid(0x40000010).eax;
}

struct Moment {
  std::uint64_t ns = 0;
  std::uint64_t tsc = 0;
};

// Both clocks at nearly the same time: the tightest of some tries.
Moment both_clocks() {
  Moment best;
  std::uint64_t least = UINT64_MAX;
  for (int i = 0; i < 20; ++i) {
    const std::uint64_t before = __rdtsc();
    const std::uint64_t ns = read_clock(CLOCK_MONOTONIC_RAW);
    const std::uint64_t after = __rdtsc();
    if (after - before < least) {
      least = after - before;
      best = {.ns = ns, .tsc = before + (after - before) / 2};
    }
  }
  return best;
}

std::uint64_t measured_khz() {
  // The distance of two moments, each good to some 30 ns, over 2 ms: within 30 millionths. The median of
  // three leaves out one that was disturbed.
  std::array<std::uint64_t, 3> results{};
  for (std::uint64_t& result : results) {
    const Moment start = both_clocks();
    while (read_clock(CLOCK_MONOTONIC_RAW) - start.ns < 2 * kNsPerMs) {
      _mm_pause();
    }
    const Moment end = both_clocks();
    result = multiply_divide(end.tsc - start.tsc, kNsPerMs, end.ns - start.ns);
  }
  std::ranges::sort(results);
  return results[1];
}

std::uint64_t host_tsc_khz() {
  static const std::uint64_t kKhz = [] {
    const std::uint64_t stated = stated_khz();
    return stated != 0 ? stated : measured_khz();
  }();
  return kKhz;
}

}  // namespace

HostClock::HostClock() : native_(invariant_tsc()), khz_(native_ ? host_tsc_khz() : kNsPerMs) {}

std::uint64_t HostClock::now_ns() const {
  return read_clock(CLOCK_MONOTONIC);
}

std::uint64_t HostClock::tsc() const {
  return native_ ? __rdtsc() : read_clock(CLOCK_MONOTONIC);
}

std::uint64_t HostClock::realtime_ns() const {
  return read_clock(CLOCK_REALTIME);
}

}  // namespace wisp::soft
