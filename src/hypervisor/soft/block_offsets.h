// Where in the Cpu the code of blocks finds what it works on, from the host's stack pointer. Private to the
// emitter.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hypervisor/soft/access_plan.h"
#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/emitter.h"

namespace wisp::soft::offsets {

inline constexpr std::int32_t kRun = offset32(offsetof(Cpu, run));
inline constexpr std::int32_t kPageAddress = offset32(offsetof(Cpu, page_address));
// Kept over a look-up of the in-line TLB; the stubs use the others.
inline constexpr std::int32_t kKept = offset32(offsetof(Cpu, kept));
inline constexpr std::int32_t kInterruptFlag = offset32(offsetof(Cpu, interrupt_flag));
inline constexpr std::int32_t kOtherFlags = offset32(offsetof(Cpu, other_flags));
inline constexpr std::int32_t kInstructionsLeft = offset32(offsetof(Cpu, instructions_left));
inline constexpr std::int32_t kPageMask = offset32(offsetof(Cpu, page_mask));
inline constexpr std::int32_t kNoInterruptWaits = offset32(offsetof(Cpu, no_interrupt_waits));

constexpr std::int32_t tlb_offset(Bank bank, std::size_t member) {
  return static_cast<std::int32_t>(offsetof(Cpu, tlb) + bank * sizeof(TlbBank) + member);
}
constexpr std::int32_t jump_offset(Bank bank, std::size_t member) {
  return static_cast<std::int32_t>(offsetof(Cpu, jumps) + bank * sizeof(JumpBank) + member);
}
constexpr std::int32_t shared_addend(std::uint8_t slot) {
  static_assert(sizeof(Cpu::shared_addends) == kAccessSlots * sizeof(std::uint64_t));
  return static_cast<std::int32_t>(offsetof(Cpu, shared_addends)) + 8 * slot;
}
constexpr std::int32_t segment_base(std::uint8_t segment) {
  return static_cast<std::int32_t>(offsetof(Cpu, segments) + segment * sizeof(Segment) +
                                   offsetof(Segment, base));
}

}  // namespace wisp::soft::offsets
