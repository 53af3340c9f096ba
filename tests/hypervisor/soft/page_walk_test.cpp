// The page walk in every paging mode, rights, accessed and dirty bits, and tables that mean harm.
#include <gtest/gtest.h>

#include <thread>

#include "hypervisor/soft/paging_kit.h"
#include "hypervisor/soft/soft_cpuid.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kLinear = 0x7f1234567000;
constexpr std::uint64_t kKernel = 0xffff888000000000;

TEST(PageWalk, FourLevelsLeadToTheByte) {
  PagingKit kit;
  kit.map(kLinear, 0x200000);
  EXPECT_EQ(kit.gpa_of(kLinear + 0xabc), 0x200abcU);
  kit.put<std::uint32_t>(0x200ff0, 0xdeadbeef);
  std::uint32_t value = 0;
  ASSERT_TRUE(kit.mmu().load(kLinear + 0xff0, value));
  EXPECT_EQ(value, 0xdeadbeef);
}

TEST(PageWalk, LargePagesOfBothSizes) {
  PagingKit kit;
  kit.map(kLinear, 0x200000, 7 | pte::kPs, 1);
  EXPECT_EQ(kit.gpa_of((kLinear & ~0x1fffffULL) + 0x1abcde), 0x200000U + 0x1abcde);
  kit.map(kKernel, 0, 7 | pte::kPs, 2);
  EXPECT_EQ(kit.gpa_of(kKernel + 0x3fffffff), 0x3fffffffU);
}

TEST(PageWalk, NotPresentAtEachLevel) {
  for (unsigned level = 0; level < 4; ++level) {
    PagingKit kit;
    kit.map(kLinear, 0x200000);
    kit.put<std::uint64_t>(kit.entry(kLinear, level), ~1ULL);  // every bit but P: none of them counts
    EXPECT_EQ(kit.read(kLinear + 5), "#PF(0) at 0x7f1234567005") << level;
    EXPECT_EQ(kit.write(kLinear + 5), "#PF(2) at 0x7f1234567005");
    EXPECT_EQ(kit.execute(kLinear + 5), "#PF(16) at 0x7f1234567005");
    kit.ring(3);
    EXPECT_EQ(kit.read(kLinear), "#PF(4) at 0x7f1234567000");
    EXPECT_EQ(kit.read(kLinear, As::kSystem), "#PF(0) at 0x7f1234567000");
  }
}

TEST(PageWalk, FetchBitOfTheErrorCodeNeedsNxOrSmep) {
  PagingKit kit;
  kit.cpu().efer &= ~efer::kNxe;
  EXPECT_EQ(kit.execute(kLinear), "#PF(0) at 0x7f1234567000");
  kit.cpu().cr4 |= cr4::kSmep;
  EXPECT_EQ(kit.execute(kLinear), "#PF(16) at 0x7f1234567000");
}

TEST(PageWalk, ReservedBitsOfFourLevelEntries) {
  struct Case {
    unsigned level;
    std::uint64_t bits;
    std::uint64_t flags;  // of the entry besides
  };
  const std::vector<Case> bad{{3, pte::kPs, 7},
                              {2, pte::kPs | 1ULL << 13, 7},
                              {2, pte::kPs | 1ULL << 29, 7},
                              {1, pte::kPs | 1ULL << 13, 7},
                              {1, pte::kPs | 1ULL << 20, 7},
                              {0, 1ULL << kPhysicalBits, 7},
                              {0, 1ULL << 51, 7},
                              {1, 1ULL << 51, 7},
                              {3, 1ULL << kPhysicalBits, 7}};
  for (const Case& one : bad) {
    PagingKit kit;
    kit.map(kLinear, 0x200000);
    const std::uint64_t entry = kit.entry(kLinear, one.level);
    kit.put(entry, kit.get<std::uint64_t>(entry) | one.bits | one.flags);
    EXPECT_EQ(kit.read(kLinear), "#PF(9) at 0x7f1234567000") << one.level << " " << std::hex << one.bits;
    EXPECT_EQ(kit.write(kLinear), "#PF(11) at 0x7f1234567000");
    // What is not present has no reserved bits.
    kit.put(entry, kit.get<std::uint64_t>(entry) & ~pte::kP);
    EXPECT_EQ(kit.read(kLinear), "#PF(0) at 0x7f1234567000");
  }
  PagingKit kit;
  kit.map(kLinear, 0x200000 | 0x7ffULL << 52);  // software's, and of protection keys
  EXPECT_EQ(kit.read(kLinear), "");
  kit.map(kLinear + 0x1000, 0x200000, 7 | pte::kNx);
  kit.cpu().efer &= ~efer::kNxe;
  kit.mmu().flush_all();
  EXPECT_EQ(kit.read(kLinear + 0x1000), "#PF(9) at 0x7f1234568000");
}

