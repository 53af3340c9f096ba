// What the MMU caches and forgets; accesses that cross pages, hit devices, or touch pages with code or under
// the dirty log.
#include <gtest/gtest.h>

#include "hypervisor/soft/paging_kit.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kLinear = 0x7f1234567000;
constexpr std::uint64_t kA = 0x200000, kB = 0x300000;  // two pages of RAM

std::size_t tlb_index(std::uint64_t linear) {
  return (linear >> 12) % kTlbEntries;
}

// As translated code looks the access up.
bool in_line(const Cpu& cpu, Bank bank, std::uint64_t linear, std::uint32_t size, bool write) {
  const TlbBank& tlb = cpu.tlb[bank];
  const std::uint64_t tag = write ? tlb.write_tag[tlb_index(linear)] : tlb.read_tag[tlb_index(linear)];
  return ((tag + linear + size - 1) & ~kPageOffset) == 0;
}

void watch(PagingKit& kit, std::uint64_t gpa, std::uint64_t lines) {
  const PhysicalPage page = kit.memory().find(gpa);
  page.info->code_lines.fetch_or(lines);
  kit.mmu().revoke_write(page.host);
}

// --- in line

TEST(InlineTlb, AnEmptyOneMatchesNothing) {
  PagingKit kit;
  for (std::size_t bank = 0; bank < kBanks; ++bank) {
    for (std::uint64_t page = 0; page < 3 * kTlbEntries; ++page) {
      // From inside the page, and from its end on into the next.
      for (const std::uint64_t offset : {0x0ULL, 0xfffULL}) {
        for (const std::uint64_t high : {0ULL, 0xffffffff80000000ULL, 0x7ffffffff000ULL}) {
          const std::uint64_t linear = high + page * kPageSize + offset;
          ASSERT_FALSE(in_line(kit.cpu(), static_cast<Bank>(bank), linear, 8, false)) << std::hex << linear;
          ASSERT_FALSE(in_line(kit.cpu(), static_cast<Bank>(bank), linear, 1, true)) << std::hex << linear;
        }
      }
    }
  }
}

TEST(InlineTlb, AnAccessAcrossPagesIsNeverAnsweredByAnEmptyEntry) {
  // The lowest pages of the address space are those that an empty entry could be taken for.
  for (const std::uint64_t page : {0ULL, 5ULL, 255ULL, 256ULL, 510ULL, 511ULL}) {
    PagingKit kit;
    kit.map(page * kPageSize, kA);
    kit.map((page + 1) * kPageSize, kB);
    kit.put<std::uint32_t>(kA + 0xffc, 0x11111111);
    kit.put<std::uint32_t>(kB, 0x22222222);
    std::uint64_t value = 0;
    ASSERT_TRUE(kit.mmu().load(page * kPageSize + 0xffc, value)) << page;
    EXPECT_EQ(value, 0x2222222211111111U) << page;
  }
}

TEST(InlineTlb, HoldsWhatWasReadAndWritesOnlyWhereTheyAreMarked) {
  PagingKit kit;
  kit.map(kLinear, kA);
  EXPECT_EQ(kit.read(kLinear), "");
  EXPECT_TRUE(in_line(kit.cpu(), kSupervisorBank, kLinear, 8, false));
  EXPECT_FALSE(in_line(kit.cpu(), kSupervisorBank, kLinear, 8, true));
  EXPECT_FALSE(in_line(kit.cpu(), kUserBank, kLinear, 8, false));
  EXPECT_EQ(kit.write(kLinear), "");
  EXPECT_TRUE(in_line(kit.cpu(), kSupervisorBank, kLinear, 8, true));
  EXPECT_FALSE(in_line(kit.cpu(), kSupervisorBank, kLinear + 0xff9, 8, true));  // ends in the next page
  EXPECT_TRUE(in_line(kit.cpu(), kSupervisorBank, kLinear + 0xff8, 8, true));
  const TlbBank& tlb = kit.cpu().tlb[kSupervisorBank];
  EXPECT_EQ(kLinear + tlb.addend[tlb_index(kLinear)], reinterpret_cast<std::uint64_t>(kit.at(kA)));
}

