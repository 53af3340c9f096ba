#include "memory/address_space.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "base/bytes.h"
#include "base/unique_fd.h"
#include "memory/flat_view_builder.h"
#include "memory/guest_copy.h"

namespace wisp {

MemoryRegion::MemoryRegion(std::string name, RegionKind kind, std::uint64_t size)
    : name_(std::move(name)), kind_(kind), size_(size) {}

MemoryRegion::~MemoryRegion() {
  for (const Child& child : children_) {
    child.region->parent_ = nullptr;
  }
}

MemoryRegionPtr MemoryRegion::container(std::string name, std::uint64_t size) {
  return MemoryRegionPtr(new MemoryRegion(std::move(name), RegionKind::kContainer, size));
}

MemoryRegionPtr MemoryRegion::ram(std::string name, std::uint8_t* host, std::uint64_t size) {
  WISP_ASSERT(host != nullptr);
  MemoryRegionPtr region(new MemoryRegion(std::move(name), RegionKind::kRam, size));
  region->host_ = host;
  return region;
}

MemoryRegionPtr MemoryRegion::rom(std::string name, std::uint8_t* host, std::uint64_t size) {
  WISP_ASSERT(host != nullptr);
  MemoryRegionPtr region(new MemoryRegion(std::move(name), RegionKind::kRom, size));
  region->host_ = host;
  return region;
}

MemoryRegionPtr MemoryRegion::io(std::string name, std::shared_ptr<IoHandler> handler, std::uint64_t size,
                                 std::vector<IoEvent> events) {
  WISP_ASSERT(handler != nullptr);
  MemoryRegionPtr region(new MemoryRegion(std::move(name), RegionKind::kIo, size));
  region->handler_ = std::move(handler);
  region->events_ = std::move(events);
  return region;
}

MemoryRegionPtr MemoryRegion::alias(std::string name, MemoryRegionPtr target, std::uint64_t target_offset,
                                    std::uint64_t size) {
  WISP_ASSERT(target != nullptr);
  MemoryRegionPtr region(new MemoryRegion(std::move(name), RegionKind::kAlias, size));
  region->target_ = std::move(target);
  region->target_offset_ = target_offset;
  return region;
}

// What a reader is looking at; on a cache line of its own.
struct alignas(64) AddressSpace::Reader::Slot {
  std::atomic<const FlatView*> held = nullptr;
};

struct AddressSpace::Impl {
  std::string name;
  WideAddress size = 0;
  MemoryRegionPtr root;
  // The published view; never null.
  std::atomic<const FlatView*> view = nullptr;

  mutable std::mutex mutex;  // guards what follows, and the tree
  std::unique_ptr<const FlatView> current;
  std::vector<std::unique_ptr<const FlatView>> retired;
  std::vector<AddressSpaceListener*> listeners;
  std::vector<std::unique_ptr<Reader::Slot>> slots;

  void publish(FlatView next) {
    auto fresh = std::make_unique<const FlatView>(std::move(next));
    view.store(fresh.get(), std::memory_order_seq_cst);
    if (current != nullptr) {
      retired.push_back(std::move(current));
    }
    current = std::move(fresh);
  }

  // The retired views that no reader holds: to be destroyed without the lock, as handlers may go with them.
  [[nodiscard]] std::vector<std::unique_ptr<const FlatView>> take_unheld() {
    const auto held = [&](const std::unique_ptr<const FlatView>& candidate) {
      return std::ranges::any_of(slots, [&](const std::unique_ptr<Reader::Slot>& slot) {
        return slot->held.load(std::memory_order_seq_cst) == candidate.get();
      });
    };
    const auto unheld = std::partition(retired.begin(), retired.end(), held);
    std::vector<std::unique_ptr<const FlatView>> taken(std::make_move_iterator(unheld),
                                                       std::make_move_iterator(retired.end()));
    retired.erase(unheld, retired.end());
    return taken;
  }

