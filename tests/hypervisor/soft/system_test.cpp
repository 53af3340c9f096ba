// Instructions of the system, control and debug registers, MSRs, descriptor tables.
#include <gtest/gtest.h>

#include <array>

#include "hypervisor/soft/soft_cpuid.h"
#include "hypervisor/soft/system_kit.h"

namespace wisp::soft {
namespace {

using Kit = SystemKit;

void set_pair(Cpu& cpu, std::uint64_t value) {
  cpu.gpr[kRax] = value & 0xffffffff;
  cpu.gpr[kRdx] = value >> 32;
}
std::uint64_t pair(const Cpu& cpu) {
  return cpu.gpr[kRdx] << 32 | cpu.gpr[kRax];
}
std::string write(Kit& kit, std::uint32_t index, std::uint64_t value) {
  return write_msr(kit.core(), index, value) ? "" : kit.fault();
}
std::uint64_t read(Kit& kit, std::uint32_t index) {
  std::uint64_t value = 0;
  EXPECT_TRUE(read_msr(kit.core(), index, value)) << index;
  return value;
}

TEST(ControlRegisters, OnlyForRing0) {
  Kit kit;
  kit.long_mode(3);
  EXPECT_EQ(kit.faults({0x0f, 0x20, 0xc0}), "#GP(0)");  // mov rax, cr0
  EXPECT_EQ(kit.faults({0x0f, 0x22, 0xd8}), "#GP(0)");  // mov cr3, rax
  EXPECT_EQ(kit.faults({0x0f, 0x06}), "#GP(0)");        // clts
  EXPECT_EQ(kit.faults({0xf4}), "#GP(0)");
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x38}), "#GP(0)");  // invlpg [rax]
  EXPECT_EQ(kit.faults({0x0f, 0x09}), "#GP(0)");        // wbinvd
  EXPECT_EQ(kit.faults({0x0f, 0x32}), "#GP(0)");        // rdmsr
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0xf8}), "#GP(0)");  // swapgs
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x10}), "#GP(0)");  // lgdt
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd8}), "#GP(0)");  // ltr ax
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0xcb}), "#UD");     // stac
  EXPECT_EQ(kit.faults({0x0f, 0x21, 0xf8}), "#GP(0)");  // mov rax, dr7
  EXPECT_EQ(kit.faults({0x0f, 0x33}), "#GP(0)");        // rdpmc
  EXPECT_EQ(kit.faults({0x66, 0x0f, 0x38, 0x82, 0x00}), "#GP(0)");
}

TEST(ControlRegisters, Cr0Combinations) {
  Kit kit;
  kit.long_mode(0);
  Core& core = kit.core();
  const std::uint64_t now = kit.cpu().cr0;
  EXPECT_FALSE(write_cr0(core, now | 1ULL << 32));
  EXPECT_FALSE(write_cr0(core, now & ~cr0::kPe));
  EXPECT_FALSE(write_cr0(core, now | cr0::kNw));
  EXPECT_FALSE(write_cr0(core, now & ~cr0::kPg));  // in 64-bit code
  EXPECT_EQ(kit.cpu().cr0, now);
  EXPECT_TRUE(write_cr0(core, (now | cr0::kTs | 0x40) & ~cr0::kEt));
  EXPECT_EQ(kit.cpu().cr0, now | cr0::kTs);
}

TEST(ControlRegisters, LongModeStartsAndEndsWithPaging) {
  Kit kit;
  kit.protected_mode(0);
  Core& core = kit.core();
  Cpu& cpu = kit.cpu();
  EXPECT_TRUE(write_msr(core, 0xc0000080, efer::kLme));
  EXPECT_FALSE(write_cr0(core, cpu.cr0 | cr0::kPg));  // without PAE
  EXPECT_TRUE(write_cr4(core, cr4::kPae));
  EXPECT_TRUE(write_cr3(core, Kit::kTables));
  EXPECT_TRUE(write_cr0(core, cpu.cr0 | cr0::kPg));
  EXPECT_TRUE(cpu.long_mode());
  EXPECT_FALSE(write_cr4(core, 0));
  EXPECT_FALSE(write_msr(core, 0xc0000080, 0));  // LME while paging
  EXPECT_TRUE(write_msr(core, 0xc0000080, efer::kLme | efer::kNxe));
  EXPECT_TRUE(cpu.long_mode());
  EXPECT_TRUE(write_cr0(core, cpu.cr0 & ~cr0::kPg));  // compatibility mode may
  EXPECT_FALSE(cpu.long_mode());
  EXPECT_EQ(cpu.efer, efer::kLme | efer::kNxe);
}

