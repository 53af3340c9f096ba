// A guest that moves between the engines in the middle of its run: what one saves, the other loads.
#include <algorithm>
#include <chrono>
#include <thread>

#include "hypervisor/engine_test.h"

namespace wisp {
namespace {

constexpr std::uint32_t kKernelGsBase = 0xc0000102;
constexpr std::uint32_t kStar = 0xc0000081;
constexpr std::uint32_t kTsc = 0x10;
constexpr std::uint32_t kArchCapabilities = 0x10a;

std::uint64_t& msr_of(CpuState& state, std::uint32_t index) {
  const auto found = std::ranges::find(state.msrs, index, &CpuMsr::index);
  if (found != state.msrs.end()) {
    return found->value;
  }
  return state.msrs.emplace_back(CpuMsr{.index = index}).value;
}

// The engines show different processors by themselves. A guest that is to move is shown one that both have;
// these look at nothing that CPUID tells, so each engine may show its own.
CpuState without_model(CpuState state) {
  state.cpuid.clear();
  std::erase_if(state.msrs, [](const CpuMsr& entry) { return entry.index == kArchCapabilities; });
  return state;
}

// Adds 1 to rax and 3 to r15 in a loop, keeps rax in memory, and sends it out.
void put_counting(BareGuest& guest) {
  guest.put(0x1000, {
                        0x48, 0x31, 0xc0,                                // xor rax, rax
                        0x4d, 0x31, 0xff,                                // xor r15, r15
                        0x48, 0xff, 0xc0,                                // loop: inc rax
                        0x49, 0x83, 0xc7, 0x03,                          // add r15, 3
                        0x48, 0x89, 0x04, 0x25, 0x00, 0x20, 0x00, 0x00,  // mov [0x2000], rax
                        0xe7, 0x10,                                      // out 0x10, eax
                        0x48, 0x3b, 0x04, 0x25, 0x00, 0x20, 0x00, 0x00,  // cmp rax, [0x2000]
                        0x74, 0xe5,                                      // je loop
                        0xe7, 0x11,                                      // out 0x11, eax
                    });
  guest.start_long(0x1000);
}

struct Way {
  const char* name;
  std::vector<const char*> engines;  // in turn
  friend std::ostream& operator<<(std::ostream& out, const Way& way) { return out << way.name; }
};

class EngineMove : public ::testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    const auto& engines = GetParam().engines;
    if (std::ranges::any_of(engines, [](const char* name) { return std::string(name) == "kvm"; }) &&
        ::access("/dev/kvm", F_OK) != 0) {
      GTEST_SKIP() << "this host has no /dev/kvm";
    }
  }
};

TEST_P(EngineMove, ACountingGuestGoesOn) {
  const auto& engines = GetParam().engines;
  auto guest = std::make_unique<BareGuest>(open_engine(engines.front()));
  put_counting(*guest);
  {
    // Things that no instruction of this guest touches, to be found where they were.
    CpuState state = must(guest->vcpu().save());
    store_le<std::uint64_t>(state.xsave.data() + 160, 0x0123456789abcdef);  // XMM0
    store_le<std::uint64_t>(state.xsave.data() + 512, 3);
    store_le<std::uint32_t>(state.lapic.regs.data() + 0x80, 0x20);  // task priority
    state.sregs.cr8 = 2;
    state.sregs.fs.base = 0x7000;
    state.debug.db[1] = 0x123000;
    msr_of(state, kKernelGsBase) = 0xffff888000001000;
    msr_of(state, kStar) = 0x0023001000000000;
    must(guest->vcpu().load(state));
  }
  std::uint64_t counter = 0;
  std::size_t turn = 0;
  for (std::uint64_t value = 1; value <= 60; ++value) {
    ASSERT_EQ(port_write_of(guest->run()), (PortWrite{0x10, 4, value}));
    if (value % 10 != 0) {
      continue;
    }
    guest->complete();
    CpuState state = must(guest->vcpu().save());
    EXPECT_EQ(state.regs.r15, 3 * value);
    EXPECT_EQ(load_le<std::uint64_t>(state.xsave.data() + 160), 0x0123456789abcdefU);
    EXPECT_EQ(load_le<std::uint32_t>(state.lapic.regs.data() + 0x80), 0x20U);
    EXPECT_EQ(state.sregs.fs.base, 0x7000U);
    EXPECT_EQ(state.debug.db[1], 0x123000U);
    EXPECT_EQ(msr_of(state, kKernelGsBase), 0xffff888000001000U);
    EXPECT_EQ(msr_of(state, kStar), 0x0023001000000000U);
    EXPECT_GT(msr_of(state, kTsc), counter);
    counter = msr_of(state, kTsc);

    const char* engine = engines[++turn % engines.size()];
    auto next = std::make_unique<BareGuest>(open_engine(engine));
    std::memcpy(next->at(0), guest->at(0), BareGuest::kRamSize);
    const auto loaded = next->vcpu().load(without_model(state));
    ASSERT_TRUE(loaded.has_value()) << engine << ": " << loaded.error().message;
    const CpuState again = must(next->vcpu().save());
    EXPECT_EQ(again.regs, state.regs);
    EXPECT_EQ(again.debug, state.debug);
    EXPECT_EQ(again.sregs.cr0, state.sregs.cr0);
    EXPECT_EQ(again.sregs.cr3, state.sregs.cr3);
    EXPECT_EQ(again.sregs.cr4, state.sregs.cr4);
    EXPECT_EQ(again.sregs.efer, state.sregs.efer);
    EXPECT_EQ(again.sregs.cs, state.sregs.cs);
    EXPECT_EQ(again.sregs.ss, state.sregs.ss);
    EXPECT_EQ(again.sregs.tr, state.sregs.tr);
    EXPECT_EQ(again.sregs.gdt, state.sregs.gdt);
    EXPECT_EQ(again.sregs.apic_base, state.sregs.apic_base);
    EXPECT_EQ(again.run_state, state.run_state);
    guest = std::move(next);
  }
}

