// Which memory accesses of a block can share one look-up of the in-line TLB: those off the same base register
// that lie close together. The first of them looks up all that they span; where that lies in one page, the
// others need only what it found.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "hypervisor/soft/insn.h"

namespace wisp::soft {

inline constexpr std::size_t kMaxBlockInstructions = 64;

struct PlannedAccess {
  enum class Kind : std::uint8_t {
    kAlone,   // looks up for itself
    kFirst,   // looks up for its group, and keeps the result in `slot`
    kShared,  // finds the result in `slot`; 0 there: looks up for itself
  };
  Kind kind = Kind::kAlone;
  std::uint8_t slot = 0;
  bool write = false;        // kFirst: whether one of the group writes
  std::uint16_t before = 0;  // kFirst: how many bytes before this access the group starts
  std::uint16_t length = 0;  // kFirst: of the group
};
using AccessPlan = std::array<PlannedAccess, kMaxBlockInstructions>;

// How many groups can be under way at once.
inline constexpr std::size_t kAccessSlots = 4;

// `block` are the instructions of a block in their order, at most kMaxBlockInstructions.
void plan_accesses(std::span<const Insn> block, AccessPlan& plan);

}  // namespace wisp::soft
