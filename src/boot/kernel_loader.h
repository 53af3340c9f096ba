// Puts kernels and initial RAM disks into guest RAM without a copy through the heap.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "base/error.h"
#include "boot/kernel_image.h"
#include "memory/gpa.h"
#include "memory/ram.h"

namespace wisp {

// A part of a RamBlock and the guest address it is placed at. The parts of a machine do not overlap.
struct RamPlacement {
  Gpa gpa = 0;
  std::uint64_t block_offset = 0;
  std::uint64_t size = 0;
  RamBlock* block = nullptr;  // borrowed
};

// Where something was loaded.
struct LoadedRange {
  Gpa gpa = 0;
  std::uint64_t size = 0;
  bool operator==(const LoadedRange&) const = default;
};

// Loads all segments. RAM must read as zero where no segment's bytes go (fresh, or discarded after a reset):
// what a kernel wants zeroed is not touched, so that it costs no host memory. Errors where the machine has no
// RAM for all of [image.start, image.end).
[[nodiscard]] Result<void> load_kernel(const ImageReader& file, const KernelImage& image,
                                       std::span<const RamPlacement> ram);

// Loads an initrd page-aligned as high as the kernel allows below 4 GiB, behind the kernel. Errors name the
// sizes where it does not fit.
[[nodiscard]] Result<LoadedRange> load_initrd(const ImageReader& file, const KernelImage& image,
                                              std::span<const RamPlacement> ram);

// The address load_initrd() chooses for `size` bytes, or nothing where they do not fit.
[[nodiscard]] std::optional<Gpa> place_initrd(std::uint64_t size, const KernelImage& image,
                                              std::uint64_t low_ram_end);

// The end of the RAM that starts at address 0 and continues without a hole, at most layout::kLowRamEnd.
[[nodiscard]] std::uint64_t low_ram_end(std::span<const RamPlacement> ram);

}  // namespace wisp
