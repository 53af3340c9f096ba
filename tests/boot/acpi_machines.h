// Machines that the ACPI tests describe.
#pragma once

#include "boot/acpi.h"
#include "boot_fixtures.h"

namespace wisp::test {

inline AcpiPower port_power() {
  return {.event_selector = {AcpiSpace::kIo, 0x600},
          .gsi = 9,
          .level_triggered = true,
          .power_button = 1,
          .sleep_button = 2,
          .slot_hotplug = 0x10,
          .sleep_control = {AcpiSpace::kIo, 0x604},
          .sleep_status = {AcpiSpace::kIo, 0x605},
          .sleep_type_s5 = 5,
          .reset = {AcpiSpace::kIo, 0x606},
          .reset_value = 0x42};
}

// Everything there is: 20 devices, 44 free slots, more CPUs than are present.
inline AcpiDescription full_machine() {
  AcpiDescription machine;
  machine.cpus = 4;
  machine.max_cpus = 8;
  machine.power = port_power();
  AcpiSlotHotplug hotplug{.registers = {AcpiSpace::kIo, layout::kSlotHotplugPort}, .free_slots = {}};
  for (std::uint32_t slot = 0; slot < layout::kVirtioMmioSlots; ++slot) {
    (slot < 20 ? machine.devices : hotplug.free_slots).push_back(virtio_slot(slot));
  }
  machine.slot_hotplug = std::move(hotplug);
  return machine;
}

// Registers in memory, an edge-triggered event, one button, no devices.
inline AcpiDescription small_machine() {
  AcpiDescription machine;
  machine.power = port_power();
  machine.power.event_selector = {AcpiSpace::kMemory, 0xFEB5'0000};
  machine.power.level_triggered = false;
  machine.power.sleep_button = machine.power.slot_hotplug = 0;
  machine.serial = false;
  machine.rtc = false;
  return machine;
}

// Nothing that sends events.
inline AcpiDescription bare_machine() {
  AcpiDescription machine = small_machine();
  machine.power.power_button = 0;
  return machine;
}

}  // namespace wisp::test