// SDM volume 3, 4.6.1, written out by who accesses what.
bool sdm_allows(Access access, bool user, bool explicit_ac, bool user_page, bool writable, bool no_execute,
                std::uint64_t cr0, std::uint64_t cr4) {
  const bool wp = (cr0 & cr0::kWp) != 0;
  const bool smep = (cr4 & cr4::kSmep) != 0;
  const bool smap = (cr4 & cr4::kSmap) != 0;
  if (user) {
    if (!user_page) {
      return false;
    }
    return access == Access::kRead || (access == Access::kWrite ? writable : !no_execute);
  }
  if (access == Access::kExecute) {
    return user_page ? !smep && !no_execute : !no_execute;
  }
  if (user_page && smap && !explicit_ac) {
    return false;
  }
  return access == Access::kRead || !wp || writable;
}

TEST(PageWalk, EveryCombinationOfRights) {
  int checked = 0;
  for (unsigned bits = 0; bits < 1U << 12; ++bits) {
    const auto bit = [bits](unsigned n) { return (bits >> n & 1) != 0; };
    const bool leaf_write = bit(0);
    const bool leaf_user = bit(1);
    const bool leaf_nx = bit(2);
    const bool upper_write = bit(3);
    const bool upper_user = bit(4);
    const bool upper_nx = bit(5);
    const bool user = bit(9);
    const bool ac = bit(10);
    const bool system = bit(11);
    static PagingKit kit;
    Cpu& cpu = kit.cpu();
    cpu.cr0 = cr0::kPe | cr0::kPg | (bit(6) ? cr0::kWp : 0);
    cpu.cr4 = cr4::kPae | (bit(7) ? cr4::kSmep : 0) | (bit(8) ? cr4::kSmap : 0);
    kit.ring(user ? 3 : 0);
    kit.ac(ac);
    kit.map(kLinear, 0x200000,
            (leaf_write ? pte::kW : 0) | (leaf_user ? pte::kU : 0) | (leaf_nx ? pte::kNx : 0));
    const std::uint64_t above = kit.entry(kLinear, 2);
    kit.put(above, (kit.get<std::uint64_t>(above) & 0x000ffffffffff000ULL) | pte::kP |
                       (upper_write ? pte::kW : 0) | (upper_user ? pte::kU : 0) | (upper_nx ? pte::kNx : 0));
    for (const Access access : {Access::kRead, Access::kWrite, Access::kExecute}) {
      if (system && access == Access::kExecute) {
        continue;
      }
      const bool as_user = user && !system;
      const bool expected = sdm_allows(access, as_user, ac && !system, leaf_user && upper_user,
                                       leaf_write && upper_write, leaf_nx || upper_nx, cpu.cr0, cpu.cr4);
      const unsigned code = 1U | (access == Access::kWrite ? 2U : 0U) | (as_user ? 4U : 0U) |
                            (access == Access::kExecute ? 16U : 0U);
      const std::string told = expected ? "" : "#PF(" + std::to_string(code) + ") at 0x7f1234567000";
      // Cold; then warm, where what another access left behind must not help.
      for (int round = 0; round < 2; ++round) {
        if (round == 0) {
          kit.mmu().flush_all();
        }
        const As as = system ? As::kSystem : As::kCode;
        const std::string found = access == Access::kRead    ? kit.read(kLinear, as)
                                  : access == Access::kWrite ? kit.write(kLinear, as)
                                                             : kit.execute(kLinear);
        ASSERT_EQ(found, told) << "bits " << std::hex << bits << " access " << static_cast<int>(access)
                               << " round " << round;
        ++checked;
      }
    }
  }
  EXPECT_EQ(checked, 20480);
}

