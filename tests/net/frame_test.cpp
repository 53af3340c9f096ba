#include "net/frame.h"

#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <vector>

namespace wisp {
namespace {

TEST(Frame, CopiesAcrossPiecesFromAnyOffset) {
  std::array<std::uint8_t, 3> a{};
  std::array<std::uint8_t, 1> b{};
  std::array<std::uint8_t, 5> c{};
  const std::array<iovec, 4> pieces{
      {{a.data(), a.size()}, {nullptr, 0}, {b.data(), b.size()}, {c.data(), c.size()}}};
  ASSERT_EQ(iovecs_size(pieces), 9U);
  std::vector<std::uint8_t> bytes(9);
  std::iota(bytes.begin(), bytes.end(), std::uint8_t{1});
  for (std::size_t offset = 0; offset <= 10; ++offset) {
    for (std::size_t size = 0; size <= 9; ++size) {
      a = {};
      b = {};
      c = {};
      const std::size_t fits = offset < 9 ? std::min(size, 9 - offset) : 0;
      EXPECT_EQ(copy_to_iovecs(std::span(bytes).first(size), pieces, offset), fits);
      std::vector<std::uint8_t> back(size);
      EXPECT_EQ(copy_from_iovecs(pieces, offset, back), fits);
      EXPECT_TRUE(std::equal(back.begin(), back.begin() + static_cast<std::ptrdiff_t>(fits), bytes.begin()));
      std::vector<std::uint8_t> all(9);
      ASSERT_EQ(copy_from_iovecs(pieces, 0, all), 9U);
      EXPECT_EQ(std::accumulate(all.begin(), all.end(), 0), static_cast<int>(fits * (fits + 1) / 2));
    }
  }
}

}  // namespace
}  // namespace wisp
