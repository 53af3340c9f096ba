// The paravirtual clock, read as a guest's kernel reads it.
#include "hypervisor/soft/kvm_clock.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <vector>

#include "base/bytes.h"

namespace wisp::soft {
namespace {

class TestClock final : public SoftClock {
 public:
  explicit TestClock(std::uint64_t khz) : khz_(khz) {}
  [[nodiscard]] std::uint64_t now_ns() const override { return multiply_divide(tsc_, 1'000'000, khz_); }
  [[nodiscard]] std::uint64_t tsc() const override { return tsc_; }
  [[nodiscard]] std::uint64_t tsc_khz() const override { return khz_; }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return 1'700'000'000'123'456'789; }
  void pass(std::uint64_t counts) { tsc_ += counts; }

 private:
  const std::uint64_t khz_;
  std::uint64_t tsc_ = 123'456'789'012;
};

// Guest memory that remembers the order of writes.
struct Memory {
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(4096, 0xee);
  std::vector<std::uint32_t> versions;
  KvmClock::Write write() {
    return [this](std::uint64_t gpa, const void* in, std::uint32_t size) {
      if (gpa + size > bytes.size()) {
        return false;
      }
      std::memcpy(bytes.data() + gpa, in, size);
      versions.push_back(load_le<std::uint32_t>(bytes.data() + 64));
      return true;
    };
  }
};

// pvclock_clocksource_read() of a guest.
std::uint64_t guest_reads(const std::uint8_t* info, std::uint64_t guest_tsc) {
  std::uint64_t delta = guest_tsc - load_le<std::uint64_t>(info + 8);
  const auto shift = static_cast<std::int8_t>(info[28]);
  delta = shift < 0 ? delta >> -shift : delta << shift;
  return load_le<std::uint64_t>(info + 16) +
         multiply_divide(delta, load_le<std::uint32_t>(info + 24), 1ULL << 32);
}

TEST(KvmClock, ScalesForAnyFrequency) {
  for (const std::uint64_t khz :
       {100'000ULL, 999'999ULL, 1'000'000ULL, 1'000'001ULL, 2'299'998ULL, 3'000'000ULL, 5'800'000ULL}) {
    const TscScale scale = tsc_scale(khz);
    EXPECT_NE(scale.multiplier >> 31, 0U) << "precise";
    // A day's counts come out as a day, within a millionth of a millionth of a per cent or so.
    const std::uint64_t day_ns = 86'400'000'000'000;
    const std::uint64_t counts = multiply_divide(day_ns, khz, 1'000'000);
    const std::uint64_t got = scale_tsc(counts, scale);
    EXPECT_LT(got > day_ns ? got - day_ns : day_ns - got, 60'000U) << khz;
  }
}

TEST(KvmClock, AGuestReadsNanosecondsSinceTheStart) {
  TestClock clock(2'299'998);
  KvmClock kvm(clock);
  Memory memory;
  constexpr std::uint64_t kOffset = -100'000'000'000ULL;
  clock.pass(5000);
  ASSERT_TRUE(kvm.publish(64 | 1, kOffset, false, memory.write()));
  const std::uint8_t* info = memory.bytes.data() + 64;
  EXPECT_EQ(load_le<std::uint32_t>(info) % 2, 0U);
  EXPECT_EQ(info[29], 1) << "stable";
  for (int i = 0; i < 100; ++i) {
    clock.pass(2'299'998'000);  // a second
    const std::uint64_t got = guest_reads(info, clock.tsc() + kOffset);
    EXPECT_EQ(got, kvm.now_ns());
    const std::uint64_t want = (static_cast<std::uint64_t>(i) + 1) * 1'000'000'000 + 2173;
    EXPECT_LT(got > want ? got - want : want - got, 100U);
  }
  // Odd while the body changes, and another number afterwards.
  ASSERT_EQ(memory.versions.size(), 3U);
  EXPECT_EQ(memory.versions[0] % 2, 1U);
  EXPECT_EQ(memory.versions[1], memory.versions[0]);
  EXPECT_EQ(memory.versions[2], memory.versions[0] + 1);
  EXPECT_EQ(memory.bytes[63], 0xee);
  EXPECT_EQ(memory.bytes[96], 0xee);
}

TEST(KvmClock, GoesOnFromALoadedTimeAndSaysThatItStood) {
  TestClock clock(1'000'000);
  KvmClock kvm(clock);
  clock.pass(777);
  kvm.set(5'000'000'000);
  clock.pass(1000);
  EXPECT_EQ(kvm.now_ns(), 5'000'001'000U);
  Memory memory;
  ASSERT_TRUE(kvm.publish(64 | 1, 0, true, memory.write()));
  EXPECT_EQ(memory.bytes[64 + 29], 3);
  EXPECT_EQ(guest_reads(memory.bytes.data() + 64, clock.tsc()), 5'000'001'000U);
}

TEST(KvmClock, WritesNothingWhereItIsOffOrThereIsNoRam) {
  TestClock clock(1'000'000);
  KvmClock kvm(clock);
  Memory memory;
  EXPECT_TRUE(kvm.publish(64, 0, false, memory.write()));
  EXPECT_TRUE(memory.versions.empty());
  EXPECT_FALSE(kvm.publish((1ULL << 40) | 1, 0, false, memory.write()));
  EXPECT_FALSE(kvm.publish_wall_clock(1ULL << 40, memory.write()));
}

TEST(KvmClock, WallClockIsTheTimeOfItsZero) {
  TestClock clock(1'000'000);
  KvmClock kvm(clock);
  clock.pass(3'000'000'000);
  Memory memory;
  ASSERT_TRUE(kvm.publish_wall_clock(64, memory.write()));
  EXPECT_EQ(load_le<std::uint32_t>(memory.bytes.data() + 68), 1'699'999'997U);
  EXPECT_EQ(load_le<std::uint32_t>(memory.bytes.data() + 72), 123'456'789U);
}

TEST(HostClock, CountsWithTheHost) {
  const HostClock clock;
  const std::uint64_t ns = clock.now_ns();
  const std::uint64_t tsc = clock.tsc();
  while (clock.now_ns() - ns < 20'000'000) {
  }
  const std::uint64_t passed = clock.now_ns() - ns;
  const std::uint64_t counted = multiply_divide(clock.tsc() - tsc, 1'000'000, clock.tsc_khz());
  EXPECT_LT(counted > passed ? counted - passed : passed - counted, passed / 100);
}

}  // namespace
}  // namespace wisp::soft
