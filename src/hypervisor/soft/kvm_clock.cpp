#include "hypervisor/soft/kvm_clock.h"

#include <atomic>

#include "base/bytes.h"

namespace wisp::soft {
namespace {

__extension__ using Wide = unsigned __int128;

// struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, multiplier, shift, flags.
constexpr std::size_t kTimeInfoSize = 32;
constexpr std::uint8_t kTscStable = 1;
constexpr std::uint8_t kGuestStopped = 2;
constexpr std::uint64_t kNsPerSecond = 1'000'000'000;

// The version is odd while the rest changes. Each write is seen by the other processors after the ones before
// it: x86 keeps the order of stores, and the fences keep the compiler's.
bool publish_versioned(std::uint64_t gpa, std::span<const std::uint8_t> body, std::uint32_t version,
                       const KvmClock::Write& write) {
  const auto put_version = [&](std::uint32_t value) {
    std::array<std::uint8_t, 4> bytes{};
    store_le(bytes.data(), value);
    return write(gpa, bytes.data(), bytes.size());
  };
  if (!put_version(version | 1)) {
    return false;
  }
  std::atomic_signal_fence(std::memory_order_seq_cst);
  const bool done = write(gpa + 4, body.data(), static_cast<std::uint32_t>(body.size()));
  std::atomic_signal_fence(std::memory_order_seq_cst);
  return put_version((version | 1) + 1) && done;
}

}  // namespace

TscScale tsc_scale(std::uint64_t tsc_khz) {
  // One count is 1e6 / khz ns: a fraction of 32 bits, normalised so that its top bit is set.
  TscScale scale;
  std::uint64_t numerator = 1'000'000;
  std::uint64_t denominator = tsc_khz == 0 ? 1 : tsc_khz;
  while (numerator >= denominator) {
    denominator *= 2;
    ++scale.shift;
  }
  while (numerator * 2 < denominator) {
    numerator *= 2;
    --scale.shift;
  }
  scale.multiplier = static_cast<std::uint32_t>((numerator << 32) / denominator);
  return scale;
}

std::uint64_t scale_tsc(std::uint64_t tsc, const TscScale& scale) {
  const std::uint64_t shifted = scale.shift >= 0 ? tsc << scale.shift : tsc >> -scale.shift;
  return static_cast<std::uint64_t>(static_cast<Wide>(shifted) * scale.multiplier >> 32);
}

KvmClock::KvmClock(const SoftClock& clock)
    : clock_(clock), scale_(tsc_scale(clock.tsc_khz())), start_tsc_(clock.tsc()) {}

std::uint64_t KvmClock::now_ns() const {
  const std::lock_guard lock(mutex_);
  return start_ns_ + scale_tsc(clock_.tsc() - start_tsc_, scale_);
}

void KvmClock::set(std::uint64_t ns) {
  const std::lock_guard lock(mutex_);
  start_tsc_ = clock_.tsc();
  start_ns_ = ns;
}

bool KvmClock::publish(std::uint64_t msr_value, std::uint64_t tsc_offset, bool stopped,
                       const Write& write) const {
  if ((msr_value & 1) == 0) {
    return true;
  }
  std::array<std::uint8_t, kTimeInfoSize - 4> body{};
  {
    const std::lock_guard lock(mutex_);
    store_le<std::uint64_t>(body.data() + 4, start_tsc_ + tsc_offset);
    store_le<std::uint64_t>(body.data() + 12, start_ns_);
  }
  store_le<std::uint32_t>(body.data() + 20, scale_.multiplier);
  body[24] = static_cast<std::uint8_t>(scale_.shift);
  body[25] = kTscStable | (stopped ? kGuestStopped : 0);
  // Any version that differs from the last will do; the clock's own reading always does.
  const auto version = static_cast<std::uint32_t>(clock_.tsc()) & ~1U;
  return publish_versioned(msr_value & ~1ULL, body, version, write);
}

bool KvmClock::publish_wall_clock(std::uint64_t gpa, const Write& write) const {
  const std::uint64_t zero = clock_.realtime_ns() - now_ns();
  std::array<std::uint8_t, 8> body{};
  store_le<std::uint32_t>(body.data(), static_cast<std::uint32_t>(zero / kNsPerSecond));
  store_le<std::uint32_t>(body.data() + 4, static_cast<std::uint32_t>(zero % kNsPerSecond));
  const auto version = static_cast<std::uint32_t>(clock_.tsc()) & ~1U;
  return publish_versioned(gpa, body, version, write);
}

}  // namespace wisp::soft
