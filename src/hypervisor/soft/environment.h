// What instructions ask of the machine around the processor.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "hypervisor/cpu_state.h"

namespace wisp::soft {

// All calls come from the processor's thread.
class Environment {
 public:
  virtual ~Environment() = default;
  [[nodiscard]] virtual std::uint64_t read_tsc() = 0;  // before the processor's own offset
  // The answer of CPUID.
  virtual CpuidEntry cpuid(std::uint32_t leaf, std::uint32_t subleaf) = 0;
  // MSRs that are not plain state of the processor: local APIC, TSC deadline, KVM clock. Empty: not there.
  [[nodiscard]] virtual std::optional<std::uint64_t> read_msr(std::uint32_t index) = 0;
  // kUnknown where there is no such MSR, kBadValue for #GP.
  enum class MsrWrite : std::uint8_t { kDone, kUnknown, kBadValue };
  [[nodiscard]] virtual MsrWrite write_msr(std::uint32_t index, std::uint64_t value) = 0;
  [[nodiscard]] virtual std::uint64_t read_cr8() = 0;
  virtual void write_cr8(std::uint64_t value) = 0;
  // Ports that the engine answers itself (PIC, PIT); false: the machine's.
  [[nodiscard]] virtual bool port_read(std::uint16_t port, std::span<std::uint8_t> data) = 0;
  [[nodiscard]] virtual bool port_write(std::uint16_t port, std::span<const std::uint8_t> data) = 0;
  // VMCALL and VMMCALL (KVM hypercalls; number and arguments in registers): the result for RAX.
  [[nodiscard]] virtual std::uint64_t hypercall(std::uint64_t number,
                                                std::span<const std::uint64_t, 4> arguments) = 0;
  // Random numbers for RDRAND and RDSEED.
  [[nodiscard]] virtual std::uint64_t random() = 0;
  // Some PAUSEs: the guest waits in a loop, most likely for another of its processors.
  virtual void pause() = 0;
  // Something this CPU does not have was tried (an instruction, an MSR): for the log, which limits itself.
  virtual void note(const std::string& what) = 0;
};

}  // namespace wisp::soft
