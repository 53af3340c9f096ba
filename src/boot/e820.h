// The memory map that a kernel is given, in the terms of the BIOS call INT 15h AX=E820h (ACPI 6.5, 15.1).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "memory/gpa.h"

namespace wisp {

enum class E820Type : std::uint32_t { kRam = 1, kReserved = 2 };

struct E820Entry {
  Gpa start = 0;
  std::uint64_t size = 0;
  E820Type type = E820Type::kRam;
  bool operator==(const E820Entry&) const = default;
};

// A range of RAM.
struct RamRange {
  Gpa gpa = 0;
  std::uint64_t size = 0;
};

// The map of a machine with this RAM: RAM without the firmware area below 1 MiB, that area and the pages that
// KVM keeps as reserved. MMIO ranges are holes: the devices that ACPI or the command line names claim them.
// `ram` is sorted and does not overlap; ranges that touch become one entry. The result is sorted.
[[nodiscard]] std::vector<E820Entry> build_e820(std::span<const RamRange> ram);

}  // namespace wisp