TEST(InlineTlb, FillTellsFaultsFromWhatCannotGoInLine) {
  PagingKit kit;
  kit.map(kLinear, kA);
  kit.map(kLinear + 0x1000, PagingKit::kNothing);
  kit.map(kLinear + 0x2000, PagingKit::kRom);
  kit.cpu().fault = {.vector = 0xff};
  EXPECT_TRUE(kit.mmu().fill(kLinear, 8, Access::kWrite));
  EXPECT_FALSE(kit.mmu().fill(kLinear + 0xffc, 8, Access::kRead));   // crosses
  EXPECT_FALSE(kit.mmu().fill(kLinear + 0x1000, 8, Access::kRead));  // a device
  EXPECT_TRUE(kit.mmu().fill(kLinear + 0x2000, 8, Access::kRead));
  EXPECT_FALSE(kit.mmu().fill(kLinear + 0x2000, 8, Access::kWrite));  // ROM
  EXPECT_EQ(kit.cpu().fault.vector, 0xff);
  EXPECT_FALSE(kit.mmu().fill(kLinear + 0x3000, 8, Access::kRead));
  EXPECT_EQ(kit.cpu().fault.vector, vec::kPf);
}

// --- forgetting

TEST(Flushes, ANewCr3DropsWhatIsNotGlobal) {
  PagingKit kit;
  kit.map(kLinear, kA, 7);
  kit.map(kLinear + 0x1000, kA, 7 | pte::kG);
  EXPECT_EQ(kit.write(kLinear), "");
  EXPECT_EQ(kit.write(kLinear + 0x1000), "");
  // Another address space, which maps neither.
  kit.cpu().cr3 = kit.new_table();
  kit.mmu().flush_context();
  EXPECT_EQ(kit.read(kLinear), "#PF(0) at 0x7f1234567000");
  EXPECT_EQ(kit.read(kLinear + 0x1000), "");
  kit.mmu().flush_all();
  EXPECT_EQ(kit.read(kLinear + 0x1000), "#PF(0) at 0x7f1234568000");
}

TEST(Flushes, WithoutPgeNothingIsGlobal) {
  PagingKit kit;
  kit.cpu().cr4 &= ~cr4::kPge;
  kit.map(kLinear, kA, 7 | pte::kG);
  EXPECT_EQ(kit.read(kLinear), "");
  kit.cpu().cr3 = kit.new_table();
  kit.mmu().flush_context();
  EXPECT_EQ(kit.read(kLinear), "#PF(0) at 0x7f1234567000");
}

TEST(Flushes, PcidsKeepAddressSpacesApart) {
  PagingKit kit;
  kit.cpu().cr4 |= cr4::kPcide;
  const std::uint64_t first = PagingKit::kRoot | 1;
  kit.cpu().cr3 = first;
  kit.mmu().flush_all();
  kit.map(kLinear, kA);
  EXPECT_EQ(kit.gpa_of(kLinear), kA);
  const std::uint64_t second = kit.new_table() | 2;
  kit.cpu().cr3 = second;
  kit.mmu().flush_context(true);
  kit.map(kLinear, kB);
  EXPECT_EQ(kit.gpa_of(kLinear), kB);
  // Back without a flush: what was cached is still there, though the tables say something else by now.
  kit.cpu().cr3 = first;
  kit.mmu().flush_context(true);
  const std::uint64_t entry = kit.entry(kLinear, 0);
  EXPECT_EQ(kit.gpa_of(kLinear), kA);
  kit.put<std::uint64_t>(entry, kB | 7);
  kit.mmu().flush_context(false);
  EXPECT_EQ(kit.gpa_of(kLinear), kB);
  // And what the flush dropped was that of one PCID.
  kit.cpu().cr3 = second;
  kit.mmu().flush_context(true);
  EXPECT_EQ(kit.gpa_of(kLinear), kB);
  kit.put<std::uint64_t>(kit.entry(kLinear, 0), kA | 7);
  kit.mmu().flush_pcid(1);
  kit.cpu().cr3 = second;
  kit.mmu().flush_pcid(2);
  EXPECT_EQ(kit.gpa_of(kLinear), kA);
}

