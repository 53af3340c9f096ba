// Exceptions that the host's processor raises in generated code on behalf of the guest (#DE, #MF, #XM, #GP of
// a misaligned operand): the signal is turned into a return from generated code.
#pragma once

#include <cstdint>

#include "base/error.h"
#include "hypervisor/soft/code_memory.h"
#include "hypervisor/soft/native_code.h"

namespace wisp::soft {

// What enter_code() returns after such an exception: this plus the vector. The address of the instruction in
// generated code is in cpu.scratch[2].
inline constexpr std::uint64_t kHostFault = 0x10000;

// While it lives, faults in `memory` leave through `trampolines.leave`. Installs the process's handlers for
// SIGFPE, SIGSEGV, SIGBUS and SIGILL at its first use; faults elsewhere go on as before.
class HostFaultGuard final {
 public:
  [[nodiscard]] static Result<HostFaultGuard> create(const CodeMemory& memory,
                                                     const Trampolines& trampolines);
  HostFaultGuard(HostFaultGuard&& other) noexcept;
  HostFaultGuard& operator=(HostFaultGuard&&) = delete;
  ~HostFaultGuard();

 private:
  explicit HostFaultGuard(int slot) : slot_(slot) {}
  int slot_;
};

}  // namespace wisp::soft
