#include "devices/boot_timer.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "base/unique_fd.h"
#include "devices/fake_parts.h"

namespace wisp {
namespace {

std::string drain(int fd) {
  std::string text(65536, '\0');
  const ssize_t count = ::read(fd, text.data(), text.size());
  text.resize(count > 0 ? static_cast<std::size_t>(count) : 0);
  return text;
}

TEST(BootTimer, LogsTheTimeSinceTheProcessBegan) {
  int fds[2];
  ASSERT_EQ(::pipe2(fds, O_CLOEXEC | O_NONBLOCK), 0);
  const UniqueFd reading(fds[0]);
  const UniqueFd writing(fds[1]);
  Log log(writing.get());
  FakeClock clock;
  BootTimer timer(clock, clock.monotonic_ns(), log);
  clock.advance(12'345'678);
  out(timer, 0, 123);
  const auto marks = timer.marks();
  ASSERT_EQ(marks.size(), 1U);
  EXPECT_EQ(marks[0].value, 123);
  EXPECT_EQ(marks[0].wall_us, 12'345U);
  EXPECT_GT(marks[0].cpu_us, 0U);
  EXPECT_NE(drain(reading.get()).find("mark 123 at 12345 us"), std::string::npos);
  for (int i = 0; i < 10'000; ++i) {
    out(timer, 0, 1);
  }
  EXPECT_EQ(timer.marks().size(), BootTimer::kMaxMarks);
  timer.reset();
  out(timer, 0, 1);
  EXPECT_EQ(timer.marks().size(), BootTimer::kMaxMarks) << "a reset gives the guest no more log";
  const std::string lines = drain(reading.get());
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'), static_cast<long>(BootTimer::kMaxMarks - 1));
  EXPECT_EQ(in8(timer, 0), 0xff);
}

TEST(BootTimer, AClockBeforeTheStartIsNoWrap) {
  Log log(-1);
  FakeClock clock;
  BootTimer timer(clock, clock.monotonic_ns() + 5, log);
  out(timer, 0, 1);
  EXPECT_EQ(timer.marks()[0].wall_us, 0U);
}

}  // namespace
}  // namespace wisp