TEST(Flushes, InvlpgDropsOnePageGlobalOrNot) {
  for (const std::uint64_t global : {std::uint64_t{0}, pte::kG}) {
    PagingKit kit;
    kit.map(kLinear, kA, 7 | global);
    kit.map(kLinear + 0x1000, kA + 0x1000, 7);
    EXPECT_EQ(kit.write(kLinear), "");
    EXPECT_EQ(kit.write(kLinear + 0x1000), "");
    kit.put<std::uint64_t>(kit.entry(kLinear, 0), 0);
    kit.put<std::uint64_t>(kit.entry(kLinear + 0x1000, 0), 0);
    kit.mmu().flush_page(kLinear + 0x123);
    EXPECT_EQ(kit.write(kLinear), "#PF(2) at 0x7f1234567000");
    EXPECT_EQ(kit.write(kLinear + 0x1000), "");
  }
}

TEST(Flushes, InvlpgDropsEveryPartOfALargePage) {
  for (const unsigned level : {1U, 2U}) {
    PagingKit kit;
    const std::uint64_t size = level == 1 ? 2U << 20 : 1U << 30;
    const std::uint64_t linear = kLinear & ~(size - 1);
    kit.map(linear, 0, 7 | pte::kPs, level);
    const std::vector<std::uint64_t> offsets{0, 0x1000, 0x1ff000, level == 1 ? 0x5000U : 0x3fc000U};
    for (const std::uint64_t offset : offsets) {
      EXPECT_EQ(kit.read(linear + offset), "");
    }
    kit.put<std::uint64_t>(kit.entry(linear, level), 0);
    kit.mmu().flush_page(linear + size - 0x5000);  // a part that was not used
    for (const std::uint64_t offset : offsets) {
      EXPECT_NE(kit.read(linear + offset), "") << level << " " << std::hex << offset;
    }
  }
}

TEST(Flushes, AFewPagesTooManyForTheLogOfFillsAreAllDropped) {
  PagingKit kit;
  for (std::uint64_t page = 0; page < 3000; ++page) {
    kit.map(kLinear + page * kPageSize, kA);
    EXPECT_EQ(kit.read(kLinear + page * kPageSize), "");
  }
  kit.cpu().cr3 = kit.new_table();
  kit.mmu().flush_context();
  for (std::uint64_t page = 0; page < 3000; ++page) {
    ASSERT_NE(kit.read(kLinear + page * kPageSize), "") << page;
  }
}

TEST(Flushes, JumpsFollowThePages) {
  PagingKit kit;
  kit.map(kLinear, kA);
  kit.map(kLinear + 0x5000, kB, 7 | pte::kG);
  Cpu& cpu = kit.cpu();
  const auto note = [&](std::uint64_t linear, bool global) {
    cpu.jumps[kSupervisorBank].tag[jump_index(linear)] = -linear;
    kit.mmu().note_jump(kSupervisorBank, jump_index(linear), global);
  };
  const auto there = [&](std::uint64_t linear) {
    return cpu.jumps[kSupervisorBank].tag[jump_index(linear)] == -linear;
  };
  const std::uint64_t local = kLinear + 0x10;
  const std::uint64_t global = kLinear + 0x5f20;
  note(local, false);
  note(global, true);
  kit.mmu().flush_page(kLinear + 0x1000);
  EXPECT_TRUE(there(local) && there(global));
  kit.mmu().flush_context();
  EXPECT_FALSE(there(local));
  EXPECT_TRUE(there(global));
  kit.mmu().flush_page(global);
  EXPECT_FALSE(there(global));
  note(global, true);
  kit.mmu().flush_all();
  EXPECT_FALSE(there(global));
}

// --- across pages

