// What a processor is like after power-up, the same for every engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hypervisor/cpu_state.h"

namespace wisp {

// The state after power-up (SDM volume 3, table 10-1), for `apic_id`; MSRs are left empty. `boot` is the
// processor that starts by itself. `version` is the register of the local APIC, `signature` CPUID leaf 1 EAX.
// The boot processor's LINT pins are set up the way firmware leaves them (virtual wire: LINT0 takes the PIC,
// LINT1 is NMI), since no firmware runs before the kernel.
[[nodiscard]] CpuState power_up_state(std::uint32_t apic_id, bool boot, std::uint32_t version,
                                      std::uint32_t signature);

// Byte offsets into LapicState::regs.
namespace lapic {
inline constexpr std::size_t kId = 0x20;
inline constexpr std::size_t kVersion = 0x30;
inline constexpr std::size_t kDestinationFormat = 0xe0;
inline constexpr std::size_t kSpuriousVector = 0xf0;
inline constexpr std::size_t kLvtTimer = 0x320;
inline constexpr std::size_t kLvtLint0 = 0x350;
inline constexpr std::size_t kLvtLint1 = 0x360;
inline constexpr std::size_t kLvtError = 0x370;
}  // namespace lapic

}  // namespace wisp
