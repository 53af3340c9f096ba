#include "hypervisor/soft/physical_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace wisp::soft {
namespace {

// Writes to a page with code before the code is forgotten: each costs a tenth of a microsecond, translating
// the page again some ten.
constexpr std::uint32_t kPatience = 256;

// Zeroed, and without host memory until it is touched.
Result<std::shared_ptr<PageInfo[]>> make_page_infos(
    std::uint64_t pages) {  // NOLINT(modernize-avoid-c-arrays)
  const std::size_t bytes = pages * sizeof(PageInfo);
  void* memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return fail_errno(errno, "cannot map {} bytes to note which pages of guest RAM hold code", bytes);
  }
  return std::shared_ptr<PageInfo[]>(  // NOLINT(modernize-avoid-c-arrays)
      static_cast<PageInfo*>(memory), [bytes](PageInfo* infos) { ::munmap(infos, bytes); });
}

// The write first, then the question who watches: whoever sets a bit and then reads the bytes either is seen
// here or reads what was written.
std::uint64_t lines_after_write(PageInfo& info) {
#if defined(__SANITIZE_THREAD__)
  return info.code_lines.fetch_or(0, std::memory_order_seq_cst);  // ThreadSanitizer knows no fences
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return info.code_lines.load(std::memory_order_seq_cst);
#endif
}

}  // namespace

PhysicalMemory::PhysicalMemory() {
  tables_.push_back(std::make_unique<Table>());
  table_ = tables_.back().get();
}
PhysicalMemory::~PhysicalMemory() = default;

PhysicalPage PhysicalMemory::find(std::uint64_t gpa) const {
  for (const Range& range : table_.load(std::memory_order_acquire)->ranges) {
    const std::uint64_t offset = gpa - range.gpa;
    if (offset < range.size) {
      const std::uint64_t page = offset / kPageSize;
      return {.host = range.host + page * kPageSize,
              .writable = range.writable,
              .info = range.info ? range.info.get() + page : nullptr};
    }
  }
  return {};
}

void PhysicalMemory::written(const PhysicalPage& page, std::uint64_t gpa, std::uint32_t size) {
  PageInfo& info = *page.info;
  if (dirty_log()) {
    info.dirty.store(1, std::memory_order_relaxed);
  }
  const std::uint64_t lines = lines_after_write(info);
  if (lines == 0) {
    return;
  }
  const std::uint64_t first = (gpa & kPageOffset) / 64;
  const std::uint64_t last = std::min<std::uint64_t>(((gpa & kPageOffset) + size - 1) / 64, 63);
  const std::uint64_t touched = (~0ULL >> (63 - last)) & (~0ULL << first);
  if ((lines & touched) != 0) {
    info.version.fetch_add(1, std::memory_order_acq_rel);
    if (watcher_ != nullptr) {
      watcher_->code_written(gpa, size);
    }
  }
  if (info.writes.fetch_add(1, std::memory_order_relaxed) >= kPatience) {
    forget_code(info, gpa);
  }
}

// A page that is written time and again is data by now, or code that is data first: nobody watches it any
// more. The version changes before and after: whoever keeps instructions read it before the lines were set.
void PhysicalMemory::forget_code(PageInfo& info, std::uint64_t gpa) {
  info.writes.store(0, std::memory_order_relaxed);
  info.version.fetch_add(1, std::memory_order_acq_rel);
  if (watcher_ != nullptr) {
    watcher_->forget_code(info, gpa & ~kPageOffset);
  } else {
    info.code_lines.store(0, std::memory_order_seq_cst);
  }
  info.version.fetch_add(1, std::memory_order_acq_rel);
}

void PhysicalMemory::host_wrote(std::uint64_t gpa, std::uint64_t size) {
  while (size != 0) {
    const std::uint64_t part = std::min<std::uint64_t>(size, kPageSize - (gpa & kPageOffset));
    if (const PhysicalPage page = find(gpa); page && page.info != nullptr) {
      written(page, gpa, static_cast<std::uint32_t>(part));
    }
    size -= part;
    if (part > UINT64_MAX - gpa) {
      return;
    }
    gpa += part;
  }
}

void PhysicalMemory::set_dirty_log(bool on) {
  if (on && !dirty_log()) {
    for (const Range& range : table_.load(std::memory_order_acquire)->ranges) {
      for (std::uint64_t page = 0; range.info && page < range.size / kPageSize; ++page) {
        if (range.info.get()[page].dirty.load(std::memory_order_relaxed) != 0) {
          range.info.get()[page].dirty.store(0, std::memory_order_relaxed);
        }
      }
    }
  }
  dirty_log_.store(on, std::memory_order_seq_cst);
  if (changed_) {
    changed_();
  }
}