TEST(Straddling, ReadsAndWritesGoToBothPages) {
  PagingKit kit;
  kit.map(kLinear, kA);
  kit.map(kLinear + 0x1000, kB);
  for (const std::uint32_t size : {2U, 3U, 8U, 16U, 32U, 64U}) {
    for (std::uint32_t first = 1; first < size; ++first) {
      const std::uint64_t linear = kLinear + 0x1000 - first;
      std::array<std::uint8_t, 64> in{};
      std::array<std::uint8_t, 64> out{};
      for (std::size_t i = 0; i < size; ++i) {
        in[i] = static_cast<std::uint8_t>(first * 7 + i);
      }
      std::memset(kit.at(kA), 0, kPageSize);
      std::memset(kit.at(kB), 0, kPageSize);
      ASSERT_TRUE(kit.mmu().write(linear, in.data(), size));
      EXPECT_EQ(std::memcmp(kit.at(kA + 0x1000 - first), in.data(), first), 0);
      EXPECT_EQ(std::memcmp(kit.at(kB), in.data() + first, size - first), 0);
      EXPECT_EQ(*kit.at(kB + size - first), 0);
      ASSERT_TRUE(kit.mmu().read(linear, out.data(), size));
      EXPECT_EQ(in, out);
    }
  }
}

TEST(Straddling, AFaultInTheSecondPageLeavesTheFirstAlone) {
  PagingKit kit;
  kit.map(kLinear, kA);
  kit.map(kLinear + 0x1000, kB, pte::kU);
  kit.cpu().fault = {};
  EXPECT_EQ(kit.outcome(kit.mmu().store(kLinear + 0xffd, std::uint64_t{~0ULL})), "#PF(3) at 0x7f1234568000");
  EXPECT_EQ(kit.get<std::uint32_t>(kA + 0xffc), 0U);
  std::uint64_t value = 0;
  kit.put<std::uint64_t>(kit.entry(kLinear + 0x1000, 0), 0);
  kit.mmu().flush_all();
  EXPECT_EQ(kit.outcome(kit.mmu().load(kLinear + 0xffd, value)), "#PF(0) at 0x7f1234568000");
  EXPECT_EQ(kit.mmu().pin(kLinear + 0xffd, 8, Access::kRead), nullptr);
  EXPECT_FALSE(kit.mmu().probe(kLinear + 0xffd, 8, Access::kRead));
}

TEST(Straddling, ADeviceIsAskedOnlyWhenNothingElseCanFault) {
  PagingKit kit;
  kit.map(kLinear, PagingKit::kNothing);
  std::uint64_t value = 0;
  EXPECT_EQ(kit.outcome(kit.mmu().load(kLinear + 0xffc, value)), "#PF(0) at 0x7f1234568000");
  EXPECT_FALSE(kit.cpu().io.waiting);
}

// --- devices

TEST(Devices, AReadWaitsAndTakesItsAnswerWhenItRunsAgain) {
  PagingKit kit;
  kit.map(kLinear, PagingKit::kNothing);
  IoState& io = kit.cpu().io;
  std::uint32_t value = 0;
  EXPECT_EQ(kit.outcome(kit.mmu().load(kLinear + 8, value)), "wait");
  EXPECT_EQ(io.wanted.kind, IoState::Kind::kMmioRead);
  EXPECT_EQ(io.wanted.address, PagingKit::kNothing + 8);
  EXPECT_EQ(io.wanted.size, 4);
  io.answers[0] = io.wanted;
  io.answers[0].data = {0x78, 0x56, 0x34, 0x12};
  io.answer_count = 1;
  io.waiting = false;
  ASSERT_TRUE(kit.mmu().load(kLinear + 8, value));
  EXPECT_EQ(value, 0x12345678U);
  // One answer serves one read.
  EXPECT_EQ(kit.outcome(kit.mmu().load(kLinear + 8, value)), "wait");
}