  [[nodiscard]] Result<void> tell_listeners(const FlatView& before, const FlatView& after);
};

namespace {

// Ranges of `one` that are not in `other`, for two sorted views.
std::vector<const FlatRange*> ranges_missing(const FlatView& one, const FlatView& other) {
  std::vector<const FlatRange*> missing;
  auto candidate = other.ranges().begin();
  for (const FlatRange& range : one.ranges()) {
    while (candidate != other.ranges().end() && candidate->start < range.start) {
      ++candidate;
    }
    if (candidate == other.ranges().end() || !(*candidate == range)) {
      missing.push_back(&range);
    }
  }
  return missing;
}

}  // namespace

Result<void> AddressSpace::Impl::tell_listeners(const FlatView& before, const FlatView& after) {
  const std::vector<const FlatRange*> removed = ranges_missing(before, after);
  const std::vector<const FlatRange*> added = ranges_missing(after, before);
  for (AddressSpaceListener* listener : listeners) {
    for (const FlatRange* range : removed) {
      listener->range_removed(*range);
    }
  }
  for (std::size_t at = 0; at < listeners.size(); ++at) {
    for (std::size_t done = 0; done < added.size(); ++done) {
      auto told = listeners[at]->range_added(*added[done]);
      if (told.has_value()) {
        continue;
      }
      std::string message = fmt::format("{}: region {} at {:#x}: {}", name, added[done]->name,
                                        added[done]->start, told.error().message);
      // Back to what it was, the last first.
      for (std::size_t listener = at + 1; listener-- > 0;) {
        const std::size_t count = listener == at ? done : added.size();
        for (std::size_t i = count; i-- > 0;) {
          listeners[listener]->range_removed(*added[i]);
        }
      }
      for (AddressSpaceListener* listener : listeners) {
        for (const FlatRange* range : removed) {
          if (const auto back = listener->range_added(*range); !back.has_value()) {
            message += fmt::format("; putting back region {} at {:#x} failed too: {}", range->name,
                                   range->start, back.error().message);
          }
        }
      }
      return std::unexpected(Error{std::move(message)});
    }
  }
  return {};
}

AddressSpace::AddressSpace(std::string name, std::uint64_t size) : impl_(std::make_unique<Impl>()) {
  impl_->root = MemoryRegion::container(name, size);
  impl_->root->root_of_ = this;
  impl_->name = std::move(name);
  impl_->size = size == 0 ? static_cast<WideAddress>(UINT64_MAX) + 1 : static_cast<WideAddress>(size);
  impl_->publish(FlatView());
}

AddressSpace::~AddressSpace() {
  WISP_ASSERT(impl_->slots.empty());
}

// Children lists and parents as they were before a commit.
struct AddressSpace::Undo {
  struct List {
    MemoryRegion* parent = nullptr;
    std::vector<MemoryRegion::Child> children;
  };
  struct Parent {
    MemoryRegionPtr region;
    MemoryRegion* parent = nullptr;
  };
  std::vector<List> lists;
  std::vector<Parent> parents;