TEST(ControlRegisters, LongModeDoesNotStartInCodeWithL) {
  Kit kit;
  kit.protected_mode(0);
  kit.cpu().cr4 = cr4::kPae;
  kit.cpu().efer = efer::kLme;
  kit.cpu().segments[kCs].attributes |= 0x2000;
  EXPECT_FALSE(write_cr0(kit.core(), kit.cpu().cr0 | cr0::kPg));
}

TEST(ControlRegisters, PaePagingLooksAtItsFourEntries) {
  Kit kit;
  kit.protected_mode(0);
  kit.cpu().cr4 = cr4::kPae;
  kit.cpu().cr3 = 0x10020;
  EXPECT_TRUE(write_cr0(kit.core(), kit.cpu().cr0 | cr0::kPg));
  kit.put<std::uint64_t>(0x11000 + 8, 0x2007);  // R/W and U/S are reserved there
  EXPECT_FALSE(write_cr3(kit.core(), 0x11000));
  kit.put<std::uint64_t>(0x11000 + 8, 0x2001);
  EXPECT_TRUE(write_cr3(kit.core(), 0x11000));
}

TEST(ControlRegisters, Cr3AndPcids) {
  Kit kit;
  kit.long_mode(0);
  Core& core = kit.core();
  EXPECT_FALSE(write_cr3(core, 1ULL << 63 | Kit::kTables));
  EXPECT_FALSE(write_cr3(core, 1ULL << kPhysicalBits));
  EXPECT_TRUE(write_cr3(core, Kit::kTables | 5));
  EXPECT_FALSE(write_cr4(core, kit.cpu().cr4 | cr4::kPcide));  // CR3[11:0] is not 0
  EXPECT_TRUE(write_cr3(core, Kit::kTables));
  EXPECT_TRUE(write_cr4(core, kit.cpu().cr4 | cr4::kPcide));
  EXPECT_TRUE(write_cr3(core, 1ULL << 63 | Kit::kTables | 7));
  EXPECT_EQ(kit.cpu().cr3, Kit::kTables | 7);
  EXPECT_FALSE(write_cr0(core, kit.cpu().cr0 & ~cr0::kPg));
}

TEST(ControlRegisters, Cr4TakesWhatCpuidOffers) {
  Kit kit;
  kit.long_mode(0);
  const std::uint64_t now = kit.cpu().cr4;
  EXPECT_TRUE(write_cr4(kit.core(), now | cr4::kSmep | cr4::kSmap | cr4::kUmip | cr4::kFsgsbase | cr4::kDe));
  kit.env.debugging_extensions = false;
  EXPECT_FALSE(write_cr4(kit.core(), now | cr4::kDe));
  EXPECT_FALSE(write_cr4(kit.core(), now | 1U << 12));  // LA57
  EXPECT_FALSE(write_cr4(kit.core(), now | cr4::kVme));
  EXPECT_FALSE(write_cr4(kit.core(), now | 1ULL << 40));
}

