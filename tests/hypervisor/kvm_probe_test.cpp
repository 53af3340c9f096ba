// The probe of ring 0: its judgement on numbers from many kinds of host, and its measurement on this one.
#include "hypervisor/kvm/kvm_probe.h"

#include <gmock/gmock.h>

#include <chrono>
#include <thread>

#include "hypervisor/kvm_guest.h"

namespace wisp {
namespace {

struct Host {
  const char* name;
  double instruction_ns;
  std::uint64_t exit_ns;
  std::uint64_t noise_ns;  // left over in the fastest of several runs
  Ring0Verdict verdict;
};

class JudgeRing0 : public ::testing::TestWithParam<Host> {};

TEST_P(JudgeRing0, SeparatesThem) {
  const Host& host = GetParam();
  for (const bool noise_in_long : {false, true}) {
    Ring0Samples samples;
    samples.short_ns = host.exit_ns + (noise_in_long ? 0 : host.noise_ns);
    samples.long_ns = host.exit_ns + (noise_in_long ? host.noise_ns : 0) +
                      static_cast<std::uint64_t>(host.instruction_ns * kRing0Extra);
    std::optional<Ring0Probe> probe;
    while (!probe) {
      ++samples.rounds;
      ASSERT_LE(samples.rounds, kRing0MostRounds);
      probe = judge_ring0(samples);
    }
    EXPECT_EQ(probe->verdict, host.verdict);
    EXPECT_LE(probe->ns_per_instruction,
              host.instruction_ns + static_cast<double>(host.exit_ns + host.noise_ns) / kRing0Extra);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Hosts, JudgeRing0,
    ::testing::Values(Host{"BareMetal", 0.4, 2'000, 1'000, Ring0Verdict::kHardware},
                      Host{"NestedInACloud", 0.6, 40'000, 20'000, Ring0Verdict::kHardware},
                      Host{"NestedUnderATranslator", 10, 340'000, 60'000, Ring0Verdict::kHardware},
                      Host{"NestedUnderABusyTranslator", 15, 1'000'000, 150'000, Ring0Verdict::kHardware},
                      Host{"Interpreter", 324, 8'000, 20'000, Ring0Verdict::kEmulated},
                      Host{"FastInterpreter", 140, 3'000, 10'000, Ring0Verdict::kEmulated},
                      Host{"SlowInterpreter", 1'200, 10'000, 100'000, Ring0Verdict::kEmulated}),
    [](const auto& host) { return host.param.name; });

TEST(JudgeRing0Rounds, FastIsSeenAtOnceAndSlowIsLookedAtAgain) {
  EXPECT_EQ(judge_ring0({}), std::nullopt);
  EXPECT_TRUE(judge_ring0({.rounds = 1, .short_ns = 3'000, .long_ns = 8'000}).has_value());
  EXPECT_FALSE(judge_ring0({.rounds = 1, .short_ns = 3'000, .long_ns = 8'000'000}).has_value());
}

using KvmProbe = KvmTest;

TEST_F(KvmProbe, AgreesWithAMeasurementOfItsOwnKind) {
  KvmGuest guest;
  const SystemClock clock;
  const Ring0Probe probe = probe_ring0(guest.vcpu(), guest.memory(), clock);
  ASSERT_NE(probe.verdict, Ring0Verdict::kBroken) << probe.failure;

  guest.put(0x1000, {
                        0x0f, 0x20, 0xd0,  // loop: mov eax, cr2
                        0x49,              // dec ecx
                        0x75, 0xfa,        // jnz loop
                        0xe6, 0x80,        // out 0x80, al
                    });
  const auto time = [&](std::uint32_t iterations) {
    std::uint64_t best = UINT64_MAX;
    for (int i = 0; i < 5; ++i) {
      guest.start_protected(0x1000);
      CpuRegs regs = must(guest.vcpu().regs());
      regs.rcx = iterations;
      must(guest.vcpu().set_regs(regs));
      const std::uint64_t start = clock.monotonic_ns();
      EXPECT_EQ(port_write_of(guest.run()).port, 0x80);
      best = std::min(best, clock.monotonic_ns() - start);
      guest.complete();
    }
    return best;
  };
  const std::uint64_t few = time(1);
  const std::uint64_t many = time(5001);
  const double own = many > few ? static_cast<double>(many - few) / 15000 : 0;
  EXPECT_EQ(own > 60, probe.verdict == Ring0Verdict::kEmulated) << own << " " << probe.ns_per_instruction;
  if (probe.verdict == Ring0Verdict::kEmulated) {
    EXPECT_GT(probe.ns_per_instruction, own / 5);
    EXPECT_LT(probe.ns_per_instruction, own * 5);
  }
}

TEST_F(KvmProbe, LeavesNoTrace) {
  KvmGuest guest;
  guest.put(0x1000, {0xe6, 0x10});  // out 0x10, al
  for (Gpa at = kRing0ProbeStart; at < kRing0ProbeStart + kRing0ProbeSize; at += 8) {
    ASSERT_TRUE(guest.memory().store(at, std::uint64_t{0x1122334455667788}));
  }
  guest.start_real(0x1000);
  const CpuState before = must(guest.vcpu().save());
  const SystemClock clock;
  (void)probe_ring0(guest.vcpu(), guest.memory(), clock);
  const CpuState after = must(guest.vcpu().save());
  EXPECT_EQ(after.regs, before.regs);
  EXPECT_EQ(after.sregs, before.sregs);
  EXPECT_EQ(port_write_of(guest.run()).port, 0x10);
  for (Gpa at = kRing0ProbeStart; at < kRing0ProbeStart + kRing0ProbeSize; at += 8) {
    ASSERT_EQ(guest.memory().load<std::uint64_t>(at), 0x1122334455667788U) << at;
  }
}

TEST_F(KvmProbe, WorksByItselfAndAmongSignals) {
  const auto hypervisor = must(KvmHypervisor::open());
  const SystemClock clock;
  EXPECT_NE(probe_ring0(*hypervisor, clock).verdict, Ring0Verdict::kBroken);
  KvmGuest guest;
  guest.vcpu().kick();  // as if somebody had wanted it to stop already
  EXPECT_NE(probe_ring0(guest.vcpu(), guest.memory(), clock).verdict, Ring0Verdict::kBroken);
}

TEST_F(KvmProbe, AVmWithoutMemoryIsBroken) {
  KvmGuest guest({}, false);
  const SystemClock clock;
  const Ring0Probe probe = probe_ring0(guest.vcpu(), GuestMemory(), clock);
  EXPECT_EQ(probe.verdict, Ring0Verdict::kBroken);
  EXPECT_FALSE(describe(probe).usable);
  EXPECT_THAT(describe(probe).summary, ::testing::HasSubstr(probe.failure));
}

TEST(DescribeRing0, SaysWhatToDo) {
  const EngineReport good = describe({.verdict = Ring0Verdict::kHardware, .ns_per_instruction = 0.5});
  EXPECT_TRUE(good.usable);
  EXPECT_THAT(good.summary, ::testing::HasSubstr("less than 1 ns"));
  const EngineReport bad = describe({.verdict = Ring0Verdict::kEmulated, .ns_per_instruction = 1200});
  EXPECT_FALSE(bad.usable);
  EXPECT_THAT(bad.summary, ::testing::HasSubstr("1200 ns"));
  EXPECT_THAT(bad.advice, ::testing::HasSubstr("26 minutes"));
}

}  // namespace
}  // namespace wisp
