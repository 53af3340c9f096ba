#include "boot/e820.h"

#include <algorithm>
#include <array>

#include "boot/layout.h"

namespace wisp {
namespace {

struct Hole {
  Gpa start;
  Gpa end;
  bool reserved;  // false: left out of the map, as the window of a VGA adapter is on a PC
};

constexpr std::array kHoles = {
    Hole{layout::kConventionalEnd, layout::kEbdaEnd, true},
    Hole{layout::kEbdaEnd, layout::kAcpiTables, false},
    Hole{layout::kAcpiTables, layout::kBiosEnd, true},
    Hole{layout::kEnginePages, layout::kEnginePagesEnd, true},
};

void add_ram(std::vector<E820Entry>& map, Gpa start, Gpa end) {
  if (start >= end) {
    return;
  }
  if (!map.empty() && map.back().type == E820Type::kRam && map.back().start + map.back().size == start) {
    map.back().size += end - start;
    return;
  }
  map.push_back({start, end - start, E820Type::kRam});
}

}  // namespace

std::vector<E820Entry> build_e820(std::span<const RamRange> ram) {
  std::vector<E820Entry> map;
  for (const RamRange& range : ram) {
    Gpa at = range.gpa;
    const Gpa end = range.gpa + range.size;
    for (const Hole& hole : kHoles) {
      if (hole.end <= at || hole.start >= end) {
        continue;
      }
      add_ram(map, at, hole.start);
      at = hole.end;
    }
    add_ram(map, at, end);
  }
  for (const Hole& hole : kHoles) {
    if (hole.reserved) {
      map.push_back({hole.start, hole.end - hole.start, E820Type::kReserved});
    }
  }
  std::ranges::sort(map, {}, &E820Entry::start);
  return map;
}

}  // namespace wisp