TEST(ControlRegisters, ThroughTheInstructions) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.cr2 = 0xffff888012345678;
  EXPECT_EQ(kit.run({0x41, 0x0f, 0x20, 0xd1}), Outcome::kNext);  // mov r9, cr2
  EXPECT_EQ(cpu.gpr[kR9], 0xffff888012345678);
  cpu.gpr[kRax] = 9;
  EXPECT_EQ(kit.run({0x44, 0x0f, 0x22, 0xc0}), Outcome::kNext);  // mov cr8, rax
  EXPECT_EQ(kit.env.cr8, 9U);
  cpu.gpr[kRax] = 16;
  EXPECT_EQ(kit.faults({0x44, 0x0f, 0x22, 0xc0}), "#GP(0)");
  cpu.cr0 |= cr0::kTs;
  EXPECT_EQ(kit.run({0x0f, 0x06}), Outcome::kNext);
  EXPECT_EQ(cpu.cr0 & cr0::kTs, 0U);
  cpu.gpr[kRcx] = 0xe;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xf1}), Outcome::kNext);  // lmsw cx: PE stays
  EXPECT_EQ(cpu.cr0 & 0xf, 0xfU);
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xe3}), Outcome::kNext);  // smsw ebx
  EXPECT_EQ(cpu.gpr[kRbx], cpu.cr0 & 0xffffffff);
}

TEST(DebugRegisters, FixedBitsAndAliases) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRax] = 0xffffffff;
  EXPECT_EQ(kit.faults({0x0f, 0x23, 0xf0}), "");  // mov dr6, rax
  EXPECT_EQ(cpu.dr6, 0xffffefff);
  cpu.gpr[kRax] = 0;
  EXPECT_EQ(kit.faults({0x0f, 0x23, 0xe0}), "");  // mov dr4, rax
  EXPECT_EQ(cpu.dr6, 0xffff0ff0);
  EXPECT_EQ(kit.faults({0x0f, 0x23, 0xf8}), "");
  EXPECT_EQ(cpu.dr7, 0x400U);
  cpu.gpr[kRax] = 1ULL << 32;
  EXPECT_EQ(kit.faults({0x0f, 0x23, 0xf8}), "#GP(0)");
  EXPECT_EQ(kit.faults({0x0f, 0x23, 0xc8}), "");  // mov dr1, rax
  EXPECT_EQ(cpu.dr[1], 1ULL << 32);
  cpu.cr4 |= cr4::kDe;
  EXPECT_EQ(kit.faults({0x0f, 0x23, 0xe0}), "#UD");
  cpu.dr7 |= 1U << 13;
  EXPECT_EQ(kit.faults({0x0f, 0x21, 0xc0}), "#DB");
  EXPECT_EQ(cpu.fault.address, 1U << 13);
}

TEST(Msrs, AreCheckedByTheirMeaning) {
  Kit kit;
  kit.long_mode(0);
  constexpr std::uint64_t kBad = 0x800000000000;
  for (const std::uint32_t index :
       {0x175U, 0x176U, 0xc0000082U, 0xc0000083U, 0xc0000100U, 0xc0000101U, 0xc0000102U}) {
    EXPECT_EQ(write(kit, index, kBad), "#GP(0)") << index;
    EXPECT_EQ(write(kit, index, 0xffff800000000123), "") << index;
    EXPECT_EQ(read(kit, index), 0xffff800000000123) << index;
  }
  EXPECT_EQ(kit.cpu().segments[kGs].base, 0xffff800000000123);
  EXPECT_EQ(write(kit, 0x277, 0x0007040600070406), "");
  EXPECT_EQ(write(kit, 0x277, 0x0007040600070402), "#GP(0)");
  EXPECT_EQ(write(kit, 0x2ff, 0xc06), "");
  EXPECT_EQ(write(kit, 0x2ff, 0xc02), "#GP(0)");
  EXPECT_EQ(write(kit, 0x200, 0xc0000000), "");
  EXPECT_EQ(write(kit, 0x200, 0xc0000007), "#GP(0)");
  EXPECT_EQ(write(kit, 0x201, 0x800), "");
  EXPECT_EQ(write(kit, 0x201, 0x400), "#GP(0)");
  EXPECT_EQ(write(kit, 0x268, 0x0606060606060606), "");
  EXPECT_EQ(write(kit, 0x268, 0x0306060606060606), "#GP(0)");
  EXPECT_EQ(write(kit, 0xc0000080, 1U << 1), "#GP(0)");
  EXPECT_EQ(write(kit, 0xc0000103, 1ULL << 32), "#GP(0)");
  EXPECT_EQ(write(kit, 0xfe, 0), "#GP(0)");
  EXPECT_EQ(write(kit, 0x48, 1), "");
  EXPECT_EQ(write(kit, 0x48, 2), "#GP(0)");
  EXPECT_EQ(read(kit, 0x10a), kSoftArchCapabilities);
  EXPECT_EQ(read(kit, 0xce), 25U << 8);
}

