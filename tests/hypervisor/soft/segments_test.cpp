// Effective and linear addresses, and loads of segment registers.
#include <gtest/gtest.h>

#include "hypervisor/soft/system_kit.h"

namespace wisp::soft {
namespace {

using Kit = SystemKit;

std::string load(Kit& kit, SegmentId which, std::uint16_t selector) {
  kit.cpu().fault = {};
  return load_segment(kit.core(), which, selector) ? "" : kit.fault();
}

std::string linear(Kit& kit, SegmentId which, std::uint64_t offset, std::uint32_t size, Access access,
                   std::uint64_t& out) {
  kit.cpu().fault = {};
  return linear_address(kit.cpu(), which, offset, size, access, out) ? "" : kit.fault();
}

TEST(EffectiveAddress, AddsBaseIndexAndDisplacementInTheAddressSize) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbx] = 0xffffffff00000010;
  cpu.gpr[kR12] = 3;
  // lea rax, [rbx + r12*8 - 0x20] and with 32-bit addresses
  EXPECT_EQ(effective_address(cpu, kit.decoded({0x4a, 0x8d, 0x44, 0xe3, 0xe0})), 0xffffffff00000008);
  EXPECT_EQ(effective_address(cpu, kit.decoded({0x67, 0x4a, 0x8d, 0x44, 0xe3, 0xe0})), 0x8U);
  // lea rax, [rip + 0x100]: from the end of the instruction
  EXPECT_EQ(effective_address(cpu, kit.decoded({0x48, 0x8d, 0x05, 0x00, 0x01, 0x00, 0x00})), 0x30107U);
  kit.real_mode();
  cpu.gpr[kRbx] = 0xfff0;
  cpu.gpr[kRsi] = 0x20;
  EXPECT_EQ(effective_address(cpu, kit.decoded({0x8d, 0x00})), 0x10U);  // lea ax, [bx + si] wraps
}

TEST(LinearAddress, In64BitCodeOnlyFsAndGsHaveBases) {
  Kit kit;
  kit.long_mode(0);
  kit.cpu().segments[kDs].base = 0x1000;
  kit.cpu().segments[kGs].base = 0xffff800000000000;
  std::uint64_t out = 0;
  EXPECT_EQ(linear(kit, kDs, 0x10, 8, Access::kRead, out), "");
  EXPECT_EQ(out, 0x10U);
  EXPECT_EQ(linear(kit, kGs, 0x10, 8, Access::kWrite, out), "");
  EXPECT_EQ(out, 0xffff800000000010);
}

TEST(LinearAddress, NonCanonicalIsGpButSsOnTheStack) {
  Kit kit;
  kit.long_mode(0);
  std::uint64_t out = 0;
  EXPECT_EQ(linear(kit, kDs, 0x800000000000, 1, Access::kRead, out), "#GP(0)");
  EXPECT_EQ(linear(kit, kSs, 0x800000000000, 1, Access::kRead, out), "#SS(0)");
  EXPECT_EQ(linear(kit, kDs, 0x7fffffffffff, 1, Access::kRead, out), "");
  EXPECT_EQ(linear(kit, kDs, 0x7fffffffffff, 2, Access::kRead, out), "#GP(0)");
  EXPECT_EQ(linear(kit, kDs, ~0ULL, 1, Access::kRead, out), "");
}

