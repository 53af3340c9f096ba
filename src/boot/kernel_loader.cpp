#include "boot/kernel_loader.h"

#include <algorithm>

#include "base/checked.h"
#include "boot/layout.h"

namespace wisp {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

std::uint64_t mib_up(std::uint64_t bytes) {
  return bytes / kMiB + (bytes % kMiB != 0 ? 1 : 0);
}

// Loads file bytes at [gpa, gpa + size), which may lie in several placements that touch.
Result<void> load_range(const ImageReader& file, Gpa gpa, std::uint64_t file_offset, std::uint64_t size,
                        std::span<const RamPlacement> ram) {
  if (file.fd() < 0) {
    return fail("an image in memory cannot be loaded into guest RAM");
  }
  while (size > 0) {
    const auto part = std::ranges::find_if(ram, [gpa](const RamPlacement& placement) {
      return gpa >= placement.gpa && gpa - placement.gpa < placement.size;
    });
    if (part == ram.end()) {
      return fail("the machine has no RAM at {:#x}", gpa);
    }
    const std::uint64_t offset = gpa - part->gpa;
    const std::uint64_t here = std::min(size, part->size - offset);
    WISP_TRY(part->block->load_file(part->block_offset + offset, file.fd(), file_offset, here));
    gpa += here;
    file_offset += here;
    size -= here;
  }
  return {};
}

}  // namespace

std::uint64_t low_ram_end(std::span<const RamPlacement> ram) {
  std::uint64_t end = 0;
  for (bool grew = true; grew && end < layout::kLowRamEnd;) {
    grew = false;
    for (const RamPlacement& placement : ram) {
      if (placement.gpa <= end && placement.size > end - placement.gpa) {
        end = placement.gpa + std::min(placement.size, layout::kLowRamEnd - placement.gpa);
        grew = end < layout::kLowRamEnd;
      }
    }
  }
  return end;
}

Result<void> load_kernel(const ImageReader& file, const KernelImage& image,
                         std::span<const RamPlacement> ram) {
  const std::uint64_t end = low_ram_end(ram);
  if (image.end > end) {
    return fail("needs memory up to {} MiB, the machine has {} MiB of RAM below 3 GiB: give it more (-m)",
                mib_up(image.end), end / kMiB);
  }
  for (const KernelSegment& segment : image.segments) {
    WISP_TRY(load_range(file, segment.gpa, segment.file_offset, segment.file_size, ram));
  }
  return {};
}

std::optional<Gpa> place_initrd(std::uint64_t size, const KernelImage& image, std::uint64_t low_ram_end) {
  const std::uint64_t limit = std::min(low_ram_end, image.initrd_last + 1);
  if (size > limit) {
    return std::nullopt;
  }
  const Gpa gpa = align_down(limit - size, kPageSize);
  if (gpa < image.end || gpa < layout::kKernelFloor) {
    return std::nullopt;
  }
  return gpa;
}

Result<LoadedRange> load_initrd(const ImageReader& file, const KernelImage& image,
                                std::span<const RamPlacement> ram) {
  const std::uint64_t end = low_ram_end(ram);
  const auto gpa = place_initrd(file.size(), image, end);
  if (!gpa) {
    return fail("of {} MiB does not fit between the end of the kernel at {} MiB and {} MiB ({})",
                mib_up(file.size()), mib_up(image.end), std::min(end, image.initrd_last + 1) / kMiB,
                image.initrd_last + 1 < end ? "the highest address this kernel takes an initrd at"
                                            : "the end of RAM below 3 GiB: give the machine more, -m");
  }
  WISP_TRY(load_range(file, *gpa, 0, file.size(), ram));
  return LoadedRange{*gpa, file.size()};
}

}  // namespace wisp
