// A setup header of any content in front of a payload: reaches deeper than whole files do.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "base/bytes.h"
#include "boot/kernel_image.h"
#include "boot/kernel_loader.h"
#include "boot/layout.h"
#include "boot/linux_protocol.h"
#include "boot/zero_page.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace wisp;
  std::vector<std::uint8_t> file(0x1000);
  const std::size_t header = std::min<std::size_t>(size, linux_protocol::kSetupHeaderEnd - 0x1F1);
  std::copy(data, data + header, file.begin() + 0x1F1);
  store_le<std::uint16_t>(&file[linux_protocol::kBootFlag], linux_protocol::kBootFlagValue);
  store_le<std::uint32_t>(&file[linux_protocol::kMagicOffset], linux_protocol::kMagic);
  file.resize(file.size() + (size - header) * 16);
  const auto image = read_bzimage_kernel(ImageReader::from_bytes(file));
  if (!image) {
    return 0;
  }
  const KernelSegment& segment = image->segments.front();
  if (segment.file_offset > file.size() || segment.file_size > file.size() - segment.file_offset ||
      image->end > layout::kHighRamStart || image->start < layout::kKernelFloor ||
      image->entry - image->start >= segment.file_size) {
    std::abort();
  }
  const auto gpa = place_initrd(size, *image, layout::kLowRamEnd);
  if (gpa && (*gpa < image->end || *gpa + size > layout::kLowRamEnd)) {
    std::abort();
  }
  const auto page = build_zero_page(*image, {.initrd = {}, .e820 = {}});
  return page && page->size() == linux_protocol::kBootParamsSize ? 0 : (std::abort(), 0);
}