TEST(Devices, AWideReadAsksPartByPartAndNeverTwice) {
  PagingKit kit;
  kit.map(kLinear, PagingKit::kNothing);
  IoState& io = kit.cpu().io;
  std::array<std::uint8_t, 32> value{};
  for (std::uint32_t part = 0; part < 4; ++part) {
    io.answers_used = 0;
    EXPECT_EQ(kit.outcome(kit.mmu().read(kLinear, value.data(), 32)), "wait");
    EXPECT_EQ(io.wanted.address, PagingKit::kNothing + part * 8);
    EXPECT_EQ(io.wanted.size, 8);
    io.answers[io.answer_count] = io.wanted;
    io.answers[io.answer_count++].data.fill(static_cast<std::uint8_t>(part + 1));
    io.waiting = false;
  }
  io.answers_used = 0;
  ASSERT_TRUE(kit.mmu().read(kLinear, value.data(), 32));
  for (std::size_t i = 0; i < 32; ++i) {
    EXPECT_EQ(value[i], i / 8 + 1);
  }
}

TEST(Devices, WritesAreTakenDownInOrder) {
  PagingKit kit;
  kit.map(kLinear, PagingKit::kNothing);
  kit.map(kLinear + 0x1000, OnePageMmio::kPage);
  ASSERT_TRUE(kit.mmu().store(kLinear + 4, std::uint32_t{0xaabbccdd}));
  ASSERT_TRUE(kit.mmu().store(kLinear + 0x1010, std::uint16_t{0x1234}));
  IoState& io = kit.cpu().io;
  ASSERT_EQ(io.write_count, 1U);
  EXPECT_EQ(io.writes[0].address, PagingKit::kNothing + 4);
  EXPECT_EQ(io.writes[0].size, 4);
  EXPECT_EQ(io.writes[0].data[3], 0xaa);
  ASSERT_EQ(kit.mmio.written.size(), 1U);  // the engine's own never leaves it
  EXPECT_EQ(kit.mmio.written[0].first, OnePageMmio::kPage + 0x10);
  std::uint32_t value = 0;
  ASSERT_TRUE(kit.mmu().load(kLinear + 0x1020, value));
  EXPECT_EQ(value, 0x5a5a5a5aU);
}

TEST(Devices, RomIsReadAndItsWritesAreToldButDropped) {
  PagingKit kit;
  kit.map(kLinear, PagingKit::kRom);
  kit.rom()[3] = 0x77;
  std::uint8_t byte = 0;
  ASSERT_TRUE(kit.mmu().load(kLinear + 3, byte));
  EXPECT_EQ(byte, 0x77);
  EXPECT_EQ(kit.mmu().pin(kLinear + 3, 1, Access::kWrite), nullptr);
  ASSERT_TRUE(kit.mmu().store(kLinear + 3, std::uint8_t{0x99}));
  EXPECT_EQ(kit.rom()[3], 0x77);
  ASSERT_EQ(kit.cpu().io.write_count, 1U);
  EXPECT_EQ(kit.cpu().io.writes[0].address, PagingKit::kRom + 3);
}

TEST(Devices, MoreWritesThanThereIsRoomForStayInside) {
  PagingKit kit;
  kit.map(kLinear, PagingKit::kNothing);
  std::array<std::uint8_t, 64> bytes{};
  for (int i = 0; i < 5; ++i) {
    (void)kit.mmu().write(kLinear, bytes.data(), 64);
  }
  EXPECT_LE(kit.cpu().io.write_count, IoState::kMax);
}

// --- code

