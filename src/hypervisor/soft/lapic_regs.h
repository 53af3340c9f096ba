// Register numbers and bits of the local APIC, shared by the parts of Lapic (Intel SDM volume 3, chapter 11).
#pragma once

#include <cstdint>

namespace wisp::soft::lapic_regs {

// Register offsets (SDM table 11-1).
inline constexpr std::uint32_t kRegId = 0x20;
inline constexpr std::uint32_t kRegVersion = 0x30;
inline constexpr std::uint32_t kRegTpr = 0x80;
inline constexpr std::uint32_t kRegApr = 0x90;
inline constexpr std::uint32_t kRegPpr = 0xa0;
inline constexpr std::uint32_t kRegEoi = 0xb0;
inline constexpr std::uint32_t kRegLdr = 0xd0;
inline constexpr std::uint32_t kRegDfr = 0xe0;
inline constexpr std::uint32_t kRegSvr = 0xf0;
inline constexpr std::uint32_t kRegIsr = 0x100;
inline constexpr std::uint32_t kRegTmr = 0x180;
inline constexpr std::uint32_t kRegIrr = 0x200;
inline constexpr std::uint32_t kRegEsr = 0x280;
inline constexpr std::uint32_t kRegLvtCmci = 0x2f0;
inline constexpr std::uint32_t kRegIcrLow = 0x300;
inline constexpr std::uint32_t kRegIcrHigh = 0x310;
inline constexpr std::uint32_t kRegLvtTimer = 0x320;
inline constexpr std::uint32_t kRegLvtThermal = 0x330;
inline constexpr std::uint32_t kRegLvtPerformance = 0x340;
inline constexpr std::uint32_t kRegLvtLint0 = 0x350;
inline constexpr std::uint32_t kRegLvtLint1 = 0x360;
inline constexpr std::uint32_t kRegLvtError = 0x370;
inline constexpr std::uint32_t kRegInitialCount = 0x380;
inline constexpr std::uint32_t kRegCurrentCount = 0x390;
inline constexpr std::uint32_t kRegDivide = 0x3e0;
inline constexpr std::uint32_t kRegSelfIpi = 0x3f0;

// Integrated APIC, 7 LVT entries (max index 6), no EOI-broadcast suppression.
inline constexpr std::uint32_t kVersion = 0x00060014;

inline constexpr std::uint32_t kLvtMasked = 1U << 16;
inline constexpr std::uint32_t kSvrEnabled = 1U << 8;
inline constexpr std::uint32_t kTimerModeShift = 17;
inline constexpr std::uint32_t kTimerOneShot = 0;
inline constexpr std::uint32_t kTimerPeriodic = 1;
inline constexpr std::uint32_t kTimerTscDeadline = 2;
inline constexpr std::uint32_t kEsrSendIllegalVector = 1U << 5;
inline constexpr std::uint32_t kEsrReceiveIllegalVector = 1U << 6;
inline constexpr std::uint32_t kEsrIllegalRegister = 1U << 7;

inline std::uint32_t timer_mode(std::uint32_t lvt) {
  return (lvt >> kTimerModeShift) & 3;
}

}  // namespace wisp::soft::lapic_regs
