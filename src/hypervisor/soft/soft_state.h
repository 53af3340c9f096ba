// Between a Cpu and the plain structures that all engines share, with KVM's conventions, so that a state
// moves between engines. Loaded states are hostile: what no processor could be in is refused.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "hypervisor/cpu_state.h"
#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

[[nodiscard]] CpuRegs regs_of(const Cpu& cpu);
void set_regs(Cpu& cpu, const CpuRegs& regs);

// CR8 and the APIC base belong to the local APIC and are left at 0.
[[nodiscard]] CpuSpecialRegs special_regs_of(const Cpu& cpu);
// Refuses combinations of CR0, CR3, CR4 and EFER that do not exist (SDM volume 3, 2.5 and 4.1). Translations
// must be flushed afterwards.
[[nodiscard]] Result<void> set_special_regs(Cpu& cpu, const CpuSpecialRegs& sregs);

// The standard-format XSAVE area, kXsaveSize bytes.
[[nodiscard]] std::vector<std::uint8_t> xsave_of(const Cpu& cpu);
// `allowed` are the components that this CPU has; others must be in their initial state.
[[nodiscard]] Result<void> set_xsave(Cpu& cpu, std::span<const std::uint8_t> area, std::uint64_t allowed);

// MSRs that are plain fields of the Cpu, in the order of their numbers. The time-stamp counter, its deadline
// and IA32_ARCH_CAPABILITIES are the caller's.
[[nodiscard]] std::vector<CpuMsr> msrs_of(const Cpu& cpu);
// What becomes of one MSR of a loaded state.
enum class MsrLoad : std::uint8_t {
  kTaken,
  kPassedOver,  // says something about the machine that this CPU tells in its own way
  kUnknown,     // no such MSR, or no such value
};
[[nodiscard]] MsrLoad load_msr(Cpu& cpu, const CpuMsr& entry);

namespace msr {
inline constexpr std::uint32_t kTsc = 0x10;
inline constexpr std::uint32_t kApicBase = 0x1b;
inline constexpr std::uint32_t kSmiCount = 0x34;
inline constexpr std::uint32_t kPredCmd = 0x49;
inline constexpr std::uint32_t kMicrocodeRevision = 0x8b;
inline constexpr std::uint32_t kArchCapabilities = 0x10a;
inline constexpr std::uint32_t kMachineCheckCap = 0x179;
inline constexpr std::uint32_t kMachineCheckStatus = 0x17a;
// What has been consumed, by domain (RAPL, SDM volume 3, 15.10), and in which unit.
inline constexpr std::uint32_t kEnergyUnits = 0x606;
inline constexpr std::uint32_t kPackageEnergy = 0x611;
inline constexpr std::uint32_t kMemoryEnergy = 0x619;
inline constexpr std::uint32_t kCoresEnergy = 0x639;
inline constexpr std::uint32_t kGraphicsEnergy = 0x641;
inline constexpr std::uint32_t kPlatformEnergy = 0x64d;
inline constexpr std::uint32_t kTscDeadline = 0x6e0;
inline constexpr std::uint32_t kAmdDecodeConfig = 0xc0011029;
inline constexpr std::uint32_t kX2apicFirst = 0x800;
inline constexpr std::uint32_t kX2apicLast = 0x8ff;
}  // namespace msr

}  // namespace wisp::soft
