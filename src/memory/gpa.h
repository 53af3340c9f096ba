// Guest physical addresses.
#pragma once

#include <cstdint>

namespace wisp {

// A guest physical address: hostile input until GuestMemory has checked it.
using Gpa = std::uint64_t;

inline constexpr std::uint64_t kPageSize = 4096;

}  // namespace wisp
