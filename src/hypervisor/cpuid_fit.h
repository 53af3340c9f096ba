// Whether a guest that was saved elsewhere can go on here.
#pragma once

#include <cstddef>
#include <span>

#include "base/error.h"
#include "hypervisor/cpu_state.h"

namespace wisp {

// The longest CPUID list that is taken (KVM_MAX_CPUID_ENTRIES).
inline constexpr std::size_t kMaxCpuidEntries = 256;

// Whether a guest that saw `saved` can go on where `host` is what a new guest would see: every feature bit,
// every state component with its place and size in the XSAVE area, and the address widths must be there. The
// error names the first that is missing.
[[nodiscard]] Result<void> check_cpuid_fits(std::span<const CpuidEntry> saved,
                                            std::span<const CpuidEntry> host);

}  // namespace wisp
