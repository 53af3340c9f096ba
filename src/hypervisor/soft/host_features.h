// What this host's processor can do, for code that runs guest instructions on it.
#pragma once

#include <cstdint>

#include "hypervisor/soft/insn.h"

namespace wisp::soft {

struct HostFeatures {
  std::uint64_t xcr0 = 3;
  std::uint32_t present = 0;  // a bit for each Feature
  bool x86_64_v2 = false;     // what the engine needs at the least
  bool quick_loop = false;  // LOOP is as quick as other jumps: AMD's processors; Intel's take 7 steps for it
  [[nodiscard]] bool has(Feature feature) const {
    return (present >> static_cast<unsigned>(feature) & 1U) != 0;
  }
};
// Asked of the processor once.
[[nodiscard]] const HostFeatures& host_features();

}  // namespace wisp::soft
