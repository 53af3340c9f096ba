// Whether an engine really runs guest kernel code (ring 0) on the processor. A /dev/kvm may be there, accept
// every call and yet interpret ring 0 in software, a thousand times slower and not completely; no name or
// capability tells, so it is measured: a loop in 64-bit mode, short and long, against the clock.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/clock.h"
#include "hypervisor/hypervisor.h"
#include "memory/guest_memory.h"

namespace wisp {

enum class Ring0Verdict : std::uint8_t { kHardware, kEmulated, kBroken };

struct Ring0Probe {
  Ring0Verdict verdict = Ring0Verdict::kBroken;
  double ns_per_instruction = 0;  // an upper bound on hardware, where the time of the exit is a part of it
  std::string failure = {};       // kBroken: what happened
};

// Where the test program lies: in the guest's own memory, since a slot of memory more would have to go again,
// and taking a slot away takes the kernel up to 10 ms.
inline constexpr Gpa kRing0ProbeStart = 0x8000;
inline constexpr std::uint64_t kRing0ProbeSize = 4 * kPageSize;

// Measures with a vCPU that has not run yet, or is parked without an access pending. `memory` is what its VM
// has been shown; registers and memory are kept. Takes 50-300 µs on hardware, some ms where an exit is slow
// or ring 0 is emulated.
[[nodiscard]] Ring0Probe probe_ring0(Vcpu& vcpu, const GuestMemory& memory, const Clock& clock);

// The same with a VM of its own, for `wisp doctor`. (Ending a VM takes the kernel up to 30 ms.)
[[nodiscard]] Ring0Probe probe_ring0(Hypervisor& hypervisor, const Clock& clock);

// In words for the user: summary, and advice where the engine is not usable.
[[nodiscard]] EngineReport describe(const Ring0Probe& probe);

// The fastest runs so far of the loop with 1 and with 1 + kRing0Extra instructions, both with one exit.
struct Ring0Samples {
  std::uint32_t rounds = 0;
  std::uint64_t short_ns = UINT64_MAX;
  std::uint64_t long_ns = UINT64_MAX;
};
inline constexpr std::uint32_t kRing0Iterations = 1000;
inline constexpr std::uint32_t kRing0Extra = 3 * (kRing0Iterations - 1);
inline constexpr std::uint32_t kRing0MostRounds = 10;

// The verdict, or nothing while another round would help. Always one after kRing0MostRounds.
[[nodiscard]] std::optional<Ring0Probe> judge_ring0(const Ring0Samples& samples);

}  // namespace wisp
