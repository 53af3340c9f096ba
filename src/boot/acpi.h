// ACPI 6.5 tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT, DSDT.
//
// The description is plain data: numbers of registers come from the caller, which knows the devices.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "boot/virtio_slot.h"
#include "hypervisor/topology.h"
#include "memory/gpa.h"

namespace wisp {

// Address space numbers of a Generic Address Structure (5.2.3.2) and of an operation region (19.6.98).
enum class AcpiSpace : std::uint8_t { kMemory = 0, kIo = 1 };

struct AcpiRegister {
  AcpiSpace space = AcpiSpace::kIo;
  std::uint64_t address = 0;
};

// Power, reset, and the Generic Event Device (5.6.9).
struct AcpiPower {
  // 32 bits: pending events, one bit each; reading takes them.
  AcpiRegister event_selector;
  std::uint32_t gsi = 9;
  bool level_triggered = true;
  // Bits of event_selector; 0 where the machine has no such thing.
  std::uint32_t power_button = 0;
  std::uint32_t sleep_button = 0;
  std::uint32_t slot_hotplug = 0;
  // 8 bits each, FADT SLEEP_CONTROL_REG, SLEEP_STATUS_REG and RESET_REG.
  AcpiRegister sleep_control;
  AcpiRegister sleep_status;
  std::uint8_t sleep_type_s5 = 5;
  AcpiRegister reset;
  std::uint8_t reset_value = 0;
};

// Slots that are empty now and may be filled later (acpi_layout.h).
struct AcpiSlotHotplug {
  AcpiRegister registers;  // SlotHotplugRegisters
  std::vector<VirtioMmioSlot> free_slots;
};

struct AcpiDescription {
  std::uint32_t cpus = 1;      // present
  std::uint32_t max_cpus = 1;  // those beyond `cpus` are announced as able to come online
  CpuTopology topology{};      // gives the APIC ids (hypervisor/topology.h)
  AcpiPower power;
  std::vector<VirtioMmioSlot> devices;  // filled at boot, there for good
  std::optional<AcpiSlotHotplug> slot_hotplug;
  bool serial = true;  // COM1 at 0x3F8, GSI 4
  bool rtc = true;     // CMOS clock at 0x70, GSI 8
  // Whether FADT announces a keyboard controller. Where it does not, Linux does not spend time probing it;
  // its reset line works all the same.
  bool i8042 = false;
};

struct AcpiTable {
  Gpa gpa = 0;
  std::string_view signature;  // "DSDT", ...; "RSD PTR " for the RSDP
  std::vector<std::uint8_t> bytes;
};

struct AcpiTables {
  Gpa rsdp = 0;
  std::vector<AcpiTable> tables;
};

// Builds the tables for placement from `gpa` (16-byte aligned, below 4 GiB), RSDP first, so that a kernel
// that scans the BIOS area finds it. Errors where they take more than `space` bytes or the numbers contradict
// each other (slots used twice, more CPUs than max_cpus, hotplug without its event).
[[nodiscard]] Result<AcpiTables> build_acpi(const AcpiDescription& machine, Gpa gpa, std::uint64_t space);

// The definition block of the DSDT alone, without a header.
[[nodiscard]] std::vector<std::uint8_t> build_dsdt_body(const AcpiDescription& machine);

}  // namespace wisp
