// The tables of boot, byte for byte as their specifications have them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "boot/boot_cpu.h"
#include "boot/command_line.h"
#include "boot/e820.h"
#include "boot/mp_table.h"
#include "boot/start_info.h"
#include "boot/zero_page.h"
#include "boot_fixtures.h"

namespace wisp {
namespace {

using test::Bytes;
using ::testing::HasSubstr;

constexpr E820Type kRam = E820Type::kRam;
constexpr E820Type kReserved = E820Type::kReserved;

Bytes part(const Bytes& bytes, std::size_t offset, std::size_t size) {
  return {bytes.begin() + static_cast<std::ptrdiff_t>(offset),
          bytes.begin() + static_cast<std::ptrdiff_t>(offset + size)};
}

std::vector<E820Entry> e820(std::initializer_list<RamRange> ram) {
  return build_e820(std::vector<RamRange>(ram));
}

TEST(E820, SmallMachine) {
  const std::vector<E820Entry> expected = {{0, 0x9'FC00, kRam},
                                           {0x9'FC00, 0x400, kReserved},
                                           {0xE'0000, 0x2'0000, kReserved},
                                           {0x10'0000, 0x7F0'0000, kRam},
                                           {0xFEFF'C000, 0x4000, kReserved}};
  EXPECT_EQ(e820({{0, 0x800'0000}}), expected);
}

TEST(E820, MachineBeyond3GiB) {
  const std::vector<E820Entry> expected = {{0, 0x9'FC00, kRam},
                                           {0x9'FC00, 0x400, kReserved},
                                           {0xE'0000, 0x2'0000, kReserved},
                                           {0x10'0000, 0xBFF0'0000, kRam},
                                           {0xFEFF'C000, 0x4000, kReserved},
                                           {0x1'0000'0000, 0x4000'0000, kRam}};
  EXPECT_EQ(e820({{0, 0xC000'0000}, {0x1'0000'0000, 0x4000'0000}}), expected);
}

TEST(E820, RangesThatTouchAreOneAndGapsStay) {
  const auto map = e820({{0, 0x40'0000}, {0x40'0000, 0x40'0000}, {0x100'0000, 0x1000}});
  EXPECT_EQ(map[3], (E820Entry{0x10'0000, 0x70'0000, kRam}));
  EXPECT_EQ(map[4], (E820Entry{0x100'0000, 0x1000, kRam}));
}

TEST(E820, RamNeverCoversWhatIsReserved) {
  // Even where a caller puts RAM over the KVM pages.
  for (const E820Entry& entry : e820({{0, 0x1'1000'0000}})) {
    if (entry.type == kRam) {
      EXPECT_FALSE(entry.start < layout::kEnginePagesEnd && entry.start + entry.size > layout::kEnginePages);
      EXPECT_FALSE(entry.start < layout::kBiosEnd && entry.start + entry.size > layout::kConventionalEnd);
    }
  }
}

TEST(ZeroPage, OfAKernelWithoutASetupHeader) {
  KernelImage image;
  image.format = KernelFormat::kElf;
  image.command_line_max = 2047;
  image.initrd_last = 0xFFFF'FFFF;
  const std::vector<E820Entry> map = {{0, 0x9'FC00, kRam}, {0x1'0000'0000, 0x12'3456'7000, kReserved}};
  const auto page = build_zero_page(image, {.command_line = 0x2'0000,
                                            .initrd = LoadedRange{0x7'8000'1000, 0x1'0000'0002},
                                            .rsdp = 0xE'0000,
                                            .e820 = map});
  ASSERT_TRUE(page);
  Bytes expected(4096);
  const auto put = [&expected](std::size_t offset, auto value) { store_le(&expected[offset], value); };
  put(0x070, std::uint64_t{0xE'0000});
  put(0x0C0, std::uint32_t{7});
  put(0x0C4, std::uint32_t{1});
  put(0x1E8, std::uint8_t{2});
  put(0x1FE, std::uint16_t{0xAA55});
  put(0x202, std::uint32_t{0x5372'6448});
  put(0x206, std::uint16_t{0x020F});
  put(0x210, std::uint8_t{0xFF});
  put(0x211, std::uint8_t{1});
  put(0x218, std::uint32_t{0x8000'1000});
  put(0x21C, std::uint32_t{2});
  put(0x228, std::uint32_t{0x2'0000});
  put(0x22C, std::uint32_t{0xFFFF'FFFF});
  put(0x230, std::uint32_t{0x100'0000});
  put(0x238, std::uint32_t{2047});
  put(0x2D0, std::uint64_t{0});
  put(0x2D8, std::uint64_t{0x9'FC00});
  put(0x2E0, std::uint32_t{1});
  put(0x2E4, std::uint64_t{0x1'0000'0000});
  put(0x2EC, std::uint64_t{0x12'3456'7000});
  put(0x2F4, std::uint32_t{2});
  EXPECT_EQ(*page, expected);
}

TEST(ZeroPage, KeepsTheSetupHeaderOfABzImage) {
  const Bytes file = test::build_bzimage({});
  const auto image = read_kernel_image(ImageReader::from_bytes(file));
  const auto page =
      build_zero_page(*image, {.command_line = 0x2'0000, .initrd = std::nullopt, .rsdp = 0, .e820 = {}});
  ASSERT_TRUE(page);
  Bytes expected(4096);
  std::copy(file.begin() + 0x1F1, file.begin() + 0x26C, expected.begin() + 0x1F1);
  expected[0x210] = 0xFF;
  store_le<std::uint32_t>(&expected[0x214], 0x100'0000);
  store_le<std::uint32_t>(&expected[0x228], 0x2'0000);
  EXPECT_EQ(*page, expected);
  EXPECT_EQ((*page)[0x1EF], 0);  // the sentinel: the loader knows the fields
}

TEST(ZeroPage, MapOfTooManyEntriesIsRefused) {
  const std::vector<E820Entry> map(129);
  EXPECT_FALSE(build_zero_page({}, {.initrd = {}, .e820 = map}));
  EXPECT_TRUE(build_zero_page({}, {.initrd = {}, .e820 = std::span(map).first(128)}));
}

TEST(PvhStartInfo, ModuleMapAndPointers) {
  const std::vector<E820Entry> map = {{0, 0x9'FC00, kRam}, {0x9'FC00, 0x400, kReserved}};
  const auto block = build_pvh_start_info(
      0x6000, 4096,
      {.command_line = 0x2'0000, .initrd = LoadedRange{0x700'0000, 0x1234}, .rsdp = 0xE'0000, .e820 = map});
  ASSERT_TRUE(block);
  Bytes expected(96 + 48);
  const auto put = [&expected](std::size_t offset, auto value) { store_le(&expected[offset], value); };
  put(0, std::uint32_t{0x336E'C578});
  put(4, std::uint32_t{1});
  put(12, std::uint32_t{1});
  put(16, std::uint64_t{0x6040});
  put(24, std::uint64_t{0x2'0000});
  put(32, std::uint64_t{0xE'0000});
  put(40, std::uint64_t{0x6060});
  put(48, std::uint32_t{2});
  put(64, std::uint64_t{0x700'0000});
  put(72, std::uint64_t{0x1234});
  put(96, std::uint64_t{0});
  put(104, std::uint64_t{0x9'FC00});
  put(112, std::uint32_t{1});
  put(120, std::uint64_t{0x9'FC00});
  put(128, std::uint64_t{0x400});
  put(136, std::uint32_t{2});
  EXPECT_EQ(*block, expected);

  const auto bare = build_pvh_start_info(0x6000, 4096, {.initrd = {}, .e820 = {}});
  ASSERT_TRUE(bare);
  EXPECT_EQ(load_le<std::uint32_t>(&(*bare)[12]), 0U);
  EXPECT_EQ(load_le<std::uint64_t>(&(*bare)[16]), 0U);
  const std::vector<E820Entry> large(1000);
  EXPECT_FALSE(build_pvh_start_info(0x6000, 4096, {.initrd = {}, .e820 = large}));
}

TEST(MultibootInfo, ModuleMapAndPointers) {
  const std::vector<E820Entry> map = {{0, 0x9'FC00, kRam}, {0x10'0000, 0x70'0000, kRam}};
  const auto block = build_multiboot_info(
      0x6000, 4096,
      {.command_line = 0x2'0000, .initrd = LoadedRange{0x60'0000, 0x1234}, .rsdp = 0, .e820 = map});
  ASSERT_TRUE(block);
  const Bytes& info = *block;
  const auto word = [&info](std::size_t offset) { return load_le<std::uint32_t>(&info[offset]); };
  EXPECT_EQ(word(0), 0x24DU);
  EXPECT_EQ(word(4), 0x9'FC00U / 1024);
  EXPECT_EQ(word(8), 0x70'0000U / 1024);
  EXPECT_EQ(word(16), 0x2'0000U);
  EXPECT_EQ(word(20), 1U);
  EXPECT_EQ(word(24), 0x6078U);
  EXPECT_EQ(word(0x78), 0x60'0000U);
  EXPECT_EQ(word(0x7C), 0x60'1234U);
  EXPECT_EQ(info[word(0x80) - 0x6000], 0);  // the module's string is empty
  EXPECT_EQ(word(44), 48U);
  const std::size_t at = word(48) - 0x6000;
  EXPECT_EQ(word(at), 20U);
  EXPECT_EQ(load_le<std::uint64_t>(&info[at + 12]), 0x9'FC00U);
  EXPECT_EQ(word(at + 24), 20U);
  EXPECT_EQ(load_le<std::uint64_t>(&info[at + 28]), 0x10'0000U);
  EXPECT_EQ(word(at + 44), 1U);
  EXPECT_EQ(at + 48, info.size());
}

TEST(MpTable, TwoCpusToTheByte) {
  const Bytes table = build_mp_table(0xF'0000, 2);
  const auto sum = [](const Bytes& bytes) { return std::accumulate(bytes.begin(), bytes.end(), 0U) & 0xFF; };
  const Bytes pointer = part(table, 0, 16);
  EXPECT_EQ(sum(pointer), 0U);
  EXPECT_EQ(part(pointer, 0, 10), (Bytes{'_', 'M', 'P', '_', 0x10, 0x00, 0x0F, 0x00, 1, 4}));
  EXPECT_EQ(part(pointer, 11, 5), Bytes(5));

  const Bytes config = part(table, 16, table.size() - 16);
  EXPECT_EQ(sum(config), 0U);
  ASSERT_EQ(config.size(), 44U + 2 * 20 + 8 + 8 + 24 * 8 + 2 * 8);
  EXPECT_EQ(part(config, 0, 7), (Bytes{'P', 'C', 'M', 'P', 0x34, 0x01, 4}));
  EXPECT_EQ(load_le<std::uint16_t>(&config[34]), 2 + 1 + 1 + 24 + 2);
  EXPECT_EQ(load_le<std::uint32_t>(&config[36]), 0xFEE0'0000U);
  EXPECT_EQ(part(config, 44, 20), (Bytes{0, 0, 0x14, 3, 0, 6, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(part(config, 64, 4), (Bytes{0, 1, 0x14, 1}));
  EXPECT_EQ(part(config, 84, 8), (Bytes{1, 0, 'I', 'S', 'A', ' ', ' ', ' '}));
  EXPECT_EQ(part(config, 92, 8), (Bytes{2, 2, 0x11, 1, 0x00, 0x00, 0xC0, 0xFE}));
  for (std::uint8_t pin = 0; pin < 24; ++pin) {
    EXPECT_EQ(part(config, 100 + pin * 8U, 8), (Bytes{3, 0, 0, 0, 0, pin, 2, pin}));
  }
  EXPECT_EQ(part(config, 292, 16), (Bytes{4, 3, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0, 0xFF, 1}));
}

TEST(MpTable, NamesNoMoreCpusThanItsIdsReach) {
  const Bytes table = build_mp_table(0xF'0000, 1000);
  EXPECT_EQ(load_le<std::uint16_t>(&table[16 + 34]), 254 + 1 + 1 + 24 + 2);
  EXPECT_EQ(table[16 + 44 + 254 * 20 + 8 + 1], 254);  // the I/O APIC's id is its own
  EXPECT_LE(table.size(), layout::kMpSpace);
}

// What a CPU would find walking the tables for `address`, or nothing.
std::optional<Gpa> walk(const Bytes& tables, std::uint64_t address) {
  const auto entry = [&tables](Gpa table, std::uint64_t index) {
    return load_le<std::uint64_t>(&tables[table - layout::kPml4 + index * 8]);
  };
  const std::uint64_t pml4 = entry(layout::kPml4, address >> 39 & 0x1FF);
  if ((pml4 & 3) != 3) {
    return std::nullopt;
  }
  const std::uint64_t pdpt = entry(pml4 & ~0xFFFULL, address >> 30 & 0x1FF);
  if ((pdpt & 3) != 3) {
    return std::nullopt;
  }
  if ((pdpt & 0x80) != 0) {
    return (pdpt & ~0x3FFF'FFFFULL) | (address & 0x3FFF'FFFF);
  }
  const std::uint64_t pd = entry(pdpt & ~0xFFFULL, address >> 21 & 0x1FF);
  if ((pd & 0x83) != 0x83) {
    return std::nullopt;
  }
  return (pd & ~0x1F'FFFFULL) | (address & 0x1F'FFFF);
}

TEST(PageTables, MapTheFirst4GiBToThemselvesAndNoMore) {
  for (const bool gigabyte_pages : {false, true}) {
    const Bytes tables = build_page_tables(gigabyte_pages);
    EXPECT_EQ(tables.size(), (gigabyte_pages ? 2U : 6U) * 4096);
    for (std::uint64_t address = 0; address < 1ULL << 32; address += 0x1F'F123) {
      ASSERT_EQ(walk(tables, address), address);
    }
    EXPECT_EQ(walk(tables, 0xFFFF'FFFF), 0xFFFF'FFFFU);
    EXPECT_EQ(walk(tables, 1ULL << 32), std::nullopt);
    EXPECT_EQ(walk(tables, 1ULL << 39), std::nullopt);
  }
}

TEST(Gdt, DescriptorsOfBothModes) {
  EXPECT_EQ(build_gdt(BootProtocol::kLinux64),
            (std::array<std::uint64_t, 6>{0, 0, 0x00AF'9B00'0000'FFFF, 0x00CF'9300'0000'FFFF,
                                          0x0000'8B00'0000'0067, 0}));
  EXPECT_EQ(build_gdt(BootProtocol::kPvh),
            (std::array<std::uint64_t, 6>{0, 0, 0x00CF'9B00'0000'FFFF, 0x00CF'9300'0000'FFFF,
                                          0x0000'8B00'0000'0067, 0}));
}

TEST(BootCpu, Linux64IsLongModeWithTheZeroPageInRsi) {
  const BootCpu cpu = boot_cpu_state(BootProtocol::kLinux64, 0x100'0200, 0x7000);
  CpuRegs regs;
  regs.rip = 0x100'0200;
  regs.rsi = 0x7000;
  EXPECT_EQ(cpu.regs, regs);
  EXPECT_EQ(cpu.sregs.cr0, 0x8000'0011U);
  EXPECT_EQ(cpu.sregs.cr3, 0x9000U);
  EXPECT_EQ(cpu.sregs.cr4, 0x20U);
  EXPECT_EQ(cpu.sregs.efer, 0x500U);
  EXPECT_EQ(cpu.sregs.apic_base, 0xFEE0'0900U);
  EXPECT_EQ(cpu.sregs.cs.selector, 0x10);
  EXPECT_TRUE(cpu.sregs.cs.long_mode);
  EXPECT_FALSE(cpu.sregs.cs.default_big);
  EXPECT_EQ(cpu.sregs.ds.selector, 0x18);
  EXPECT_EQ(cpu.sregs.ss, cpu.sregs.ds);
  EXPECT_EQ(cpu.sregs.gdt, (CpuTable{0x500, 47}));
}

TEST(BootCpu, ThirtyTwoBitProtocolsAreFlatWithoutPaging) {
  for (const BootProtocol protocol :
       {BootProtocol::kPvh, BootProtocol::kMultiboot1, BootProtocol::kLinux32}) {
    const BootCpu cpu = boot_cpu_state(protocol, 0x20'0000, 0x6000);
    EXPECT_EQ(cpu.sregs.cr0, 0x11U);
    EXPECT_EQ(cpu.sregs.cr3, 0U);
    EXPECT_EQ(cpu.sregs.cr4, 0U);
    EXPECT_EQ(cpu.sregs.efer, 0U);
    EXPECT_FALSE(cpu.sregs.cs.long_mode);
    EXPECT_TRUE(cpu.sregs.cs.default_big);
    EXPECT_EQ(cpu.sregs.cs.limit, 0xFFFF'FFFFU);
    EXPECT_EQ(cpu.sregs.tr.limit, 0x67U);
    EXPECT_EQ(cpu.sregs.tr.type, 0xB);
    EXPECT_EQ(cpu.regs.rflags, 2U);
    EXPECT_EQ(cpu.regs.rip, 0x20'0000U);
    EXPECT_EQ(cpu.regs.rsi, protocol == BootProtocol::kLinux32 ? 0x6000U : 0U);
    EXPECT_EQ(cpu.regs.rbx, protocol == BootProtocol::kLinux32 ? 0U : 0x6000U);
    EXPECT_EQ(cpu.regs.rax, protocol == BootProtocol::kMultiboot1 ? 0x2BAD'B002U : 0U);
  }
}

TEST(CommandLine, DevicesFollowTheUsersWords) {
  const std::vector<VirtioMmioSlot> slots = {virtio_slot(0), virtio_slot(1)};
  const auto text = [&slots](std::string_view base, std::uint32_t max = 2047) {
    const auto line = build_command_line(base, slots, max);
    return line ? line->text : line.error().message;
  };
  const std::string devices = "virtio_mmio.device=512@0xfeb00000:10 virtio_mmio.device=512@0xfeb01000:11";
  EXPECT_EQ(text("console=ttyS0"), "console=ttyS0 " + devices);
  EXPECT_EQ(text(""), devices);
  EXPECT_EQ(text("quiet -- -s \"a b\""), "quiet " + devices + " -- -s \"a b\"");
  EXPECT_EQ(text("--"), devices + " --");
  EXPECT_EQ(text("a=\"x -- y\" b"), "a=\"x -- y\" b " + devices);
  EXPECT_EQ(text("a=-- --b"), "a=-- --b " + devices);
}

TEST(CommandLine, ItsLengthIsKept) {
  std::vector<VirtioMmioSlot> slots;
  for (std::uint32_t i = 0; i < 64; ++i) {
    slots.push_back(virtio_slot(i));
  }
  const auto line = build_command_line("quiet -- x", slots, 200);
  ASSERT_TRUE(line);
  EXPECT_EQ(line->devices, 5U);
  EXPECT_EQ(line->text.size(), 5 + 4 * 37 + 36 + 5);
  EXPECT_LE(line->text.size(), 200U);
  EXPECT_EQ(build_command_line(std::string(200, 'x'), slots, 200)->devices, 0U);
  EXPECT_EQ(build_command_line(std::string(200, 'x'), slots, 200)->text.size(), 200U);
  EXPECT_THAT(test::error_of(build_command_line(std::string(201, 'x'), slots, 200)),
              HasSubstr("has 201 bytes, this kernel takes at most 200"));
  EXPECT_FALSE(build_command_line(std::string_view("a\0b", 3), slots, 200));
}

TEST(VirtioSlots, ShareThePinsThatAreFree) {
  for (std::uint32_t i = 0; i < layout::kVirtioMmioSlots; ++i) {
    const VirtioMmioSlot slot = virtio_slot(i);
    EXPECT_EQ(slot.base, 0xFEB0'0000U + i * 0x1000);
    EXPECT_GE(slot.gsi, 5U);
    EXPECT_LT(slot.gsi, kIoApicPins);
    EXPECT_LT(virtio_slot(i, false).gsi, 16U);
    EXPECT_EQ(virtio_slot(i, false).base, slot.base);
    for (const std::uint32_t taken : {layout::kSerialGsi, layout::kRtcGsi, layout::kGedGsi}) {
      EXPECT_NE(slot.gsi, taken);
    }
  }
}

}  // namespace
}  // namespace wisp
