// FLDENV, FNSTENV, FRSTOR and FNSAVE (SDM volume 1, 8.1.10).
#pragma once

#include "hypervisor/soft/executor.h"

namespace wisp::soft {

[[nodiscard]] Outcome fpu_environment(Core& core, const Insn& insn);

// Whether the next waiting x87 instruction raises #MF: an unmasked exception is noted in the status word.
[[nodiscard]] bool x87_exception_pending(const Cpu& cpu);

}  // namespace wisp::soft