TEST(PageWalk, WhatOneRingFilledDoesNotServeAnother) {
  PagingKit kit;
  kit.map(kLinear, 0x200000, 3);           // supervisor
  kit.map(kLinear + 0x1000, 0x201000, 7);  // user
  kit.cpu().cr4 |= cr4::kSmap;
  kit.mmu().flush_all();
  EXPECT_EQ(kit.write(kLinear), "");
  kit.ac(true);
  EXPECT_EQ(kit.write(kLinear + 0x1000), "");
  kit.ac(false);
  EXPECT_EQ(kit.read(kLinear + 0x1000), "#PF(1) at 0x7f1234568000");
  kit.ac(true);
  EXPECT_EQ(kit.read(kLinear + 0x1000, As::kSystem), "#PF(1) at 0x7f1234568000");
  kit.ring(3);
  EXPECT_EQ(kit.read(kLinear), "#PF(5) at 0x7f1234567000");
  EXPECT_EQ(kit.write(kLinear + 0x1000), "");
}

TEST(PageWalk, AccessedAndDirtyBits) {
  PagingKit kit;
  kit.map(kLinear, 0x200000);
  const auto entry = [&kit](unsigned level) { return kit.get<std::uint64_t>(kit.entry(kLinear, level)); };
  EXPECT_EQ(kit.read(kLinear), "");
  for (unsigned level = 0; level < 4; ++level) {
    EXPECT_EQ(entry(level) & (pte::kA | pte::kD), pte::kA) << level;
  }
  EXPECT_EQ(kit.write(kLinear), "");  // in the TLB by now, and yet it marks the page
  EXPECT_EQ(entry(0) & (pte::kA | pte::kD), pte::kA | pte::kD);
  EXPECT_EQ(entry(1) & pte::kD, 0U);
  // Cleared by the guest and told: set again.
  kit.put(kit.entry(kLinear, 0), entry(0) & ~(pte::kA | pte::kD));
  kit.mmu().flush_page(kLinear);
  EXPECT_EQ(kit.execute(kLinear), "");
  EXPECT_EQ(entry(0) & (pte::kA | pte::kD), pte::kA);
}

TEST(PageWalk, AFaultMarksNothing) {
  PagingKit kit;
  kit.map(kLinear, 0x200000, pte::kU);
  EXPECT_EQ(kit.write(kLinear), "#PF(3) at 0x7f1234567000");
  for (unsigned level = 0; level < 4; ++level) {
    EXPECT_EQ(kit.get<std::uint64_t>(kit.entry(kLinear, level)) & (pte::kA | pte::kD), 0U) << level;
  }
}

TEST(PageWalk, AddressesThatAreNotCanonicalAreRefusedOrNotTranslated) {
  PagingKit kit;
  kit.map(0, 0x200000);
  // Bit 47 alone, and bits that a walk never looks at.
  EXPECT_NE(kit.read(0x800000000000), "");
  EXPECT_NE(kit.read(0x0001000000000000), "");
  EXPECT_NE(kit.read(0xfffe000000000000), "");
}

