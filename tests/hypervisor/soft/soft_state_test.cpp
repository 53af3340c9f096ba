// The processor's registers as saved state, and back.
#include "hypervisor/soft/soft_state.h"

#include <gtest/gtest.h>

#include <memory>

#include "base/bytes.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/xsave_area.h"

namespace wisp::soft {
namespace {

// A guest that set MXCSR and whose XMM registers are all zero: the host's processor calls SSE initial, and
// stores nothing of it.
TEST(SoftState, MxcsrIsKeptWithoutAnyVectorRegisterInUse) {
  const auto from = std::make_unique<Cpu>();
  reset_cpu(*from, true);
  vectors_put<std::uint32_t>(*from, xsave::kMxcsr, 0x9fc0);
  vectors_put<std::uint64_t>(*from, xsave::kHeader, xsave::kX87);
  std::fill_n(from->vectors.begin() + xsave::kXmm, 16, std::uint8_t{0xee});  // left there from before
  const auto to = std::make_unique<Cpu>();
  reset_cpu(*to, true);
  ASSERT_TRUE(set_xsave(*to, xsave_of(*from), 7));
  EXPECT_EQ(vectors_get<std::uint32_t>(*to, xsave::kMxcsr), 0x9fc0U);
  EXPECT_EQ(load_le<std::uint64_t>(to->vectors.data() + xsave::kXmm), 0U);
}

}  // namespace
}  // namespace wisp::soft
