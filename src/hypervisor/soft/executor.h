// Instructions that are done in C++, by group; each in a source file of its own. A function runs one decoded
// instruction whose address is cpu.rip, and does not move rip except where it returns Outcome::kJump or
// kTrap. Nothing may have changed where it returns kFault or kIo (but see strings.cpp).
#pragma once

#include <cstdint>

#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/environment.h"
#include "hypervisor/soft/insn.h"
#include "hypervisor/soft/mmu.h"

namespace wisp::soft {

// One processor with all that it works on.
struct Core {
  Cpu& cpu;
  Mmu& mmu;
  PhysicalMemory& memory;
  Environment& env;
};

// --- addresses (segments.cpp)

// The offset of the memory operand in its segment, address size applied.
[[nodiscard]] std::uint64_t effective_address(const Cpu& cpu, const Insn& insn);
// The linear address of [offset, offset + size) of a segment; false: #GP or #SS is set. Checks limit, rights
// and canonical form (SDM volume 3, 5.3 and 5.4, volume 1, 3.3.7.1).
[[nodiscard]] bool linear_address(Cpu& cpu, SegmentId segment, std::uint64_t offset, std::uint32_t size,
                                  Access access, std::uint64_t& linear);
[[nodiscard]] inline bool canonical(std::uint64_t linear) {
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(linear << 16) >> 16) == linear;
}

// --- the stack (stack.cpp): operand size in bytes, at SS:rSP with the stack's own address size

[[nodiscard]] bool push(Core& core, std::uint64_t value, std::uint32_t size);
// Reads the top without moving rSP, which the caller does once all went well (add_to_sp()).
[[nodiscard]] bool peek(Core& core, std::uint32_t depth_bytes, std::uint64_t& value, std::uint32_t size);
void add_to_sp(Cpu& cpu, std::int64_t bytes);
[[nodiscard]] std::uint32_t stack_address_size(const Cpu& cpu);

// --- segments and far transfers (segments.cpp, far_transfer.cpp)

// Loads a data segment register or SS as MOV and POP do.
[[nodiscard]] bool load_segment(Core& core, SegmentId segment, std::uint16_t selector);
// Near jump to an offset of CS: false with #GP set where it is out of limit or not canonical.
[[nodiscard]] bool set_rip(Cpu& cpu, std::uint64_t target, std::uint32_t operand_size);
Outcome far_jump(Core& core, std::uint16_t selector, std::uint64_t offset, std::uint32_t operand_size);
Outcome far_call(Core& core, std::uint16_t selector, std::uint64_t offset, std::uint32_t operand_size,
                 std::uint64_t return_rip);
Outcome far_return(Core& core, std::uint32_t operand_size, std::uint32_t drop_bytes);
Outcome interrupt_return(Core& core, std::uint32_t operand_size);

// --- events (events.cpp)

enum class EventKind : std::uint8_t { kFault, kTrap, kSoftwareInterrupt, kExternal, kNmi };
// Delivers an event through the IDT (real-mode IVT): pushes flags, CS, RIP (cpu.rip must be the address to
// return to), and jumps to the handler. Faults on the way become #DF; false: triple fault, shut down.
// `length`: of the instruction that raised a software interrupt. What faults in its delivery is a fault of
// that instruction, so rip goes back by as much.
[[nodiscard]] bool deliver_event(Core& core, const Fault& fault, EventKind kind, std::uint8_t length = 0);
// Whether an instruction may end in #DB: TF is set, or DR7 has a breakpoint enabled.
[[nodiscard]] bool debug_active(const Cpu& cpu);

// The state after INIT, and with `power_up` after power-up (SDM volume 3, table 9-1).
void reset_cpu(Cpu& cpu, bool power_up);
// A start-up IPI came: real mode at vector << 12.
void start_at(Cpu& cpu, std::uint8_t sipi_vector);

// --- groups (OpGroup): each returns what became of the instruction

Outcome execute_integer(Core& core, const Insn& insn);         // integer.cpp
Outcome execute_control(Core& core, const Insn& insn);         // control.cpp
Outcome execute_string(Core& core, const Insn& insn);          // strings.cpp
Outcome execute_extended_state(Core& core, const Insn& insn);  // xsave.cpp
Outcome execute_vector(Core& core, const Insn& insn);          // vector.cpp
Outcome execute_system(Core& core, const Insn& insn);          // system.cpp, system_registers.cpp

// CR0, CR3, CR4, EFER as MOV to CR and WRMSR do, with their checks and flushes; false: #GP is set.
[[nodiscard]] bool write_cr0(Core& core, std::uint64_t value);
[[nodiscard]] bool write_cr3(Core& core, std::uint64_t value);
[[nodiscard]] bool write_cr4(Core& core, std::uint64_t value);
[[nodiscard]] bool read_msr(Core& core, std::uint32_t index, std::uint64_t& value);
[[nodiscard]] bool write_msr(Core& core, std::uint32_t index, std::uint64_t value);
// Ring-3 port access: IOPL and the TSS bitmap; false: #GP is set.
[[nodiscard]] bool port_allowed(Core& core, std::uint16_t port, std::uint32_t size);

// Whether the vector instruction may run: CR0.EM, CR0.TS, CR4.OSFXSR, OSXSAVE and XCR0; false: #UD or #NM
// set.
[[nodiscard]] bool vector_allowed(Cpu& cpu, VectorUse use);

// By the function of its group; of none that is the processor's own business, and #UD here.
[[nodiscard]] inline Outcome execute_by_group(Core& core, const Insn& insn) {
  switch (group_of(insn.op)) {
    case OpGroup::kNone:
      break;
    case OpGroup::kInteger:
      return execute_integer(core, insn);
    case OpGroup::kControl:
      return execute_control(core, insn);
    case OpGroup::kString:
      return execute_string(core, insn);
    case OpGroup::kExtendedState:
      return execute_extended_state(core, insn);
    case OpGroup::kVector:
      return execute_vector(core, insn);
    case OpGroup::kSystem:
      return execute_system(core, insn);
  }
  (void)core.cpu.raise(vec::kUd);
  return Outcome::kFault;
}

}  // namespace wisp::soft
