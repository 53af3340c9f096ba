// bzImage: the Linux/x86 boot protocol, version 2.10 and later (Linux 2.6.31).
#include <algorithm>
#include <bit>

#include "base/bytes.h"
#include "base/checked.h"
#include "boot/kernel_image.h"
#include "boot/layout.h"
#include "boot/linux_protocol.h"

namespace wisp {

Result<KernelImage> read_bzimage_kernel(const ImageReader& file) {
  using namespace linux_protocol;
  constexpr std::size_t kNeeded = kInitSize + 4;
  constexpr std::size_t kSector = 512;

  WISP_ASSIGN(const auto head, file.head(kSetupHeaderEnd));
  if (head.size() < kNeeded) {
    return fail("is a truncated bzImage: {} bytes", head.size());
  }
  if (load_le<std::uint16_t>(&head[kBootFlag]) != kBootFlagValue) {
    return fail("is a damaged bzImage: boot flag {:#x}, {:#x} is expected",
                load_le<std::uint16_t>(&head[kBootFlag]), kBootFlagValue);
  }
  const auto version = load_le<std::uint16_t>(&head[kVersion]);
  if (version < 0x020A) {
    return fail("is a kernel with boot protocol {}.{:02}, at least 2.10 (Linux 2.6.31) is needed",
                version >> 8, version & 0xFF);
  }
  if ((head[kLoadFlags] & kLoadedHigh) == 0) {
    return fail("is a zImage that loads below 1 MiB, which is not supported: give a bzImage");
  }
  // The byte after the jump opcode is the distance from 0x202 to the end of the header.
  const std::size_t header_end = kMagicOffset + head[kJump + 1];
  if (header_end < kNeeded || header_end > kSetupHeaderEnd) {
    return fail("is a damaged bzImage: its setup header ends at {:#x}", header_end);
  }
  if (header_end > head.size()) {
    return fail("is a truncated bzImage: {} bytes", head.size());
  }

  const std::uint64_t setup_sectors = head[kSetupSects] == 0 ? 4 : head[kSetupSects];
  const std::uint64_t payload_offset = (setup_sectors + 1) * kSector;
  const std::uint64_t payload_size = std::uint64_t{load_le<std::uint32_t>(&head[kSysSize])} * 16;
  if (payload_size == 0) {
    return fail("is a damaged bzImage: its protected-mode part has no size");
  }
  // syssize counts whole paragraphs, the file may end inside the last.
  if (file.size() <= payload_offset || file.size() - payload_offset + 15 < payload_size) {
    return fail("is a truncated bzImage: {:#x} bytes at offset {:#x} are needed, the file has {:#x} bytes",
                payload_size, payload_offset, file.size());
  }
  const std::uint64_t file_size = std::min(payload_size, file.size() - payload_offset);

  const auto preferred = load_le<std::uint64_t>(&head[kPrefAddress]);
  const std::uint64_t alignment = load_le<std::uint32_t>(&head[kKernelAlignment]);
  if (!std::has_single_bit(alignment) || !is_aligned(preferred, alignment)) {
    return fail("is a damaged bzImage: load address {:#x}, alignment {:#x}", preferred, alignment);
  }
  const std::uint64_t memory_size =
      std::max<std::uint64_t>(load_le<std::uint32_t>(&head[kInitSize]), file_size);
  if (preferred < layout::kKernelFloor || !range_within(preferred, memory_size, layout::kHighRamStart)) {
    return fail("is a bzImage that wants {:#x} bytes at {:#x}, which do not lie between 1 MiB and 4 GiB",
                memory_size, preferred);
  }

  KernelImage image;
  image.format = KernelFormat::kBzImage;
  image.segments = {{preferred, payload_offset, file_size, memory_size}};
  image.start = preferred;
  image.end = preferred + memory_size;
  const bool has_64 = version >= 0x020C && (load_le<std::uint16_t>(&head[kXLoadFlags]) & kXlfKernel64) != 0;
  if (has_64) {
    if (file_size <= kEntry64) {
      return fail("is a damaged bzImage: {} bytes of protected-mode code", file_size);
    }
    image.protocol = BootProtocol::kLinux64;
    image.entry = preferred + kEntry64;
  } else {
    image.protocol = BootProtocol::kLinux32;
    image.entry = preferred;
  }
  const auto command_line_max = load_le<std::uint32_t>(&head[kCmdlineSize]);
  image.command_line_max =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(command_line_max, layout::kCommandLineSpace - 1));
  image.initrd_last = load_le<std::uint32_t>(&head[kInitrdAddrMax]);
  image.setup_header.assign(head.begin() + kSetupHeader,
                            head.begin() + static_cast<std::ptrdiff_t>(header_end));
  return image;
}

}  // namespace wisp
