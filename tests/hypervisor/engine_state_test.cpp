// State out of a vCPU and into another: complete, in order, and safe against what a damaged file may hold.
#include <gmock/gmock.h>

#include <algorithm>
#include <functional>
#include <random>

#include "hypervisor/engine_test.h"

namespace wisp {
namespace {

using EngineState = EngineTest;
WISP_FOR_EACH_ENGINE(EngineState);

CpuRegs distinct_regs() {
  return {.rax = 1,
          .rbx = 2,
          .rcx = 3,
          .rdx = 4,
          .rsi = 5,
          .rdi = 6,
          .rsp = 7,
          .rbp = 8,
          .r8 = 9,
          .r9 = 10,
          .r10 = 11,
          .r11 = 12,
          .r12 = 13,
          .r13 = 14,
          .r14 = 15,
          .r15 = 0xfedcba9876543210,
          .rip = 0x1000,
          .rflags = 0x40 | 2};
}

std::uint64_t msr_value(const CpuState& state, std::uint32_t index) {
  const auto found = std::ranges::find(state.msrs, index, &CpuMsr::index);
  return found != state.msrs.end() ? found->value : UINT64_MAX;
}

void set_msr(CpuState& state, std::uint32_t index, std::uint64_t value) {
  const auto found = std::ranges::find(state.msrs, index, &CpuMsr::index);
  ASSERT_NE(found, state.msrs.end());
  found->value = value;
}

constexpr std::uint32_t kTsc = 0x10;
constexpr std::uint32_t kKernelGsBase = 0xc0000102;
constexpr std::uint32_t kTscDeadline = 0x6e0;

TEST_P(EngineState, RegistersRoundTrip) {
  BareGuest guest = make();
  must(guest.vcpu().set_regs(distinct_regs()));
  EXPECT_EQ(must(guest.vcpu().regs()), distinct_regs());
  guest.start_long(0x1000);
  const CpuSpecialRegs sregs = must(guest.vcpu().special_regs());
  EXPECT_TRUE(sregs.cs.long_mode);
  EXPECT_EQ(sregs.cs.selector, 8);
  EXPECT_FALSE(sregs.cs.system);
  EXPECT_EQ(sregs.cr3, 0x90000U);
  must(guest.vcpu().set_special_regs(sregs));
  EXPECT_EQ(must(guest.vcpu().special_regs()), sregs);
}

TEST_P(EngineState, PowerUpStateIsWhatAKernelNeeds) {
  VmOptions options;
  options.max_vcpus = 2;
  options.topology.cores = 2;
  BareGuest guest = make(options);
  const CpuState boot = must(guest.vcpu(0).save());
  const CpuState other = must(guest.vcpu(1).save());
  EXPECT_EQ(boot.run_state, CpuRunState::kRunnable);
  EXPECT_EQ(other.run_state, CpuRunState::kUninitialized);
  EXPECT_EQ(boot.sregs.apic_base, 0xfee00900U);
  EXPECT_EQ(other.sregs.apic_base, 0xfee00800U);
  EXPECT_EQ(msr_value(boot, 0x2ff), 0x806U);
  EXPECT_EQ(msr_value(boot, 0x1a0) & 1, 1U);
  EXPECT_EQ(load_le<std::uint32_t>(boot.lapic.regs.data() + 0x350), 0x700U);
  EXPECT_EQ(load_le<std::uint32_t>(boot.lapic.regs.data() + 0x360), 0x400U);
  EXPECT_EQ(load_le<std::uint32_t>(other.lapic.regs.data() + 0x20), 1U << 24);
  EXPECT_FALSE(boot.cpuid.empty());
  EXPECT_NE(boot.cpuid, other.cpuid);
  // The counter is loaded first and its deadline last.
  EXPECT_EQ(boot.msrs.front().index, kTsc);
  EXPECT_EQ(boot.msrs.back().index, kTscDeadline);
}

TEST_P(EngineState, WholeStateRoundTripsIntoAnotherVm) {
  BareGuest first = make();
  first.start_long(0x1000);
  must(first.vcpu().set_regs(distinct_regs()));
  CpuState changed = must(first.vcpu().save());
  set_msr(changed, kKernelGsBase, 0xffff888000001000);
  changed.debug.db = {0x1111, 0x2222, 0x3333, 0x4444};
  changed.sregs.cr2 = 0x5555;
  store_le<std::uint64_t>(changed.xsave.data() + 160, 0x0123456789abcdef);  // XMM0
  store_le<std::uint64_t>(changed.xsave.data() + 512, 3);                   // x87 and SSE in use
  store_le<std::uint32_t>(changed.lapic.regs.data() + 0x80, 0x20);          // task priority
  changed.sregs.cr8 = 2;
  changed.events.nmi.masked = true;
  changed.run_state = CpuRunState::kHalted;
  must(first.vcpu().load(changed));

  const CpuState saved = must(first.vcpu().save());
  BareGuest second = make();
  must(second.vcpu().load(saved));
  const CpuState again = must(second.vcpu().save());
  EXPECT_EQ(again.regs, distinct_regs());
  EXPECT_EQ(again.sregs, saved.sregs);
  EXPECT_EQ(again.sregs.cr2, 0x5555U);
  EXPECT_EQ(again.debug, changed.debug);
  EXPECT_EQ(load_le<std::uint64_t>(again.xsave.data() + 160), 0x0123456789abcdefU);
  EXPECT_EQ(again.xcr0, saved.xcr0);
  EXPECT_EQ(again.lapic.regs, saved.lapic.regs);
  EXPECT_EQ(load_le<std::uint32_t>(again.lapic.regs.data() + 0x80), 0x20U);
  EXPECT_TRUE(again.events.nmi.masked);
  EXPECT_EQ(again.run_state, CpuRunState::kHalted);
  EXPECT_EQ(again.cpuid, saved.cpuid);
  EXPECT_EQ(again.tsc_khz, saved.tsc_khz);
  EXPECT_EQ(msr_value(again, kKernelGsBase), 0xffff888000001000U);
  ASSERT_EQ(again.msrs.size(), saved.msrs.size());
  for (std::size_t i = 0; i < saved.msrs.size(); ++i) {
    if (saved.msrs[i].index == kTsc) {
      EXPECT_GE(again.msrs[i].value, saved.msrs[i].value);
      EXPECT_LT(again.msrs[i].value - saved.msrs[i].value, saved.tsc_khz * 60'000);
    } else {
      EXPECT_EQ(again.msrs[i], saved.msrs[i]) << "MSR " << std::hex << saved.msrs[i].index;
    }
  }
}

// Whether the engine sets a guest's counter at all; a KVM that interprets guests in software may not.
bool counter_can_be_set(BareGuest guest) {
  CpuState state = must(guest.vcpu().save());
  const std::uint64_t hours_ahead = msr_value(state, kTsc) + state.tsc_khz * 10'000'000;
  set_msr(state, kTsc, hours_ahead);
  must(guest.vcpu().load(state));
  return msr_value(must(guest.vcpu().save()), kTsc) >= hours_ahead;
}

// A guest saved in its first second of life goes on from there, on all its CPUs, though KVM would rather take
// the values for an attempt to synchronise.
TEST_P(EngineState, AYoungGuestsClockIsNotSetBack) {
  VmOptions options;
  options.max_vcpus = 3;
  options.topology.cores = 3;
  BareGuest guest = make(options);
  const bool can_be_set = counter_can_be_set(make());
  std::vector<CpuState> states;
  for (std::size_t i = 0; i < 3; ++i) {
    states.push_back(must(guest.vcpu(i).save()));
  }
  const std::uint64_t second = states[0].tsc_khz * 1000;
  const std::uint64_t saved = msr_value(states[0], kTsc) + second * 3 / 5;
  for (std::size_t i = 0; i < 3; ++i) {
    set_msr(states[i], kTsc, saved + i * 1000);  // read one after another
    must(guest.vcpu(i).load(states[i]));
  }
  std::uint64_t least = UINT64_MAX;
  std::uint64_t most = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const std::uint64_t now = msr_value(must(guest.vcpu(i).save()), kTsc);
    if (can_be_set) {
      EXPECT_GE(now, saved) << i;
    }
    least = std::min(least, now);
    most = std::max(most, now);
  }
  EXPECT_LT(most - least, second / 2);
}

// An armed deadline is an absolute value of the counter: it comes back only where the counter and the local
// APIC are in place before it.
TEST_P(EngineState, AnArmedDeadlineTimerSurvives) {
  BareGuest first = make();
  CpuState state = must(first.vcpu().save());
  store_le<std::uint32_t>(state.lapic.regs.data() + 0xf0, 0x1ff);
  store_le<std::uint32_t>(state.lapic.regs.data() + 0x320, (2U << 17) | 0x61);  // deadline mode, vector 0x61
  set_msr(state, kTsc, 1'000'000'000'000);
  const std::uint64_t deadline = 1'000'000'000'000 + state.tsc_khz * 3'600'000;
  set_msr(state, kTscDeadline, deadline);
  std::ranges::reverse(state.msrs);  // whatever the order in the file
  must(first.vcpu().load(state));
  const CpuState saved = must(first.vcpu().save());
  EXPECT_EQ(msr_value(saved, kTscDeadline), deadline);
  BareGuest second = make();
  must(second.vcpu().load(saved));
  EXPECT_EQ(msr_value(must(second.vcpu().save()), kTscDeadline), deadline);
}

// Counts in a register and sends each value out, in a loop.
void put_counting(BareGuest& guest) {
  guest.put(0x1000, {
                        0x31, 0xc0,                 // xor eax, eax
                        0x40,                       // loop: inc eax
                        0xe7, 0x10,                 // out 0x10, eax
                        0x89, 0x05, 0, 0x20, 0, 0,  // mov [0x2000], eax
                        0x3b, 0x05, 0, 0x20, 0, 0,  // cmp eax, [0x2000]
                        0x74, 0xef,                 // je loop
                        0xe7, 0x11,                 // out 0x11, eax: memory and register differ
                    });
}

TEST_P(EngineState, AGuestMovesBetweenVmsInTheMiddle) {
  auto guest = std::make_unique<BareGuest>(engine(), VmOptions{});
  put_counting(*guest);
  guest->start_protected(0x1000);
  for (std::uint64_t value = 1; value <= 60; ++value) {
    ASSERT_EQ(port_write_of(guest->run()), (PortWrite{0x10, 4, value}));
    if (value % 10 == 0) {
      EXPECT_FALSE(guest->vcpu().save().has_value());  // the write is not completed yet
      guest->complete();
      const CpuState state = must(guest->vcpu().save());
      const auto platform = must(guest->vm().save_platform());
      auto next = std::make_unique<BareGuest>(engine(), VmOptions{});
      std::memcpy(next->at(0), guest->at(0), BareGuest::kRamSize);
      must(next->vcpu().load(state));
      must(next->vm().load_platform(platform));
      guest = std::move(next);
    }
  }
}

TEST_P(EngineState, ResetIsPowerUpAgain) {
  BareGuest guest = make();
  const CpuState fresh = must(guest.vcpu().save());
  put_counting(guest);
  guest.start_protected(0x1000);
  ASSERT_EQ(port_write_of(guest.run()).value, 1U);
  EXPECT_FALSE(guest.vcpu().reset().has_value());
  guest.complete();
  CpuState used = must(guest.vcpu().save());
  set_msr(used, kKernelGsBase, 0x1234000);
  set_msr(used, 0x2ff, 0);
  store_le<std::uint32_t>(used.lapic.regs.data() + 0xf0, 0x1ff);
  store_le<std::uint32_t>(used.lapic.regs.data() + 0x210, 2);  // an interrupt waits
  used.debug.db[0] = 0x1000;
  used.events.nmi.pending = true;
  store_le<std::uint64_t>(used.xsave.data() + 160, 77);
  store_le<std::uint64_t>(used.xsave.data() + 512, 3);
  used.run_state = CpuRunState::kHalted;
  must(guest.vcpu().load(used));
  must(guest.vcpu().reset());

  const CpuState state = must(guest.vcpu().save());
  EXPECT_EQ(state.regs.rip, 0xfff0U);
  EXPECT_EQ(state.regs.rax, 0U);
  EXPECT_EQ(state.regs.rflags, 2U);
  EXPECT_NE(state.regs.rdx, 0U);  // family, model, stepping
  EXPECT_EQ(state.sregs.cr0, 0x60000010U);
  EXPECT_EQ(state.sregs.cs.base, 0xffff0000U);
  EXPECT_EQ(state.sregs.cs.selector, 0xf000);
  EXPECT_EQ(state.sregs.apic_base, 0xfee00900U);
  EXPECT_EQ(state.debug, CpuDebugRegs{});
  EXPECT_EQ(state.lapic.regs, fresh.lapic.regs);
  EXPECT_EQ(load_le<std::uint64_t>(state.xsave.data() + 160), 0U);
  EXPECT_FALSE(state.events.nmi.pending);
  EXPECT_EQ(state.run_state, CpuRunState::kRunnable);
  for (std::size_t i = 0; i < state.msrs.size(); ++i) {
    if (state.msrs[i].index != kTsc) {
      EXPECT_EQ(state.msrs[i], fresh.msrs[i]) << "MSR " << std::hex << state.msrs[i].index;
    }
  }
}

// Loads a damaged state; gives the error's text. The vCPU takes the good state afterwards.
std::string refusal(BareGuest& guest, const CpuState& good, const std::function<void(CpuState&)>& damage) {
  CpuState state = good;
  damage(state);
  const auto loaded = guest.vcpu().load(state);
  EXPECT_TRUE(guest.vcpu().load(good).has_value());
  return loaded ? "" : loaded.error().message;
}

TEST_P(EngineState, HostileStatesAreRefused) {
  using ::testing::HasSubstr;
  BareGuest guest = make();
  const CpuState good = must(guest.vcpu().save());
  const auto refused = [&](const std::function<void(CpuState&)>& damage) {
    return refusal(guest, good, damage);
  };
  EXPECT_THAT(refused([](CpuState& s) { s.xsave.clear(); }), HasSubstr("XSAVE"));
  EXPECT_THAT(refused([](CpuState& s) { s.xsave.resize(100); }), HasSubstr("100 bytes"));
  EXPECT_THAT(refused([](CpuState& s) { s.xsave.resize(1 << 20); }), HasSubstr("XSAVE"));
  EXPECT_THAT(refused([](CpuState& s) { s.xsave.resize(60'000, 1); }), HasSubstr("in use"));
  EXPECT_THAT(refused([](CpuState& s) { store_le(s.xsave.data() + 520, 1ULL << 63); }),
              HasSubstr("compacted"));
  EXPECT_THAT(refused([](CpuState& s) { store_le(s.xsave.data() + 512, 1ULL << 62); }),
              HasSubstr("vector registers"));
  EXPECT_THAT(refused([](CpuState& s) { s.xcr0 = 0; }), HasSubstr("XCR0"));
  EXPECT_THAT(refused([](CpuState& s) { s.run_state = static_cast<CpuRunState>(200); }),
              HasSubstr("run state 200"));
  EXPECT_THAT(refused([](CpuState& s) { s.msrs.push_back(s.msrs.front()); }), HasSubstr("twice"));
  EXPECT_THAT(refused([](CpuState& s) { s.msrs.resize(100'000); }), HasSubstr("100000 MSRs"));
  EXPECT_THAT(refused([](CpuState& s) { s.msrs.push_back({0x12345678, 1}); }), HasSubstr("0x12345678"));
  EXPECT_THAT(refused([](CpuState& s) { set_msr(s, 0x2ff, 2); }), HasSubstr("0x2ff"));
  EXPECT_THAT(refused([](CpuState& s) { s.tsc_khz = UINT64_MAX; }), HasSubstr("kHz"));
  EXPECT_THAT(refused([](CpuState& s) { s.events.exception = {.injected = true, .vector = 200}; }),
              HasSubstr("exception 200"));
  EXPECT_THAT(refused([](CpuState& s) { s.sregs.cr4 = 1ULL << 40; }), HasSubstr("special registers"));
  EXPECT_THAT(refused([](CpuState& s) { s.cpuid.resize(1); }), HasSubstr("without leaf 1"));
  EXPECT_THAT(refused([](CpuState& s) {
                while (s.cpuid.size() < 300) {
                  s.cpuid.push_back({.leaf = 0x50000000});
                }
              }),
              HasSubstr("300 CPUID entries"));
  EXPECT_THAT(
      refused([](CpuState& s) { std::ranges::find(s.cpuid, 1U, &CpuidEntry::leaf)->ebx |= 0xff000000; }),
      HasSubstr("APIC id 255"));
  // An MSR unknown here without a value is nothing to lose.
  EXPECT_EQ(refused([](CpuState& s) { s.msrs.push_back({0x12345678, 0}); }), "");
}

TEST_P(EngineState, AHostWithFewerFeaturesRefusesByName) {
  BareGuest guest = make();
  const CpuState good = must(guest.vcpu().save());
  CpuState more = good;
  const auto leaf7 = std::ranges::find(more.cpuid, 7U, &CpuidEntry::leaf);
  ASSERT_NE(leaf7, more.cpuid.end());
  leaf7->ebx |= 1U << 2;  // SGX, which no guest here has
  auto loaded = guest.vcpu().load(more);
  ASSERT_FALSE(loaded.has_value());
  EXPECT_THAT(loaded.error().message, ::testing::HasSubstr("leaf 0x7 sub-leaf 0 EBX bit 2"));

  CpuState immune = good;
  const auto capabilities = std::ranges::find(immune.msrs, 0x10aU, &CpuMsr::index);
  if (capabilities != immune.msrs.end()) {
    capabilities->value |= (1ULL << 62) | (1ULL << 27) | (1ULL << 26) | (1ULL << 20);
    if (capabilities->value != msr_value(good, 0x10a)) {
      loaded = guest.vcpu().load(immune);
      ASSERT_FALSE(loaded.has_value());
      EXPECT_THAT(loaded.error().message, ::testing::HasSubstr("immunities"));
    }
  }

  // Fewer are taken before the first run: the guest goes on seeing what it saw.
  CpuState fewer = good;
  const auto leaf1 = std::ranges::find(fewer.cpuid, 1U, &CpuidEntry::leaf);
  leaf1->ecx &= ~(1U << 30);  // RDRAND
  must(guest.vcpu().load(fewer));
  EXPECT_EQ(must(guest.vcpu().save()).cpuid, fewer.cpuid);
}

TEST_P(EngineState, RandomStatesNeverDoHarm) {
  BareGuest guest = make();
  const CpuState good = must(guest.vcpu().save());
  std::mt19937_64 random(1);  // NOLINT: the same sequence each time
  for (int i = 0; i < 300; ++i) {
    CpuState state = good;
    for (int change = 0; change < 4; ++change) {
      switch (random() % 6) {
        case 0:
          state.lapic.regs[random() % state.lapic.regs.size()] = static_cast<std::uint8_t>(random());
          break;
        case 1:
          state.xsave[random() % state.xsave.size()] = static_cast<std::uint8_t>(random());
          break;
        case 2:
          state.msrs[random() % state.msrs.size()].value = random();
          break;
        case 3:
          state.sregs.cr0 = random();
          state.sregs.cr4 = random() & 0x3fffff;
          state.sregs.efer = random() & 0xffff;
          break;
        case 4:
          state.regs.rip = random();
          state.regs.rflags = random();
          break;
        default:
          state.events.interrupt = {.injected = true, .vector = static_cast<std::uint8_t>(random())};
          state.events.sipi_vector = static_cast<std::uint32_t>(random());
          break;
      }
    }
    if (guest.vcpu().load(state)) {
      guest.vcpu().kick();
      (void)guest.vcpu().run();
    }
  }
  must(guest.vcpu().load(good));
}

TEST_P(EngineState, PlatformRecordRoundTrips) {
  BareGuest first = make();
  first.put(0x1000, {
                        0xb0, 0x34, 0xe6, 0x43,  // PIT channel 0, mode 2: mov al, 0x34; out 0x43, al
                        0xb0, 0x11, 0xe6, 0x40,  // reload 0x2211
                        0xb0, 0x22, 0xe6, 0x40,  //
                        0xb0, 0x5a, 0xe6, 0x21,  // mask of the PIC
                        0xe6, 0x10,              // out 0x10, al
                    });
  first.start_real(0x1000);
  ASSERT_EQ(port_write_of(first.run()).port, 0x10);
  first.complete();
  const auto record = must(first.vm().save_platform());
  BareGuest second = make();
  must(second.vm().load_platform(record));
  const auto again = must(second.vm().save_platform());
  ASSERT_EQ(again.size(), record.size());
  second.put(0x1000, {0xe4, 0x21, 0xe6, 0x10});  // in al, 0x21; out 0x10, al
  second.start_real(0x1000);
  EXPECT_EQ(port_write_of(second.run()), (PortWrite{0x10, 1, 0x5a}));
}

TEST_P(EngineState, HostilePlatformRecordsAreRefused) {
  BareGuest guest = make();
  const auto good = must(guest.vm().save_platform());
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(guest.vm().load_platform(std::span(good).first(size)).has_value()) << size;
  }
  auto longer = good;
  longer.push_back(0);
  EXPECT_FALSE(guest.vm().load_platform(longer).has_value());
  auto version = good;
  version[0] = 9;
  EXPECT_FALSE(guest.vm().load_platform(version).has_value());
  if (!soft()) {
    auto chip = good;
    chip[12] = 2;  // the first controller says that it is the third
    EXPECT_FALSE(guest.vm().load_platform(chip).has_value());
  }
  std::mt19937_64 random(2);  // NOLINT: the same sequence each time
  for (int i = 0; i < 500; ++i) {
    auto damaged = good;
    for (int change = 0; change < 8; ++change) {
      damaged[random() % damaged.size()] = static_cast<std::uint8_t>(random());
    }
    (void)guest.vm().load_platform(damaged);
  }
  must(guest.vm().load_platform(good));
  VmOptions without_pit;
  without_pit.pit = false;
  BareGuest other = make(without_pit);
  EXPECT_FALSE(other.vm().load_platform(good).has_value());
}

}  // namespace
}  // namespace wisp
