// The groups that execute_system() takes instructions from, each in a file of its own. All return what became
// of the instruction, as execute_system() does.
#pragma once

#include "hypervisor/soft/executor.h"

namespace wisp::soft {

// system_registers.cpp: control and debug registers, XCR0.
[[nodiscard]] Outcome move_from_cr(Core& core, const Insn& insn);
[[nodiscard]] Outcome move_to_cr(Core& core, const Insn& insn);
[[nodiscard]] Outcome move_from_dr(Core& core, const Insn& insn);
[[nodiscard]] Outcome move_to_dr(Core& core, const Insn& insn);
[[nodiscard]] Outcome load_status_word(Core& core, const Insn& insn);
[[nodiscard]] Outcome store_status_word(Core& core, const Insn& insn);
[[nodiscard]] Outcome clear_task_switched(Core& core);
[[nodiscard]] Outcome get_xcr(Core& core);
[[nodiscard]] Outcome set_xcr(Core& core);
// What EFER takes from WRMSR; false: #GP is set.
[[nodiscard]] bool write_efer(Core& core, std::uint64_t value);

// fast_calls.cpp: SYSCALL, SYSENTER and their returns.
[[nodiscard]] Outcome fast_call(Core& core, const Insn& insn);

// descriptor_tables.cpp: table registers, and what looks at descriptors.
[[nodiscard]] Outcome table_instruction(Core& core, const Insn& insn);

// Whether CPUID offers a feature: bit `bit` of `words` of a leaf.
[[nodiscard]] inline bool offered(Core& core, std::uint32_t leaf, std::uint32_t CpuidEntry::* word,
                                  unsigned bit) {
  return (core.env.cpuid(leaf, 0).*word >> bit & 1) != 0;
}

// UMIP: what tells of system registers is for ring 0 only. False: #GP is set.
[[nodiscard]] inline bool umip_allows(Cpu& cpu) {
  return cpu.cpl == 0 || (cpu.cr4 & cr4::kUmip) == 0 || cpu.raise(vec::kGp, 0);
}

}  // namespace wisp::soft
