// Operands of instructions that are done one by one in C++: a general register or memory.
#pragma once

#include <cstdint>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/executor.h"

namespace wisp::soft::operand {

// The linear address of the memory operand.
[[nodiscard]] inline bool locate(Core& core, const Insn& insn, std::uint32_t size, Access access,
                                 std::uint64_t& linear) {
  return linear_address(core.cpu, static_cast<SegmentId>(insn.segment), effective_address(core.cpu, insn),
                        size, access, linear);
}

// The r/m operand; a register of another size than memory has its own.
[[nodiscard]] bool load(Core& core, const Insn& insn, std::uint32_t size, std::uint64_t& value);
[[nodiscard]] bool store(Core& core, const Insn& insn, std::uint32_t register_size, std::uint32_t memory_size,
                         std::uint64_t value);

// Areas of more bytes than Mmu::read() and write() take. A write happens whole, or faults before it begins.
[[nodiscard]] bool read_area(Core& core, std::uint64_t linear, std::uint8_t* out, std::uint32_t size);
[[nodiscard]] bool probe_area(Core& core, std::uint64_t linear, std::uint32_t size);
// After probe_area().
[[nodiscard]] bool write_area(Core& core, std::uint64_t linear, const std::uint8_t* in, std::uint32_t size);

// Ends the instruction with an exception that has no error code, or with #GP(0).
inline Outcome fault(Core& core, std::uint8_t vector) {
  (void)core.cpu.raise(vector);
  return Outcome::kFault;
}
inline Outcome general_protection(Core& core) {
  (void)core.cpu.raise(vec::kGp, 0);
  return Outcome::kFault;
}

}  // namespace wisp::soft::operand
