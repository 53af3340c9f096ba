// ELF kernels: vmlinux and others with a PVH note, 64-bit vmlinux without one, and multiboot (ELF32).
#include <elf.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/bytes.h"
#include "base/checked.h"
#include "boot/kernel_image.h"
#include "boot/layout.h"
#include "boot/linux_protocol.h"

namespace wisp {
namespace {

// More than any kernel has (Linux: about 5 segments and 1 KiB of notes); bounds the work on a hostile file.
constexpr std::uint32_t kMaxProgramHeaders = 256;
constexpr std::uint64_t kMaxNoteBytes = 64 << 10;

constexpr std::uint32_t kXenNotePhys32Entry = 18;  // XEN_ELFNOTE_PHYS32_ENTRY

constexpr std::uint32_t kMultibootMagic = 0x1BADB002;
constexpr std::uint64_t kMultibootSearch = 8192;
constexpr std::uint32_t kMultibootNeedsUnknown = 0xFFFC;  // required features beyond alignment and memory map
constexpr std::uint32_t kMultibootAddresses = 1U << 16;
constexpr std::uint64_t kMultibootCommandLineMax = 4095;

// The parts of both ELF classes that matter here, in 64 bits.
struct Segment {
  std::uint32_t type = 0;
  std::uint64_t offset = 0;
  std::uint64_t paddr = 0;
  std::uint64_t file_size = 0;
  std::uint64_t memory_size = 0;
  std::uint64_t align = 0;
};

struct ElfFile {
  bool is_64 = false;
  std::uint64_t entry = 0;
  std::vector<Segment> segments;
};

template <typename Ehdr, typename Phdr>
Result<ElfFile> read_headers(const ImageReader& file, bool is_64) {
  WISP_ASSIGN(const Ehdr header, file.load<Ehdr>(0));
  const std::uint16_t machine = header.e_machine;
  if (is_64 && machine != EM_X86_64) {
    return fail("is an ELF file for another machine (e_machine {}, x86-64 is {})", machine, EM_X86_64);
  }
  if (!is_64 && machine != EM_386) {
    return fail("is a 32-bit ELF file for another machine (e_machine {}, i386 is {})", machine, EM_386);
  }
  if (header.e_type == ET_REL || header.e_type == ET_CORE) {
    return fail("is an ELF {}, not a kernel",
                header.e_type == ET_REL ? "object or kernel module" : "core dump");
  }
  if (header.e_type != ET_EXEC && header.e_type != ET_DYN) {
    return fail("has ELF type {}, which is not a kernel's", std::uint16_t{header.e_type});
  }
  if (header.e_phnum == 0 || header.e_phentsize != sizeof(Phdr)) {
    return fail("is an ELF file without usable program headers ({} of {} bytes)",
                std::uint16_t{header.e_phnum}, std::uint16_t{header.e_phentsize});
  }
  if (header.e_phnum > kMaxProgramHeaders) {
    return fail("has {} program headers, more than the {} a kernel may have", std::uint16_t{header.e_phnum},
                kMaxProgramHeaders);
  }
  ElfFile elf{.is_64 = is_64, .entry = header.e_entry, .segments = {}};
  std::vector<Phdr> table(header.e_phnum);
  WISP_TRY(file.read(header.e_phoff,
                     std::span(reinterpret_cast<std::uint8_t*>(table.data()), table.size() * sizeof(Phdr))));
  for (const Phdr& entry : table) {
    elf.segments.push_back(
        {entry.p_type, entry.p_offset, entry.p_paddr, entry.p_filesz, entry.p_memsz, entry.p_align});
  }
  return elf;
}

Result<ElfFile> read_elf(const ImageReader& file) {
  std::array<std::uint8_t, EI_NIDENT> ident{};
  WISP_TRY(file.read(0, ident));
  if (ident[EI_DATA] != ELFDATA2LSB) {
    return fail("is a big-endian ELF file, not an x86 kernel");
  }
  switch (ident[EI_CLASS]) {
    case ELFCLASS64:
      return read_headers<Elf64_Ehdr, Elf64_Phdr>(file, true);
    case ELFCLASS32:
      return read_headers<Elf32_Ehdr, Elf32_Phdr>(file, false);
    default:
      return fail("is an ELF file of unknown class {}", ident[EI_CLASS]);
  }
}

// The physical 32-bit entry that the notes name, if any. Each step moves on by at least the 12 bytes of a
// note header, so the walk ends.
Result<std::optional<Gpa>> find_pvh_entry(const ImageReader& file, const ElfFile& elf) {
  for (const Segment& segment : elf.segments) {
    if (segment.type != PT_NOTE) {
      continue;
    }
    if (segment.file_size > kMaxNoteBytes) {
      return fail("has a note segment of {} bytes, more than the {} a kernel may have", segment.file_size,
                  kMaxNoteBytes);
    }
    std::vector<std::uint8_t> notes(segment.file_size);
    WISP_TRY(file.read(segment.offset, notes));
    // 8 where the segment says so (GNU property notes), else 4, as in every kernel's.
    const std::uint64_t align = segment.align == 8 ? 8 : 4;
    std::uint64_t at = 0;
    while (range_within(at, sizeof(Elf64_Nhdr), notes.size())) {
      Elf64_Nhdr note{};
      std::memcpy(&note, &notes[at], sizeof note);
      const std::uint64_t name = at + sizeof note;
      const std::uint64_t desc = align_down(name + note.n_namesz + align - 1, align);
      if (!range_within(name, note.n_namesz, notes.size()) ||
          !range_within(desc, note.n_descsz, notes.size())) {
        return fail("has a note at offset {:#x} that runs past its segment", segment.offset + at);
      }
      if (note.n_type == kXenNotePhys32Entry && note.n_namesz == 4 &&
          std::memcmp(&notes[name], "Xen", 4) == 0) {
        if (note.n_descsz != 4 && note.n_descsz != 8) {
          return fail("has a PVH entry note of {} bytes, where 4 or 8 are expected",
                      std::uint32_t{note.n_descsz});
        }
        const Gpa entry =
            note.n_descsz == 4 ? load_le<std::uint32_t>(&notes[desc]) : load_le<std::uint64_t>(&notes[desc]);
        return entry;
      }
      at = align_down(desc + note.n_descsz + align - 1, align);
    }
  }
  return std::nullopt;
}

// Whether the file carries a multiboot header that this loader can serve: one that leaves addresses to ELF.
Result<bool> has_multiboot_header(const ImageReader& file) {
  WISP_ASSIGN(const auto head, file.head(kMultibootSearch));
  for (std::size_t at = 0; at + 12 <= head.size(); at += 4) {
    const auto magic = load_le<std::uint32_t>(&head[at]);
    const auto flags = load_le<std::uint32_t>(&head[at + 4]);
    const auto checksum = load_le<std::uint32_t>(&head[at + 8]);
    if (magic != kMultibootMagic || magic + flags + checksum != 0) {
      continue;
    }
    if ((flags & kMultibootNeedsUnknown) != 0 || (flags & kMultibootAddresses) != 0) {
      return fail("has a multiboot header with flags {:#x}, which ask for more than is supported", flags);
    }
    return true;
  }
  return false;
}

Result<void> place_segments(const ImageReader& file, const ElfFile& elf, KernelImage& image) {
  for (const Segment& segment : elf.segments) {
    if (segment.type != PT_LOAD || segment.memory_size == 0) {
      continue;
    }
    if (segment.file_size > segment.memory_size) {
      return fail("has a segment at {:#x} with more bytes in the file ({:#x}) than in memory ({:#x})",
                  segment.paddr, segment.file_size, segment.memory_size);
    }
    if (!range_within(segment.offset, segment.file_size, file.size())) {
      return fail("is truncated: a segment needs {:#x} bytes at offset {:#x}, the file has {:#x} bytes",
                  segment.file_size, segment.offset, file.size());
    }
    if (segment.paddr < layout::kKernelFloor) {
      return fail("has a segment at {:#x}, below {:#x} where boot data lies", segment.paddr,
                  layout::kKernelFloor);
    }
    if (!range_within(segment.paddr, segment.memory_size, layout::kHighRamStart)) {
      return fail("has a segment of {:#x} bytes at {:#x}, which does not end below 4 GiB",
                  segment.memory_size, segment.paddr);
    }
    image.segments.push_back({segment.paddr, segment.offset, segment.file_size, segment.memory_size});
  }
  if (image.segments.empty()) {
    return fail("is an ELF file with nothing to load");
  }
  std::ranges::sort(image.segments, {}, &KernelSegment::gpa);
  for (std::size_t i = 1; i < image.segments.size(); ++i) {
    const KernelSegment& before = image.segments[i - 1];
    if (before.gpa + before.memory_size > image.segments[i].gpa) {
      return fail("has segments at {:#x} and {:#x} that overlap", before.gpa, image.segments[i].gpa);
    }
  }
  image.start = image.segments.front().gpa;
  image.end = image.segments.back().gpa + image.segments.back().memory_size;
  return {};
}

}  // namespace

Result<KernelImage> read_elf_kernel(const ImageReader& file, ElfEntry elf_entry) {
  WISP_ASSIGN(const ElfFile elf, read_elf(file));
  KernelImage image;
  image.format = KernelFormat::kElf;
  image.command_line_max = linux_protocol::kCommandLineMax;
  image.initrd_last = linux_protocol::kInitrdLast;
  WISP_TRY(place_segments(file, elf, image));

  WISP_ASSIGN(const std::optional<Gpa> pvh, find_pvh_entry(file, elf));
  if (elf_entry == ElfEntry::kPvh && !pvh) {
    return fail("has no PVH entry (Linux: build it with CONFIG_PVH=y)");
  }
  if (pvh && elf_entry != ElfEntry::kLinux64) {
    image.protocol = BootProtocol::kPvh;
    image.entry = *pvh;
  } else if (elf.is_64) {
    image.protocol = BootProtocol::kLinux64;
    image.entry = elf.entry;
  } else {
    WISP_ASSIGN(const bool multiboot, has_multiboot_header(file));
    if (!multiboot || elf_entry == ElfEntry::kLinux64) {
      return fail("is a 32-bit ELF file without a PVH note or multiboot header: give a 64-bit vmlinux");
    }
    image.protocol = BootProtocol::kMultiboot1;
    image.entry = elf.entry;
    image.command_line_max = kMultibootCommandLineMax;
  }
  const bool inside = std::ranges::any_of(image.segments, [&](const KernelSegment& segment) {
    return image.entry >= segment.gpa && image.entry - segment.gpa < segment.file_size;
  });
  if (!inside) {
    return fail("has its {} entry at {:#x}, outside what it loads", to_string(image.protocol), image.entry);
  }
  return image;
}

}  // namespace wisp