  void keep_list(MemoryRegion& parent) {
    if (std::ranges::find(lists, &parent, &List::parent) == lists.end()) {
      lists.push_back({&parent, parent.children_});
    }
  }
};

void AddressSpace::roll_back(Undo& undo) {
  for (auto& list : undo.lists) {
    list.parent->children_ = std::move(list.children);
  }
  for (auto kept = undo.parents.rbegin(); kept != undo.parents.rend(); ++kept) {
    kept->region->parent_ = kept->parent;
  }
}

// Whether the region hangs in the tree of another address space.
bool AddressSpace::foreign(const MemoryRegion& region) const {
  const MemoryRegion* top = &region;
  while (top->parent_ != nullptr) {
    top = top->parent_;
  }
  return top->root_of_ != nullptr && top->root_of_ != this;
}

Result<void> AddressSpace::apply(const Change& change, Undo& undo) {
  WISP_ASSERT(change.region != nullptr);
  return change.add ? apply_addition(change, undo) : apply_removal(change, undo);
}

Result<void> AddressSpace::apply_addition(const Change& change, Undo& undo) {
  MemoryRegion& region = *change.region;
  MemoryRegion& parent = change.parent == nullptr ? *impl_->root : *change.parent;
  if (region.parent_ != nullptr || region.root_of_ != nullptr) {
    return fail("{}: region {} is in use already", impl_->name, region.name_);
  }
  if (parent.kind_ != RegionKind::kContainer || foreign(parent)) {
    return fail("{}: region {} cannot be put into {}, which is no container of this address space",
                impl_->name, region.name_, parent.name_);
  }
  for (const MemoryRegion* above = &parent; above != nullptr; above = above->parent_) {
    if (above == &region) {
      return fail("{}: region {} cannot be put into itself", impl_->name, region.name_);
    }
  }
  const WideAddress parent_size =
      &parent == impl_->root.get() ? impl_->size : static_cast<WideAddress>(parent.size_);
  const WideAddress end = static_cast<WideAddress>(change.offset) + static_cast<WideAddress>(region.size_);
  if (region.size_ == 0 || end > parent_size) {
    return fail("{}: region {} of {:#x} bytes at {:#x} does not fit into {}", impl_->name, region.name_,
                region.size_, change.offset, parent.name_);
  }
  undo.keep_list(parent);
  undo.parents.push_back({change.region, nullptr});
  // Before all of the same priority: the one added later wins.
  const auto place = std::ranges::find_if(
      parent.children_, [&](const MemoryRegion::Child& child) { return child.priority <= change.priority; });
  parent.children_.insert(place, {change.region, change.offset, change.priority});
  region.parent_ = &parent;
  return {};
}

Result<void> AddressSpace::apply_removal(const Change& change, Undo& undo) {
  MemoryRegion& region = *change.region;
  MemoryRegion* parent = region.parent_;
  if (parent == nullptr || foreign(region) || (change.parent != nullptr && change.parent.get() != parent)) {
    return fail("{}: region {} is not there to be removed", impl_->name, region.name_);
  }
  undo.keep_list(*parent);
  undo.parents.push_back({change.region, parent});
  std::erase_if(parent->children_,
                [&](const MemoryRegion::Child& child) { return child.region == change.region; });
  region.parent_ = nullptr;
  return {};
}

Result<void> AddressSpace::commit(std::span<const Change> changes) {
  // What goes with the old view and tree is destroyed after the lock is given back.
  std::vector<std::unique_ptr<const FlatView>> garbage;
  Undo undo;
  const std::lock_guard lock(impl_->mutex);
  const auto attempt = [&]() -> Result<void> {
    for (const Change& change : changes) {
      WISP_TRY(apply(change, undo));
      WISP_TRY(FlatViewBuilder::check(*change.region));
    }
    WISP_ASSIGN(FlatView next, FlatViewBuilder::build(*impl_->root, impl_->size));
    WISP_TRY(impl_->tell_listeners(*impl_->current, next));
    impl_->publish(std::move(next));
    return {};
  };
  auto result = attempt();
  if (!result.has_value()) {
    roll_back(undo);
    return result;
  }
  garbage = impl_->take_unheld();
  return {};
}

Result<void> AddressSpace::add(MemoryRegionPtr region, std::uint64_t offset, int priority) {
  const Change change{.region = std::move(region), .offset = offset, .priority = priority};
  return commit(std::span(&change, 1));
}

Result<void> AddressSpace::remove(const MemoryRegionPtr& region) {
  const Change change{.region = region, .add = false};
  return commit(std::span(&change, 1));
}

bool AddressSpace::quiescent() {
  std::vector<std::unique_ptr<const FlatView>> garbage;
  const std::lock_guard lock(impl_->mutex);
  garbage = impl_->take_unheld();
  return impl_->retired.empty();
}

Result<void> AddressSpace::add_listener(AddressSpaceListener* listener) {
  const std::lock_guard lock(impl_->mutex);
  const auto ranges = impl_->current->ranges();
  for (std::size_t done = 0; done < ranges.size(); ++done) {
    const auto told = listener->range_added(ranges[done]);
    if (!told.has_value()) {
      for (std::size_t i = done; i-- > 0;) {
        listener->range_removed(ranges[i]);
      }
      return fail("{}: region {} at {:#x}: {}", impl_->name, ranges[done].name, ranges[done].start,
                  told.error().message);
    }
  }
  impl_->listeners.push_back(listener);
  return {};
}

void AddressSpace::remove_listener(AddressSpaceListener* listener) {
  const std::lock_guard lock(impl_->mutex);
  std::erase(impl_->listeners, listener);
}

FlatView AddressSpace::snapshot() const {
  const std::lock_guard lock(impl_->mutex);
  return *impl_->current;
}

AddressSpace::Reader::Reader(AddressSpace& space) : space_(space) {
  auto slot = std::make_unique<Slot>();
  slot_ = slot.get();
  const std::lock_guard lock(space_.impl_->mutex);
  space_.impl_->slots.push_back(std::move(slot));
}

AddressSpace::Reader::~Reader() {
  const std::lock_guard lock(space_.impl_->mutex);
  std::erase_if(space_.impl_->slots, [&](const std::unique_ptr<Slot>& slot) { return slot.get() == slot_; });
}

// Keeps the published view from being freed while it lives (a hazard pointer).
class AddressSpace::Reader::Hold final {
 public:
  explicit Hold(Reader& reader) : slot_(*reader.slot_), outer_(slot_.held.load(std::memory_order_relaxed)) {
    if (outer_ != nullptr) {
      view_ = outer_;
      return;
    }
    const std::atomic<const FlatView*>& published = reader.space_.impl_->view;
    view_ = published.load(std::memory_order_seq_cst);
    for (;;) {
      slot_.held.store(view_, std::memory_order_seq_cst);
      // Where it is still the published one, its retirement comes after the store above, and so does the look
      // at the slots that precedes its end.
      const FlatView* now = published.load(std::memory_order_seq_cst);
      if (now == view_) {
        return;
      }
      view_ = now;
    }
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  ~Hold() { slot_.held.store(outer_, std::memory_order_release); }

  [[nodiscard]] const FlatView& view() const { return *view_; }

 private:
  Slot& slot_;
  const FlatView* const outer_;
  const FlatView* view_ = nullptr;
};

namespace {

constexpr std::size_t kMaxHandlerAccess = 8;

// Calls `each(range, offset in the access, length, offset in the range)` for the pieces of [address, address
// + size), with a null range where nobody answers.
template <typename Each>
void for_each_piece(const FlatView& view, Gpa address, std::size_t size, const Each& each) {
  const std::span<const FlatRange> ranges = view.ranges();
  auto next = std::ranges::upper_bound(ranges, address, {}, &FlatRange::start);
  // The range before may reach into the access.
  if (next != ranges.begin() && address - (next - 1)->start < (next - 1)->size) {
    --next;
  }
  std::size_t done = 0;
  while (done < size) {
    const std::size_t left = size - done;
    if (done > UINT64_MAX - address) {
      each(nullptr, done, left, std::uint64_t{0});  // beyond 2^64
      return;
    }
    const Gpa at = address + done;
    if (next == ranges.end()) {
      each(nullptr, done, left, std::uint64_t{0});
      return;
    }
    if (at < next->start) {
      const std::size_t gap = std::min<std::uint64_t>(left, next->start - at);
      each(nullptr, done, gap, std::uint64_t{0});
      done += gap;
      continue;
    }
    const std::uint64_t offset = at - next->start;
    const std::size_t count = std::min<std::uint64_t>(left, next->size - offset);
    each(&*next, done, count, offset);
    done += count;
    ++next;
  }
}

bool signal_matching_event(const FlatRange& range, std::uint64_t offset, std::span<const std::uint8_t> data) {
  for (const IoEvent& event : range.events) {
    if (event.offset != offset) {
      continue;
    }
    if (event.size == 0 ||
        (event.size == data.size() && (!event.value.has_value() || *event.value == bytes_to_u64(data)))) {
      signal_eventfd(event.fd);
      return true;
    }
  }
  return false;
}

}  // namespace

void AddressSpace::Reader::read(Gpa address, std::span<std::uint8_t> data) {
  const Hold hold(*this);
  for_each_piece(hold.view(), address, data.size(),
                 [&](const FlatRange* range, std::size_t at, std::size_t count, std::uint64_t offset) {
                   std::span<std::uint8_t> part = data.subspan(at, count);
                   if (range == nullptr) {
                     std::ranges::fill(part, std::uint8_t{0xff});
                     return;
                   }
                   if (range->kind != RegionKind::kIo) {
                     copy_from_guest(part.data(), range->host + offset, count);
                     return;
                   }
                   while (!part.empty()) {
                     const std::size_t step = std::min(part.size(), kMaxHandlerAccess);
                     range->handler->io_read(range->region_offset + offset, part.first(step));
                     part = part.subspan(step);
                     offset += step;
                   }
                 });
}

void AddressSpace::Reader::write(Gpa address, std::span<const std::uint8_t> data) {
  const Hold hold(*this);
  for_each_piece(hold.view(), address, data.size(),
                 [&](const FlatRange* range, std::size_t at, std::size_t count, std::uint64_t offset) {
                   std::span<const std::uint8_t> part = data.subspan(at, count);
                   if (range == nullptr || range->kind == RegionKind::kRom) {
                     return;
                   }
                   if (range->kind == RegionKind::kRam) {
                     copy_to_guest(range->host + offset, part.data(), count);
                     return;
                   }
                   while (!part.empty()) {
                     const std::size_t step = std::min(part.size(), kMaxHandlerAccess);
                     if (!signal_matching_event(*range, offset, part.first(step))) {
                       range->handler->io_write(range->region_offset + offset, part.first(step));
                     }
                     part = part.subspan(step);
                     offset += step;
                   }
                 });
}

}  // namespace wisp