TEST(PageWalk, PaePaging) {
  PagingKit kit;
  kit.pae_mode();
  kit.cpu().cr3 = kit.new_table() + 0x20;  // 32-byte aligned
  const std::uint64_t directory = kit.new_table();
  const std::uint64_t table = kit.new_table();
  kit.put<std::uint64_t>(kit.cpu().cr3 + 2 * 8, directory | pte::kP);  // 0x80000000
  kit.put<std::uint64_t>(directory + 5 * 8, table | 7);
  kit.put<std::uint64_t>(table + 7 * 8, 0x200000 | 7);
  kit.put<std::uint64_t>(directory + 6 * 8, 0x200000 | 7 | pte::kPs);
  const std::uint64_t linear = 0x80000000 + 5 * 0x200000 + 7 * 0x1000;
  EXPECT_EQ(kit.gpa_of(linear + 0x123), 0x200123U);
  EXPECT_EQ(kit.gpa_of(0x80000000 + 6 * 0x200000 + 0x123456), 0x323456U);
  EXPECT_EQ(kit.write(linear), "");
  EXPECT_EQ(kit.get<std::uint64_t>(table + 7 * 8) & (pte::kA | pte::kD), pte::kA | pte::kD);
  EXPECT_EQ(kit.get<std::uint64_t>(kit.cpu().cr3 + 2 * 8), directory | pte::kP);  // it has no such bit
  EXPECT_EQ(kit.read(0x40000000), "#PF(0) at 0x40000000");
  // Bits 62 to 52 are reserved, and those of the root's entries that grant rights elsewhere.
  kit.put<std::uint64_t>(table + 8 * 8, 0x200000 | 7 | 1ULL << 52);
  EXPECT_EQ(kit.read(linear + 0x1000), "#PF(9) at 0x80a08000");
  for (const std::uint64_t bad : std::vector<std::uint64_t>{2, 4, 0x20, 0x80, 0x100, pte::kNx, 1ULL << 52}) {
    kit.mmu().flush_all();
    kit.put<std::uint64_t>(kit.cpu().cr3 + 2 * 8, directory | pte::kP | bad);
    EXPECT_EQ(kit.read(linear), "#PF(9) at 0x80a07000") << std::hex << bad;
  }
}

TEST(PageWalk, ThirtyTwoBitPaging) {
  PagingKit kit;
  kit.legacy_mode(true);
  const std::uint64_t table = kit.new_table();
  kit.put<std::uint32_t>(PagingKit::kRoot + 0x200 * 4, static_cast<std::uint32_t>(table | 7));
  kit.put<std::uint32_t>(table + 3 * 4, 0x200000 | 7);
  kit.put<std::uint32_t>(PagingKit::kRoot + 0x201 * 4, 0x00000000 | 7 | pte::kPs);
  kit.put<std::uint32_t>(PagingKit::kRoot + 0x202 * 4, 0x00400000 | 7 | pte::kPs | 5U << 13);  // PSE-36
  kit.put<std::uint32_t>(PagingKit::kRoot + 0x203 * 4, 7 | pte::kPs | 1U << 21);
  EXPECT_EQ(kit.gpa_of(0x80003abc), 0x200abcU);
  EXPECT_EQ(kit.gpa_of(0x80723456), 0x323456U);
  EXPECT_EQ(kit.gpa_of(0x80800010), 0x500400010U);
  EXPECT_EQ(kit.read(0x80c00000), "#PF(9) at 0x80c00000");
  EXPECT_EQ(kit.write(0x80003000), "");
  EXPECT_EQ(kit.get<std::uint32_t>(table + 3 * 4), 0x200000U | 7 | pte::kA | pte::kD);
  EXPECT_EQ(kit.get<std::uint32_t>(table + 4 * 4), 0U);  // the neighbour was not touched
  EXPECT_EQ(kit.execute(0x90000000), "#PF(0) at 0x90000000");
}

