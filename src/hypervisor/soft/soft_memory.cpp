#include "hypervisor/soft/soft_memory.h"

#include <fcntl.h>

#include <algorithm>
#include <bit>
#include <cerrno>

namespace wisp::soft {

Result<void> MemoryListener::check_memory(const FlatRange& range) const {
  const auto host = reinterpret_cast<std::uintptr_t>(range.host);
  if (((range.start ^ host) & kPageOffset) != 0) {
    return fail(
        "{}: memory at guest address {:#x} lies at host address {:#x}, which is not the same place in a page",
        range.name, range.start, host);
  }
  for (const auto& [start, known] : known_) {
    if (known.range.kind != RegionKind::kIo &&
        (range.start - start < known.range.size || start - range.start < range.size)) {
      return fail("{}: {} bytes of memory at {:#x} overlap {}", range.name, range.size, range.start,
                  known.range.name);
    }
  }
  return {};
}

Result<MemoryListener::Known> MemoryListener::with_own_bells(const FlatRange& range) {
  Known known{.range = range, .bells = {}};
  for (IoEvent& event : known.range.events) {
    const bool good_size = event.size <= 8 && (event.size == 0 || std::has_single_bit(event.size));
    if (!good_size || (event.size == 0 && event.value)) {
      return fail("{}: a doorbell of {} bytes{} cannot be", range.name, event.size,
                  event.value ? " with a value" : "");
    }
    const auto same = std::ranges::count_if(range.events, [&event](const IoEvent& other) {
      return other.offset == event.offset && other.size == event.size && other.value == event.value;
    });
    if (same > 1) {
      return fail("{}: two doorbells at {:#x} for the same writes", range.name, range.start + event.offset);
    }
    UniqueFd own(::fcntl(event.fd, F_DUPFD_CLOEXEC, 0));
    if (!own.valid()) {
      return fail_errno(errno, "{}: cannot keep the doorbell's descriptor", range.name);
    }
    event.fd = own.get();
    known.bells.push_back(std::move(own));
  }
  return known;
}

Result<void> MemoryListener::range_added(const FlatRange& range) {
  Known known{.range = range, .bells = {}};
  if (range.kind == RegionKind::kIo) {
    WISP_ASSIGN(known, with_own_bells(range));
  } else {
    WISP_TRY(check_memory(range));
  }
  WISP_TRY(memory_.range_added(known.range));
  WISP_ASSERT(known_.try_emplace(range.start, std::move(known)).second);
  return {};
}

bool MemoryListener::is_ram(Gpa gpa) const {
  return std::ranges::any_of(known_, [gpa](const auto& entry) {
    const FlatRange& range = entry.second.range;
    return range.kind == RegionKind::kRam && ((range.start + kPageOffset) & ~kPageOffset) == gpa;
  });
}

void MemoryListener::range_removed(const FlatRange& range) {
  // When it is back no processor rings these bells any more.
  memory_.range_removed(range);
  known_.erase(range.start);
}

}  // namespace wisp::soft
