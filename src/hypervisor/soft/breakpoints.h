// DR7's breakpoints on data and ports (SDM volume 3, 17.2): an access notes which of them it hits, and the
// processor delivers #DB behind the instruction. Translated code does not run while any is set.
#pragma once

#include <cstdint>

#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

enum class Watched : std::uint8_t { kRead, kWrite, kPort };

[[nodiscard]] inline bool breakpoints_set(const Cpu& cpu) {
  return (cpu.dr7 & 0xff) != 0;
}

// Sets bits of cpu.breakpoint_hits.
void note_breakpoint_hits(Cpu& cpu, std::uint64_t address, std::uint32_t size, Watched what);

inline void note_breakpoints(Cpu& cpu, std::uint64_t address, std::uint32_t size, Watched what) {
  if (breakpoints_set(cpu)) [[unlikely]] {
    note_breakpoint_hits(cpu, address, size, what);
  }
}

}  // namespace wisp::soft