TEST(LinearAddress, LimitsAndRightsOutside64BitCode) {
  Kit kit;
  kit.protected_mode(0);
  Cpu& cpu = kit.cpu();
  std::uint64_t out = 0;
  cpu.segments[kDs] = {.base = 0x1000, .limit = 0xff, .selector = 0x10, .attributes = 0x4093};
  EXPECT_EQ(linear(kit, kDs, 0xfc, 4, Access::kWrite, out), "");
  EXPECT_EQ(out, 0x10fcU);
  EXPECT_EQ(linear(kit, kDs, 0xfd, 4, Access::kWrite, out), "#GP(0)");
  cpu.segments[kDs].attributes = 0x4091;  // read-only
  EXPECT_EQ(linear(kit, kDs, 0, 4, Access::kRead, out), "");
  EXPECT_EQ(linear(kit, kDs, 0, 4, Access::kWrite, out), "#GP(0)");
  cpu.segments[kDs].attributes = 0x4099;  // execute-only
  EXPECT_EQ(linear(kit, kDs, 0, 4, Access::kRead, out), "#GP(0)");
  cpu.segments[kDs] = {};  // null
  EXPECT_EQ(linear(kit, kDs, 0, 1, Access::kRead, out), "#GP(0)");
  cpu.segments[kSs].limit = 0xff;
  EXPECT_EQ(linear(kit, kSs, 0x100, 1, Access::kRead, out), "#SS(0)");
}

TEST(LinearAddress, ExpandDownSegmentsBeginAboveTheirLimit) {
  Kit kit;
  kit.protected_mode(0);
  Cpu& cpu = kit.cpu();
  std::uint64_t out = 0;
  cpu.segments[kDs] = {.limit = 0xfff, .selector = 0x10, .attributes = 0x4097};
  EXPECT_EQ(linear(kit, kDs, 0xfff, 1, Access::kRead, out), "#GP(0)");
  EXPECT_EQ(linear(kit, kDs, 0x1000, 4, Access::kRead, out), "");
  EXPECT_EQ(linear(kit, kDs, 0xfffffffc, 4, Access::kRead, out), "");
  cpu.segments[kDs].attributes = 0x97;  // 16-bit
  EXPECT_EQ(linear(kit, kDs, 0xfffe, 2, Access::kRead, out), "");
  EXPECT_EQ(linear(kit, kDs, 0xfffe, 4, Access::kRead, out), "#GP(0)");
}

TEST(LinearAddress, AlignmentIsCheckedInRing3WithAmAndAc) {
  Kit kit;
  kit.long_mode(3);
  Cpu& cpu = kit.cpu();
  std::uint64_t out = 0;
  cpu.cr0 |= cr0::kAm;
  EXPECT_EQ(linear(kit, kDs, 0x200001, 4, Access::kRead, out), "");
  cpu.other_flags |= flag::kAc;
  EXPECT_EQ(linear(kit, kDs, 0x200001, 4, Access::kRead, out), "#AC(0)");
  EXPECT_EQ(linear(kit, kDs, 0x200001, 1, Access::kRead, out), "");
  EXPECT_EQ(linear(kit, kDs, 0x200004, 4, Access::kRead, out), "");
  EXPECT_EQ(linear(kit, kDs, 0x200004, 8, Access::kRead, out), "#AC(0)");
  EXPECT_EQ(linear(kit, kDs, 0x200001, 16, Access::kRead, out), "");
  cpu.cpl = 0;
  EXPECT_EQ(linear(kit, kDs, 0x200001, 4, Access::kRead, out), "");
}

TEST(LoadSegment, RealModeKeepsTheLimit) {
  Kit kit;
  kit.real_mode();
  kit.cpu().segments[kDs].limit = 0xffffffff;
  EXPECT_EQ(load(kit, kDs, 0x1234), "");
  EXPECT_EQ(kit.cpu().segments[kDs].base, 0x12340U);
  EXPECT_EQ(kit.cpu().segments[kDs].limit, 0xffffffffU);
}

