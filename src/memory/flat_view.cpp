#include <algorithm>

#include "memory/address_space.h"
#include "memory/flat_view_builder.h"

namespace wisp {

const FlatRange* FlatView::find(Gpa address) const {
  const auto next = std::ranges::upper_bound(ranges_, address, {}, &FlatRange::start);
  if (next == ranges_.begin()) {
    return nullptr;
  }
  const FlatRange& range = *(next - 1);
  return address - range.start < range.size ? &range : nullptr;
}

Result<FlatView> FlatViewBuilder::build(const MemoryRegion& root, WideAddress size) {
  WISP_TRY(check(root));
  FlatViewBuilder builder;
  for (const MemoryRegion::Child& child : root.children_) {
    WISP_TRY(builder.render(*child.region, child.offset, 0, size, 1));
  }
  builder.join_neighbours();
  std::vector<FlatRange> ranges;
  ranges.reserve(builder.pieces_.size());
  for (const Piece& piece : builder.pieces_) {
    ranges.push_back(to_range(piece));
  }
  return FlatView(std::move(ranges));
}

Result<void> FlatViewBuilder::check(const MemoryRegion& region) {
  Marks marks;
  return check_below(region, marks, 0);
}

Result<void> FlatViewBuilder::check_below(const MemoryRegion& region, Marks& marks, std::size_t depth) {
  if (depth > kMaxDepth) {
    return fail("region {} is nested more than {} levels deep", region.name_, kMaxDepth);
  }
  const auto [place, fresh] = marks.try_emplace(&region, Mark::kBeingVisited);
  if (!fresh) {
    if (place->second == Mark::kBeingVisited) {
      return fail("region {} would contain itself through an alias", region.name_);
    }
    return {};
  }
  if (region.kind_ == RegionKind::kAlias) {
    const std::uint64_t target_size = region.target_->size_;
    if (region.size_ > target_size || region.target_offset_ > target_size - region.size_) {
      return fail("alias {} shows {:#x} bytes at {:#x} of region {}, which has {:#x}", region.name_,
                  region.size_, region.target_offset_, region.target_->name_, target_size);
    }
    WISP_TRY(check_below(*region.target_, marks, depth + 1));
  }
  for (const MemoryRegion::Child& child : region.children_) {
    WISP_TRY(check_below(*child.region, marks, depth + 1));
  }
  marks[&region] = Mark::kDone;
  return {};
}

Result<void> FlatViewBuilder::render(const MemoryRegion& region, WideAddress base, WideAddress start,
                                     WideAddress end, std::size_t depth) {
  // The depth of one path through aliases can be more than check() saw, which walks each region once.
  if (++visits_ > kMaxVisits || depth > kMaxDepth) {
    return fail("region {} is shown through too many aliases", region.name_);
  }
  start = std::max(start, base);
  end = std::min(end, base + static_cast<WideAddress>(region.size_));
  if (start >= end) {
    return {};
  }
  switch (region.kind_) {
    case RegionKind::kContainer:
      for (const MemoryRegion::Child& child : region.children_) {
        WISP_TRY(render(*child.region, base + static_cast<WideAddress>(child.offset), start, end, depth + 1));
      }
      return {};
    case RegionKind::kAlias:
      return render(*region.target_, base - static_cast<WideAddress>(region.target_offset_), start, end,
                    depth + 1);
    case RegionKind::kRam:
    case RegionKind::kRom:
    case RegionKind::kIo:
      return fill_gaps(region, base, start, end);
  }
  return {};
}

Result<void> FlatViewBuilder::fill_gaps(const MemoryRegion& region, WideAddress base, WideAddress start,
                                        WideAddress end) {
  const auto piece = [&](WideAddress from, WideAddress to) {
    return Piece{from, to, &region, static_cast<std::uint64_t>(from - base)};
  };
  auto next = std::ranges::upper_bound(pieces_, start, {}, &Piece::end);
  while (start < end) {
    const WideAddress gap_end = next == pieces_.end() ? end : std::min(end, next->start);
    if (start < gap_end) {
      if (pieces_.size() >= kMaxRanges) {
        return fail("region {} would give more than {} ranges", region.name_, kMaxRanges);
      }
      next = pieces_.insert(next, piece(start, gap_end)) + 1;
    }
    if (next == pieces_.end()) {
      break;
    }
    start = std::max(start, next->end);
    ++next;
  }
  return {};
}

void FlatViewBuilder::join_neighbours() {
  std::vector<Piece> joined;
  joined.reserve(pieces_.size());
  for (const Piece& piece : pieces_) {
    if (!joined.empty()) {
      Piece& last = joined.back();
      const WideAddress last_size = last.end - last.start;
      const WideAddress whole = piece.end - last.start;
      if (last.region == piece.region && last.end == piece.start &&
          static_cast<WideAddress>(last.region_offset) + last_size ==
              static_cast<WideAddress>(piece.region_offset) &&
          whole <= static_cast<WideAddress>(UINT64_MAX)) {
        last.end = piece.end;
        continue;
      }
    }
    joined.push_back(piece);
  }
  pieces_ = std::move(joined);
}

FlatRange FlatViewBuilder::to_range(const Piece& piece) {
  const MemoryRegion& region = *piece.region;
  FlatRange range;
  range.start = static_cast<Gpa>(piece.start);
  range.size = static_cast<std::uint64_t>(piece.end - piece.start);
  range.kind = region.kind_;
  range.host = region.host_ == nullptr ? nullptr : region.host_ + piece.region_offset;
  range.handler = region.handler_;
  range.region_offset = piece.region_offset;
  range.name = region.name_;
  for (IoEvent event : region.events_) {
    const std::uint64_t needed = std::max<std::uint32_t>(event.size, 1);
    if (event.offset >= piece.region_offset && event.offset - piece.region_offset < range.size &&
        needed <= range.size - (event.offset - piece.region_offset)) {
      event.offset -= piece.region_offset;
      range.events.push_back(event);
    }
  }
  return range;
}

}  // namespace wisp
