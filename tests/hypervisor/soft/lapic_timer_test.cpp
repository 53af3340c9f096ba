#include <gtest/gtest.h>

#include <array>

#include "hypervisor/soft/apic_kit.h"

namespace wisp::soft {
namespace {

TEST(LapicTimer, OneShotFiresOnce) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.write(0x320, 0x60);
  cpu.write(0x3e0, 0xb);  // divide by 1: 1 ns a tick
  cpu.write(0x380, 500);
  EXPECT_EQ(cpu.next_timer_ns(), kit.now + 500);
  kit.now += 499;
  cpu.poll_timer();
  EXPECT_EQ(cpu.read(0x390), 1U);
  EXPECT_EQ(kit.take(0), -1);
  kit.now += 1;
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), 0x60);
  cpu.eoi();
  EXPECT_EQ(cpu.read(0x390), 0U);
  EXPECT_EQ(cpu.next_timer_ns(), std::nullopt);
  kit.now += 5000;
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), -1);
}

TEST(LapicTimer, EveryDivisor) {
  constexpr std::array<std::pair<std::uint32_t, std::uint64_t>, 8> kDivisors = {
      {{0, 2}, {1, 4}, {2, 8}, {3, 16}, {8, 32}, {9, 64}, {10, 128}, {11, 1}}};
  for (const auto& [code, divisor] : kDivisors) {
    ApicKit kit(1);
    kit.cpu(0).write(0x3e0, code);
    kit.cpu(0).write(0x380, 10);
    EXPECT_EQ(kit.cpu(0).next_timer_ns(), kit.now + 10 * divisor) << code;
  }
}

TEST(LapicTimer, PeriodicKeepsItsPhaseAndDropsMissedPeriods) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  const std::uint64_t start = kit.now;
  cpu.write(0x320, 0x20060);
  cpu.write(0x3e0, 0xb);
  cpu.write(0x380, 100);
  kit.now += 350;
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), 0x60);
  cpu.eoi();
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), -1);
  EXPECT_EQ(cpu.next_timer_ns(), start + 400);
  EXPECT_EQ(cpu.read(0x390), 50U);
  cpu.write(0x380, 0);
  EXPECT_EQ(cpu.next_timer_ns(), std::nullopt);
}

TEST(LapicTimer, NewDivisorGoesOnFromTheCount) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.write(0x320, 0x60);
  cpu.write(0x3e0, 0xb);
  cpu.write(0x380, 1000);
  kit.now += 400;
  cpu.write(0x3e0, 0x3);
  EXPECT_EQ(cpu.read(0x390), 600U);
  EXPECT_EQ(cpu.next_timer_ns(), kit.now + 600 * 16);
}

TEST(LapicTimer, DeadlineFiresAndClears) {
  ApicKit kit(1);
  Lapic& cpu = kit.cpu(0);
  cpu.set_tsc_deadline(5000);
  EXPECT_EQ(cpu.tsc_deadline(), 0U) << "not in deadline mode";
  cpu.write(0x320, 0x40060);
  cpu.set_tsc_deadline(5000);  // TSC is twice the nanoseconds
  cpu.write(0x380, 77);        // ignored in this mode
  EXPECT_EQ(cpu.read(0x380), 0U);
  kit.now = 2499;
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), -1);
  const auto next = cpu.next_timer_ns();
  ASSERT_TRUE(next.has_value());
  kit.now = *next;
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), 0x60);
  cpu.eoi();
  EXPECT_EQ(cpu.tsc_deadline(), 0U);
  cpu.set_tsc_deadline(1);  // past: due at once
  EXPECT_EQ(cpu.next_timer_ns(), kit.now);
  cpu.poll_timer();
  EXPECT_EQ(kit.take(0), 0x60);
  cpu.set_tsc_deadline(~0ULL);
  EXPECT_GT(*cpu.next_timer_ns(), kit.now);
  cpu.write(0x320, 0x60);  // leaving the mode disarms
  EXPECT_EQ(cpu.next_timer_ns(), std::nullopt);
  cpu.write(0x320, 0x40060);
  EXPECT_EQ(cpu.tsc_deadline(), 0U);
}

TEST(LapicTimer, DueButUnseenAtSaveIsSavedAsPending) {
  ApicKit kit(1);
  kit.cpu(0).write(0x320, 0x60);
  kit.cpu(0).write(0x380, 10);
  kit.now += 1000;
  const LapicState saved = kit.cpu(0).save();
  ApicKit other(1);
  ASSERT_TRUE(other.cpu(0).load(saved).has_value());
  EXPECT_EQ(other.take(0), 0x60);
}

TEST(LapicTimer, MaskedTimerStaysSilent) {
  ApicKit kit(1);
  kit.cpu(0).write(0x320, 0x10060);
  kit.cpu(0).write(0x380, 10);
  kit.now += 1000;
  kit.cpu(0).write(0x320, 0x60);  // it had expired behind the mask
  kit.cpu(0).poll_timer();
  EXPECT_EQ(kit.take(0), -1);
}

}  // namespace
}  // namespace wisp::soft