TEST(Code, AWriteIntoAWatchedLineIsToldOnceItHappened) {
  PagingKit kit;
  kit.map(kLinear, kA);
  EXPECT_EQ(kit.write(kLinear), "");
  PageInfo& info = *kit.memory().find(kA).info;
  const std::uint32_t version = info.version.load();
  watch(kit, kA, 1U << 3 | 1U << 4);
  EXPECT_FALSE(in_line(kit.cpu(), kSupervisorBank, kLinear, 1, true));
  EXPECT_TRUE(in_line(kit.cpu(), kSupervisorBank, kLinear, 1, false));
  // Beside the lines: nobody need know.
  ASSERT_TRUE(kit.mmu().store(kLinear + 3 * 64 - 8, std::uint64_t{1}));
  EXPECT_EQ(info.version.load(), version);
  EXPECT_TRUE(kit.watcher.calls.empty());
  EXPECT_FALSE(in_line(kit.cpu(), kSupervisorBank, kLinear, 1, true));  // the page is still watched
  // Across from one that is not watched into one that is.
  ASSERT_TRUE(kit.mmu().store(kLinear + 3 * 64 - 4, std::uint64_t{2}));
  EXPECT_GT(info.version.load(), version);
  ASSERT_EQ(kit.watcher.calls.size(), 1U);
  const auto [gpa, size] = kit.watcher.calls[0];
  EXPECT_LE(gpa, kA + 3 * 64);
  EXPECT_GE(gpa + size, kA + 3 * 64 + 4);
}

TEST(Code, EveryWayOfWritingIsSeen) {
  const auto seen = [](const std::function<void(PagingKit&)>& act) {
    PagingKit kit;
    kit.map(kLinear, kA);
    kit.map(kLinear + 0x1000, kB);
    EXPECT_EQ(kit.write(kLinear), "");
    PageInfo& info = *kit.memory().find(kA).info;
    watch(kit, kA, ~0ULL);
    const std::uint32_t version = info.version.load();
    act(kit);
    return info.version.load() != version;
  };
  EXPECT_TRUE(seen([](PagingKit& kit) { (void)kit.mmu().store(kLinear + 0xffc, std::uint64_t{1}); }));
  EXPECT_TRUE(seen([](PagingKit& kit) { (void)kit.mmu().store(kLinear, std::uint8_t{1}, As::kSystem); }));
  EXPECT_TRUE(seen([](PagingKit& kit) { (void)kit.mmu().write_physical(kA + 8, "x", 1); }));
  EXPECT_TRUE(seen([](PagingKit& kit) {
    std::uint8_t* host = kit.mmu().pin(kLinear + 100, 16, Access::kWrite);
    ASSERT_NE(host, nullptr);
    host[0] = 1;
    kit.mmu().wrote(kLinear + 100, 16);
  }));
  EXPECT_FALSE(seen([](PagingKit& kit) {
    std::uint64_t value = 0;
    (void)kit.mmu().load(kLinear, value);
    (void)kit.mmu().probe(kLinear, 8, Access::kWrite);
  }));
  // The walk's own marks in a table that somebody runs as code.
  PagingKit kit;
  kit.map(kLinear, kA);
  const std::uint64_t table = kit.entry(kLinear, 0) & ~kPageOffset;
  watch(kit, table, ~0ULL);
  const std::uint32_t version = kit.memory().find(table).info->version.load();
  EXPECT_EQ(kit.read(kLinear), "");
  EXPECT_NE(kit.memory().find(table).info->version.load(), version);
}

// A page that held code and is data now must not be slow for ever.
TEST(CodeLines, AreForgottenOfAPageThatIsWrittenTimeAndAgain) {
  PagingKit kit;
  kit.map(kLinear, kA);
  watch(kit, kA, 1);  // the first line; the writes go to another one
  const PageInfo& info = *kit.memory().find(kA).info;
  const std::uint32_t version = info.version.load();
  const std::size_t told = kit.watcher.calls.size();
  for (int i = 0; i < 2000 && info.code_lines.load() != 0; ++i) {
    EXPECT_EQ(kit.write(kLinear + 0x800), "");
  }
  EXPECT_EQ(info.code_lines.load(), 0U);
  // Whoever keeps its instructions learns of it, and whoever translated them.
  EXPECT_NE(info.version.load(), version);
  ASSERT_EQ(kit.watcher.calls.size(), told + 1);
  EXPECT_EQ(kit.watcher.calls.back(), std::pair(std::uint64_t{kA}, std::uint32_t{kPageSize}));
  // Now in line, without anybody being told.
  EXPECT_EQ(kit.write(kLinear + 0x800), "");
  EXPECT_EQ(kit.write(kLinear + 0x808), "");
  EXPECT_EQ(kit.watcher.calls.size(), told + 1);
}

