// Kernel formats: what a file is, where its parts belong in guest memory, and how it wants to be entered.
// Reading a format touches no guest memory; kernel_loader.h puts the result there.
//
// ELF: System V gABI; PVH: Xen docs/misc/pvh.pandoc; bzImage: Documentation/arch/x86/boot.rst; Multiboot
// 0.6.96.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "boot/image_reader.h"
#include "memory/gpa.h"

namespace wisp {

enum class KernelFormat : std::uint8_t { kElf, kBzImage, kRaw };

// The state of the boot processor and the data that a kernel expects at its entry.
enum class BootProtocol : std::uint8_t {
  kLinux64,     // 64-bit Linux boot protocol: long mode, zero page in RSI
  kLinux32,     // 32-bit Linux boot protocol: flat protected mode, zero page in ESI
  kPvh,         // flat protected mode, hvm_start_info in EBX
  kMultiboot1,  // flat protected mode, magic in EAX, multiboot information in EBX
};

[[nodiscard]] std::string_view to_string(KernelFormat format);
[[nodiscard]] std::string_view to_string(BootProtocol protocol);

// A piece of the file and where it goes. Memory beyond `file_size` reads as zero.
struct KernelSegment {
  Gpa gpa = 0;
  std::uint64_t file_offset = 0;
  std::uint64_t file_size = 0;
  std::uint64_t memory_size = 0;  // at least file_size
  bool operator==(const KernelSegment&) const = default;
};

// A file that was understood. All segments lie in [layout::kKernelFloor, 4 GiB), sorted, without overlaps;
// whether the machine has RAM there is for the loader to find.
struct KernelImage {
  KernelFormat format = KernelFormat::kRaw;
  BootProtocol protocol = BootProtocol::kLinux64;
  Gpa entry = 0;
  std::vector<KernelSegment> segments;
  // Memory that the kernel uses before it reads the memory map, segments included: no initrd in there.
  Gpa start = 0;
  Gpa end = 0;
  // Longest command line it takes, without the terminating zero.
  std::uint32_t command_line_max = 0;
  // The last byte of an initrd may not be beyond this.
  Gpa initrd_last = 0;
  // bzImage: the setup header, from byte 0x1F1 of the file, as the zero page takes it over.
  std::vector<std::uint8_t> setup_header;
};

// Which way to enter an ELF kernel that offers several.
enum class ElfEntry : std::uint8_t { kAuto, kPvh, kLinux64 };

// Finds the format by its magic and reads the headers. kAuto takes the PVH entry where there is one, since it
// is the one that names its own protocol. Errors say what the file is or what is wrong with it; callers put
// the path in front.
[[nodiscard]] Result<KernelImage> read_kernel_image(const ImageReader& file,
                                                    ElfEntry elf_entry = ElfEntry::kAuto);

// The readers of each format; for read_kernel_image() and tests.
[[nodiscard]] Result<KernelImage> read_elf_kernel(const ImageReader& file, ElfEntry elf_entry);
[[nodiscard]] Result<KernelImage> read_bzimage_kernel(const ImageReader& file);

}  // namespace wisp
