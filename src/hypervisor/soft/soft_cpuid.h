// The processor that the software CPU is, as CPUID and IA32_ARCH_CAPABILITIES tell it (SDM volume 2, CPUID;
// volume 4): one named model, whatever the host, so that a guest moves between hosts. Only AVX and what comes
// with it depends on the host, since such instructions are run by it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "hypervisor/cpu_state.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/soft/host_features.h"

namespace wisp::soft {

struct SoftCpuidInput {
  CpuTopology topology = {};
  std::uint32_t index = 0;    // of the vCPU
  std::uint32_t tsc_khz = 0;  // not 0
  HostFeatures host = {};
  // Bits 6 and 13 of leaf 7 EBX, how the x87 unit reports: a property of the host, not a choice.
  std::uint32_t x87_bits = 0;
};

[[nodiscard]] std::uint32_t host_x87_bits();

// The answers for one vCPU, with XCR0, CR4.OSXSAVE and the like as after power-up: see cpuid_answer().
[[nodiscard]] std::vector<CpuidEntry> soft_cpuid(const SoftCpuidInput& input);

// What CPUID gives to code that runs now: the entry, or what Intel's processors give where there is none,
// with what follows from control registers.
[[nodiscard]] CpuidEntry cpuid_answer(std::span<const CpuidEntry> entries, std::uint32_t leaf,
                                      std::uint32_t subleaf, std::uint64_t cr4, std::uint64_t xcr0);

// Components of XCR0 that `entries` allow.
[[nodiscard]] std::uint64_t allowed_xcr0(std::span<const CpuidEntry> entries);

// Bits of a physical address.
inline constexpr std::uint32_t kPhysicalBits = 46;

// Says no to every leak that kernels guard against by flushes and separate page tables: the host's processor
// never walks the guest's page tables, so nothing of that would help here, and all of it costs much.
inline constexpr std::uint64_t kSoftArchCapabilities = (1ULL << 0) |   // RDCL_NO
                                                       (1ULL << 1) |   // IBRS_ALL
                                                       (1ULL << 3) |   // SKIP_L1DFL_VMENTRY
                                                       (1ULL << 4) |   // SSB_NO
                                                       (1ULL << 5) |   // MDS_NO
                                                       (1ULL << 6) |   // IF_PSCHANGE_MC_NO
                                                       (1ULL << 8) |   // TAA_NO
                                                       (1ULL << 13) |  // SBDR_SSDP_NO
                                                       (1ULL << 14) |  // FBSDP_NO
                                                       (1ULL << 15) |  // PSDP_NO
                                                       (1ULL << 20) |  // BHI_NO
                                                       (1ULL << 24) |  // PBRSB_NO
                                                       (1ULL << 26) |  // GDS_NO
                                                       (1ULL << 27) |  // RFDS_NO
                                                       (1ULL << 62);   // ITS_NO

}  // namespace wisp::soft
