// Timers, clocks and non-maskable interrupts, as a kernel's start-up uses them.
#include <chrono>
#include <thread>

#include "hypervisor/engine_test.h"

namespace wisp {
namespace {

using EngineTime = EngineTest;
WISP_FOR_EACH_ENGINE(EngineTime);
using SteadyClock = std::chrono::steady_clock;

constexpr std::uint32_t kTsc = 0x10;
constexpr std::uint32_t kTscDeadline = 0x6e0;

std::uint64_t& msr_of(CpuState& state, std::uint32_t index) {
  const auto found = std::ranges::find(state.msrs, index, &CpuMsr::index);
  if (found != state.msrs.end()) {
    return found->value;
  }
  return state.msrs.emplace_back(CpuMsr{.index = index}).value;
}

// Long mode with an interrupt table whose vector 2 goes to 0x2800 and 0x61 to 0x3000; interrupts are off.
void start_with_table(BareGuest& guest, Gpa entry) {
  store_le<std::uint64_t>(guest.at(0x4008), 0x00af9b000000ffff);
  store_le<std::uint64_t>(guest.at(0x4010), 0x00cf93000000ffff);
  store_le<std::uint64_t>(guest.at(0x5000 + 2 * 16), 0x00008e0000082800);
  store_le<std::uint64_t>(guest.at(0x5000 + 0x61 * 16), 0x00008e0000083000);
  guest.start_long(entry);
  CpuState state = must(guest.vcpu().save());
  state.sregs.gdt = {.base = 0x4000, .limit = 0x17};
  state.sregs.idt = {.base = 0x5000, .limit = 0xfff};
  state.regs.rsp = 0x8000;
  store_le<std::uint32_t>(state.lapic.regs.data() + 0xf0, 0x1ff);
  must(guest.vcpu().load(state));
}

void set_timer(BareGuest& guest, std::uint32_t lvt, std::uint64_t deadline_ms, std::uint32_t count) {
  CpuState state = must(guest.vcpu().save());
  store_le<std::uint32_t>(state.lapic.regs.data() + 0x320, lvt);
  store_le<std::uint32_t>(state.lapic.regs.data() + 0x3e0, 0xb);  // every tick of 1 ns
  store_le<std::uint32_t>(state.lapic.regs.data() + 0x380, count);
  store_le<std::uint32_t>(state.lapic.regs.data() + 0x390, count);
  msr_of(state, kTscDeadline) = deadline_ms == 0 ? 0 : msr_of(state, kTsc) + state.tsc_khz * deadline_ms;
  must(guest.vcpu().load(state));
}

constexpr std::initializer_list<std::uint8_t> kSpin = {0xfb, 0xeb, 0xfe};        // sti; jmp to itself
constexpr std::initializer_list<std::uint8_t> kHalt = {0xfb, 0xf4, 0xeb, 0xfd};  // sti; hlt; jmp to hlt
constexpr std::initializer_list<std::uint8_t> kTell = {0xe6, 0x22, 0xeb,
                                                       0xfe};  // out 0x22, al; jmp to itself

TEST_P(EngineTime, ADeadlineInterruptsAGuestThatSpinsOrSleeps) {
  for (const bool spins : {true, false}) {
    BareGuest guest = make();
    guest.put(0x1000, spins ? kSpin : kHalt);
    guest.put(0x3000, kTell);
    start_with_table(guest, 0x1000);
    set_timer(guest, (2U << 17) | 0x61, 30, 0);
    const auto start = SteadyClock::now();
    EXPECT_EQ(port_write_of(guest.run()).port, 0x22);
    const auto took = SteadyClock::now() - start;
    EXPECT_GE(took, std::chrono::milliseconds(25)) << spins;
    EXPECT_LT(took, std::chrono::seconds(5)) << spins;
  }
}

TEST_P(EngineTime, APeriodicTimerComesAgain) {
  BareGuest guest = make();
  guest.put(0x1000, kHalt);
  guest.put(0x3000, {
                        0xe6, 0x22,                    // out 0x22, al
                        0xbb, 0xb0, 0x00, 0xe0, 0xfe,  // mov ebx, 0xfee000b0
                        0x31, 0xc9,                    // xor ecx, ecx
                        0x89, 0x0b,                    // mov [rbx], ecx: EOI
                        0x48, 0xcf,                    // iretq
                    });
  start_with_table(guest, 0x1000);
  set_timer(guest, (1U << 17) | 0x61, 0, 10'000'000);
  const auto start = SteadyClock::now();
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(port_write_of(guest.run()).port, 0x22);
  }
  EXPECT_GE(SteadyClock::now() - start, std::chrono::milliseconds(85));
}

// The 8254 through the 8259 and the local APIC's LINT0, as at the start of a kernel without ACPI.
TEST_P(EngineTime, ThePitTicksThroughThePicInRealMode) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xb0, 0x11, 0xe6, 0x20,  // ICW1: mov al, 0x11; out 0x20, al
                        0xb0, 0x20, 0xe6, 0x21,  // ICW2: vectors 0x20
                        0xb0, 0x04, 0xe6, 0x21,  // ICW3
                        0xb0, 0x01, 0xe6, 0x21,  // ICW4
                        0xb0, 0xfe, 0xe6, 0x21,  // input 0 alone
                        0xb0, 0x34, 0xe6, 0x43,  // channel 0, mode 2
                        0xb0, 0x9c, 0xe6, 0x40,  // reload 0x2e9c: 10 ms
                        0xb0, 0x2e, 0xe6, 0x40,  //
                        0xfb,                    // sti
                        0xf4,                    // hlt
                        0xeb, 0xfd,              // jmp to the hlt
                    });
  guest.put(0x1100, {
                        0xb0, 0x20, 0xe6, 0x20,  // end of interrupt
                        0xe6, 0x11,              // out 0x11, al
                        0xcf,                    // iret
                    });
  store_le<std::uint32_t>(guest.at(0x20 * 4), 0x1100);
  guest.start_real(0x1000);
  const auto start = SteadyClock::now();
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(port_write_of(guest.run()).port, 0x11);
  }
  EXPECT_GE(SteadyClock::now() - start, std::chrono::milliseconds(85));
}

