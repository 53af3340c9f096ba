#include "boot/kernel_image.h"

#include <algorithm>
#include <array>
#include <span>

#include "base/bytes.h"
#include "base/checked.h"
#include "boot/layout.h"
#include "boot/linux_protocol.h"

namespace wisp {
namespace {

constexpr std::size_t kHeadSize = 4096;

struct WrongFile {
  std::size_t offset;
  std::string_view magic;
  std::string_view message;
};

using namespace std::string_view_literals;

// Files that users hand over by mistake; without this a flat kernel image would be seen in them.
constexpr std::array kWrongFiles = {
    WrongFile{0, "\x1f\x8b"sv, "is gzip-compressed: unpack it first (gunzip)"},
    WrongFile{0,
              "\xfd"
              "7zXZ\0"sv,
              "is xz-compressed: unpack it first (unxz)"},
    WrongFile{0, "\x28\xb5\x2f\xfd"sv, "is zstd-compressed: unpack it first (unzstd)"},
    WrongFile{0, "\x02\x21\x4c\x18"sv, "is lz4-compressed: unpack it first (unlz4)"},
    WrongFile{0, "\x04\x22\x4d\x18"sv, "is lz4-compressed: unpack it first (unlz4)"},
    WrongFile{0, "BZh"sv, "is bzip2-compressed: unpack it first (bunzip2)"},
    WrongFile{0, "\x89LZO\0\r\n\x1a\n"sv, "is lzop-compressed: unpack it first (lzop -d)"},
    WrongFile{0, "\x5d\0\0"sv, "is lzma-compressed: unpack it first (unlzma)"},
    WrongFile{4, "zimg"sv, "is an EFI zboot image: give the kernel inside it"},
    WrongFile{0, "MZ"sv, "is an EFI or DOS program, not an x86 Linux kernel (no HdrS header)"},
    WrongFile{0, "#!"sv, "is a script, not a kernel"},
    WrongFile{0, "!<arch>\n"sv, "is a package or static library: unpack the kernel from it"},
    WrongFile{0, "\xed\xab\xee\xdb"sv, "is an RPM package: unpack the kernel from it"},
    WrongFile{0, "PK\x03\x04"sv, "is a zip archive: unpack the kernel from it"},
    WrongFile{0, "070701"sv, "is a cpio archive: give it as the initrd"},
    WrongFile{0, "070702"sv, "is a cpio archive: give it as the initrd"},
    WrongFile{257, "ustar"sv, "is a tar archive: unpack the kernel from it"},
    WrongFile{0, "QFI\xfb"sv, "is a qcow2 disk image: give it as a drive"},
    WrongFile{0, "hsqs"sv, "is a squashfs file system: give it as a drive"},
    WrongFile{0x438, "\x53\xef"sv, "is an ext2/3/4 file system: give it as a drive"},
    WrongFile{0x1FE, "\x55\xaa"sv, "is a boot sector or disk image, not a kernel (no HdrS header)"},
    WrongFile{0, "\xd0\x0d\xfe\xed"sv, "is a device tree or FIT image, not an x86 kernel"},
    WrongFile{0, "\x27\x05\x19\x56"sv, "is a U-Boot image, not an x86 kernel"},
};

bool has_magic(std::span<const std::uint8_t> bytes, std::size_t offset, std::string_view magic) {
  return range_within(offset, magic.size(), bytes.size()) &&
         std::ranges::equal(bytes.subspan(offset, magic.size()), magic, {}, {},
                            [](char c) { return static_cast<std::uint8_t>(c); });
}

bool looks_like_text(std::span<const std::uint8_t> bytes) {
  return std::ranges::all_of(bytes.first(std::min<std::size_t>(bytes.size(), 512)), [](std::uint8_t byte) {
    return byte == '\t' || byte == '\n' || byte == '\r' || (byte >= 0x20 && byte != 0x7F);
  });
}

Result<KernelImage> read_raw_kernel(const ImageReader& file) {
  const auto end = checked_add<std::uint64_t>(layout::kRawKernel, file.size());
  if (!end || *end > layout::kHighRamStart) {
    return fail("is too large for a kernel: {} bytes", file.size());
  }
  KernelImage image;
  image.format = KernelFormat::kRaw;
  image.protocol = BootProtocol::kLinux64;
  image.entry = layout::kRawKernel;
  image.segments = {{layout::kRawKernel, 0, file.size(), file.size()}};
  image.start = layout::kRawKernel;
  image.end = *end;
  image.command_line_max = linux_protocol::kCommandLineMax;
  image.initrd_last = linux_protocol::kInitrdLast;
  return image;
}

}  // namespace

std::string_view to_string(KernelFormat format) {
  switch (format) {
    case KernelFormat::kElf:
      return "ELF";
    case KernelFormat::kBzImage:
      return "bzImage";
    case KernelFormat::kRaw:
      return "flat image";
  }
  return "unknown";
}

std::string_view to_string(BootProtocol protocol) {
  switch (protocol) {
    case BootProtocol::kLinux64:
      return "64-bit Linux protocol";
    case BootProtocol::kLinux32:
      return "32-bit Linux protocol";
    case BootProtocol::kPvh:
      return "PVH";
    case BootProtocol::kMultiboot1:
      return "multiboot";
  }
  return "unknown";
}

Result<KernelImage> read_kernel_image(const ImageReader& file, ElfEntry elf_entry) {
  if (file.size() == 0) {
    return fail("is empty");
  }
  WISP_ASSIGN(const auto head, file.head(kHeadSize));
  if (has_magic(head, 0,
                "\x7f"
                "ELF")) {
    return read_elf_kernel(file, elf_entry);
  }
  if (has_magic(head, linux_protocol::kMagicOffset, "HdrS")) {
    return read_bzimage_kernel(file);
  }
  for (const WrongFile& wrong : kWrongFiles) {
    if (has_magic(head, wrong.offset, wrong.magic)) {
      return fail("{}", wrong.message);
    }
  }
  if (looks_like_text(head)) {
    return fail("is a text file, not a kernel");
  }
  if (std::ranges::all_of(head, [](std::uint8_t byte) { return byte == 0; })) {
    return fail("starts with {} zero bytes: not a kernel (ELF vmlinux, bzImage or flat vmlinux.bin)",
                head.size());
  }
  return read_raw_kernel(file);
}

}  // namespace wisp
