// Guest instructions run by the host's own processor: re-encoded with their registers in their homes and
// their memory operand where generated code has put it. One place for both executors.
#pragma once

#include <cstdint>

#include "hypervisor/soft/emitter.h"
#include "hypervisor/soft/insn.h"

namespace wisp::soft {

enum class MemoryForm : std::uint8_t {
  kAddressAddend,  // [kAddress + kAddend]
  kAddressOnly,    // [kAddress]
};

// Emits a kNative instruction. Flags are the guest's before and after. Clobbers the scratch registers; the
// Cpu's `kept` too. The vector registers must hold the guest's where the instruction uses them.
void emit_native(Emitter& out, const Insn& insn, MemoryForm form);

// The code that enters and leaves generated code, made once for a code memory.
struct Trampolines {
  // void(Cpu*, const std::uint8_t* code): loads the guest's registers and flags, cpu.scratch[1] into
  // kAddress, and jumps to the code.
  const std::uint8_t* enter = nullptr;
  // Jumped to by generated code: stores them, and returns from `enter` with kAddress as result.
  const std::uint8_t* leave = nullptr;
  // Called by generated code: the guest's vector registers into the host's and back; flags are kept, kTemp
  // is lost. save also gives the host's code the floating-point settings it expects.
  const std::uint8_t* load_vectors = nullptr;
  const std::uint8_t* save_vectors = nullptr;
  // Called: guest registers and flags to the Cpu, and back; all scratch registers are lost.
  const std::uint8_t* spill = nullptr;
  const std::uint8_t* reload = nullptr;
};
[[nodiscard]] Trampolines emit_trampolines(Emitter& out);

// Enters generated code; the result is what the code left in kAddress: by convention 0 where all went well,
// or kHostFault + vector where the host's processor raised an exception in it (see host_faults.h).
inline std::uint64_t enter_code(const Trampolines& trampolines, Cpu& cpu, const std::uint8_t* code) {
  using Enter = std::uint64_t (*)(Cpu*, const std::uint8_t*);
  // Addresses of generated code come as numbers. NOLINTNEXTLINE(performance-no-int-to-ptr)
  return reinterpret_cast<Enter>(reinterpret_cast<std::uintptr_t>(trampolines.enter))(&cpu, code);
}

}  // namespace wisp::soft
