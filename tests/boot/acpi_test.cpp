#include "boot/acpi.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "acpi_machines.h"
#include "base/bytes.h"
#include "boot/acpi_layout.h"

namespace wisp {
namespace {

using test::Bytes;
using ::testing::HasSubstr;
using ::testing::Not;

const AcpiTable& table_of(const AcpiTables& tables, std::string_view signature) {
  return *std::ranges::find(tables.tables, signature, &AcpiTable::signature);
}

AcpiTables build(const AcpiDescription& machine) {
  auto tables = build_acpi(machine, layout::kAcpiTables, layout::kAcpiSpace);
  EXPECT_TRUE(tables) << test::error_of(tables);
  return *tables;
}

std::uint8_t sum(std::span<const std::uint8_t> bytes) {
  return static_cast<std::uint8_t>(std::accumulate(bytes.begin(), bytes.end(), 0U));
}

TEST(Acpi, TablesLieApartAndSumToZero) {
  const AcpiTables tables = build(test::full_machine());
  EXPECT_EQ(tables.rsdp, layout::kAcpiTables);
  std::vector<const AcpiTable*> sorted;
  for (const AcpiTable& table : tables.tables) {
    SCOPED_TRACE(table.signature);
    sorted.push_back(&table);
    EXPECT_EQ(table.gpa % 16, 0U);
    EXPECT_EQ(sum(table.bytes), 0);
    EXPECT_GE(table.gpa, layout::kAcpiTables);
    EXPECT_LE(table.gpa + table.bytes.size(), layout::kAcpiTables + layout::kAcpiSpace);
    EXPECT_EQ(std::memcmp(table.bytes.data(), table.signature.data(), table.signature.size()), 0);
    if (table.signature != "RSD PTR ") {
      EXPECT_EQ(load_le<std::uint32_t>(&table.bytes[4]), table.bytes.size());
    }
  }
  std::ranges::sort(sorted, {}, [](const AcpiTable* table) { return table->gpa; });
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    EXPECT_LE(sorted[i - 1]->gpa + sorted[i - 1]->bytes.size(), sorted[i]->gpa);
  }
}

TEST(Acpi, PointersLeadFromRsdpToEveryTable) {
  const AcpiTables tables = build(test::full_machine());
  const Bytes& rsdp = table_of(tables, "RSD PTR ").bytes;
  ASSERT_EQ(rsdp.size(), 36U);
  EXPECT_EQ(sum(std::span(rsdp).first(20)), 0);
  EXPECT_EQ(rsdp[15], 2);
  EXPECT_EQ(load_le<std::uint32_t>(&rsdp[16]), 0U);
  EXPECT_EQ(load_le<std::uint32_t>(&rsdp[20]), 36U);
  EXPECT_EQ(load_le<std::uint64_t>(&rsdp[24]), table_of(tables, "XSDT").gpa);
  const Bytes& xsdt = table_of(tables, "XSDT").bytes;
  ASSERT_EQ(xsdt.size(), 36U + 16);
  EXPECT_EQ(load_le<std::uint64_t>(&xsdt[36]), table_of(tables, "FACP").gpa);
  EXPECT_EQ(load_le<std::uint64_t>(&xsdt[44]), table_of(tables, "APIC").gpa);
  EXPECT_EQ(load_le<std::uint64_t>(&table_of(tables, "FACP").bytes[140]), table_of(tables, "DSDT").gpa);
}

TEST(Acpi, FadtIsHardwareReducedWithSleepAndReset) {
  AcpiDescription machine = test::full_machine();
  const Bytes fadt = table_of(build(machine), "FACP").bytes;
  ASSERT_EQ(fadt.size(), 276U);
  EXPECT_EQ(fadt[8], 6);
  EXPECT_EQ(fadt[131], 5);
  EXPECT_EQ(load_le<std::uint32_t>(&fadt[36]), 0U);  // FACS
  EXPECT_EQ(load_le<std::uint32_t>(&fadt[40]), 0U);  // DSDT, replaced by X_DSDT
  EXPECT_EQ(load_le<std::uint32_t>(&fadt[112]), 1U << 0 | 1U << 4 | 1U << 5 | 1U << 10 | 1U << 20);
  EXPECT_EQ(load_le<std::uint16_t>(&fadt[109]), 0x0005);  // legacy devices, no VGA; no 8042; RTC is there
  const Bytes reset(fadt.begin() + 116, fadt.begin() + 128);
  EXPECT_EQ(reset, (Bytes{1, 8, 0, 1, 0x06, 0x06, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(fadt[128], 0x42);
  const Bytes control(fadt.begin() + 244, fadt.begin() + 256);
  EXPECT_EQ(control, (Bytes{1, 8, 0, 1, 0x04, 0x06, 0, 0, 0, 0, 0, 0}));
  const Bytes status(fadt.begin() + 256, fadt.begin() + 268);
  EXPECT_EQ(status, (Bytes{1, 8, 0, 1, 0x05, 0x06, 0, 0, 0, 0, 0, 0}));
  // Everything of the fixed hardware that is not there is zero.
  EXPECT_TRUE(std::all_of(fadt.begin() + 45, fadt.begin() + 109, [](auto byte) { return byte == 0; }));
  EXPECT_TRUE(std::all_of(fadt.begin() + 148, fadt.begin() + 244, [](auto byte) { return byte == 0; }));

  machine.serial = false;
  machine.rtc = false;
  machine.i8042 = true;
  EXPECT_EQ(load_le<std::uint16_t>(&table_of(build(machine), "FACP").bytes[109]), 0x0026);
}

TEST(Acpi, MadtNamesEveryCpuAndTheIoApic) {
  AcpiDescription machine;
  machine.cpus = 2;
  machine.max_cpus = 3;
  const Bytes madt = table_of(build(machine), "APIC").bytes;
  const Bytes expected = {
      0x00, 0x00, 0xE0, 0xFE, 0,    0,    0,    0,     // local APIC address, flags
      0,    8,    0,    0,    1,    0,    0,    0,     // CPU 0 enabled
      0,    8,    1,    1,    1,    0,    0,    0,     // CPU 1 enabled
      0,    8,    2,    2,    2,    0,    0,    0,     // CPU 2 may come online
      1,    12,   0,    0,    0x00, 0x00, 0xC0, 0xFE,  // I/O APIC
      0,    0,    0,    0,                             // from GSI 0
      4,    6,    0xFF, 0,    0,    1,                 // NMI on LINT1
  };
  EXPECT_EQ(Bytes(madt.begin() + 36, madt.end()), expected);
}

TEST(Acpi, CpusBeyondEightBitsUseX2Apic) {
  AcpiDescription machine;
  machine.cpus = 256;
  machine.max_cpus = 256;
  const Bytes madt = table_of(build(machine), "APIC").bytes;
  const std::size_t at = 36 + 8 + 255 * 8;
  const Bytes last(madt.begin() + at, madt.begin() + at + 16);
  EXPECT_EQ(last, (Bytes{9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0}));
}

TEST(Acpi, ContradictionsAreRefused) {
  const auto error = [](const AcpiDescription& machine, std::uint64_t space = layout::kAcpiSpace) {
    return test::error_of(build_acpi(machine, layout::kAcpiTables, space));
  };
  AcpiDescription machine;
  machine.cpus = 2;
  EXPECT_THAT(error(machine), HasSubstr("2 of at most 1 CPUs"));
  machine.max_cpus = 5000;
  EXPECT_THAT(error(machine), HasSubstr("5000"));
  machine = {};
  machine.devices = {virtio_slot(3), virtio_slot(3)};
  EXPECT_THAT(error(machine), HasSubstr("slot 3 is used twice"));
  machine.devices = {{.index = 64, .base = layout::kVirtioMmio, .gsi = 5}};
  EXPECT_THAT(error(machine), HasSubstr("slot 64 is beyond"));
  machine.devices = {{.index = 0, .base = 0xFFFF'FFFF, .gsi = 5}};
  EXPECT_THAT(error(machine), HasSubstr("below 4 GiB"));
  machine.devices = {virtio_slot(0)};
  machine.slot_hotplug = AcpiSlotHotplug{.registers = {}, .free_slots = {virtio_slot(0)}};
  EXPECT_THAT(error(machine), HasSubstr("slot 0 is used twice"));
  machine.slot_hotplug->free_slots = {virtio_slot(1)};
  EXPECT_THAT(error(machine), HasSubstr("event register"));
  machine.power.slot_hotplug = 4;
  EXPECT_EQ(error(machine), "no error");
  EXPECT_THAT(error(machine, 512), HasSubstr("there is room for 512"));
}

TEST(Acpi, TheLargestMachineFits) {
  AcpiDescription machine = test::full_machine();
  machine.cpus = machine.max_cpus = 512;
  EXPECT_TRUE(build_acpi(machine, layout::kAcpiTables, layout::kAcpiSpace));
}

// --- iasl -----------------------------------------------------------------------------------------------

struct Outcome {
  int status;
  std::string output;
};

Outcome run(const std::string& command) {
  std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen((command + " 2>&1").c_str(), "r"), &::pclose);
  std::string output;
  std::array<char, 4096> buffer{};
  while (const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe.get())) {
    output.append(buffer.data(), got);
  }
  return {::pclose(pipe.release()), output};
}

class AcpiTools : public ::testing::Test {
 protected:
  // Puts the table into a file of its own and gives its path.
  [[nodiscard]] std::string write(const AcpiTable& table) const {
    const std::string path = (directory_ / (std::string(table.signature) + ".dat")).string();
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(table.bytes.data()),
               static_cast<std::streamsize>(table.bytes.size()));
    return path;
  }
  void SetUp() override {
    if (run("iasl -v").status != 0) {
      GTEST_FAIL() << "iasl is missing: apt-get install acpica-tools";
    }
    std::string name = (std::filesystem::temp_directory_path() / "wisp-acpi-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::filesystem::path directory_;
};

class Iasl : public AcpiTools, public ::testing::WithParamInterface<AcpiDescription> {};

TEST_P(Iasl, DisassemblesEveryTableAndCompilesItAgain) {
  for (const AcpiTable& table : build(GetParam()).tables) {
    if (table.signature == "RSD PTR ") {
      continue;  // iasl takes an RSDP only as data table source
    }
    const std::string base = (directory_ / std::string(table.signature)).string();
    ASSERT_EQ(write(table), base + ".dat");
    const Outcome disassembled = run("iasl -d " + base + ".dat");
    EXPECT_EQ(disassembled.status, 0) << disassembled.output;
    EXPECT_THAT(disassembled.output, Not(HasSubstr("Error")));
    EXPECT_THAT(disassembled.output, Not(HasSubstr("Warning")));
    EXPECT_THAT(disassembled.output, Not(HasSubstr("Unknown")));
    const Outcome compiled = run(fmt::format("iasl -oa -p {0}-again {0}.dsl", base));
    EXPECT_EQ(compiled.status, 0) << compiled.output;
    EXPECT_THAT(compiled.output, HasSubstr("Compilation successful. 0 Errors, 0 Warnings"))
        << table.signature;
    // iasl gives back the same bytes, so it understood every one of them; the header names the compiler.
    std::ifstream in(base + "-again.aml", std::ios::binary);
    Bytes again{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    ASSERT_EQ(again.size(), table.bytes.size()) << table.signature;
    EXPECT_TRUE(std::equal(again.begin() + 36, again.end(), table.bytes.begin() + 36)) << table.signature;
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, Iasl,
                         ::testing::Values(test::full_machine(), test::small_machine(),
                                           test::bare_machine()));

// ACPICA, the interpreter that is also in Linux, runs the guest's part of the protocol of acpi_layout.h with
// all registers reading zero, then all ones.
TEST_F(AcpiTools, EventMethodNotifiesWhatChanged) {
  const std::string file = write(table_of(build(test::full_machine()), "DSDT"));
  const std::string commands = " -b 'execute \\_SB.VC14._STA;execute \\_SB.GED._EVT 9;quit' " + file;
  const Outcome quiet = run("acpiexec" + commands);
  EXPECT_THAT(quiet.output, HasSubstr("[Integer] = 0000000000000000"));
  EXPECT_THAT(quiet.output, HasSubstr("No object was returned from evaluation of \\_SB.GED._EVT"));
  EXPECT_THAT(quiet.output, Not(HasSubstr("Notify on")));

  const Outcome events = run("acpiexec -fv 0xff" + commands);
  EXPECT_THAT(events.output, HasSubstr("[Integer] = 000000000000000F"));
  EXPECT_THAT(events.output, HasSubstr("Device Notify on [PWRB]"));
  EXPECT_THAT(events.output, HasSubstr("Device Notify on [SLPB]"));
  for (std::uint32_t slot = 0; slot < layout::kVirtioMmioSlots; ++slot) {
    const std::string notified = fmt::format("System Notify on [VC{:02X}]", slot);
    EXPECT_EQ(events.output.find(notified) != std::string::npos, slot >= 20) << notified;
  }
  EXPECT_THAT(events.output, Not(HasSubstr("Exception")));
}

TEST(Acpi, DsdtSaysWhatTheDescriptionSays) {
  const AcpiDescription machine = test::full_machine();
  const Bytes dsdt = build_dsdt_body(machine);
  const auto count = [&dsdt](std::string_view text) {
    std::size_t found = 0;
    for (auto at = dsdt.begin();;) {
      at = std::search(at, dsdt.end(), text.begin(), text.end());
      if (at == dsdt.end()) {
        return found;
      }
      ++found;
      ++at;
    }
  };
  EXPECT_EQ(count("LNRO0005"), 64U);
  EXPECT_EQ(count("ACPI0004"), 44U);  // the slots that are free
  EXPECT_EQ(count("ACPI0007"), machine.max_cpus);
  EXPECT_EQ(count("ACPI0013"), 1U);
  EXPECT_EQ(count("VSCN"), 2U);  // declared and called
  const Bytes bare = build_dsdt_body(test::bare_machine());
  const std::string_view event_device = "ACPI0013";  // nothing to tell, so not there
  EXPECT_EQ(std::ranges::search(bare, event_device).begin(), bare.end());
}

}  // namespace
}  // namespace wisp
