// Synthetic kernels and guest RAM for the tests of src/boot.
#pragma once

#include <elf.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "boot/kernel_loader.h"
#include "boot/layout.h"
#include "memory/guest_memory.h"
#include "memory/ram.h"

namespace wisp::test {

using Bytes = std::vector<std::uint8_t>;

inline Bytes pattern(std::size_t size, std::uint8_t seed) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    bytes[i] = static_cast<std::uint8_t>(seed + i * 7 + i / 251);
  }
  return bytes;
}

// A file with no name but a path, gone with the object.
class ScratchFile final {
 public:
  explicit ScratchFile(const Bytes& content) : fd_(::memfd_create("wisp-boot-test", MFD_CLOEXEC)) {
    EXPECT_EQ(::pwrite(fd_.get(), content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
  }
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::string path() const { return "/proc/self/fd/" + std::to_string(fd_.get()); }

 private:
  UniqueFd fd_;
};

template <typename T>
void append_struct(Bytes& to, const T& value) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

struct ElfSegment {
  std::uint32_t type = PT_LOAD;
  std::uint64_t paddr = 0;
  Bytes content;
  std::uint64_t memory_size = 0;  // 0: the size of the content
  std::uint64_t align = 0;
};

// An ELF file of either class; contents are placed from file offset 0x1000, each on a page of its own.
template <typename Ehdr = Elf64_Ehdr, typename Phdr = Elf64_Phdr>
Bytes build_elf(std::uint64_t entry, const std::vector<ElfSegment>& segments) {
  constexpr bool kIs64 = sizeof(Ehdr) == sizeof(Elf64_Ehdr);
  Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = kIs64 ? ELFCLASS64 : ELFCLASS32;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_ident[EI_VERSION] = EV_CURRENT;
  header.e_type = ET_EXEC;
  header.e_machine = kIs64 ? EM_X86_64 : EM_386;
  header.e_version = EV_CURRENT;
  header.e_entry = static_cast<decltype(header.e_entry)>(entry);
  header.e_phoff = sizeof header;
  header.e_ehsize = sizeof header;
  header.e_phentsize = sizeof(Phdr);
  header.e_phnum = static_cast<std::uint16_t>(segments.size());
  Bytes file;
  append_struct(file, header);
  std::uint64_t offset = 0x1000;
  for (const ElfSegment& segment : segments) {
    Phdr entry_header{};
    using Word = decltype(entry_header.p_filesz);
    entry_header.p_type = segment.type;
    entry_header.p_offset = static_cast<Word>(offset);
    entry_header.p_vaddr = entry_header.p_paddr = static_cast<Word>(segment.paddr);
    entry_header.p_filesz = static_cast<Word>(segment.content.size());
    entry_header.p_memsz =
        static_cast<Word>(segment.memory_size != 0 ? segment.memory_size : segment.content.size());
    entry_header.p_align = static_cast<Word>(segment.align);
    append_struct(file, entry_header);
    offset += (segment.content.size() + 0xFFF) / 0x1000 * 0x1000;
  }
  for (const ElfSegment& segment : segments) {
    file.resize((file.size() + 0xFFF) / 0x1000 * 0x1000);
    file.insert(file.end(), segment.content.begin(), segment.content.end());
  }
  return file;
}

inline Bytes note(const std::string& owner, std::uint32_t type, const Bytes& desc) {
  Bytes out;
  append_struct(out, Elf64_Nhdr{static_cast<std::uint32_t>(owner.size() + 1),
                                static_cast<std::uint32_t>(desc.size()), type});
  for (const char c : owner) {
    out.push_back(static_cast<std::uint8_t>(c));
  }
  out.push_back(0);
  out.resize((out.size() + 3) / 4 * 4);
  out.insert(out.end(), desc.begin(), desc.end());
  out.resize((out.size() + 3) / 4 * 4);
  return out;
}

inline ElfSegment pvh_note(std::uint32_t entry) {
  Bytes desc(4);
  store_le(desc.data(), entry);
  Bytes notes = note("Linux", 0x100, {1, 2, 3});
  const Bytes pvh = note("Xen", 18, desc);
  notes.insert(notes.end(), pvh.begin(), pvh.end());
  return {.type = PT_NOTE, .content = notes};
}

struct BzImageShape {
  std::uint16_t version = 0x020F;
  std::uint8_t setup_sects = 7;
  std::uint16_t xloadflags = 1;
  std::uint64_t pref_address = 0x100'0000;
  std::uint32_t alignment = 0x20'0000;
  std::uint32_t init_size = 0x80'0000;
  std::uint32_t cmdline_size = 2047;
  std::uint32_t initrd_addr_max = 0x7FFF'FFFF;
  Bytes payload = pattern(0x5000, 3);
};

inline Bytes build_bzimage(const BzImageShape& shape) {
  Bytes file((shape.setup_sects + 1UL) * 512);
  const auto put = [&file](std::size_t offset, auto value) { store_le(&file[offset], value); };
  file[0] = 'M';
  file[1] = 'Z';
  put(0x1F1, shape.setup_sects);
  put(0x1F4, static_cast<std::uint32_t>((shape.payload.size() + 15) / 16));
  put(0x1FE, std::uint16_t{0xAA55});
  put(0x200, std::uint16_t{0x6AEB});  // jmp: the header ends at 0x202 + 0x6A
  put(0x202, std::uint32_t{0x5372'6448});
  put(0x206, shape.version);
  put(0x211, std::uint8_t{1});
  put(0x214, std::uint32_t{0x10'0000});
  put(0x22C, shape.initrd_addr_max);
  put(0x230, shape.alignment);
  put(0x234, std::uint8_t{1});
  put(0x236, shape.xloadflags);
  put(0x238, shape.cmdline_size);
  put(0x258, shape.pref_address);
  put(0x260, shape.init_size);
  file.insert(file.end(), shape.payload.begin(), shape.payload.end());
  return file;
}

// RAM of a machine in one block: low, and high where `size` is beyond 3 GiB.
struct TestRam {
  explicit TestRam(std::uint64_t size) {
    auto created = RamBlock::create({.size = size});
    EXPECT_TRUE(created) << (created ? "" : created.error().message);
    block = std::move(*created);
    const std::uint64_t low = std::min(size, layout::kLowRamEnd);
    placements.push_back({0, 0, low, block.get()});
    if (size > low) {
      placements.push_back({layout::kHighRamStart, low, size - low, block.get()});
    }
    std::vector<GuestMemoryBlock> blocks;
    for (const RamPlacement& placement : placements) {
      blocks.push_back({.gpa = placement.gpa,
                        .size = placement.size,
                        .host = block->host() + placement.block_offset,
                        .dirty = nullptr});
    }
    memory.set_blocks(std::move(blocks));
  }
  [[nodiscard]] Bytes bytes(Gpa gpa, std::size_t size) const {
    Bytes out(size);
    EXPECT_TRUE(memory.read(gpa, out)) << std::hex << gpa;
    return out;
  }
  template <typename T>
  [[nodiscard]] T at(Gpa gpa) const {
    return memory.load<T>(gpa).value();
  }

  std::unique_ptr<RamBlock> block;
  std::vector<RamPlacement> placements;
  GuestMemory memory;
};

template <typename T>
std::string error_of(const Result<T>& result) {
  return result ? "no error" : result.error().message;
}

}  // namespace wisp::test