TEST(Msrs, OthersAreTheEnvironmentsAndUnknownOnesAreNoted) {
  Kit kit;
  kit.long_mode(0);
  kit.env.msrs[0x1b] = 0xfee00900;
  EXPECT_EQ(read(kit, 0x1b), 0xfee00900U);
  EXPECT_EQ(write(kit, 0x1b, 0xfee00d00), "");
  EXPECT_EQ(write(kit, 0x1b, ~0ULL), "#GP(0)");
  EXPECT_TRUE(kit.env.notes.empty());
  std::uint64_t value = 0;
  EXPECT_FALSE(read_msr(kit.core(), 0xdead, value));
  EXPECT_EQ(kit.fault(), "#GP(0)");
  EXPECT_EQ(write(kit, 0xdead, 1), "#GP(0)");
  EXPECT_EQ(kit.env.notes.size(), 2U);
}

TEST(Msrs, TimeStampCounterAndItsAdjustment) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  kit.env.tsc = 5000;
  EXPECT_EQ(write(kit, 0x10, 100), "");
  kit.env.tsc = 5010;
  EXPECT_EQ(kit.run({0x0f, 0x31}), Outcome::kNext);
  EXPECT_EQ(pair(cpu), 110U);
  EXPECT_EQ(read(kit, 0x3b), static_cast<std::uint64_t>(-4900));
  EXPECT_EQ(write(kit, 0x3b, 0), "");
  EXPECT_EQ(read(kit, 0x10), 5010U);
  cpu.msr.tsc_aux = 0x77;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xf9}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRcx], 0x77U);
  EXPECT_EQ(kit.run({0xf3, 0x0f, 0xc7, 0xfb}), Outcome::kNext);  // rdpid rbx
  EXPECT_EQ(cpu.gpr[kRbx], 0x77U);
  kit.long_mode(3);
  cpu.cr4 |= cr4::kTsd;
  EXPECT_EQ(kit.faults({0x0f, 0x31}), "#GP(0)");
}

TEST(Msrs, ThroughTheInstructions) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRcx] = 0xffffffffc0000082;
  set_pair(cpu, 0xffffffff81abcdef);
  cpu.gpr[kRax] |= 0xffULL << 40;
  EXPECT_EQ(kit.run({0x0f, 0x30}), Outcome::kNext);
  EXPECT_EQ(cpu.msr.lstar, 0xffffffff81abcdef);
  set_pair(cpu, ~0ULL);
  EXPECT_EQ(kit.run({0x0f, 0x32}), Outcome::kNext);
  EXPECT_EQ(pair(cpu), 0xffffffff81abcdef);
}

TEST(BaseRegisters, SwapgsAndFsgsbase) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.segments[kGs].base = 1;
  cpu.msr.kernel_gs_base = 2;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xf8}), Outcome::kNext);
  EXPECT_EQ(cpu.segments[kGs].base, 2U);
  EXPECT_EQ(cpu.msr.kernel_gs_base, 1U);
  EXPECT_EQ(kit.faults({0xf3, 0x48, 0x0f, 0xae, 0xc0}), "#UD");  // rdfsbase rax
  cpu.cr4 |= cr4::kFsgsbase;
  cpu.cpl = 3;
  cpu.gpr[kRax] = 0xffff812345678000;
  EXPECT_EQ(kit.faults({0xf3, 0x48, 0x0f, 0xae, 0xd0}), "");  // wrfsbase rax
  EXPECT_EQ(cpu.segments[kFs].base, 0xffff812345678000);
  EXPECT_EQ(kit.faults({0xf3, 0x0f, 0xae, 0xc3}), "");  // rdfsbase ebx
  EXPECT_EQ(cpu.gpr[kRbx], 0x45678000U);
  cpu.gpr[kRax] = 0x812345678000;
  EXPECT_EQ(kit.faults({0xf3, 0x48, 0x0f, 0xae, 0xd8}), "#GP(0)");  // wrgsbase rax
}

