#include "hypervisor/soft/block_table.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace wisp::soft {
namespace {

TableBlock& add(BlockTable& table, std::uint64_t gpa, std::uint32_t bytes, std::uint32_t outer) {
  TableBlock& block = table.make();
  block.gpa = gpa;
  block.key = gpa << 6;
  block.guest_bytes = bytes;
  block.entries = {.outer = outer, .inner = outer + 8};
  table.add(block);
  return block;
}

TEST(BlockTable, FindsWhatWasAdded) {
  BlockTable table;
  EXPECT_EQ(table.find(0), nullptr);
  EXPECT_EQ(table.entries(0).outer, 0U);
  TableBlock& first = add(table, 0, 4, 64);  // a key of 0 is one like others
  TableBlock& second = add(table, 0x12345678, 4, 128);
  EXPECT_EQ(table.find(first.key), &first);
  EXPECT_EQ(table.find(second.key), &second);
  EXPECT_EQ(table.entries(second.key).inner, 136U);
  EXPECT_EQ(table.find(second.key + 1), nullptr);
}

TEST(BlockTable, TakesOutWhatLiesThere) {
  BlockTable table;
  add(table, 0x1000, 16, 8);
  add(table, 0x1010, 16, 16);
  add(table, 0x1020, 16, 24);
  add(table, 0x2010, 16, 32);
  std::vector<std::uint64_t> dead;
  const auto note = [&dead](const TableBlock& block) { dead.push_back(block.gpa); };
  EXPECT_FALSE(table.take_out(0x1030, 16, note));
  EXPECT_TRUE(table.take_out(0x1018, 9, note));
  EXPECT_EQ(dead, (std::vector<std::uint64_t>{0x1020, 0x1010}));
  EXPECT_EQ(table.find(0x1010 << 6), nullptr);
  EXPECT_EQ(table.entries(0x1020 << 6).outer, 0U);
  EXPECT_NE(table.find(0x1000 << 6), nullptr);
  EXPECT_NE(table.find(0x2010 << 6), nullptr);
  EXPECT_FALSE(table.take_out(0x1018, 9, note));
}

TEST(BlockTable, AKeyComesBackWithAnotherBlock) {
  BlockTable table;
  add(table, 0x1000, 16, 8);
  table.take_out(0x1000, 1, [](const TableBlock&) {});
  TableBlock& again = add(table, 0x1000, 4, 80);
  EXPECT_EQ(table.find(again.key), &again);
  EXPECT_EQ(table.entries(again.key).outer, 80U);
}

TEST(BlockTable, IsFullBeforeItOverflowsAndEmptyAfterClear) {
  BlockTable table;
  std::uint64_t count = 0;
  while (!table.full()) {
    add(table, 16 * count++, 16, 8);
  }
  EXPECT_GT(count, 50'000U);
  EXPECT_NE(table.find((16 * (count - 1)) << 6), nullptr);
  EXPECT_EQ(table.find((16 * count) << 6), nullptr);
  table.clear();
  EXPECT_FALSE(table.full());
  EXPECT_EQ(table.find(0), nullptr);
  EXPECT_FALSE(table.take_out(0, 4096, [](const TableBlock&) {}));
}

// A slot that was free a moment ago may be another's: keys whose search starts at the same slot.
TEST(BlockTable, NobodyFindsAnothersBlockWhileItIsAdded) {
  constexpr std::uint64_t kFactor = 0x9e3779b97f4a7c15ULL;  // of the table's hash
  std::uint64_t inverse = kFactor;
  for (int i = 0; i < 6; ++i) {
    inverse *= 2 - kFactor * inverse;
  }
  const auto key = [inverse](std::uint64_t slot, std::uint64_t which) {
    return inverse * (slot << 47 | which);
  };
  std::uint64_t wrong = 0;
  for (int round = 0; round < 3; ++round) {
    BlockTable table;
    std::atomic<std::uint64_t> at = 0;
    std::atomic<bool> stop = false;
    std::thread reader([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        const std::uint64_t from = at.load(std::memory_order_relaxed);
        for (std::uint64_t i = from; i < from + 4; ++i) {
          wrong += table.entries(key(i, 77)).outer != 0 ? 1U : 0U;
        }
      }
    });
    for (std::uint64_t i = 0; i < 90'000; ++i) {
      TableBlock& block = table.make();
      block.gpa = i << 12;
      block.key = key(i, 5);
      block.guest_bytes = 4;
      block.entries = {.outer = 8, .inner = 16};
      table.add(block);
      at.store(i + 1, std::memory_order_relaxed);
    }
    stop = true;
    reader.join();
  }
  EXPECT_EQ(wrong, 0U);
}

}  // namespace
}  // namespace wisp::soft
