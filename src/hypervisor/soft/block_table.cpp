#include "hypervisor/soft/block_table.h"

#include <sys/mman.h>

#include <bit>
#include <memory>
#include <new>

namespace wisp::soft {
namespace {

std::uint64_t load(std::uint64_t& value) {
  return std::atomic_ref(value).load(std::memory_order_acquire);
}
void store(std::uint64_t& place, std::uint64_t value) {
  std::atomic_ref(place).store(value, std::memory_order_release);
}

}  // namespace

// The slots fill up all over: one large page is quicker to come by than each small one.
BlockTable::BlockTable() {
  memory_ =
      ::mmap(nullptr, 2 * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory_ == MAP_FAILED) {
    throw std::bad_alloc();
  }
  void* start = memory_;
  std::size_t room = 2 * kBytes;
  slots_ = static_cast<Slot*>(std::align(kBytes, kBytes, start, room));
  (void)::madvise(slots_, kBytes, MADV_HUGEPAGE);
}

BlockTable::~BlockTable() {
  ::munmap(memory_, 2 * kBytes);
}

// The slot with the key, or the free one where it belongs. There always is one: see full().
std::size_t BlockTable::slot_of(std::uint64_t key) const {
  for (std::size_t i = (key * 0x9e3779b97f4a7c15ULL) >> (64 - kBits);; i = (i + 1) % kSlots) {
    const std::uint64_t there = load(slots_[i].key);
    if (there == key + 1 || there == 0) {
      return i;
    }
  }
}

BlockEntries BlockTable::entries(std::uint64_t key) const {
  Slot& slot = slots_[slot_of(key)];
  // Where it was free, it may be somebody else's by now; once it has a key, it keeps that.
  return load(slot.key) == key + 1 ? std::bit_cast<BlockEntries>(load(slot.entries)) : BlockEntries{};
}

TableBlock* BlockTable::find(std::uint64_t key) const {
  const std::size_t slot = slot_of(key);
  return slots_[slot].entries != 0 ? block_of_slot_[slot] : nullptr;
}

void BlockTable::add(TableBlock& block) {
  const std::size_t number = slot_of(block.key);
  Slot& slot = slots_[number];
  used_ += slot.key == 0 ? 1U : 0U;
  block_of_slot_[number] = &block;
  store(slot.entries, std::bit_cast<std::uint64_t>(block.entries));
  store(slot.key, block.key + 1);
  TableBlock*& page = by_page_[block.gpa >> 12];
  block.next_of_page = page;
  page = &block;
}

void BlockTable::remove(const TableBlock& block) {
  store(slots_[slot_of(block.key)].entries, 0);
}

void BlockTable::clear() {
  for (std::size_t i = 0; i < kSlots; ++i) {
    slots_[i] = {};
  }
  used_ = 0;
  by_page_.clear();
  blocks_.clear();
}

}  // namespace wisp::soft
