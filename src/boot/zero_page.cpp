#include "boot/zero_page.h"

#include <algorithm>

#include "base/bytes.h"
#include "boot/linux_protocol.h"

namespace wisp {

Result<std::vector<std::uint8_t>> build_zero_page(const KernelImage& image, const BootInfo& info) {
  using namespace linux_protocol;
  if (info.e820.size() > kE820MaxEntries) {
    return fail("the memory map has {} entries, the zero page takes {}", info.e820.size(), kE820MaxEntries);
  }
  std::vector<std::uint8_t> page(kBootParamsSize);
  const auto put = [&page](std::size_t offset, auto value) { store_le(&page[offset], value); };
  const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
  const auto high = [](std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32); };

  if (image.format == KernelFormat::kBzImage) {
    std::ranges::copy(image.setup_header, page.begin() + kSetupHeader);
    put(kCode32Start, low(image.start));
  } else {
    put(kBootFlag, kBootFlagValue);
    put(kMagicOffset, kMagic);
    put(kVersion, std::uint16_t{0x020F});
    put(kLoadFlags, kLoadedHigh);
    put(kKernelAlignment, std::uint32_t{0x100'0000});
    put(kInitrdAddrMax, low(image.initrd_last));
    put(kCmdlineSize, image.command_line_max);
  }
  put(kTypeOfLoader, kLoaderUndefined);
  put(kCmdLinePtr, low(info.command_line));
  put(kExtCmdLinePtr, high(info.command_line));
  if (info.initrd) {
    put(kRamdiskImage, low(info.initrd->gpa));
    put(kExtRamdiskImage, high(info.initrd->gpa));
    put(kRamdiskSize, low(info.initrd->size));
    put(kExtRamdiskSize, high(info.initrd->size));
  }
  put(kAcpiRsdpAddr, std::uint64_t{info.rsdp});
  put(kE820Entries, static_cast<std::uint8_t>(info.e820.size()));
  std::size_t at = kE820Table;
  for (const E820Entry& entry : info.e820) {
    put(at, std::uint64_t{entry.start});
    put(at + 8, std::uint64_t{entry.size});
    put(at + 16, static_cast<std::uint32_t>(entry.type));
    at += kE820EntrySize;
  }
  return page;
}

}  // namespace wisp
