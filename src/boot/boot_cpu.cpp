#include "boot/boot_cpu.h"

#include "base/bytes.h"
#include "boot/layout.h"
#include "boot/start_info.h"

namespace wisp {
namespace {

constexpr std::uint64_t kCr0Pe = 1U << 0;
constexpr std::uint64_t kCr0Et = 1U << 4;
constexpr std::uint64_t kCr0Pg = 1U << 31;
constexpr std::uint64_t kCr4Pae = 1U << 5;
constexpr std::uint64_t kEferLme = 1U << 8;
constexpr std::uint64_t kEferLma = 1U << 10;
// The local APIC at its usual place, on, of the boot processor (SDM volume 3, IA32_APIC_BASE).
constexpr std::uint64_t kApicBase = layout::kLocalApic | 1U << 11 | 1U << 8;

constexpr std::uint16_t kCodeSelector = 0x10;
constexpr std::uint16_t kDataSelector = 0x18;
constexpr std::uint16_t kTaskSelector = 0x20;

constexpr std::uint8_t kCodeType = 0xB;  // execute, read, accessed
constexpr std::uint8_t kDataType = 0x3;  // read, write, accessed
constexpr std::uint8_t kTaskType = 0xB;  // 32-bit or 64-bit TSS, busy
constexpr std::uint32_t kTaskLimit = 0x67;

CpuSegment code_segment(bool long_mode) {
  return {.base = 0,
          .limit = 0xFFFF'FFFF,
          .selector = kCodeSelector,
          .type = kCodeType,
          .present = true,
          .long_mode = long_mode,
          .default_big = !long_mode,
          .granularity = true};
}

CpuSegment data_segment() {
  return {.base = 0,
          .limit = 0xFFFF'FFFF,
          .selector = kDataSelector,
          .type = kDataType,
          .present = true,
          .default_big = true,
          .granularity = true};
}

CpuSegment task_segment() {
  return {.base = 0,
          .limit = kTaskLimit,
          .selector = kTaskSelector,
          .type = kTaskType,
          .present = true,
          .system = true};
}

// A segment descriptor as in memory (SDM volume 3, figure 3-8).
std::uint64_t descriptor(const CpuSegment& segment) {
  const std::uint64_t limit = segment.granularity ? segment.limit >> 12 : segment.limit;
  const std::uint64_t access = segment.type | (segment.system ? 0ULL : 1ULL << 4) |
                               std::uint64_t{segment.dpl} << 5 | (segment.present ? 1ULL << 7 : 0ULL);
  const std::uint64_t flags = (segment.available ? 1ULL : 0ULL) | (segment.long_mode ? 1ULL << 1 : 0ULL) |
                              (segment.default_big ? 1ULL << 2 : 0ULL) |
                              (segment.granularity ? 1ULL << 3 : 0ULL);
  return (limit & 0xFFFF) | (segment.base & 0xFF'FFFF) << 16 | access << 40 | (limit >> 16 & 0xF) << 48 |
         flags << 52 | (segment.base >> 24 & 0xFF) << 56;
}

}  // namespace

BootCpu boot_cpu_state(BootProtocol protocol, Gpa entry, Gpa info) {
  const bool long_mode = protocol == BootProtocol::kLinux64;
  BootCpu cpu;
  cpu.regs.rip = entry;
  cpu.sregs.cs = code_segment(long_mode);
  cpu.sregs.ds = cpu.sregs.es = cpu.sregs.fs = cpu.sregs.gs = cpu.sregs.ss = data_segment();
  cpu.sregs.tr = task_segment();
  cpu.sregs.ldt = {.type = 2, .system = true, .unusable = true};
  cpu.sregs.gdt = {layout::kGdt, 6 * 8 - 1};
  cpu.sregs.idt = {0, 0};
  cpu.sregs.cr0 = kCr0Pe | kCr0Et;
  cpu.sregs.apic_base = kApicBase;
  switch (protocol) {
    case BootProtocol::kLinux64:
      cpu.sregs.cr0 |= kCr0Pg;
      cpu.sregs.cr3 = layout::kPml4;
      cpu.sregs.cr4 = kCr4Pae;
      cpu.sregs.efer = kEferLme | kEferLma;
      cpu.regs.rsi = info;
      break;
    case BootProtocol::kLinux32:
      cpu.regs.rsi = info;
      break;
    case BootProtocol::kPvh:
      cpu.regs.rbx = info;
      break;
    case BootProtocol::kMultiboot1:
      cpu.regs.rax = kMultibootBootMagic;
      cpu.regs.rbx = info;
      break;
  }
  return cpu;
}

std::array<std::uint64_t, 6> build_gdt(BootProtocol protocol) {
  return {0,
          0,
          descriptor(code_segment(protocol == BootProtocol::kLinux64)),
          descriptor(data_segment()),
          descriptor(task_segment()),
          0};
}

std::vector<std::uint8_t> build_page_tables(bool gigabyte_pages) {
  constexpr std::uint64_t kPresentWritable = 0x3;
  constexpr std::uint64_t kPageSizeBit = 0x80;
  constexpr std::uint64_t kGigabytes = 4;
  constexpr std::uint64_t kLargePages = 512 * kGigabytes;
  const std::uint64_t end = gigabyte_pages ? layout::kPageDirectories : layout::kPageTablesEnd;
  std::vector<std::uint8_t> tables(end - layout::kPml4);
  const auto put = [&tables](Gpa table, std::uint64_t index, std::uint64_t entry) {
    store_le(&tables[table - layout::kPml4 + index * 8], entry);
  };
  put(layout::kPml4, 0, layout::kPdpt | kPresentWritable);
  for (std::uint64_t gigabyte = 0; gigabyte < kGigabytes; ++gigabyte) {
    put(layout::kPdpt, gigabyte,
        gigabyte_pages ? gigabyte << 30 | kPageSizeBit | kPresentWritable
                       : (layout::kPageDirectories + gigabyte * kPageSize) | kPresentWritable);
  }
  for (std::uint64_t page = 0; !gigabyte_pages && page < kLargePages; ++page) {
    put(layout::kPageDirectories, page, page << 21 | kPageSizeBit | kPresentWritable);
  }
  return tables;
}

}  // namespace wisp
