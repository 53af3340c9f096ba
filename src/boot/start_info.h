// What PVH and multiboot kernels are handed: one block of tables each, at a given address.
#pragma once

#include <cstdint>
#include <vector>

#include "base/error.h"
#include "boot/zero_page.h"

namespace wisp {

// struct hvm_start_info version 1 (Xen, public/arch-x86/hvm/start_info.h) at `gpa`, followed by the module
// list and the memory map it points to. At most `space` bytes, else an error.
[[nodiscard]] Result<std::vector<std::uint8_t>> build_pvh_start_info(Gpa gpa, std::uint64_t space,
                                                                     const BootInfo& info);

// Multiboot information (specification 0.6.96, section 3.3) at `gpa`, followed by the module list and the
// memory map it points to. All addresses must lie below 4 GiB. At most `space` bytes, else an error.
[[nodiscard]] Result<std::vector<std::uint8_t>> build_multiboot_info(Gpa gpa, std::uint64_t space,
                                                                     const BootInfo& info);

// In EAX at the entry of a multiboot kernel.
inline constexpr std::uint32_t kMultibootBootMagic = 0x2BADB002;

}  // namespace wisp
