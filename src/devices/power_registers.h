// Where the power device's registers lie: what the ACPI tables say and src/devices/power.h implements.
//
// ACPI 6.5: hardware-reduced sleep registers (4.8.3.7), reset register (4.8.3.6), Generic Event Device
// (5.6.9). They are ports, whose exits an engine can serve without decoding an instruction; FADT names them
// as generic addresses in SystemIO space, byte access.
#pragma once

#include <cstdint>

namespace wisp {

inline constexpr std::uint16_t kPowerPortCount = 16;

// The interrupt of the Generic Event Device is level-triggered, active high, and high as long as an event is
// pending.
//
// 32 bits, read only: the pending events, one bit each. Reading takes them: they are 0 afterwards and the
// interrupt goes low. A read of 1 or 2 bytes takes what it shows. The _EVT method reads it once, as a DWord,
// and notifies the objects whose bits were set.
inline constexpr std::uint16_t kPowerEventSelector = 0x0;
// 8 bits, FADT SLEEP_CONTROL_REG: SLP_TYPx in bits 2-4, SLP_EN in bit 5.
inline constexpr std::uint16_t kPowerSleepControl = 0x4;
// 8 bits, FADT SLEEP_STATUS_REG: WAK_STS in bit 7, cleared by writing one.
inline constexpr std::uint16_t kPowerSleepStatus = 0x5;
// 8 bits, FADT RESET_REG: writing kPowerResetValue (FADT RESET_VALUE) resets the machine.
inline constexpr std::uint16_t kPowerReset = 0x6;
inline constexpr std::uint8_t kPowerResetValue = 0x42;
// SLP_TYPx for soft off, to stand in \_S5.
inline constexpr std::uint8_t kPowerSleepTypeS5 = 5;

// Events in kPowerEventSelector and what _EVT does with them.
inline constexpr std::uint32_t kPowerEventPowerButton = 1U << 0;  // Notify(power button PNP0C0C, 0x80)
inline constexpr std::uint32_t kPowerEventSleepButton = 1U << 1;  // Notify(sleep button PNP0C0E, 0x80)
inline constexpr std::uint32_t kPowerEventSlotScan = 1U << 5;     // look for virtio-mmio slots that changed
inline constexpr std::uint32_t kPowerEventAll =
    kPowerEventPowerButton | kPowerEventSleepButton | kPowerEventSlotScan;

}  // namespace wisp