TEST(PageWalk, WithoutPseTheLargeBitMeansNothing) {
  PagingKit kit;
  kit.legacy_mode(false);
  const std::uint64_t table = kit.new_table();
  kit.put<std::uint32_t>(PagingKit::kRoot, static_cast<std::uint32_t>(table | 7 | pte::kPs));
  kit.put<std::uint32_t>(table, 0x300000 | 7);
  EXPECT_EQ(kit.gpa_of(0x10), 0x300010U);
}

TEST(PageWalk, PagingOffIsTheIdentityOf32Bits) {
  PagingKit kit;
  kit.unpaged_mode();
  EXPECT_EQ(kit.gpa_of(0x345678), 0x345678U);
  kit.ring(3);
  EXPECT_EQ(kit.write(0x200000), "");
  kit.ring(0);
  kit.cpu().cr4 |= cr4::kSmep | cr4::kSmap;  // about pages, which there are none of
  kit.mmu().flush_all();
  EXPECT_EQ(kit.write(0x200000), "");
  EXPECT_EQ(kit.write(0x200000), "");
  EXPECT_EQ(kit.execute(0x200000), "");
}

TEST(PageWalk, AddressesWrapAt4GibOutsideLongMode) {
  PagingKit kit;
  kit.unpaged_mode();
  kit.put<std::uint32_t>(0, 0x44332211);
  // The second half of an access across the end of the address space is at 0.
  kit.cpu().io.answers[0] = {
      .kind = IoState::Kind::kMmioRead, .size = 2, .address = 0xfffffffe, .data = {9, 9}};
  kit.cpu().io.answer_count = 1;
  std::uint32_t value = 0;
  ASSERT_TRUE(kit.mmu().load(0xfffffffe, value));
  EXPECT_EQ(value, 0x22110909U);
}

TEST(HostileTables, AnEntryThatLeadsBackToItsOwnTable) {
  PagingKit kit;
  // The PML4 as every table of the walk: slot 1 is slot 1 of itself.
  const std::uint64_t linear = 1ULL << 39 | 1ULL << 30 | 1ULL << 21 | 1ULL << 12;
  kit.put<std::uint64_t>(PagingKit::kRoot + 8, PagingKit::kRoot | 7);
  EXPECT_EQ(kit.gpa_of(linear + 0x18), PagingKit::kRoot + 0x18);
  // It writes its own table through itself: the entry it came by is what it wrote last.
  ASSERT_TRUE(kit.mmu().store(linear + 8, std::uint64_t{PagingKit::kRoot | 7}));
  kit.mmu().flush_all();
  EXPECT_EQ(kit.write(linear + 0x40), "");
  EXPECT_EQ(kit.get<std::uint64_t>(PagingKit::kRoot + 8), PagingKit::kRoot | 7 | pte::kA | pte::kD);
}

TEST(HostileTables, TablesWhereThereIsNoMemoryReadAsNotPresent) {
  for (unsigned level = 1; level < 4; ++level) {
    for (const std::uint64_t where : std::vector<std::uint64_t>{
             PagingKit::kNothing, PagingKit::kRamSize, (1ULL << kPhysicalBits) - 4096, OnePageMmio::kPage}) {
      PagingKit kit;
      kit.map(kLinear, 0x200000);
      kit.put(kit.entry(kLinear, level), where | 7);
      EXPECT_EQ(kit.read(kLinear), "#PF(0) at 0x7f1234567000");
      EXPECT_EQ(kit.mmio.reads, 0);  // nor is a device asked
    }
  }
  PagingKit kit;
  kit.cpu().cr3 = PagingKit::kNothing;
  kit.mmu().flush_all();
  EXPECT_EQ(kit.write(kLinear), "#PF(2) at 0x7f1234567000");
}

TEST(HostileTables, TheLastEntryOfTheLastPageOfRam) {
  PagingKit kit;
  const std::uint64_t last = PagingKit::kRamSize - kPageSize;
  kit.cpu().cr3 = last;
  // Every index is 511: the last 8 bytes of RAM serve at each level.
  kit.put<std::uint64_t>(PagingKit::kRamSize - 8, last | 7);
  kit.mmu().flush_all();
  EXPECT_EQ(kit.gpa_of(0xfffffffffffff000), last);
  EXPECT_EQ(kit.write(0xffffffffffffffff), "");
  std::uint64_t value = 0;
  EXPECT_FALSE(kit.mmu().load(0xfffffffffffffffc, value));  // on from there is 0
}

