// Registers by which the guest's ACPI code learns of virtio-mmio devices that come and go.
//
// The DSDT (acpi.h) declares every slot that may be filled later as a generic container (ACPI0004) holding
// one LNRO0005 device. The container's _STA reads its bit of `present`, so an empty slot does not exist for
// the guest. A container, because operating systems re-scan a device on notification only where they have a
// scan handler for it: Linux has one for ACPI0004, none for LNRO0005.
//
// To add a device: place it in the slot, set the slot's bit in `present` and in `changed`, set the hotplug
// bit in the Generic Event Device's event register, and pulse the GED's interrupt. The guest's _EVT then
// reads the event register, and for its hotplug bit reads both `changed` words, writes back what it read (the
// bits written as one become zero, others stay), and notifies each changed container with Device Check (1).
// To remove one: the same with the bit in `present` cleared.
//
// Linux (6.1 to 6.12) makes a platform device of a slot that appears, but keeps that platform device when the
// slot disappears, and makes no second one for the same slot: give a freed slot out again only after a reset
// of the machine, or once all never-used slots are gone.
#pragma once

#include <cstdint>

namespace wisp {

// Ports, 32 bits each, accessed as aligned double words; slot n is bit n % 32 of word n / 32. Writes to
// `present` and accesses of other widths mean nothing: they are ignored and read as zero.
struct SlotHotplugRegisters {
  static constexpr std::uint64_t kPresent0 = 0x00;  // read-only: slots 0-31 that hold a device
  static constexpr std::uint64_t kPresent1 = 0x04;  // read-only: slots 32-63
  static constexpr std::uint64_t kChanged0 = 0x08;  // read; write 1 to clear: changed since acknowledged
  static constexpr std::uint64_t kChanged1 = 0x0C;
  static constexpr std::uint64_t kSize = 0x10;
};

}  // namespace wisp
