#include "base/state.h"

#include <gtest/gtest.h>

namespace wisp {
namespace {

TEST(State, ReadsWhatWasWritten) {
  StateWriter writer;
  writer.put(std::uint16_t{0x1234});
  writer.put(true);
  writer.put_string("disk");
  const auto bytes = writer.take();
  StateReader reader(bytes);
  EXPECT_EQ(*reader.get<std::uint16_t>(), 0x1234);
  EXPECT_TRUE(*reader.get<bool>());
  EXPECT_EQ(*reader.get_string(16), "disk");
  EXPECT_TRUE(reader.empty());
}

TEST(State, HostileLengthsAreErrors) {
  StateWriter writer;
  writer.put(UINT64_MAX);
  const auto bytes = writer.take();
  EXPECT_FALSE(StateReader(bytes).get_bytes(SIZE_MAX).has_value());
  EXPECT_FALSE(StateReader(std::span(bytes).first(3)).get<std::uint32_t>().has_value());
  EXPECT_FALSE(check_version({.name = "x", .version = 3, .bytes = {}}, 2).has_value());
  EXPECT_FALSE(check_version({.name = "x", .version = 0, .bytes = {}}, 2).has_value());
}

}  // namespace
}  // namespace wisp