TEST(Features, StacXgetbvRandomHypercallHalt) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xcb}), Outcome::kNext);
  EXPECT_NE(cpu.other_flags & flag::kAc, 0U);
  EXPECT_EQ(cpu.bank(), kSupervisorAcBank);
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xca}), Outcome::kNext);
  EXPECT_EQ(cpu.other_flags & flag::kAc, 0U);

  cpu.gpr[kRcx] = 0;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xd0}), Outcome::kNext);
  EXPECT_EQ(pair(cpu), 7U);
  for (const std::uint64_t bad : {0ULL, 2ULL, 5ULL, 0xfULL, 1ULL << 63 | 1}) {
    set_pair(cpu, bad);
    EXPECT_EQ(kit.faults({0x0f, 0x01, 0xd1}), "#GP(0)") << bad;
  }
  set_pair(cpu, 3);
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0xd1}), "");
  EXPECT_EQ(cpu.xcr0, 3U);
  cpu.gpr[kRcx] = 1;
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0xd0}), "#GP(0)");
  cpu.cr4 &= ~cr4::kOsxsave;
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0xd0}), "#UD");

  cpu.gpr[kRbx] = ~0ULL;
  cpu.arithmetic_flags = flag::kZf | flag::kOf;
  EXPECT_EQ(kit.run({0x66, 0x0f, 0xc7, 0xf3}), Outcome::kNext);  // rdrand bx
  EXPECT_EQ(cpu.gpr[kRbx], 0xffffffffffff7788);
  EXPECT_EQ(cpu.arithmetic_flags, flag::kCf);
  EXPECT_EQ(kit.run({0x0f, 0xc7, 0xfb}), Outcome::kNext);  // rdseed ebx
  EXPECT_EQ(cpu.gpr[kRbx], 0x55667788U);

  cpu.gpr[kRax] = 1000;
  cpu.gpr[kRbx] = cpu.gpr[kRcx] = cpu.gpr[kRdx] = cpu.gpr[kRsi] = 1;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xc1}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 1017U);
  cpu.cpl = 3;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0xd9}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], ~0ULL);
  cpu.cpl = 0;
  EXPECT_EQ(kit.run({0xf3, 0x90}), Outcome::kNext);
  EXPECT_EQ(kit.env.pauses, 0);
  cpu.pauses_left = 1;
  EXPECT_EQ(kit.run({0xf3, 0x90}), Outcome::kNext);
  EXPECT_EQ(kit.env.pauses, 1);
  EXPECT_EQ(kit.run({0xf4}), Outcome::kHalt);
  EXPECT_EQ(cpu.rip, 0x30000U);  // the caller moves it
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0xc8}), "#UD");
  EXPECT_EQ(kit.faults({0x0f, 0x33}), "#GP(0)");
}

TEST(DescriptorTables, LoadAndStore) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbx] = 0x200100;
  kit.put<std::uint16_t>(0x200100, 0x7f);
  kit.put<std::uint64_t>(0x200102, 0xffff800000001000);
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x1b}), "");  // lidt [rbx]
  EXPECT_EQ(cpu.idt.base, 0xffff800000001000);
  EXPECT_EQ(cpu.idt.limit, 0x7f);
  kit.put<std::uint64_t>(0x200102, 0x800000001000);
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x13}), "#GP(0)");
  EXPECT_EQ(cpu.gdt.base, Kit::kGdt);
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x03}), "");  // sgdt [rbx]
  EXPECT_EQ(kit.get<std::uint16_t>(0x200100), 0xb7);
  EXPECT_EQ(kit.get<std::uint64_t>(0x200102), Kit::kGdt);
  cpu.cpl = 3;
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x03}), "");
  cpu.cr4 |= cr4::kUmip;
  for (const std::uint8_t modrm : std::array<std::uint8_t, 3>{0x03, 0x0b, 0x23}) {  // sgdt, sidt, smsw
    EXPECT_EQ(kit.faults({0x0f, 0x01, modrm}), "#GP(0)");
  }
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xc3}), "#GP(0)");  // sldt
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xcb}), "#GP(0)");  // str
  kit.real_mode();
  cpu.gpr[kRbx] = 0x500;
  kit.put<std::uint16_t>(0x500, 0x10);
  kit.put<std::uint32_t>(0x502, 0xff123456);
  EXPECT_EQ(kit.faults({0x0f, 0x01, 0x17}), "");  // lgdt [bx], 16-bit operands
  EXPECT_EQ(cpu.gdt.base, 0x123456U);
  EXPECT_EQ(kit.faults({0x66, 0x0f, 0x01, 0x17}), "");
  EXPECT_EQ(cpu.gdt.base, 0xff123456U);
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xc3}), "#UD");
}