TEST_P(EngineTime, WithoutAPitItsPortsAreTheMachines) {
  VmOptions options;
  options.pit = false;
  BareGuest guest = make(options);
  guest.put(0x1000, {0xb0, 0x34, 0xe6, 0x43});  // mov al, 0x34; out 0x43, al
  guest.start_real(0x1000);
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x43, 1, 0x34}));
}

// A second NMI waits until the first one's handler returns.
TEST_P(EngineTime, NmisDoNotNest) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xbb, 0x00, 0x03, 0xe0, 0xfe,        // mov ebx, 0xfee00300
                        0xc7, 0x03, 0x00, 0x44, 0x04, 0x00,  // mov [rbx], 0x44400: NMI to itself
                        0xeb, 0xfe,                          // jmp to itself
                    });
  guest.put(0x2800, {
                        0xfe, 0xc2,                          // inc dl
                        0x88, 0xd0,                          // mov al, dl
                        0xe6, 0x10,                          // out 0x10, al
                        0x80, 0xfa, 0x03,                    // cmp dl, 3
                        0x73, 0x08,                          // jae past the next two
                        0xc7, 0x03, 0x00, 0x44, 0x04, 0x00,  // mov [rbx], 0x44400: another
                        0x88, 0xd0,                          // mov al, dl
                        0xe6, 0x11,                          // out 0x11, al
                        0x48, 0xcf,                          // iretq
                    });
  start_with_table(guest, 0x1000);
  CpuRegs regs = must(guest.vcpu().regs());
  regs.rdx = 0;
  must(guest.vcpu().set_regs(regs));
  for (std::uint64_t i = 1; i <= 3; ++i) {
    EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x10, 1, i}));
    EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x11, 1, i}));
  }
}

// Writes the MSR of the paravirtual clock and tells the structure's nanoseconds by the counter; the caller
// compares with its own clock.
TEST_P(EngineTime, TheParavirtualClockRunsWithTheCounter) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xb9, 0x01, 0x4d, 0x56, 0x4b,        // mov ecx, 0x4b564d01
                        0xb8, 0x01, 0x20, 0x00, 0x00,        // mov eax, 0x2001
                        0x31, 0xd2,                          // xor edx, edx
                        0x0f, 0x30,                          // wrmsr
                        0xe6, 0x10,                          // out 0x10, al
                        0x0f, 0x31,                          // again: rdtsc
                        0xa3, 0x80, 0x20, 0x00, 0x00,        // mov [0x2080], eax
                        0x89, 0x15, 0x84, 0x20, 0x00, 0x00,  // mov [0x2084], edx
                        0xe6, 0x11,                          // out 0x11, al
                        0xeb, 0xef,                          // jmp again
                    });
  guest.start_protected(0x1000);
  ASSERT_EQ(port_write_of(guest.run()).port, 0x10);
  const auto guest_ns = [&] {
    EXPECT_EQ(port_write_of(guest.run()).port, 0x11);
    const std::uint8_t* info = guest.at(0x2000);
    EXPECT_EQ(load_le<std::uint32_t>(info) % 2, 0U);
    EXPECT_NE(load_le<std::uint32_t>(info), 0U);
    std::uint64_t delta = load_le<std::uint64_t>(guest.at(0x2080)) - load_le<std::uint64_t>(info + 8);
    const auto shift = static_cast<std::int8_t>(info[28]);
    delta = shift < 0 ? delta >> -shift : delta << shift;
    __extension__ using Wide = unsigned __int128;
    return load_le<std::uint64_t>(info + 16) +
           static_cast<std::uint64_t>(static_cast<Wide>(delta) * load_le<std::uint32_t>(info + 24) >> 32);
  };
  const std::uint64_t first = guest_ns();
  const auto start = SteadyClock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const std::uint64_t second = guest_ns();
  const auto passed =
      std::chrono::duration_cast<std::chrono::nanoseconds>(SteadyClock::now() - start).count();
  EXPECT_LT(first, 60'000'000'000U) << "starts with the machine";
  EXPECT_NEAR(static_cast<double>(second - first), static_cast<double>(passed), 20e6);
}

}  // namespace
}  // namespace wisp
