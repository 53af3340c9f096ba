// Where everything lies in the guest physical address space of a microVM. One table, so that the E820 map,
// the ACPI tables, the kernel loader and the machine cannot disagree.
//
//   0x00000000  RAM. Below 1 MiB the structures that a kernel is handed at entry
//   0xC0000000  end of low RAM; nothing up to the MMIO window
//   0xFEB00000  virtio-mmio transports
//   0xFEC00000  I/O APIC
//   0xFEE00000  local APIC
//   0xFEFFC000  pages that the KVM engine keeps for itself
//   0x100000000 RAM beyond the first 3 GiB
#pragma once

#include <array>
#include <cstdint>

#include "memory/gpa.h"

namespace wisp::layout {

// RAM fills [0, kLowRamEnd) first; what is left continues at kHighRamStart. 3 GiB leaves the last quarter
// below 4 GiB to MMIO and lets 1 GiB pages map all low RAM.
inline constexpr Gpa kLowRamEnd = 0xC000'0000;
inline constexpr Gpa kHighRamStart = 0x1'0000'0000;

// --- Structures below 1 MiB, in RAM that the kernel may reuse once it has read them ---------------------

// Global descriptor table of the boot processor: 6 entries of 8 bytes.
inline constexpr Gpa kGdt = 0x500;
// PVH: hvm_start_info, module list and memory map in one page. Multiboot information uses the same page.
inline constexpr Gpa kStartInfo = 0x6000;
inline constexpr std::uint64_t kStartInfoSize = 0x1000;
// Linux boot protocol: struct boot_params ("zero page").
inline constexpr Gpa kZeroPage = 0x7000;
// Identity page tables: PML4, PDPT, then four page directories (2 MiB pages only).
inline constexpr Gpa kPml4 = 0x9000;
inline constexpr Gpa kPdpt = 0xA000;
inline constexpr Gpa kPageDirectories = 0xB000;
inline constexpr Gpa kPageTablesEnd = 0xF000;
// Kernel command line with its terminating zero.
inline constexpr Gpa kCommandLine = 0x2'0000;
inline constexpr std::uint64_t kCommandLineSpace = 0x1'0000;

// --- The area of a PC that belongs to firmware and option ROMs: never given to the kernel as RAM --------

// Conventional memory ends here; the last KiB below 640 KiB is the extended BIOS data area of a PC.
inline constexpr Gpa kConventionalEnd = 0x9'FC00;
inline constexpr Gpa kEbdaEnd = 0xA'0000;
// ACPI tables; a kernel that was not told where looks for the RSDP on 16-byte boundaries from here (ACPI 6.5,
// 5.2.5.1). Reserved in E820 up to 1 MiB.
inline constexpr Gpa kAcpiTables = 0xE'0000;
inline constexpr std::uint64_t kAcpiSpace = 0x1'0000;
// MP floating pointer and MP table: in the third place where the MP specification (1.4, section 4) has
// operating systems look. The first two, EBDA and the last KiB of base memory, are too small for many CPUs.
inline constexpr Gpa kMpTable = 0xF'0000;
inline constexpr std::uint64_t kMpSpace = 0xFFF0;
// Where a PC's firmware is entered in real mode. A kernel that knows no better way to restart the machine
// jumps here (Linux does by default where ACPI is hardware-reduced and there is no EFI): what lies here
// resets the machine.
inline constexpr Gpa kResetVector = 0xF'FFF0;
inline constexpr Gpa kBiosEnd = 0x10'0000;

// Nothing of a kernel image may be loaded below this.
inline constexpr Gpa kKernelFloor = 0x10'0000;
// A flat vmlinux.bin (objcopy -O binary of a vmlinux linked with CONFIG_PHYSICAL_START=0x1000000) lies and is
// entered here.
inline constexpr Gpa kRawKernel = 0x100'0000;

// --- MMIO below 4 GiB ------------------------------------------------------------------------------------

// virtio-mmio transports: one page apart, so that each can be mapped and trapped alone.
inline constexpr Gpa kVirtioMmio = 0xFEB0'0000;
inline constexpr std::uint64_t kVirtioMmioStride = 0x1000;
inline constexpr std::uint64_t kVirtioMmioSize = 0x200;
inline constexpr std::uint32_t kVirtioMmioSlots = 64;
inline constexpr Gpa kIoApic = 0xFEC0'0000;
inline constexpr Gpa kLocalApic = 0xFEE0'0000;
// Pages that the KVM engine keeps for itself. Reserved in E820, never RAM.
inline constexpr Gpa kEnginePages = 0xFEFF'C000;
inline constexpr Gpa kEnginePagesEnd = 0xFF00'0000;

// --- Ports -----------------------------------------------------------------------------------------------

inline constexpr std::uint16_t kSerialPort = 0x3F8;
inline constexpr std::uint16_t kRtcPort = 0x70;
// Power control and the Generic Event Device (devices/power_registers.h).
inline constexpr std::uint16_t kPowerPort = 0x600;
// Registers that tell the guest which virtio-mmio slots hold a device (acpi_layout.h). Ports, not memory: the
// guest reads them for each empty slot while it boots, and a port exit needs no instruction decoded.
inline constexpr std::uint16_t kSlotHotplugPort = 0x620;

// --- Interrupts ------------------------------------------------------------------------------------------

inline constexpr std::uint32_t kSerialGsi = 4;  // edge-triggered, active high
inline constexpr std::uint32_t kRtcGsi = 8;     // edge-triggered
inline constexpr std::uint32_t kGedGsi = 9;     // level-triggered, active high
// Pins that virtio-mmio devices share, edge-triggered: all without the RTC (8), the Generic Event Device (9),
// the i8042's mouse (12) and the coprocessor (13), which kernels without ACPI take for ISA's own. Those below
// 16 come first: a kernel without ACPI has no others.
inline constexpr std::array<std::uint32_t, 15> kVirtioGsis = {10, 11, 14, 15, 5,  6,  7, 16,
                                                              17, 18, 19, 20, 21, 22, 23};
inline constexpr std::uint32_t kVirtioLegacyGsis = 7;

static_assert(kVirtioMmio + kVirtioMmioSlots * kVirtioMmioStride <= kIoApic);
static_assert(kPageDirectories + 4 * kPageSize == kPageTablesEnd);
static_assert(kCommandLine + kCommandLineSpace <= kConventionalEnd);

}  // namespace wisp::layout