TEST(HostileTables, TablesInRomServeAndStayAsTheyAre) {
  PagingKit kit;
  kit.map(kLinear, 0x200000);
  kit.put(kit.entry(kLinear, 1), PagingKit::kRom | 7);
  const std::uint64_t entry = 0x200000 | 7;
  std::memcpy(kit.rom() + (kLinear >> 12 & 511) * 8, &entry, sizeof entry);
  EXPECT_EQ(kit.write(kLinear), "");
  EXPECT_EQ(kit.write(kLinear), "");
  std::uint64_t after = 0;
  std::memcpy(&after, kit.rom() + (kLinear >> 12 & 511) * 8, sizeof after);
  EXPECT_EQ(after, entry);
}

TEST(HostileTables, EveryPageOntoOne) {
  PagingKit kit;
  for (std::uint64_t page = 0; page < 512; ++page) {
    kit.map(kLinear + page * kPageSize, 0x200000);
  }
  for (std::uint64_t page = 0; page < 512; ++page) {
    ASSERT_TRUE(kit.mmu().store(kLinear + page * kPageSize + 8 * page, page));
  }
  for (std::uint64_t page = 0; page < 512; ++page) {
    EXPECT_EQ(kit.get<std::uint64_t>(0x200000 + 8 * page), page);
  }
}

// Two processors set bits of the same entries while a third changes one: no update is lost.
TEST(HostileTables, ProcessorsThatMarkTheSameEntriesLoseNothing) {
  PagingKit kit;
  constexpr int kPages = 64;
  for (std::uint64_t page = 0; page < kPages; ++page) {
    kit.map(kLinear + page * kPageSize, 0x200000 + page * kPageSize);
  }
  auto other_cpu = std::make_unique<Cpu>();
  Mmu other(*other_cpu, kit.memory(), kit.mmio);
  other_cpu->cr0 = kit.cpu().cr0;
  other_cpu->cr3 = kit.cpu().cr3;
  other_cpu->cr4 = kit.cpu().cr4;
  other_cpu->efer = kit.cpu().efer;
  other_cpu->segments = kit.cpu().segments;
  const std::uint64_t first = kit.entry(kLinear, 0);
  for (int round = 0; round < 200; ++round) {
    for (std::uint64_t page = 0; page < kPages; ++page) {
      kit.put(first + page * 8, (0x200000 + page * kPageSize) | 7);
    }
    kit.mmu().flush_all();
    std::thread reader([&] {
      other.flush_all();
      for (std::uint64_t page = 0; page < kPages; ++page) {
        std::uint8_t byte = 0;
        EXPECT_TRUE(other.load(kLinear + page * kPageSize, byte));
      }
    });
    // A bit of the software's, set as the guest's kernel would, by a locked instruction.
    std::thread marker([&] {
      for (std::uint64_t page = 0; page < kPages; ++page) {
        __atomic_fetch_or(reinterpret_cast<std::uint64_t*>(kit.at(first + page * 8)), 1ULL << 55,
                          __ATOMIC_SEQ_CST);
      }
    });
    for (std::uint64_t page = 0; page < kPages; ++page) {
      EXPECT_EQ(kit.write(kLinear + page * kPageSize), "");
    }
    reader.join();
    marker.join();
    for (std::uint64_t page = 0; page < kPages; ++page) {
      ASSERT_EQ(kit.get<std::uint64_t>(first + page * 8),
                ((0x200000 + page * kPageSize) | 7 | pte::kA | pte::kD | 1ULL << 55));
    }
  }
}

}  // namespace
}  // namespace wisp::soft
