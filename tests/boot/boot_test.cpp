// prepare_boot(): what a kernel finds in memory and registers, followed from the registers as it would.
#include "boot/boot.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "acpi_machines.h"

namespace wisp {
namespace {

using test::Bytes;
using test::ScratchFile;
using test::TestRam;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr std::uint64_t kMiB = 1 << 20;

const Bytes kText = test::pattern(0x3000, 1);

Bytes pvh_kernel() {
  return test::build_elf(0x100'0000, {{.paddr = 0x100'0000, .content = kText}, test::pvh_note(0x100'0100)});
}
Bytes plain_kernel() {
  return test::build_elf(0x100'0000, {{.paddr = 0x100'0000, .content = kText}});
}

std::string text_at(const TestRam& ram, Gpa gpa) {
  std::string text;
  for (char c = 0; (c = ram.at<char>(gpa)) != 0; ++gpa) {
    text += c;
  }
  return text;
}

BootDescription describe(const ScratchFile& kernel) {
  BootDescription description;
  description.kernel = kernel.path();
  description.command_line = "console=ttyS0";
  return description;
}

TEST(PrepareBoot, Linux64WithInitrdAcpiAndDevices) {
  const ScratchFile kernel(plain_kernel());
  const Bytes initrd_bytes = test::pattern(0x1801, 9);
  const ScratchFile initrd(initrd_bytes);
  TestRam ram(64 * kMiB);
  BootDescription description = describe(kernel);
  description.initrd = initrd.path();
  description.acpi = test::full_machine();
  description.cpus = description.acpi->cpus;
  description.command_line_devices = {virtio_slot(0)};
  const auto state = prepare_boot(description, ram.memory, ram.placements);
  ASSERT_TRUE(state) << test::error_of(state);

  EXPECT_EQ(state->protocol, BootProtocol::kLinux64);
  EXPECT_EQ(ram.bytes(state->cpu.regs.rip, kText.size()), kText);
  EXPECT_EQ(state->kernel, (LoadedRange{0x100'0000, 0x3000}));
  const Gpa zero_page = state->cpu.regs.rsi;
  EXPECT_EQ(ram.at<std::uint64_t>(zero_page + 0x70), state->rsdp);
  EXPECT_EQ(ram.bytes(state->rsdp, 8), (Bytes{'R', 'S', 'D', ' ', 'P', 'T', 'R', ' '}));
  EXPECT_EQ(text_at(ram, ram.at<std::uint32_t>(zero_page + 0x228)),
            "console=ttyS0 virtio_mmio.device=512@0xfeb00000:10");
  const Gpa initrd_gpa = ram.at<std::uint32_t>(zero_page + 0x218);
  EXPECT_EQ(initrd_gpa, 64 * kMiB - 0x2000);
  EXPECT_EQ(ram.bytes(initrd_gpa, ram.at<std::uint32_t>(zero_page + 0x21C)), initrd_bytes);
  EXPECT_EQ(ram.at<std::uint8_t>(zero_page + 0x1E8), state->e820.size());
  EXPECT_EQ(ram.at<std::uint64_t>(state->cpu.sregs.cr3), layout::kPdpt | 3);
  EXPECT_EQ(ram.at<std::uint64_t>(state->cpu.sregs.gdt.base + 0x10), 0x00AF'9B00'0000'FFFFU);
  EXPECT_EQ(ram.bytes(layout::kMpTable, 4), (Bytes{'_', 'M', 'P', '_'}));
  EXPECT_EQ(ram.bytes(layout::kResetVector, 4), (Bytes{0xB0, 0xFE, 0xE6, 0x64}));
  EXPECT_EQ(state->devices_not_named, 0U);
}

TEST(PrepareBoot, PvhWithoutAcpi) {
  const ScratchFile kernel(pvh_kernel());
  TestRam ram(64 * kMiB);
  const auto state = prepare_boot(describe(kernel), ram.memory, ram.placements);
  ASSERT_TRUE(state) << test::error_of(state);
  EXPECT_EQ(state->protocol, BootProtocol::kPvh);
  EXPECT_EQ(state->cpu.regs.rip, 0x100'0100U);
  const Gpa info = state->cpu.regs.rbx;
  EXPECT_EQ(ram.at<std::uint32_t>(info), 0x336E'C578U);
  EXPECT_EQ(text_at(ram, ram.at<std::uint64_t>(info + 24)), "console=ttyS0");
  EXPECT_EQ(ram.at<std::uint64_t>(info + 32), 0U);
  EXPECT_EQ(state->rsdp, 0U);
  EXPECT_EQ(ram.at<std::uint64_t>(layout::kAcpiTables), 0U);
  EXPECT_EQ(ram.at<std::uint32_t>(info + 48), state->e820.size());
}

TEST(PrepareBoot, MultibootNamesTheKernelFirst) {
  Bytes code = test::pattern(0x100, 1);
  store_le<std::uint32_t>(&code[0x20], 0x1BADB002);
  store_le<std::uint32_t>(&code[0x24], 0);
  store_le<std::uint32_t>(&code[0x28], 0U - 0x1BADB002);
  const ScratchFile kernel(
      test::build_elf<Elf32_Ehdr, Elf32_Phdr>(0x40'0004, {{.paddr = 0x40'0000, .content = code}}));
  TestRam ram(64 * kMiB);
  BootDescription description = describe(kernel);
  auto state = prepare_boot(description, ram.memory, ram.placements);
  ASSERT_TRUE(state) << test::error_of(state);
  EXPECT_EQ(state->protocol, BootProtocol::kMultiboot1);
  EXPECT_EQ(state->cpu.regs.rax, 0x2BADB002U);
  EXPECT_EQ(state->cpu.regs.rip, 0x40'0004U);
  const Gpa info = state->cpu.regs.rbx;
  EXPECT_NE(ram.at<std::uint32_t>(info) & 4, 0U);
  EXPECT_EQ(text_at(ram, ram.at<std::uint32_t>(info + 16)), kernel.path() + " console=ttyS0");

  description.command_line = "";
  TestRam fresh(64 * kMiB);
  state = prepare_boot(description, fresh.memory, fresh.placements);
  ASSERT_TRUE(state) << test::error_of(state);
  EXPECT_EQ(state->command_line, kernel.path());
}

TEST(PrepareBoot, BzImageAndFlatImage) {
  TestRam ram(64 * kMiB);
  test::BzImageShape shape;
  const ScratchFile bzimage(test::build_bzimage(shape));
  const auto big = prepare_boot(describe(bzimage), ram.memory, ram.placements);
  ASSERT_TRUE(big) << test::error_of(big);
  EXPECT_EQ(big->cpu.regs.rip, 0x100'0200U);
  EXPECT_EQ(ram.bytes(0x100'0000, shape.payload.size()), shape.payload);
  EXPECT_EQ(ram.at<std::uint32_t>(layout::kZeroPage + 0x260), shape.init_size);
  EXPECT_EQ(big->kernel, (LoadedRange{0x100'0000, shape.init_size}));

  TestRam fresh(64 * kMiB);
  const Bytes code = test::pattern(0x2222, 0x48);
  const ScratchFile flat(code);
  const auto raw = prepare_boot(describe(flat), fresh.memory, fresh.placements);
  ASSERT_TRUE(raw) << test::error_of(raw);
  EXPECT_EQ(raw->cpu.regs.rip, 0x100'0000U);
  EXPECT_EQ(fresh.bytes(0x100'0000, code.size()), code);
}

TEST(PrepareBoot, MachineWithRamAbove4GiB) {
  const ScratchFile kernel(plain_kernel());
  const ScratchFile initrd(Bytes(0x1000));
  TestRam ram(layout::kLowRamEnd + 64 * kMiB);
  BootDescription description = describe(kernel);
  description.initrd = initrd.path();
  const auto state = prepare_boot(description, ram.memory, ram.placements);
  ASSERT_TRUE(state) << test::error_of(state);
  EXPECT_EQ(state->initrd->gpa, layout::kLowRamEnd - 0x1000);
  EXPECT_EQ(state->e820.back(), (E820Entry{layout::kHighRamStart, 64 * kMiB, E820Type::kRam}));
}

TEST(PrepareBoot, DevicesThatDoNotFitNeedAcpi) {
  const ScratchFile kernel(plain_kernel());
  TestRam ram(64 * kMiB);
  BootDescription description = describe(kernel);
  for (std::uint32_t i = 0; i < 64; ++i) {
    description.command_line_devices.push_back(virtio_slot(i));
  }
  EXPECT_THAT(test::error_of(prepare_boot(description, ram.memory, ram.placements)),
              HasSubstr("has room for 55 of 64 virtio_mmio.device="));
  description.acpi = test::full_machine();
  description.cpus = 4;
  const auto state = prepare_boot(description, ram.memory, ram.placements);
  ASSERT_TRUE(state) << test::error_of(state);
  EXPECT_EQ(state->devices_not_named, 9U);
  EXPECT_LE(state->command_line.size(), 2047U);
}

TEST(PrepareBoot, ErrorsNameTheFile) {
  const ScratchFile kernel(plain_kernel());
  const ScratchFile text(Bytes(100, 'x'));
  const ScratchFile initrd(Bytes(60 * kMiB));
  TestRam ram(64 * kMiB);
  const auto error = [&ram](const BootDescription& description) {
    return test::error_of(prepare_boot(description, ram.memory, ram.placements));
  };
  BootDescription description = describe(text);
  EXPECT_EQ(error(description), "kernel " + text.path() + " is a text file, not a kernel");
  description.kernel = "/nonexistent";
  EXPECT_THAT(error(description), StartsWith("kernel /nonexistent cannot be opened: No such file"));
  description.kernel = "/tmp";
  EXPECT_EQ(error(description), "kernel /tmp is a directory, not a file");
  description = describe(kernel);
  description.initrd = initrd.path();
  EXPECT_THAT(error(description), StartsWith("initrd " + initrd.path() + " of 60 MiB does not fit"));
  description.initrd = "/nonexistent";
  EXPECT_THAT(error(description), StartsWith("initrd /nonexistent cannot be opened"));
  description = describe(kernel);
  description.command_line = std::string(2048, 'x');
  EXPECT_THAT(error(description), HasSubstr("has 2048 bytes, this kernel takes at most 2047"));
  TestRam small(16 * kMiB);
  EXPECT_THAT(test::error_of(prepare_boot(describe(kernel), small.memory, small.placements)),
              HasSubstr("needs memory up to 17 MiB, the machine has 16 MiB"));
}

}  // namespace
}  // namespace wisp
