// The translations of a VM, by what they were made of.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

namespace wisp::soft {

// Where the two entries of a block stand, from the start of the code memory.
struct BlockEntries {
  std::uint32_t outer = 0;
  std::uint32_t inner = 0;
};

struct TableBlock {
  // A jump that leads to the block's inner entry, and what stood there before.
  struct Incoming {
    const std::uint8_t* displacement = nullptr;
    std::int32_t unlinked = 0;
  };
  std::uint64_t gpa = 0;
  std::uint64_t key = 0;
  std::uint32_t guest_bytes = 0;
  BlockEntries entries{};
  const std::uint8_t* way_out = nullptr;
  std::vector<Incoming> incoming{};
  TableBlock* next_of_page = nullptr;
};

// entries() may run beside everything but clear(); all others one at a time.
class BlockTable final {
 public:
  BlockTable();
  BlockTable(const BlockTable&) = delete;
  BlockTable& operator=(const BlockTable&) = delete;
  ~BlockTable();
  // Of the living block with this key; zeros: none. Touches one line of memory, as a rule: it is asked for
  // all that code jumps to after each switch of the guest's contexts.
  [[nodiscard]] BlockEntries entries(std::uint64_t key) const;
  // That block; null: none.
  [[nodiscard]] TableBlock* find(std::uint64_t key) const;
  // Whether there is no room for more.
  [[nodiscard]] bool full() const { return used_ >= kSlots / 4 * 3; }
  // A block to be filled in, and then to be added; its key must not be there.
  [[nodiscard]] TableBlock& make() { return blocks_.emplace_back(); }
  void add(TableBlock& block);
  // Takes out the blocks of guest code in [gpa, gpa + size), inside one page, and gives each to `dies`.
  // Whether there were any.
  template <typename F>
  bool take_out(std::uint64_t gpa, std::uint64_t size, const F& dies) {
    const auto page = by_page_.find(gpa >> 12);
    if (page == by_page_.end()) {
      return false;
    }
    bool any = false;
    for (TableBlock** link = &page->second; *link != nullptr;) {
      TableBlock& block = **link;
      if (block.gpa >= gpa + size || gpa >= block.gpa + std::max(block.guest_bytes, 1U)) {
        link = &block.next_of_page;
        continue;
      }
      *link = block.next_of_page;
      remove(block);
      dies(block);
      any = true;
    }
    return any;
  }
  void clear();

 private:
  // Keeps its key until clear(); free where that is 0. Keys are stored with one added.
  struct alignas(16) Slot {
    std::uint64_t key;
    std::uint64_t entries;  // both in one; 0 where the block is dead
  };
  static constexpr unsigned kBits = 17;
  static constexpr std::size_t kSlots = std::size_t{1} << kBits;
  static constexpr std::size_t kBytes = kSlots * sizeof(Slot);  // a large page
  [[nodiscard]] std::size_t slot_of(std::uint64_t key) const;
  void remove(const TableBlock& block);

  void* memory_ = nullptr;
  Slot* slots_ = nullptr;
  std::vector<TableBlock*> block_of_slot_ = std::vector<TableBlock*>(kSlots);
  std::size_t used_ = 0;
  std::unordered_map<std::uint64_t, TableBlock*> by_page_{};  // the first of each page
  std::deque<TableBlock> blocks_{};
};

}  // namespace wisp::soft
