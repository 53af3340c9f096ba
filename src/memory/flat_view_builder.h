// Renders a tree of regions to the flat view that look-ups use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "memory/address_space.h"

namespace wisp {

// Wide enough for any sum of two addresses, and for the start of a region that an alias shows from its
// middle.
__extension__ using WideAddress = __int128;

class FlatViewBuilder final {
 public:
  // The view of [0, size) of the tree under `root`; `size` is at most 2^64. Errors: loops of aliases, aliases
  // beyond their target, trees whose view would have more than kMaxRanges ranges or take more than kMaxVisits
  // visits of regions (aliases of aliases can double with each level).
  [[nodiscard]] static Result<FlatView> build(const MemoryRegion& root, WideAddress size);
  // The checks of build() for a region and all below it, for parts that are not under the root yet.
  [[nodiscard]] static Result<void> check(const MemoryRegion& region);

  static constexpr std::size_t kMaxRanges = 1U << 16;
  static constexpr std::size_t kMaxVisits = 1U << 16;
  static constexpr std::size_t kMaxDepth = 64;

 private:
  // A piece of one region: [start, end) of the space shows the region from `region_offset` on.
  struct Piece {
    WideAddress start = 0;
    WideAddress end = 0;
    const MemoryRegion* region = nullptr;
    std::uint64_t region_offset = 0;
  };
  enum class Mark : std::uint8_t { kBeingVisited, kDone };
  using Marks = std::unordered_map<const MemoryRegion*, Mark>;

  [[nodiscard]] static Result<void> check_below(const MemoryRegion& region, Marks& marks, std::size_t depth);
  // Shows [start, end) of `region`, whose offset 0 lies at `base`, wherever nothing is shown yet.
  [[nodiscard]] Result<void> render(const MemoryRegion& region, WideAddress base, WideAddress start,
                                    WideAddress end, std::size_t depth);
  [[nodiscard]] Result<void> fill_gaps(const MemoryRegion& region, WideAddress base, WideAddress start,
                                       WideAddress end);
  void join_neighbours();
  [[nodiscard]] static FlatRange to_range(const Piece& piece);

  std::vector<Piece> pieces_;  // sorted, without overlaps
  std::size_t visits_ = 0;
};

}  // namespace wisp
