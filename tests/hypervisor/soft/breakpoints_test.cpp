// Breakpoints on data and ports, and accesses to devices that are long, by way of the engine's seam.
#include "hypervisor/soft/vm_kit.h"

namespace wisp::soft {
namespace {

class Breakpoints : public VmKit {
 protected:
  // Handler of #DB: counts in EBX, keeps DR6 in R8 and the address it came from in R9.
  CpuState with_handler(std::uint64_t dr7) {
    CpuState state = long_mode();
    gate(1, kHandler);
    code(kHandler, {0xff, 0xc3,              // inc ebx
                    0x41, 0x0f, 0x21, 0xf0,  // mov r8, dr6
                    0x4c, 0x8b, 0x0c, 0x24,  // mov r9, [rsp]
                    0x48, 0xcf});            // iretq
    state.debug.dr7 = 0x400 | dr7;
    state.debug.db = {kData, kData + 0x100, 0x60, kData + 0x208};
    return state;
  }
  static constexpr std::uint64_t kOnWrite = 1, kOnPort = 2, kOnAccess = 3;
  static constexpr std::uint64_t enable(unsigned number, std::uint64_t on, std::uint64_t length) {
    return 1ULL << (2 * number) | (on | length << 2) << (16 + 4 * number);
  }
};

TEST_P(Breakpoints, AWriteTrapsBehindItsInstruction) {
  const CpuState state = with_handler(enable(0, kOnWrite, 3));
  code(kCode, {0x8b, 0x04, 0x25, 0x00, 0x00, 0x04, 0x00,        // mov eax, [0x40000]: a read
               0xc6, 0x04, 0x25, 0x04, 0x00, 0x04, 0x00, 0x01,  // mov byte [0x40004], 1: beside it
               0xc6, 0x04, 0x25, 0x03, 0x00, 0x04, 0x00, 0x01,  // mov byte [0x40003], 1
               0x90, 0xf4});
  ASSERT_TRUE(vcpu_->load(state));
  const CpuState end = run_to_halt();
  EXPECT_EQ(end.regs.rbx, 1U);
  EXPECT_EQ(end.regs.r8 & 0xffff, 0x0ff1U);
  EXPECT_EQ(end.regs.r9, kCode + 23);
}

TEST_P(Breakpoints, AnAccessAcrossTheEdgeHits) {
  const CpuState state = with_handler(enable(1, kOnAccess, 0));
  code(kCode, {0x48, 0x8b, 0x04, 0x25, 0xf9, 0x00, 0x04, 0x00,  // mov rax, [0x400f9]: its last byte
               0x48, 0x8b, 0x04, 0x25, 0xf8, 0x00, 0x04, 0x00,  // mov rax, [0x400f8]: all before
               0x48, 0x01, 0x04, 0x25, 0x00, 0x01, 0x04, 0x00,  // add [0x40100], rax
               0xf4});
  ASSERT_TRUE(vcpu_->load(state));
  const CpuState end = run_to_halt();
  EXPECT_EQ(end.regs.rbx, 2U);
  EXPECT_EQ(end.regs.r8 & 0xffff, 0x0ff2U);
  EXPECT_EQ(end.regs.r9, kCode + 24);
}

TEST_P(Breakpoints, ARepeatedStoreTrapsBehindTheIterationThatHits) {
  const CpuState state = with_handler(enable(3, kOnWrite, 2));
  code(kCode, {0xbf, 0x00, 0x02, 0x04, 0x00,  // mov edi, 0x40200
               0xb9, 0x04, 0x00, 0x00, 0x00,  // mov ecx, 4
               0xf3, 0x48, 0xab,              // rep stosq
               0xf4});
  ASSERT_TRUE(vcpu_->load(state));
  const CpuState end = run_to_halt();
  EXPECT_EQ(end.regs.rbx, 1U);
  EXPECT_EQ(end.regs.r8 & 0xffff, 0x0ff8U);
  EXPECT_EQ(end.regs.r9, kCode + 10) << "two iterations are left";
  EXPECT_EQ(end.regs.rdi, kData + 0x220);
}

TEST_P(Breakpoints, PortsWithDebuggingExtensions) {
  CpuState state = with_handler(enable(2, kOnPort, 0));
  code(kCode, {0xe6, 0x60,  // out 0x60, al
               0xe6, 0x61,  // out 0x61, al: the engine's own
               0xf4});
  for (const bool extensions : {false, true}) {
    state.sregs.cr4 = (state.sregs.cr4 & ~cr4::kDe) | (extensions ? cr4::kDe : 0);
    ASSERT_TRUE(vcpu_->load(state));
    EXPECT_TRUE(std::holds_alternative<PortWriteExit>(run()));
    const CpuState end = run_to_halt();
    EXPECT_EQ(end.regs.rbx, extensions ? 1U : 0U);
  }
}

TEST_P(Breakpoints, LoadingTheStackSegmentHoldsThemBackForOneInstruction) {
  const CpuState state = with_handler(enable(0, kOnAccess, 1));
  put<std::uint16_t>(kData, kDataSegment);
  code(kCode, {0x8e, 0x14, 0x25, 0x00, 0x00, 0x04, 0x00,  // mov ss, [0x40000]
               0x90,                                      // nop
               0x90, 0xf4});
  ASSERT_TRUE(vcpu_->load(state));
  const CpuState end = run_to_halt();
  EXPECT_EQ(end.regs.rbx, 1U);
  EXPECT_EQ(end.regs.r8 & 0xffff, 0x0ff1U);
  EXPECT_EQ(end.regs.r9, kCode + 8);
}

// --- long accesses to devices

class LongAccesses : public VmKit {};

// The machine hears of each of the 64 pieces.
TEST_P(LongAccesses, AnAreaStoredIntoADevice) {
  CpuState state = long_mode();
  put(kPt + 0x80 * 8, std::uint64_t{0x200003});                 // 0x80000: where there is nothing
  code(kCode, {0x0f, 0xae, 0x04, 0x25, 0x00, 0x00, 0x08, 0x00,  // fxsave [0x80000]
               0xf4});
  ASSERT_TRUE(vcpu_->load(state));
  for (std::uint64_t bytes = 0; bytes < 416;) {
    const Exit exit = run_and_kick(std::chrono::seconds(10));
    const auto* write = std::get_if<MmioWriteExit>(&exit);
    ASSERT_NE(write, nullptr) << "after " << bytes;
    EXPECT_EQ(write->address, 0x200000 + bytes);
    bytes += write->data.size();
  }
  EXPECT_EQ(run_to_halt().regs.rip, kCode + 9);
}

TEST_P(LongAccesses, AnAreaLoadedFromADevice) {
  CpuState state = long_mode();
  put(kPt + 0x80 * 8, std::uint64_t{0x200003});
  code(kCode, {0x0f, 0xae, 0x0c, 0x25, 0x00, 0x00, 0x08, 0x00,  // fxrstor [0x80000]
               0x66, 0x48, 0x0f, 0x7e, 0xc0,                    // movq rax, xmm0
               0xf4});
  ASSERT_TRUE(vcpu_->load(state));
  for (std::uint64_t bytes = 0; bytes < 512;) {
    const Exit exit = run_and_kick(std::chrono::seconds(10));
    const auto* read = std::get_if<MmioReadExit>(&exit);
    ASSERT_NE(read, nullptr) << "after " << bytes;
    // Every byte is the number of its eight in the area, but for MXCSR.
    const std::uint64_t offset = read->address - 0x200000;
    std::ranges::fill(read->data, offset == 24 ? std::uint8_t{0} : static_cast<std::uint8_t>(offset / 8));
    bytes += read->data.size();
  }
  EXPECT_EQ(run_to_halt().regs.rax, 0x1414141414141414U);
}

INSTANTIATE_TEST_SUITE_P(Executors, Breakpoints, both_executors(), executor_name);
INSTANTIATE_TEST_SUITE_P(Executors, LongAccesses, both_executors(), executor_name);

}  // namespace
}  // namespace wisp::soft
