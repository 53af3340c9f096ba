#include "virtio/rng.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "virtio/support/device_harness.h"

namespace wisp {
namespace {

using test::ChainBuilder;
using test::DeviceHarness;

// Gives 1, 2, 3, ... and fails where told.
class CountingEntropy final : public EntropySource {
 public:
  explicit CountingEntropy(bool& fails) : fails_(fails) {}
  [[nodiscard]] Result<void> fill(std::span<std::uint8_t> buffer) override {
    if (fails_) {
      return fail("no bytes today");
    }
    for (std::uint8_t& byte : buffer) {
      byte = ++next_;
    }
    return {};
  }

 private:
  bool& fails_;
  std::uint8_t next_ = 0;
};

class RngTest : public testing::Test {
 protected:
  std::unique_ptr<DeviceHarness> make(const VirtioRngOptions& options = {.id = "rng0"}) {
    return std::make_unique<DeviceHarness>([&](EventLoop& loop, const GuestMemory& memory) {
      return VirtioRng::create(loop, memory, options, std::make_unique<CountingEntropy>(fails_), log_, clock_)
          .value();
    });
  }
  bool fails_ = false;
  Log log_{-1};
  SystemClock clock_;
};

TEST_F(RngTest, FillsTheWritablePart) {
  const auto rng = make();
  ASSERT_TRUE(rng->activate().has_value());
  const Gpa a = rng->guest().allocate(4);
  const Gpa b = rng->guest().allocate(4);
  rng->submit(0, ChainBuilder().readable(a, 4).writable(a, 4).writable(b, 3));
  const auto used = rng->wait_used(0);
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->written, 7U);
  EXPECT_EQ(rng->guest().read_text(a, 4), "\1\2\3\4");
  EXPECT_EQ(rng->guest().read_text(b, 4), std::string("\5\6\7\0", 4));
  EXPECT_EQ(rng->interrupts().used(0), 1U);
}

TEST_F(RngTest, HugeRequestsGetAPart) {
  const auto rng = make();
  ASSERT_TRUE(rng->activate().has_value());
  rng->submit(0, ChainBuilder().writable(rng->guest().allocate(100000), 100000));
  EXPECT_EQ(rng->wait_used(0)->written, VirtioRng::kMaxRequest);
}

TEST_F(RngTest, RateIsLimited) {
  const auto rng = make({.id = "rng0", .max_bytes = 10, .period_ms = 50});
  ASSERT_TRUE(rng->activate().has_value());
  const Gpa buffer = rng->guest().allocate(64);
  const std::uint64_t start = clock_.monotonic_ns();
  for (int i = 0; i < 3; ++i) {
    rng->submit(0, ChainBuilder().writable(buffer, 10));
  }
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(rng->wait_used(0)->written, 10U);
  }
  EXPECT_GE(clock_.monotonic_ns() - start, 100'000'000U - 1'000'000U);
}

TEST_F(RngTest, FailingSourceIsTriedAgain) {
  const auto rng = make();
  ASSERT_TRUE(rng->activate().has_value());
  fails_ = true;
  rng->submit(0, ChainBuilder().writable(rng->guest().allocate(8), 8));
  rng->pump();
  EXPECT_FALSE(rng->queue(0).take_used().has_value());
  EXPECT_FALSE(rng->interrupts().broken());
  fails_ = false;
  EXPECT_EQ(rng->wait_used(0)->written, 8U);  // after the retry's second
}

TEST_F(RngTest, FilesGiveBytesOrSayWhyNot) {
  const auto urandom = FileEntropy::open("/dev/urandom");
  ASSERT_TRUE(urandom.has_value());
  std::array<std::uint8_t, 64> bytes{};
  ASSERT_TRUE((*urandom)->fill(bytes).has_value());
  EXPECT_TRUE(std::ranges::any_of(bytes, [](std::uint8_t byte) { return byte != 0; }));
  EXPECT_FALSE(FileEntropy::open("/nonexistent").has_value());
  EXPECT_FALSE(FileEntropy::open("/tmp").has_value());
  const auto null = FileEntropy::open("/dev/null");
  ASSERT_TRUE(null.has_value());
  EXPECT_FALSE((*null)->fill(bytes).has_value());
}

TEST(RngOptions, RateNeedsBothHalves) {
  PropertySet set;
  set.set("rng", std::string("objrng0"));
  EXPECT_EQ(virtio_rng_options("r", set)->rng, "objrng0");
  set.set("max-bytes", std::uint64_t{1024});
  EXPECT_FALSE(virtio_rng_options("r", set).has_value());
  set.set("period", std::uint64_t{1000});
  EXPECT_EQ(virtio_rng_options("r", set)->period_ms, 1000U);
}

}  // namespace
}  // namespace wisp
