#include "boot/kernel_image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>

#include "boot_fixtures.h"

namespace wisp {
namespace {

using test::Bytes;
using ::testing::HasSubstr;

Result<KernelImage> read(const Bytes& file, ElfEntry elf_entry = ElfEntry::kAuto) {
  return read_kernel_image(ImageReader::from_bytes(file), elf_entry);
}
std::string error_of(const Bytes& file, ElfEntry elf_entry = ElfEntry::kAuto) {
  return test::error_of(read(file, elf_entry));
}

Bytes two_segments(std::uint64_t entry = 0x20'0000) {
  return test::build_elf(entry,
                         {{.paddr = 0x40'0000, .content = test::pattern(0x800, 2), .memory_size = 0x3000},
                          {.paddr = 0x20'0000, .content = test::pattern(0x1234, 1)}});
}

// The program header `index` of an ELF64 file from build_elf().
Elf64_Phdr& program_header(Bytes& file, std::size_t index) {
  return *reinterpret_cast<Elf64_Phdr*>(&file[sizeof(Elf64_Ehdr) + index * sizeof(Elf64_Phdr)]);
}
Elf64_Ehdr& elf_header(Bytes& file) {
  return *reinterpret_cast<Elf64_Ehdr*>(file.data());
}

TEST(ElfKernel, SegmentsAreSortedAndEntryIsLinux64WithoutANote) {
  const auto image = read(two_segments());
  ASSERT_TRUE(image) << test::error_of(image);
  EXPECT_EQ(image->format, KernelFormat::kElf);
  EXPECT_EQ(image->protocol, BootProtocol::kLinux64);
  EXPECT_EQ(image->entry, 0x20'0000U);
  const std::vector<KernelSegment> expected = {{0x20'0000, 0x2000, 0x1234, 0x1234},
                                               {0x40'0000, 0x1000, 0x800, 0x3000}};
  EXPECT_EQ(image->segments, expected);
  EXPECT_EQ(image->start, 0x20'0000U);
  EXPECT_EQ(image->end, 0x40'3000U);
  EXPECT_EQ(image->command_line_max, 2047U);
}

TEST(ElfKernel, PvhNoteNamesTheEntry) {
  const Bytes file = test::build_elf(
      0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(0x1000, 1)}, test::pvh_note(0x20'0040)});
  const auto automatic = read(file);
  ASSERT_TRUE(automatic) << test::error_of(automatic);
  EXPECT_EQ(automatic->protocol, BootProtocol::kPvh);
  EXPECT_EQ(automatic->entry, 0x20'0040U);
  EXPECT_EQ(read(file, ElfEntry::kPvh)->protocol, BootProtocol::kPvh);
  const auto linux64 = read(file, ElfEntry::kLinux64);
  ASSERT_TRUE(linux64);
  EXPECT_EQ(linux64->protocol, BootProtocol::kLinux64);
  EXPECT_EQ(linux64->entry, 0x20'0000U);
  EXPECT_THAT(error_of(two_segments(), ElfEntry::kPvh), HasSubstr("no PVH entry"));
}

TEST(ElfKernel, PvhNoteOfEightBytesAndIn32BitFiles) {
  Bytes wide(8);
  store_le<std::uint64_t>(wide.data(), 0x20'0010);
  const Bytes file = test::build_elf<Elf32_Ehdr, Elf32_Phdr>(
      0xC020'0000, {{.paddr = 0x20'0000, .content = test::pattern(0x100, 1)},
                    {.type = PT_NOTE, .content = test::note("Xen", 18, wide)}});
  const auto image = read(file);
  ASSERT_TRUE(image) << test::error_of(image);
  EXPECT_EQ(image->protocol, BootProtocol::kPvh);
  EXPECT_EQ(image->entry, 0x20'0010U);
}

TEST(ElfKernel, NotesThatDoNotCount) {
  const auto protocol = [](const Bytes& notes) {
    const auto image = read(test::build_elf(0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(64, 1)},
                                                        {.type = PT_NOTE, .content = notes}}));
    EXPECT_TRUE(image) << test::error_of(image);
    return image ? image->protocol : BootProtocol::kPvh;
  };
  EXPECT_EQ(protocol(test::note("Xen", 17, {0, 0, 0x20, 0})), BootProtocol::kLinux64);
  EXPECT_EQ(protocol(test::note("Xem", 18, {0, 0, 0x20, 0})), BootProtocol::kLinux64);
  EXPECT_EQ(protocol(test::note("GNU", 18, {0, 0, 0x20, 0})), BootProtocol::kLinux64);
  EXPECT_EQ(protocol({1, 2, 3}), BootProtocol::kLinux64);     // shorter than a note header
  EXPECT_EQ(protocol(Bytes(60000)), BootProtocol::kLinux64);  // 5,000 notes of nothing
}

TEST(ElfKernel, HostileNotesAreRefused) {
  const auto with_notes = [](const Bytes& notes) {
    return error_of(test::build_elf(0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(64, 1)},
                                                {.type = PT_NOTE, .content = notes}}));
  };
  Bytes huge_name = test::note("Xen", 18, {0, 0, 0x20, 0});
  store_le<std::uint32_t>(&huge_name[0], 0xFFFF'FFFF);
  EXPECT_THAT(with_notes(huge_name), HasSubstr("runs past its segment"));
  Bytes huge_desc = test::note("Xen", 18, {0, 0, 0x20, 0});
  store_le<std::uint32_t>(&huge_desc[4], 0xFFFF'FFFC);
  EXPECT_THAT(with_notes(huge_desc), HasSubstr("runs past its segment"));
  EXPECT_THAT(with_notes(test::note("Xen", 18, {0, 0})), HasSubstr("note of 2 bytes"));
  EXPECT_THAT(with_notes(Bytes(70000)), HasSubstr("note segment of 70000 bytes"));
  Bytes past_end = test::build_elf(
      0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(64, 1)}, test::pvh_note(0x20'0000)});
  program_header(past_end, 1).p_offset = UINT64_MAX - 8;
  EXPECT_THAT(error_of(past_end), HasSubstr("truncated"));
}

TEST(ElfKernel, EntryMustLieInWhatTheFileLoads) {
  EXPECT_THAT(error_of(two_segments(0x10'0000)), HasSubstr("entry at 0x100000, outside"));
  EXPECT_THAT(error_of(two_segments(0x40'0800)), HasSubstr("outside"));  // bss
  EXPECT_THAT(error_of(two_segments(0x20'1234)), HasSubstr("outside"));  // one beyond
  EXPECT_EQ(error_of(two_segments(0x20'1233)), "no error");
  EXPECT_THAT(error_of(two_segments(UINT64_MAX)), HasSubstr("outside"));
  EXPECT_THAT(error_of(test::build_elf(0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(64, 1)},
                                                   test::pvh_note(0xFFFF'FFF0)})),
              HasSubstr("PVH entry at 0xfffffff0, outside"));
}

TEST(ElfKernel, HostileSegmentsAreRefused) {
  const auto with = [](auto change) {
    Bytes file = two_segments();
    change(program_header(file, 1));
    return error_of(file);
  };
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_paddr = 0x7000; }), HasSubstr("below 0x100000"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_paddr = 0xF'FFFF; }), HasSubstr("below 0x100000"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_paddr = UINT64_MAX - 0x100; }), HasSubstr("below 4 GiB"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_memsz = UINT64_MAX; }), HasSubstr("below 4 GiB"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_memsz = 0x1'0000'0000 - 0x20'0000 + 1; }),
              HasSubstr("below 4 GiB"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_memsz = 0x1233; }), HasSubstr("more bytes in the file"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_offset = UINT64_MAX - 0x10; }), HasSubstr("truncated"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_filesz = p.p_memsz = 0x2000; }), HasSubstr("truncated"));
  EXPECT_THAT(with([](Elf64_Phdr& p) { p.p_memsz = 0x20'0001; }), HasSubstr("overlap"));
  EXPECT_EQ(with([](Elf64_Phdr& p) { p.p_memsz = 0x20'0000; }), "no error");  // they touch
  EXPECT_THAT(error_of(test::build_elf(0x20'0000, {})), HasSubstr("program headers"));
  EXPECT_THAT(error_of(test::build_elf(0x20'0000, {test::pvh_note(0)})), HasSubstr("nothing to load"));
}

TEST(ElfKernel, HostileHeadersAreRefused) {
  const auto with = [](auto change) {
    Bytes file = two_segments();
    change(elf_header(file));
    return error_of(file);
  };
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_machine = EM_AARCH64; }), HasSubstr("another machine"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_type = ET_REL; }), HasSubstr("object or kernel module"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_type = ET_CORE; }), HasSubstr("core dump"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_type = 77; }), HasSubstr("ELF type 77"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_ident[EI_DATA] = ELFDATA2MSB; }), HasSubstr("big-endian"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_ident[EI_CLASS] = 9; }), HasSubstr("class 9"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_phnum = 0xFFFF; }), HasSubstr("65535 program headers"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_phentsize = 1; }), HasSubstr("program headers"));
  EXPECT_THAT(with([](Elf64_Ehdr& h) { h.e_phoff = UINT64_MAX - 4; }), HasSubstr("truncated"));
  EXPECT_THAT(error_of(test::build_elf<Elf32_Ehdr, Elf32_Phdr>(
                  0x20'0000, {{.paddr = 0x20'0000, .content = test::pattern(64, 1)}})),
              HasSubstr("32-bit ELF file without a PVH note or multiboot header"));
}

TEST(ElfKernel, EveryTruncationIsAnError) {
  const Bytes file = test::build_elf(
      0x20'0000, {test::pvh_note(0x20'0000), {.paddr = 0x20'0000, .content = test::pattern(0x80, 1)}});
  ASSERT_TRUE(read(file));
  for (std::size_t size = 4; size < file.size(); ++size) {
    EXPECT_FALSE(read(Bytes(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size)))) << size;
  }
}

TEST(ElfKernel, MultibootHeaderMakesA32BitFileBootable) {
  const auto file = [](std::uint32_t flags, std::uint32_t checksum_error) {
    Bytes code = test::pattern(0x100, 1);
    store_le<std::uint32_t>(&code[0x20], 0x1BADB002);
    store_le<std::uint32_t>(&code[0x24], flags);
    store_le<std::uint32_t>(&code[0x28], 0U - 0x1BADB002 - flags + checksum_error);
    return test::build_elf<Elf32_Ehdr, Elf32_Phdr>(0x40'0004, {{.paddr = 0x40'0000, .content = code}});
  };
  const auto image = read(file(0, 0));
  ASSERT_TRUE(image) << test::error_of(image);
  EXPECT_EQ(image->protocol, BootProtocol::kMultiboot1);
  EXPECT_EQ(image->entry, 0x40'0004U);
  EXPECT_TRUE(read(file(3, 0)));
  EXPECT_THAT(error_of(file(4, 0)), HasSubstr("flags 0x4"));             // wants video
  EXPECT_THAT(error_of(file(1U << 16, 0)), HasSubstr("flags 0x10000"));  // addresses in the header
  EXPECT_THAT(error_of(file(0, 1)), HasSubstr("without a PVH note"));
}

TEST(BzImage, FieldsOfTheSetupHeaderAreFollowed) {
  const test::BzImageShape shape;
  const Bytes file = test::build_bzimage(shape);
  const auto image = read(file);
  ASSERT_TRUE(image) << test::error_of(image);
  EXPECT_EQ(image->format, KernelFormat::kBzImage);
  EXPECT_EQ(image->protocol, BootProtocol::kLinux64);
  EXPECT_EQ(image->entry, 0x100'0200U);
  const std::vector<KernelSegment> expected = {{0x100'0000, 0x1000, 0x5000, 0x80'0000}};
  EXPECT_EQ(image->segments, expected);
  EXPECT_EQ(image->end, 0x180'0000U);
  EXPECT_EQ(image->command_line_max, 2047U);
  EXPECT_EQ(image->initrd_last, 0x7FFF'FFFFU);
  EXPECT_EQ(image->setup_header, Bytes(file.begin() + 0x1F1, file.begin() + 0x26C));
}

TEST(BzImage, WithoutThe64BitEntryTheOldOneIsTaken) {
  test::BzImageShape shape;
  shape.xloadflags = 0;
  EXPECT_EQ(read(test::build_bzimage(shape))->protocol, BootProtocol::kLinux32);
  EXPECT_EQ(read(test::build_bzimage(shape))->entry, 0x100'0000U);
  shape.xloadflags = 1;
  shape.version = 0x020B;  // xloadflags came with 2.12
  EXPECT_EQ(read(test::build_bzimage(shape))->protocol, BootProtocol::kLinux32);
}

TEST(BzImage, SetupSectsZeroMeansFour) {
  test::BzImageShape shape;
  shape.setup_sects = 4;
  Bytes file = test::build_bzimage(shape);
  file[0x1F1] = 0;
  EXPECT_EQ(read(file)->segments[0].file_offset, 5U * 512);
}

TEST(BzImage, DamagedHeadersAreRefused) {
  const auto with = [](auto change) {
    test::BzImageShape shape;
    change(shape);
    return error_of(test::build_bzimage(shape));
  };
  using Shape = test::BzImageShape;
  EXPECT_THAT(with([](Shape& s) { s.version = 0x0209; }), HasSubstr("boot protocol 2.09"));
  EXPECT_THAT(with([](Shape& s) { s.alignment = 0; }), HasSubstr("alignment 0x0"));
  EXPECT_THAT(with([](Shape& s) { s.alignment = 0x30'0000; }), HasSubstr("alignment 0x300000"));
  EXPECT_THAT(with([](Shape& s) { s.pref_address = 0x100'1000; }), HasSubstr("load address 0x1001000"));
  EXPECT_THAT(with([](Shape& s) { s.pref_address = 0; }), HasSubstr("between 1 MiB and 4 GiB"));
  EXPECT_THAT(with([](Shape& s) { s.pref_address = 0xFFFF'FFFF'FFE0'0000; }),
              HasSubstr("between 1 MiB and 4 GiB"));
  EXPECT_THAT(with([](Shape& s) { s.init_size = 0xFFFF'FFFF; }), HasSubstr("between 1 MiB and 4 GiB"));
  EXPECT_THAT(with([](Shape& s) { s.payload = Bytes(16); }), HasSubstr("16 bytes of protected-mode code"));

  const auto patched = [](std::size_t offset, auto value) {
    Bytes file = test::build_bzimage({});
    store_le(&file[offset], value);
    return error_of(file);
  };
  EXPECT_THAT(patched(0x1FE, std::uint16_t{0}), HasSubstr("boot flag 0x0"));
  EXPECT_THAT(patched(0x201, std::uint8_t{0xFF}), HasSubstr("setup header ends at 0x301"));
  EXPECT_THAT(patched(0x201, std::uint8_t{0x10}), HasSubstr("setup header ends at 0x212"));
  EXPECT_THAT(patched(0x211, std::uint8_t{0}), HasSubstr("zImage"));
  EXPECT_THAT(patched(0x1F4, std::uint32_t{0}), HasSubstr("no size"));
  EXPECT_THAT(patched(0x1F4, std::uint32_t{0xFFFF'FFFF}), HasSubstr("truncated"));
  EXPECT_THAT(patched(0x1F1, std::uint8_t{0xFF}), HasSubstr("truncated"));
}

TEST(BzImage, EveryTruncationIsAnError) {
  test::BzImageShape shape;
  shape.payload = test::pattern(0x300, 9);
  const Bytes file = test::build_bzimage(shape);
  ASSERT_TRUE(read(file));
  for (std::size_t size = 0x206; size < file.size() - 15; size += 3) {
    EXPECT_FALSE(read(Bytes(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size)))) << size;
  }
}

TEST(RawKernel, LiesAndStartsAt16MiB) {
  Bytes file = test::pattern(5000, 0x48);
  const auto image = read(file);
  ASSERT_TRUE(image) << test::error_of(image);
  EXPECT_EQ(image->format, KernelFormat::kRaw);
  EXPECT_EQ(image->protocol, BootProtocol::kLinux64);
  EXPECT_EQ(image->entry, 0x100'0000U);
  const std::vector<KernelSegment> expected = {{0x100'0000, 0, 5000, 5000}};
  EXPECT_EQ(image->segments, expected);
}

TEST(WrongFiles, AreNamedForWhatTheyAre) {
  const auto starting = [](std::initializer_list<int> start, std::size_t size = 4096) {
    Bytes file(size);
    std::ranges::transform(start, file.begin(), [](int byte) { return static_cast<std::uint8_t>(byte); });
    return error_of(file);
  };
  EXPECT_THAT(starting({0x1F, 0x8B, 8}), HasSubstr("gzip"));
  EXPECT_THAT(starting({0xFD, '7', 'z', 'X', 'Z', 0}), HasSubstr("xz-compressed"));
  EXPECT_THAT(starting({0x28, 0xB5, 0x2F, 0xFD}), HasSubstr("zstd"));
  EXPECT_THAT(starting({0x02, 0x21, 0x4C, 0x18}), HasSubstr("lz4"));
  EXPECT_THAT(starting({0x04, 0x22, 0x4D, 0x18}), HasSubstr("lz4"));
  EXPECT_THAT(starting({'B', 'Z', 'h', '9'}), HasSubstr("bzip2"));
  EXPECT_THAT(starting({'M', 'Z', 1}), HasSubstr("EFI or DOS"));
  EXPECT_THAT(starting({'M', 'Z', 0, 0, 'z', 'i', 'm', 'g'}), HasSubstr("zboot"));
  EXPECT_THAT(starting({'#', '!', '/'}), HasSubstr("script"));
  EXPECT_THAT(starting({'Q', 'F', 'I', 0xFB}), HasSubstr("qcow2"));
  EXPECT_THAT(starting({'0', '7', '0', '7', '0', '1'}), HasSubstr("initrd"));
  EXPECT_THAT(starting({'!', '<', 'a', 'r', 'c', 'h', '>', '\n'}), HasSubstr("package"));
  EXPECT_THAT(starting({}), HasSubstr("zero bytes"));
  EXPECT_THAT(starting({'h', 'e', 'l', 'l', 'o', '\n'}, 6), HasSubstr("text file"));
  EXPECT_THAT(error_of({}), HasSubstr("empty"));
  Bytes disk = test::pattern(4096, 5);
  disk[510] = 0x55;
  disk[511] = 0xAA;
  EXPECT_THAT(error_of(disk), HasSubstr("boot sector"));
  Bytes ext4 = test::pattern(4096, 5);
  ext4[0x438] = 0x53;
  ext4[0x439] = 0xEF;
  EXPECT_THAT(error_of(ext4), HasSubstr("file system"));
}

TEST(WrongFiles, DirectoriesPipesAndEmptyFiles) {
  const auto error = [](const std::string& path) -> std::string {
    auto fd = open_image(path);
    return fd ? test::error_of(ImageReader::from_fd(fd->get())) : fd.error().message;
  };
  EXPECT_THAT(error("/tmp"), HasSubstr("is a directory"));
  EXPECT_THAT(error("/dev/null"), HasSubstr("not a regular file"));
  EXPECT_THAT(error("/nonexistent/kernel"), HasSubstr("No such file"));
  EXPECT_THAT(error(test::ScratchFile({}).path()), HasSubstr("empty"));
  std::string name = (std::filesystem::temp_directory_path() / "wisp-boot-XXXXXX").string();
  ASSERT_NE(::mkdtemp(name.data()), nullptr);
  const std::string fifo = name + "/fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_THAT(error(fifo), HasSubstr("not a regular file"));  // and does not wait for a writer
  std::filesystem::remove_all(name);
}

}  // namespace
}  // namespace wisp