// --- the dirty log

TEST(DirtyLog, TellsPagesThatWereWrittenSinceItWasTaken) {
  PagingKit kit;
  kit.memory().set_change_hook([&kit] { kit.mmu().flush_all(); });
  kit.map(kLinear, kA);
  kit.map(kLinear + 0x1000, kB);
  EXPECT_EQ(kit.write(kLinear), "");
  kit.memory().set_dirty_log(true);
  const auto dirty = [&kit](std::uint64_t gpa) {
    const auto pages = kit.memory().take_dirty_log(0);
    EXPECT_TRUE(pages);
    return pages && (pages->at(gpa / kPageSize / 64) >> (gpa / kPageSize % 64) & 1) != 0;
  };
  EXPECT_FALSE(dirty(kA));  // it was before the log
  EXPECT_EQ(kit.read(kLinear), "");
  EXPECT_FALSE(dirty(kA));
  EXPECT_EQ(kit.write(kLinear), "");
  EXPECT_EQ(kit.write(kLinear), "");
  EXPECT_TRUE(dirty(kA));
  EXPECT_FALSE(dirty(kA));
  EXPECT_EQ(kit.write(kLinear), "");  // though it had write access before
  EXPECT_TRUE(dirty(kA));
  // The processor's own writes: into tables, and those of the clock.
  kit.put<std::uint64_t>(kit.entry(kLinear + 0x1000, 0), kB | 7);
  kit.mmu().flush_all();
  EXPECT_EQ(kit.read(kLinear + 0x1000), "");
  EXPECT_TRUE(dirty(kit.entry(kLinear, 0) & ~kPageOffset));
  ASSERT_TRUE(kit.mmu().write_physical(kB + 0xffe, "abcd", 4));
  auto pages = kit.memory().take_dirty_log(0);
  ASSERT_TRUE(pages);
  EXPECT_EQ(pages->at(kB / kPageSize / 64) >> (kB / kPageSize % 64) & 3, 3U);
  EXPECT_FALSE(kit.memory().take_dirty_log(0x1000));
  EXPECT_FALSE(kit.memory().take_dirty_log(PagingKit::kRom));
}

TEST(DirtyLog, OfARangeWithAnOddNumberOfPages) {
  std::vector<std::uint8_t> host(67 * kPageSize + kPageSize);
  PhysicalMemory memory;
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add_listener(&memory));
  ASSERT_TRUE(space.add(MemoryRegion::ram("ram", host.data(), 67 * kPageSize), 1ULL << 32));
  memory.set_dirty_log(true);
  const std::uint64_t last = (1ULL << 32) + 66 * kPageSize;
  memory.written(memory.find(last), last + 5, 1);
  const auto pages = memory.take_dirty_log(1ULL << 32);
  ASSERT_TRUE(pages);
  EXPECT_EQ(*pages, (std::vector<std::uint64_t>{0, 4}));
  space.remove_listener(&memory);
}

// --- the map of memory

TEST(MemoryMap, ForgetsWhatWasTakenOut) {
  std::vector<std::uint8_t> host(16 * kPageSize);
  PhysicalMemory memory;
  int changes = 0;
  memory.set_change_hook([&changes] { ++changes; });
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add_listener(&memory));
  const auto low = MemoryRegion::ram("low", host.data(), 4 * kPageSize);
  const auto high = MemoryRegion::ram("high", host.data() + 4 * kPageSize, 4 * kPageSize);
  ASSERT_TRUE(space.add(low, 0x10000));
  ASSERT_TRUE(space.add(high, 0x1ffff0000));
  EXPECT_EQ(changes, 2);
  EXPECT_FALSE(memory.find(0xffff));
  EXPECT_EQ(memory.find(0x10fff).host, host.data());
  EXPECT_EQ(memory.find(0x13fff).host, host.data() + 3 * kPageSize);
  EXPECT_FALSE(memory.find(0x14000));
  EXPECT_EQ(memory.find(0x1ffff1000).host, host.data() + 5 * kPageSize);
  EXPECT_FALSE(memory.find(~0ULL));
  ASSERT_TRUE(space.remove(low));
  EXPECT_FALSE(memory.find(0x10000));
  EXPECT_EQ(memory.find(0x1ffff1000).host, host.data() + 5 * kPageSize);
  EXPECT_EQ(changes, 3);
  space.remove_listener(&memory);
}

