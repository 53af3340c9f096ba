#include "base/log.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <array>

#include "base/unique_fd.h"

namespace wisp {
namespace {

class FakeClock final : public Clock {
 public:
  [[nodiscard]] std::uint64_t monotonic_ns() const override { return now; }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return now; }
  std::uint64_t now = 1'000'000'000'000;
};

std::string logged(LogLevel level, const std::string& message) {
  std::array<int, 2> pipe{};
  EXPECT_EQ(::pipe2(pipe.data(), O_NONBLOCK), 0);
  const UniqueFd in(pipe[0]);
  const UniqueFd out(pipe[1]);
  Log log(out.get());
  log.write(level, message);
  std::array<char, 4096> text{};
  const ssize_t got = ::read(in.get(), text.data(), text.size());
  return got > 0 ? std::string(text.data(), static_cast<std::size_t>(got)) : std::string();
}

TEST(Log, WritesOneLineAndDropsWhatIsAboveItsLevel) {
  EXPECT_EQ(logged(LogLevel::kError, "no kernel"), "wisp: error: no kernel\n");
  EXPECT_EQ(logged(LogLevel::kDebug, "detail"), "");
}

TEST(Log, GuestTextCannotSteerTheTerminalOrGrowTheLine) {
  EXPECT_EQ(logged(LogLevel::kError, "a\x1b[2J\nb"), "wisp: error: a?[2J?b\n");
  EXPECT_LT(logged(LogLevel::kError, std::string(100'000, 'x')).size(), 2100U);
}

TEST(LogGate, LetsABurstThroughThenOnePerInterval) {
  FakeClock clock;
  LogGate gate(clock, 2, 100);
  EXPECT_TRUE(gate.open());
  EXPECT_TRUE(gate.open());
  EXPECT_FALSE(gate.open());
  clock.now += 100;
  EXPECT_TRUE(gate.open());
  EXPECT_FALSE(gate.open());
  clock.now += 100'000;
  EXPECT_TRUE(gate.open());
  EXPECT_TRUE(gate.open());
  EXPECT_FALSE(gate.open());
}

}  // namespace
}  // namespace wisp
