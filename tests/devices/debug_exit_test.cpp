#include "devices/debug_exit.h"

#include <gtest/gtest.h>

#include <vector>

#include "devices/fake_parts.h"

namespace wisp {
namespace {

TEST(DebugExit, TheStatusIsTwiceTheValuePlusOne) {
  std::vector<std::uint32_t> statuses;
  DebugExit device([&](std::uint32_t status) { statuses.push_back(status); });
  out(device, 0, 0);
  out(device, 1, 0x10);
  out(device, 0, 0x1234, 2);
  out(device, 0, 0x80000000, 4);
  EXPECT_EQ(statuses, (std::vector<std::uint32_t>{1, 0x21, 0x2469, 1}));
  EXPECT_EQ(in(device, 0, 4), 0U) << "reading ends nothing";
  EXPECT_EQ(statuses.size(), 4U);
}

}  // namespace
}  // namespace wisp