Result<std::vector<std::uint64_t>> PhysicalMemory::take_dirty_log(std::uint64_t gpa) {
  for (const Range& range : table_.load(std::memory_order_acquire)->ranges) {
    if (range.gpa != gpa || !range.writable) {
      continue;
    }
    const std::uint64_t pages = range.size / kPageSize;
    std::vector<std::uint64_t> bits((pages + 63) / 64);
    for (std::uint64_t page = 0; page < pages; ++page) {
      std::atomic<std::uint32_t>& dirty = range.info.get()[page].dirty;
      if (dirty.load(std::memory_order_relaxed) != 0 && dirty.exchange(0, std::memory_order_seq_cst) != 0) {
        bits[page / 64] |= 1ULL << (page % 64);
      }
    }
    // A write that still goes through an in-line entry belongs to a page that is in `bits`, and comes before
    // this returns.
    if (changed_) {
      changed_();
    }
    return bits;
  }
  return fail("no RAM starts at guest address {:#x}", gpa);
}

bool PhysicalMemory::has_doorbells() const {
  const std::scoped_lock lock(bell_mutex_);
  return !bells_.empty();
}

int PhysicalMemory::doorbell(std::uint64_t address, std::span<const std::uint8_t> data) const {
  std::uint64_t value = 0;
  std::memcpy(&value, data.data(), std::min(data.size(), sizeof value));
  const std::scoped_lock lock(bell_mutex_);
  for (const Bell& bell : bells_) {
    if (bell.address == address && (bell.size == 0 || bell.size == data.size()) &&
        (!bell.value || *bell.value == value)) {
      return bell.fd;
    }
  }
  return -1;
}

void PhysicalMemory::publish(std::unique_ptr<Table> table) {
  table_.store(table.get(), std::memory_order_release);
  tables_.push_back(std::move(table));
  if (changed_) {
    changed_();
  }
}

Result<void> PhysicalMemory::range_added(const FlatRange& range) {
  // Doorbells move as often as the guest moves its devices: they are no part of the tables, which all stay.
  if (range.kind == RegionKind::kIo) {
    const std::scoped_lock lock(bell_mutex_);
    for (const IoEvent& event : range.events) {
      bells_.push_back(
          {.address = range.start + event.offset, .size = event.size, .value = event.value, .fd = event.fd});
    }
    return {};
  }
  auto table = std::make_unique<Table>(*table_.load(std::memory_order_acquire));
  {
    const std::uint64_t skip = (kPageSize - (range.start & kPageOffset)) & kPageOffset;
    const std::uint64_t size = range.size > skip ? (range.size - skip) & ~kPageOffset : 0;
    if (size == 0) {
      return {};  // not one whole page: reached by way of the machine
    }
    Range added{.gpa = range.start + skip,
                .size = size,
                .host = range.host + skip,
                .writable = range.kind == RegionKind::kRam};
    WISP_ASSIGN(added.info, make_page_infos(size / kPageSize));
    table->ranges.push_back(std::move(added));
    std::ranges::sort(table->ranges, std::greater{}, &Range::size);  // the likeliest first
  }
  publish(std::move(table));
  return {};
}

void PhysicalMemory::range_removed(const FlatRange& range) {
  const auto inside = [&range](std::uint64_t address) {
    return address >= range.start && address - range.start < range.size;
  };
  if (range.kind == RegionKind::kIo) {
    {
      const std::scoped_lock lock(bell_mutex_);
      if (std::erase_if(bells_, [&](const Bell& bell) { return inside(bell.address); }) == 0) {
        return;
      }
    }
    // No processor is between finding a doorbell and ringing it when this returns.
    if (changed_) {
      changed_();
    }
    return;
  }
  auto table = std::make_unique<Table>(*table_.load(std::memory_order_acquire));
  std::vector<Range> removed;
  std::erase_if(table->ranges, [&](const Range& known) {
    const bool gone = inside(known.gpa);
    if (gone) {
      removed.push_back(known);
    }
    return gone;
  });
  publish(std::move(table));
  // Whoever kept instructions of it compares versions.
  for (const Range& gone : removed) {
    for (std::uint64_t page = 0; page < gone.size / kPageSize; ++page) {
      PageInfo& info = gone.info[static_cast<std::ptrdiff_t>(page)];
      if (info.code_lines.load(std::memory_order_relaxed) == 0) {
        continue;
      }
      info.version.fetch_add(1, std::memory_order_acq_rel);
      if (watcher_ != nullptr) {
        watcher_->code_written(gone.gpa + page * kPageSize, kPageSize);
      }
    }
  }
}

}  // namespace wisp::soft
