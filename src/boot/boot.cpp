#include "boot/boot.h"

#include <algorithm>
#include <array>

#include "boot/command_line.h"
#include "boot/layout.h"
#include "boot/mp_table.h"
#include "boot/start_info.h"
#include "boot/zero_page.h"

namespace wisp {
namespace {

Result<void> write(const GuestMemory& memory, Gpa gpa, std::span<const std::uint8_t> bytes,
                   std::string_view what) {
  if (!memory.write(gpa, bytes)) {
    return fail("the machine has no RAM at {:#x} for the {}: it needs at least 2 MiB (-m)", gpa, what);
  }
  return {};
}

struct OpenImage {
  UniqueFd fd;
  ImageReader reader;
};

Result<OpenImage> open_reader(const std::string& path) {
  WISP_ASSIGN(UniqueFd fd, open_image(path));
  WISP_ASSIGN(const ImageReader reader, ImageReader::from_fd(fd.get()));
  return OpenImage{std::move(fd), reader};
}

// Puts "kernel PATH" in front of an error.
template <typename T>
Result<T> about(std::string_view what, const std::string& path, Result<T> result) {
  if (!result) {
    return fail("{} {} {}", what, path, result.error().message);
  }
  return result;
}

// mov al, 0xfe; out 0x64, al (i8042: pulse the reset line); then halt for good.
constexpr std::array<std::uint8_t, 7> kResetCode{0xB0, 0xFE, 0xE6, 0x64, 0xF4, 0xEB, 0xFD};

Result<Gpa> write_acpi(const AcpiDescription& description, const GuestMemory& memory) {
  WISP_ASSIGN(const AcpiTables tables, build_acpi(description, layout::kAcpiTables, layout::kAcpiSpace));
  for (const AcpiTable& table : tables.tables) {
    WISP_TRY(write(memory, table.gpa, table.bytes, "ACPI tables"));
  }
  return tables.rsdp;
}

// The zero page or its like; returns where it lies.
Result<Gpa> write_boot_info(const KernelImage& image, const BootInfo& info, const GuestMemory& memory) {
  switch (image.protocol) {
    case BootProtocol::kLinux64:
    case BootProtocol::kLinux32: {
      WISP_ASSIGN(const auto page, build_zero_page(image, info));
      WISP_TRY(write(memory, layout::kZeroPage, page, "zero page"));
      return layout::kZeroPage;
    }
    case BootProtocol::kPvh: {
      WISP_ASSIGN(const auto block, build_pvh_start_info(layout::kStartInfo, layout::kStartInfoSize, info));
      WISP_TRY(write(memory, layout::kStartInfo, block, "PVH start info"));
      return layout::kStartInfo;
    }
    case BootProtocol::kMultiboot1: {
      WISP_ASSIGN(const auto block, build_multiboot_info(layout::kStartInfo, layout::kStartInfoSize, info));
      WISP_TRY(write(memory, layout::kStartInfo, block, "multiboot information"));
      return layout::kStartInfo;
    }
  }
  return fail("unknown boot protocol");
}

}  // namespace

Result<BootState> prepare_boot(const BootDescription& description, const GuestMemory& memory,
                               std::span<const RamPlacement> ram) {
  BootState state;

  WISP_ASSIGN(const OpenImage kernel, about("kernel", description.kernel, open_reader(description.kernel)));
  WISP_ASSIGN(const KernelImage image,
              about("kernel", description.kernel, read_kernel_image(kernel.reader, description.elf_entry)));
  state.format = image.format;
  state.protocol = image.protocol;
  state.kernel = {image.start, image.end - image.start};

  std::string words = description.command_line;
  if (image.protocol == BootProtocol::kMultiboot1) {
    // By convention the first word is the kernel's path (Multiboot 0.6.96, 3.3).
    words = description.kernel + (words.empty() ? "" : " ") + words;
  }
  WISP_ASSIGN(const KernelCommandLine command_line,
              build_command_line(words, description.command_line_devices, image.command_line_max));
  state.command_line = command_line.text;
  state.devices_not_named =
      static_cast<std::uint32_t>(description.command_line_devices.size()) - command_line.devices;
  if (state.devices_not_named > 0 && !description.acpi) {
    return fail(
        "the command line of at most {} bytes has room for {} of {} virtio_mmio.device= arguments: "
        "shorten it (-append), or boot with ACPI",
        image.command_line_max, command_line.devices, description.command_line_devices.size());
  }

  WISP_TRY(about("kernel", description.kernel, load_kernel(kernel.reader, image, ram)));
  if (!description.initrd.empty()) {
    WISP_ASSIGN(const OpenImage initrd, about("initrd", description.initrd, open_reader(description.initrd)));
    WISP_ASSIGN(state.initrd, about("initrd", description.initrd, load_initrd(initrd.reader, image, ram)));
  }

  std::vector<RamRange> ranges;
  for (const RamPlacement& placement : ram) {
    ranges.push_back({placement.gpa, placement.size});
  }
  std::ranges::sort(ranges, {}, &RamRange::gpa);
  state.e820 = build_e820(ranges);

  if (description.acpi) {
    WISP_ASSERT(description.acpi->cpus == description.cpus);
    WISP_ASSIGN(state.rsdp, write_acpi(*description.acpi, memory));
  }
  WISP_TRY(write(memory, layout::kMpTable,
                 build_mp_table(layout::kMpTable, description.cpus, description.topology), "MP table"));

  WISP_TRY(write(memory, layout::kResetVector, kResetCode, "reset vector"));

  std::vector<std::uint8_t> text(state.command_line.begin(), state.command_line.end());
  text.push_back(0);
  WISP_TRY(write(memory, layout::kCommandLine, text, "command line"));

  const BootInfo info{
      .command_line = layout::kCommandLine, .initrd = state.initrd, .rsdp = state.rsdp, .e820 = state.e820};
  WISP_ASSIGN(const Gpa info_gpa, write_boot_info(image, info, memory));

  const auto gdt = build_gdt(image.protocol);
  WISP_TRY(write(memory, layout::kGdt,
                 std::span(reinterpret_cast<const std::uint8_t*>(gdt.data()), sizeof gdt), "GDT"));
  if (image.protocol == BootProtocol::kLinux64) {
    WISP_TRY(write(memory, layout::kPml4, build_page_tables(description.gigabyte_pages), "page tables"));
  }
  state.cpu = boot_cpu_state(image.protocol, image.entry, info_gpa);
  return state;
}

}  // namespace wisp