TEST(MemoryMap, RangesThatAreNoWholePages) {
  std::vector<std::uint8_t> host(4 * kPageSize);
  PhysicalMemory memory;
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add_listener(&memory));
  ASSERT_TRUE(space.add(MemoryRegion::rom("rom", host.data(), 0x2800), 0x1800));
  EXPECT_FALSE(memory.find(0x1800));  // the machine answers for the rest of that page
  EXPECT_EQ(memory.find(0x2000).host, host.data() + 0x800);
  EXPECT_EQ(memory.find(0x3fff).host, host.data() + 0x1800);
  EXPECT_FALSE(memory.find(0x4000));
  ASSERT_TRUE(space.add(MemoryRegion::ram("small", host.data(), 0x800), 0x8000));
  EXPECT_FALSE(memory.find(0x8000));
  space.remove_listener(&memory);
}

TEST(MemoryMap, CodeOfPagesThatWentIsNotKept) {
  std::vector<std::uint8_t> host(4 * kPageSize);
  PhysicalMemory memory;
  AddressSpace space("memory", 0);
  ASSERT_TRUE(space.add_listener(&memory));
  RecordingWatcher watcher;
  memory.set_code_watcher(&watcher);
  const auto region = MemoryRegion::ram("ram", host.data(), 4 * kPageSize);
  ASSERT_TRUE(space.add(region, 0x1000));
  PageInfo* info = memory.find(0x2000).info;
  info->code_lines.store(1);
  const std::uint32_t version = info->version.load();
  ASSERT_TRUE(space.remove(region));
  // Whoever kept an instruction of it compares the version, through the pointer that it has.
  EXPECT_NE(info->version.load(), version);
  ASSERT_EQ(watcher.calls.size(), 1U);
  EXPECT_EQ(watcher.calls[0].first, 0x2000U);
  space.remove_listener(&memory);
}

TEST(MemoryMap, Doorbells) {
  PhysicalMemory memory;
  FlatRange range{.start = 0x9000, .size = 0x1000, .kind = RegionKind::kIo};
  range.events = {{.offset = 0x50, .size = 4, .value = 1, .fd = 101},
                  {.offset = 0x50, .size = 4, .value = 2, .fd = 102},
                  {.offset = 0x50, .size = 2, .value = {}, .fd = 103},
                  {.offset = 0x60, .size = 0, .value = {}, .fd = 104}};
  ASSERT_TRUE(memory.range_added(range));
  const auto ring = [&memory](std::uint64_t address, std::uint32_t value, std::size_t size) {
    std::array<std::uint8_t, 8> data{};
    std::memcpy(data.data(), &value, 4);
    return memory.doorbell(address, std::span(data.data(), size));
  };
  EXPECT_EQ(ring(0x9050, 1, 4), 101);
  EXPECT_EQ(ring(0x9050, 2, 4), 102);
  EXPECT_EQ(ring(0x9050, 3, 4), -1);
  EXPECT_EQ(ring(0x9050, 77, 2), 103);
  EXPECT_EQ(ring(0x9050, 1, 1), -1);
  EXPECT_EQ(ring(0x9060, 9, 1), 104);
  EXPECT_EQ(ring(0x9060, 9, 8), 104);
  EXPECT_EQ(ring(0x9061, 9, 1), -1);
  memory.range_removed(range);
  EXPECT_EQ(ring(0x9050, 1, 4), -1);
}

}  // namespace
}  // namespace wisp::soft