TEST(DescriptorTables, LtrMarksBusyAndLldtChecks) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  kit.put<std::uint32_t>(Kit::kGdt + Kit::kTask + 8, 0xffff8000);
  cpu.gpr[kRax] = Kit::kTask;
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd8}), "");
  EXPECT_EQ(cpu.tr.base, 0xffff800000000000 | Kit::kTss);
  EXPECT_EQ(kit.get<std::uint8_t>(Kit::kGdt + Kit::kTask + 5), 0x8b);
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd8}), "#GP(48)");  // busy now
  cpu.gpr[kRax] = 0;
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd8}), "#GP(0)");
  cpu.gpr[kRax] = 4;
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd8}), "#GP(4)");
  cpu.gpr[kRax] = Kit::kLocal;
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd0}), "");
  EXPECT_EQ(cpu.ldtr.base, Kit::kLdt);
  EXPECT_EQ(kit.run({0x0f, 0x00, 0xc3}), Outcome::kNext);  // sldt ebx
  EXPECT_EQ(cpu.gpr[kRbx], Kit::kLocal);
  kit.put<std::uint8_t>(Kit::kGdt + Kit::kLocal + 5, 0x02);
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd0}), "#NP(112)");
  cpu.gpr[kRax] = 3;
  EXPECT_EQ(kit.faults({0x0f, 0x00, 0xd0}), "");
  EXPECT_EQ(cpu.ldtr.attributes, 0);
}

TEST(DescriptorTables, LarLslVerrVerwTellByZf) {
  Kit kit;
  kit.long_mode(3);
  Cpu& cpu = kit.cpu();
  const auto zf = [&](std::initializer_list<std::uint8_t> code, std::uint64_t selector) {
    cpu.gpr[kRax] = selector;
    EXPECT_EQ(kit.faults(code), "");
    return (cpu.arithmetic_flags & flag::kZf) != 0;
  };
  EXPECT_TRUE(zf({0x0f, 0x02, 0xd8}, Kit::kUserData));  // lar ebx, eax
  EXPECT_EQ(cpu.gpr[kRbx], 0xc0f300U);
  EXPECT_FALSE(zf({0x0f, 0x02, 0xd8}, Kit::kData));
  EXPECT_FALSE(zf({0x0f, 0x02, 0xd8}, 0));
  EXPECT_FALSE(zf({0x0f, 0x02, 0xd8}, 0x1000));
  EXPECT_TRUE(zf({0x0f, 0x02, 0xd8}, Kit::kConforming | 3));
  EXPECT_TRUE(zf({0x0f, 0x03, 0xd8}, Kit::kUserCode64));  // lsl
  EXPECT_EQ(cpu.gpr[kRbx], 0xffffffffU);
  EXPECT_TRUE(zf({0x0f, 0x00, 0xe0}, Kit::kUserData));  // verr
  EXPECT_FALSE(zf({0x0f, 0x00, 0xe0}, Kit::kExecuteOnly));
  EXPECT_TRUE(zf({0x0f, 0x00, 0xe8}, Kit::kUserData));  // verw
  EXPECT_FALSE(zf({0x0f, 0x00, 0xe8}, Kit::kUserCode64));
  cpu.cpl = 0;
  EXPECT_TRUE(zf({0x0f, 0x02, 0xd8}, Kit::kLocal));
  EXPECT_TRUE(zf({0x0f, 0x03, 0xd8}, Kit::kTask));
  EXPECT_EQ(cpu.gpr[kRbx], 0x67U);
  kit.call_gate(Kit::kGate, {.selector = Kit::kCode64, .type = 12});
  EXPECT_TRUE(zf({0x0f, 0x02, 0xd8}, Kit::kGate));
  EXPECT_FALSE(zf({0x0f, 0x03, 0xd8}, Kit::kGate));
  kit.protected_mode(0);
  cpu.gpr[kRcx] = 0x11;
  EXPECT_TRUE(zf({0x63, 0xc8}, 0x10));  // arpl ax, cx
  EXPECT_EQ(cpu.gpr[kRax], 0x11U);
  EXPECT_FALSE(zf({0x63, 0xc8}, 0x13));
  kit.real_mode();
  EXPECT_EQ(kit.faults({0x0f, 0x02, 0xd8}), "#UD");
}

