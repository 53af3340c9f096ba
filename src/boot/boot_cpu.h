// The boot processor at a kernel's entry: registers, descriptor table, page tables.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "boot/kernel_image.h"
#include "hypervisor/cpu_state.h"
#include "memory/gpa.h"

namespace wisp {

struct BootCpu {
  CpuRegs regs;
  CpuSpecialRegs sregs;
};

// State at `entry` for the protocol, with `info` (zero page, start info or multiboot information) in the
// register where the kernel expects it. Interrupts are off. The Linux protocols' selectors are __BOOT_CS 0x10
// and __BOOT_DS 0x18 of the table build_gdt() gives, at layout::kGdt; long mode runs on the page tables at
// layout::kPml4.
[[nodiscard]] BootCpu boot_cpu_state(BootProtocol protocol, Gpa entry, Gpa info);

// Six descriptors: null, null, code (64-bit for kLinux64, else 32-bit), data, and a TSS of two.
[[nodiscard]] std::array<std::uint64_t, 6> build_gdt(BootProtocol protocol);

// Page tables that map the first 4 GiB to themselves, from layout::kPml4 on: with 1 GiB pages, where the
// guest's CPU has them (CPUID 8000_0001h EDX bit 26), in two pages, else in six.
[[nodiscard]] std::vector<std::uint8_t> build_page_tables(bool gigabyte_pages);

}  // namespace wisp
