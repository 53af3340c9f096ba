#include "memory/guest_memory.h"

#include <algorithm>

#include "base/checked.h"
#include "base/error.h"
#include "memory/guest_copy.h"

namespace wisp {
std::size_t GuestSlice::read(std::size_t offset, std::span<std::uint8_t> out) const {
  if (offset >= size_ || out.empty()) {
    return 0;
  }
  const std::size_t count = std::min(out.size(), size_ - offset);
  copy_from_guest(out.data(), data_ + offset, count);
  return count;
}

std::size_t GuestSlice::write(std::size_t offset, std::span<const std::uint8_t> in) const {
  if (offset >= size_ || in.empty()) {
    return 0;
  }
  const std::size_t count = std::min(in.size(), size_ - offset);
  copy_to_guest(data_ + offset, in.data(), count);
  return count;
}

std::optional<GuestSlice> GuestSlice::part(std::size_t offset, std::size_t size) const {
  if (!range_within(offset, size, size_)) {
    return std::nullopt;
  }
  return GuestSlice(data_ + offset, size, gpa_ + offset);
}

DirtyBitmap::DirtyBitmap(std::uint64_t bytes)
    : words_((bytes / kPageSize + (bytes % kPageSize != 0 ? 1 : 0) + 63) / 64) {}

void DirtyBitmap::mark(std::uint64_t offset, std::uint64_t size) {
  if (size == 0) {
    return;
  }
  const std::uint64_t first = offset / kPageSize;
  const std::uint64_t last = (offset + size - 1) / kPageSize;
  WISP_ASSERT(offset + size > offset && last / 64 < words_.size());
  for (std::uint64_t word = first / 64; word <= last / 64; ++word) {
    std::uint64_t bits = ~0ULL;
    if (word == first / 64) {
      bits &= ~0ULL << (first % 64);
    }
    if (word == last / 64) {
      bits &= ~0ULL >> (63 - last % 64);
    }
    // Always the locked operation, even where the bits are set: it orders the page's contents before the mark
    // against a take() that clears it.
    words_[word].fetch_or(bits, std::memory_order_acq_rel);
  }
}

std::vector<std::uint64_t> DirtyBitmap::take() {
  std::vector<std::uint64_t> taken(words_.size());
  for (std::size_t i = 0; i < words_.size(); ++i) {
    taken[i] = words_[i].exchange(0, std::memory_order_acq_rel);
  }
  return taken;
}

struct GuestMemory::Table {
  std::vector<GuestMemoryBlock> blocks;
};

GuestMemory::GuestMemory() : table_(nullptr) {
  set_blocks({});
}

GuestMemory::~GuestMemory() = default;

void GuestMemory::set_blocks(std::vector<GuestMemoryBlock> blocks) {
  std::ranges::sort(blocks, {}, &GuestMemoryBlock::gpa);
  Gpa end = 0;
  for (const GuestMemoryBlock& block : blocks) {
    WISP_ASSERT(block.size > 0 && is_aligned(block.size | block.gpa, kPageSize) && block.host != nullptr);
    WISP_ASSERT(block.gpa >= end && block.size - 1 <= UINT64_MAX - block.gpa);
    // A block that ends at 2^64 leaves no room for a next one.
    end = block.size > UINT64_MAX - block.gpa ? UINT64_MAX : block.gpa + block.size;
  }
  auto table = std::make_unique<Table>();
  table->blocks = std::move(blocks);
  const Table* published = table.get();
  tables_.push_back(std::move(table));
  table_.store(published, std::memory_order_release);
}

std::span<const GuestMemoryBlock> GuestMemory::blocks() const {
  return table_.load(std::memory_order_acquire)->blocks;
}

const GuestMemoryBlock* GuestMemory::find(Gpa gpa) const {
  const std::span<const GuestMemoryBlock> table = blocks();
  const auto next = std::ranges::upper_bound(table, gpa, {}, &GuestMemoryBlock::gpa);
  if (next == table.begin()) {
    return nullptr;
  }
  const GuestMemoryBlock& block = *(next - 1);
  return gpa - block.gpa < block.size ? &block : nullptr;
}

std::optional<GuestSlice> GuestMemory::slice(Gpa gpa, std::uint64_t size) const {
  const GuestMemoryBlock* block = size == 0 ? nullptr : find(gpa);
  if (block == nullptr || size > block->size - (gpa - block->gpa)) {
    return std::nullopt;
  }
  return GuestSlice(block->host + (gpa - block->gpa), size, gpa);
}

bool GuestMemory::read(Gpa gpa, std::span<std::uint8_t> out) const {
  while (!out.empty()) {
    const GuestMemoryBlock* block = find(gpa);
    if (block == nullptr) {
      return false;
    }
    const std::uint64_t offset = gpa - block->gpa;
    const std::size_t count = std::min<std::uint64_t>(out.size(), block->size - offset);
    copy_from_guest(out.data(), block->host + offset, count);
    out = out.subspan(count);
    if (!out.empty() && count > UINT64_MAX - gpa) {
      return false;
    }
    gpa += count;
  }
  return true;
}

bool GuestMemory::write(Gpa gpa, std::span<const std::uint8_t> in) const {
  while (!in.empty()) {
    const GuestMemoryBlock* block = find(gpa);
    if (block == nullptr) {
      return false;
    }
    const std::uint64_t offset = gpa - block->gpa;
    const std::size_t count = std::min<std::uint64_t>(in.size(), block->size - offset);
    copy_to_guest(block->host + offset, in.data(), count);
    if (block->dirty != nullptr) {
      block->dirty->mark(offset, count);
    }
    if (write_hook_) {
      write_hook_(gpa, count);
    }
    in = in.subspan(count);
    if (!in.empty() && count > UINT64_MAX - gpa) {
      return false;
    }
    gpa += count;
  }
  return true;
}

void GuestMemory::mark_dirty(Gpa gpa, std::uint64_t size) const {
  if (size == 0) {
    return;
  }
  const Gpa last = size - 1 > UINT64_MAX - gpa ? UINT64_MAX : gpa + (size - 1);
  for (const GuestMemoryBlock& block : blocks()) {
    const Gpa block_last = block.gpa + (block.size - 1);
    if (block.dirty == nullptr || block.gpa > last || block_last < gpa) {
      continue;
    }
    const Gpa from = std::max(gpa, block.gpa);
    const Gpa to = std::min(last, block_last);
    block.dirty->mark(from - block.gpa, to - from + 1);
  }
  if (write_hook_) {
    write_hook_(gpa, size);
  }
}

}  // namespace wisp
