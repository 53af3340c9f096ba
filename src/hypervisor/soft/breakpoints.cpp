#include "hypervisor/soft/breakpoints.h"

#include <array>

namespace wisp::soft {

void note_breakpoint_hits(Cpu& cpu, std::uint64_t address, std::uint32_t size, Watched what) {
  enum : std::uint64_t { kOnExecution, kOnWrite, kOnPort, kOnAccess };
  constexpr std::array<std::uint64_t, 4> kLengths{1, 2, 8, 4};  // by LEN
  for (unsigned i = 0; i < cpu.dr.size(); ++i) {
    if ((cpu.dr7 >> (2 * i) & 3) == 0) {
      continue;
    }
    const std::uint64_t on = cpu.dr7 >> (16 + 4 * i) & 3;
    const bool asked = what == Watched::kPort
                           ? on == kOnPort && (cpu.cr4 & cr4::kDe) != 0
                           : on == kOnAccess || (on == kOnWrite && what == Watched::kWrite);
    const std::uint64_t length = kLengths[cpu.dr7 >> (18 + 4 * i) & 3];
    const std::uint64_t start = cpu.dr[i] & ~(length - 1);
    if (asked && (address - start < length || start - address < size)) {
      cpu.breakpoint_hits |= 1ULL << i;
    }
  }
}

}  // namespace wisp::soft
