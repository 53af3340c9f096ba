// Direct boot of a kernel: everything it finds in memory and registers at its first instruction.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "boot/acpi.h"
#include "boot/boot_cpu.h"
#include "boot/e820.h"
#include "boot/kernel_image.h"
#include "boot/kernel_loader.h"
#include "memory/guest_memory.h"

namespace wisp {

struct BootDescription {
  std::string kernel;  // path
  std::string initrd;  // path, or empty for none
  std::string command_line;
  ElfEntry elf_entry = ElfEntry::kAuto;
  std::uint32_t cpus = 1;
  CpuTopology topology{};
  // Named on the command line as virtio_mmio.device=, for kernels that do not read ACPI; a kernel that does
  // both finds the ACPI device first and ignores the second. Where they do not all fit on the command line,
  // that is an error without ACPI, and reported in BootState with it.
  std::vector<VirtioMmioSlot> command_line_devices;
  std::optional<AcpiDescription> acpi;  // its cpus must be `cpus`
  bool gigabyte_pages = false;          // the guest's CPU has 1 GiB pages
};

// What was prepared. `cpu` goes into vCPU 0 (all other state stays as after power-up); the other vCPUs wait.
struct BootState {
  BootCpu cpu;
  KernelFormat format = KernelFormat::kRaw;
  BootProtocol protocol = BootProtocol::kLinux64;
  LoadedRange kernel;
  std::optional<LoadedRange> initrd;
  std::string command_line;  // as the kernel gets it
  std::vector<E820Entry> e820;
  Gpa rsdp = 0;                         // 0: no ACPI
  std::uint32_t devices_not_named = 0;  // of command_line_devices, for want of room
};

// Loads kernel and initrd and writes every table. `memory` and `ram` show the same RAM, which must read as
// zero: fresh, or discarded after a reset. For a reset of the machine call it again. Errors name the file.
[[nodiscard]] Result<BootState> prepare_boot(const BootDescription& description, const GuestMemory& memory,
                                             std::span<const RamPlacement> ram);

}  // namespace wisp
