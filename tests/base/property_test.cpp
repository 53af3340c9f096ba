#include "base/property.h"

#include <gtest/gtest.h>

namespace wisp {
namespace {

TEST(ParseSize, TakesTheUnitsThatUsersWrite) {
  EXPECT_EQ(parse_size("512"), 512U);
  EXPECT_EQ(parse_size("512", 1 << 20), 512ULL << 20);
  EXPECT_EQ(parse_size("64k"), 64U << 10);
  EXPECT_EQ(parse_size("2G"), 2ULL << 30);
  EXPECT_EQ(parse_size("1TiB"), 1ULL << 40);
  EXPECT_EQ(parse_size("1MB"), 1ULL << 20);
}

TEST(ParseSize, RefusesWhatDoesNotFitOrIsNotANumber) {
  for (const char* text : {"", "k", "-1", "+1", "1.5G", "99999999999999999999", "18446744073709551615k", "1x",
                           "1 k", "0x", "1kk"}) {
    EXPECT_FALSE(parse_size(text).has_value()) << text;
  }
}

TEST(ParseProperty, ChecksKindAndRange) {
  const PropertySpec number{.name = "n", .kind = PropertyKind::kUint, .help = "", .minimum = 2, .maximum = 8};
  EXPECT_EQ(std::get<std::uint64_t>(*parse_property(number, "8")), 8U);
  EXPECT_EQ(parse_property(number, "9").error().message, "'9' is out of range, expected 2 to 8");
  EXPECT_EQ(parse_property(number, "x").error().message, "'x' is not a number");
  const PropertySpec word{
      .name = "w", .kind = PropertyKind::kEnum, .help = "", .choices = "threads|io_uring"};
  EXPECT_TRUE(parse_property(word, "io_uring").has_value());
  EXPECT_FALSE(parse_property(word, "io").has_value());
  EXPECT_FALSE(parse_property(word, "").has_value());
  const PropertySpec mac{.name = "mac", .kind = PropertyKind::kMac, .help = ""};
  EXPECT_TRUE(parse_property(mac, "52:54:00:12:34:56").has_value());
  EXPECT_FALSE(parse_property(mac, "52:54:00:12:34:5g").has_value());
  EXPECT_FALSE(parse_property(mac, "52-54-00-12-34-56").has_value());
}

}  // namespace
}  // namespace wisp