// A halted guest with its deadline timer set wakes on the other engine.
TEST_P(EngineMove, AHaltedGuestIsWokenByItsTimer) {
  const auto& engines = GetParam().engines;
  BareGuest first(open_engine(engines[0]));
  // Interrupt 0x61 goes to 0x3000 by a gate of the long mode's table at 0x5000; code segment at 8 of the
  // table at 0x4000.
  const auto fill = [](BareGuest& guest) {
    guest.put(0x1000, {0xfb, 0xf4, 0xeb, 0xfd});  // sti; hlt; jmp to the hlt
    guest.put(0x3000, {0xe6, 0x22, 0xeb, 0xfe});  // out 0x22, al; jmp to itself
    store_le<std::uint64_t>(guest.at(0x4008), 0x00af9b000000ffff);
    store_le<std::uint64_t>(guest.at(0x4010), 0x00cf93000000ffff);
    store_le<std::uint64_t>(guest.at(0x5000 + 0x61 * 16), 0x00008e0000083000);
  };
  fill(first);
  first.start_long(0x1000);
  CpuState state = must(first.vcpu().save());
  state.sregs.gdt = {.base = 0x4000, .limit = 0x17};
  state.sregs.idt = {.base = 0x5000, .limit = 0xfff};
  state.regs.rsp = 0x8000;
  store_le<std::uint32_t>(state.lapic.regs.data() + 0xf0, 0x1ff);
  store_le<std::uint32_t>(state.lapic.regs.data() + 0x320, (2U << 17) | 0x61);
  msr_of(state, 0x6e0) = msr_of(state, kTsc) + state.tsc_khz * 300;  // 0.3 s
  must(first.vcpu().load(state));
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    first.vcpu().kick();
  });
  EXPECT_TRUE(std::holds_alternative<InterruptedExit>(first.vcpu().run()));
  kicker.join();
  const CpuState halted = must(first.vcpu().save());
  EXPECT_EQ(halted.run_state, CpuRunState::kHalted);

  BareGuest second(open_engine(engines[1 % engines.size()]));
  std::memcpy(second.at(0), first.at(0), BareGuest::kRamSize);
  must(second.vcpu().load(without_model(halted)));
  EXPECT_EQ(port_write_of(second.run()).port, 0x22);
}

INSTANTIATE_TEST_SUITE_P(Ways, EngineMove,
                         ::testing::Values(Way{"kvm_to_interpreter_and_back", {"kvm", "interpreter"}},
                                           Way{"translator_to_kvm_and_back", {"translator", "kvm"}},
                                           Way{"among_all", {"kvm", "interpreter", "translator"}},
                                           Way{"interpreter_to_translator_and_back",
                                               {"interpreter", "translator"}}),
                         [](const auto& way) { return std::string(way.param.name); });

}  // namespace
}  // namespace wisp