TEST(PortRights, ByIoplOrTheBitmapOfTheTss) {
  Kit kit;
  kit.long_mode(3);
  Cpu& cpu = kit.cpu();
  kit.put<std::uint16_t>(Kit::kTss + 102, 104);  // past the limit: no map
  EXPECT_FALSE(port_allowed(kit.core(), 0x60, 1));
  EXPECT_EQ(kit.fault(), "#GP(0)");
  cpu.other_flags |= flag::kIopl;
  EXPECT_TRUE(port_allowed(kit.core(), 0x60, 1));
  cpu.other_flags &= ~flag::kIopl;
  kit.put<std::uint8_t>(Kit::kTss + 104 + 0x60 / 8, 0x0c);  // ports 62 and 63 are shut
  cpu.tr.limit = 104 + 0x60 / 8 + 1;
  EXPECT_TRUE(port_allowed(kit.core(), 0x60, 2));
  EXPECT_FALSE(port_allowed(kit.core(), 0x60, 4));
  EXPECT_FALSE(port_allowed(kit.core(), 0x62, 1));
  EXPECT_TRUE(port_allowed(kit.core(), 0x64, 4));
  EXPECT_FALSE(port_allowed(kit.core(), 0x68, 1));  // its second byte lies past the limit
  cpu.cpl = 0;
  EXPECT_TRUE(port_allowed(kit.core(), 0xffff, 1));
}

TEST(Invalidation, InvpcidChecksItsDescriptor) {
  Kit kit;
  kit.long_mode(0);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbx] = 0x200200;
  const auto attempt = [&](std::uint64_t type, std::uint64_t pcid, std::uint64_t address) {
    kit.put(0x200200, pcid);
    kit.put(0x200208, address);
    cpu.gpr[kRax] = type;
    return kit.faults({0x66, 0x0f, 0x38, 0x82, 0x03});
  };
  EXPECT_EQ(attempt(0, 0, 0x1000), "");
  EXPECT_EQ(attempt(0, 0, 0x800000000000), "#GP(0)");
  EXPECT_EQ(attempt(1, 5, 0), "#GP(0)");  // without CR4.PCIDE
  EXPECT_EQ(attempt(2, 5, 0), "");
  EXPECT_EQ(attempt(4, 0, 0), "#GP(0)");
  cpu.cr4 |= cr4::kPcide;
  EXPECT_EQ(attempt(1, 5, 0), "");
  EXPECT_EQ(attempt(3, 0x1000, 0), "#GP(0)");
}

TEST(Invalidation, InvlpgMakesTheWalkSeeTheNewEntry) {
  Kit kit;
  kit.long_mode(0);
  std::uint8_t byte = 0;
  *kit.at(0x200000) = 1;
  *kit.at(0x201000) = 2;
  EXPECT_TRUE(kit.mmu().load(0x200000, byte));
  EXPECT_EQ(byte, 1);
  kit.put<std::uint64_t>(Kit::kPageTable, 0x201007);
  kit.cpu().gpr[kRbx] = 0x200123;
  EXPECT_EQ(kit.run({0x0f, 0x01, 0x3b}), Outcome::kNext);
  EXPECT_TRUE(kit.mmu().load(0x200000, byte));
  EXPECT_EQ(byte, 2);
}

}  // namespace
}  // namespace wisp::soft
