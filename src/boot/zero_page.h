// struct boot_params of the Linux/x86 boot protocol (Documentation/arch/x86/zero-page.rst).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "boot/e820.h"
#include "boot/kernel_image.h"
#include "boot/kernel_loader.h"

namespace wisp {

// What the boot loader tells a kernel, by whichever protocol.
struct BootInfo {
  Gpa command_line = 0;
  std::optional<LoadedRange> initrd;
  Gpa rsdp = 0;  // 0: no ACPI
  std::span<const E820Entry> e820;
};

// The page, linux_protocol::kBootParamsSize bytes: the setup header of a bzImage, or one made up for a kernel
// that has none, with the loader's fields filled in. Errors where the memory map has too many entries.
[[nodiscard]] Result<std::vector<std::uint8_t>> build_zero_page(const KernelImage& image,
                                                                const BootInfo& info);

}  // namespace wisp
