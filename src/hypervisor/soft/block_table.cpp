#include "hypervisor/soft/block_table.h"

#include <bit>
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

BlockTable::BlockTable() : memory_(std::calloc(kSlots + 1, sizeof(Slot))) {
  if (memory_ == nullptr) {
    throw std::bad_alloc();
  }
  void* start = memory_.get();
  std::size_t room = (kSlots + 1) * sizeof(Slot);
  slots_ = static_cast<Slot*>(std::align(alignof(Slot), kSlots * sizeof(Slot), start, room));
}

// The slot with the key, or the free one where it belongs. There always is one: see full().
BlockTable::Slot* BlockTable::slot_of(std::uint64_t key) const {
  for (std::size_t i = (key * 0x9e3779b97f4a7c15ULL) >> (64 - kBits);; i = (i + 1) % kSlots) {
    const std::uint64_t there = load(slots_[i].key);
    if (there == key + 1 || there == 0) {
      return &slots_[i];
    }
  }
}

BlockEntries BlockTable::entries(std::uint64_t key) const {
  return std::bit_cast<BlockEntries>(load(slot_of(key)->entries));
}

TableBlock* BlockTable::find(std::uint64_t key) const {
  const Slot* slot = slot_of(key);
  return slot->entries != 0 ? slot->block : nullptr;
}

void BlockTable::add(TableBlock& block) {
  Slot* slot = slot_of(block.key);
  used_ += slot->key == 0 ? 1U : 0U;
  slot->block = &block;
  store(slot->entries, std::bit_cast<std::uint64_t>(block.entries));
  store(slot->key, block.key + 1);
  TableBlock*& page = by_page_[block.gpa >> 12];
  block.next_of_page = page;
  page = &block;
}

void BlockTable::remove(const TableBlock& block) {
  Slot* slot = slot_of(block.key);
  store(slot->entries, 0);
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