TEST(LoadSegment, DataSegmentsAreCheckedInOrder) {
  Kit kit;
  kit.long_mode(3);
  EXPECT_EQ(load(kit, kDs, Kit::kUserData), "");
  EXPECT_EQ(kit.cpu().segments[kDs].limit, 0xffffffffU);
  EXPECT_EQ(load(kit, kDs, Kit::kData), "#GP(16)");  // DPL 0
  EXPECT_EQ(load(kit, kDs, 0x4b), "#GP(72)");        // absent, but DPL comes first
  EXPECT_EQ(load(kit, kDs, 0xb8), "#GP(184)");       // past the limit
  EXPECT_EQ(load(kit, kDs, 0x17), "#GP(20)");        // no LDT
  EXPECT_EQ(load(kit, kDs, Kit::kExecuteOnly | 3), "#GP(160)");
  EXPECT_EQ(load(kit, kDs, Kit::kConforming | 3), "");
  EXPECT_EQ(load(kit, kDs, Kit::kTask), "#GP(48)");
  EXPECT_EQ(load(kit, kDs, 3), "");
  EXPECT_EQ(kit.cpu().segments[kDs].attributes, 0);
  EXPECT_EQ(kit.cpu().segments[kDs].selector, 3);
  kit.long_mode(0);
  EXPECT_EQ(load(kit, kDs, Kit::kAbsent), "#NP(72)");
  EXPECT_EQ(load(kit, kDs, Kit::kData | 3), "#GP(16)");  // RPL
}

TEST(LoadSegment, StackSegmentMustFitTheRingExactly) {
  Kit kit;
  kit.long_mode(0);
  EXPECT_EQ(load(kit, kSs, Kit::kData), "");
  EXPECT_EQ(load(kit, kSs, Kit::kData | 3), "#GP(16)");
  EXPECT_EQ(load(kit, kSs, Kit::kUserData), "#GP(32)");
  EXPECT_EQ(load(kit, kSs, Kit::kAbsent), "#SS(72)");
  EXPECT_EQ(load(kit, kSs, Kit::kCode64), "#GP(8)");
  EXPECT_EQ(load(kit, kSs, 0), "");  // null in 64-bit ring 0
  EXPECT_EQ(load(kit, kSs, 3), "#GP(0)");
  kit.compatibility_mode(0);
  EXPECT_EQ(load(kit, kSs, 0), "#GP(0)");
  kit.long_mode(3);
  EXPECT_EQ(load(kit, kSs, 3), "#GP(0)");
}

TEST(LoadSegment, SetsTheAccessedBitOnce) {
  Kit kit;
  kit.long_mode(0);
  kit.descriptor(Kit::kReadOnly, 0, 0xfffff, 0xc0f0);
  EXPECT_EQ(load(kit, kDs, Kit::kReadOnly), "");
  EXPECT_EQ(kit.get<std::uint8_t>(Kit::kGdt + Kit::kReadOnly + 5), 0xf1);
  EXPECT_EQ(kit.cpu().segments[kDs].type(), 1);
}

TEST(LoadSegment, LocalTableIsUsedWhereTheSelectorSaysSo) {
  Kit kit;
  kit.long_mode(3);
  kit.cpu().ldtr = {.base = Kit::kLdt, .limit = 0xf, .selector = Kit::kLocal, .attributes = 0x82};
  kit.put<std::uint64_t>(Kit::kLdt + 8, 0x00cff3000000ffff | 0x5678ULL << 16);
  EXPECT_EQ(load(kit, kFs, 0x0f), "");
  EXPECT_EQ(kit.cpu().segments[kFs].base, 0x5678U);
  EXPECT_EQ(load(kit, kFs, 0x17), "#GP(20)");
}

TEST(SetRip, ChecksTheLimitOrTheCanonicalForm) {
  Kit kit;
  kit.long_mode(0);
  EXPECT_TRUE(set_rip(kit.cpu(), 0xffff800000000000, 8));
  EXPECT_FALSE(set_rip(kit.cpu(), 0x800000000000, 8));
  EXPECT_EQ(kit.fault(), "#GP(0)");
  EXPECT_EQ(kit.cpu().rip, 0xffff800000000000);
  kit.protected_mode(0);
  kit.cpu().segments[kCs].limit = 0xfff;
  EXPECT_FALSE(set_rip(kit.cpu(), 0x1000, 4));
  EXPECT_TRUE(set_rip(kit.cpu(), 0x12340abc, 2));
  EXPECT_EQ(kit.cpu().rip, 0xabcU);
}

}  // namespace
}  // namespace wisp::soft
