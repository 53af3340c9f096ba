// Any bytes as a kernel file. What is accepted must keep the promises of KernelImage.
#include <cstdlib>

#include "boot/kernel_image.h"
#include "boot/layout.h"
#include "boot/zero_page.h"

namespace {

void require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace wisp;
  const auto file = ImageReader::from_bytes({data, size});
  for (const ElfEntry entry : {ElfEntry::kAuto, ElfEntry::kPvh, ElfEntry::kLinux64}) {
    const auto image = read_kernel_image(file, entry);
    if (!image) {
      require(!image.error().message.empty());
      continue;
    }
    require(!image->segments.empty());
    Gpa at = layout::kKernelFloor;
    bool entry_inside = false;
    for (const KernelSegment& segment : image->segments) {
      require(segment.gpa >= at && segment.file_size <= segment.memory_size);
      require(segment.file_offset <= size && segment.file_size <= size - segment.file_offset);
      at = segment.gpa + segment.memory_size;
      require(at >= segment.gpa && at <= layout::kHighRamStart);
      entry_inside |= image->entry >= segment.gpa && image->entry < segment.gpa + segment.file_size;
    }
    require(entry_inside && image->start == image->segments.front().gpa && image->end == at);
    require(image->command_line_max < layout::kCommandLineSpace);
    const auto page = build_zero_page(*image, {.initrd = {}, .e820 = {}});
    require(page && page->size() == 4096);
  }
  return 0;
}
