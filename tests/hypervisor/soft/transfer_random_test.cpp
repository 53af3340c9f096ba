// Far transfers, returns and events over descriptor tables and stacks of random bytes: what faults changes
// nothing, what succeeds leaves a processor that may exist, and all of it ends.
#include <gtest/gtest.h>

#include <random>

#include "hypervisor/soft/system_kit.h"

namespace wisp::soft {
namespace {

using Kit = SystemKit;

struct Snapshot {
  std::array<std::uint64_t, 16> gpr{};
  std::uint64_t rip = 0, flags = 0, cr0 = 0;
  std::array<Segment, 6> segments{};
  std::uint8_t cpl = 0;
};

bool same(const Segment& a, const Segment& b) {
  return a.base == b.base && a.limit == b.limit && a.selector == b.selector && a.attributes == b.attributes;
}

Snapshot snapshot(const Cpu& cpu) {
  return {.gpr = cpu.gpr,
          .rip = cpu.rip,
          .flags = cpu.rflags(),
          .cr0 = cpu.cr0,
          .segments = cpu.segments,
          .cpl = cpu.cpl};
}

void expect_unchanged(const Cpu& cpu, const Snapshot& before) {
  EXPECT_TRUE(cpu.gpr == GeneralRegisters(before.gpr));
  EXPECT_EQ(cpu.rip, before.rip);
  EXPECT_EQ(cpu.rflags(), before.flags);
  EXPECT_EQ(cpu.cpl, before.cpl);
  for (std::size_t i = 0; i < 6; ++i) {
    EXPECT_TRUE(same(cpu.segments[i], before.segments[i])) << i;
  }
}

// What holds of every processor outside of real mode.
void expect_possible(const Cpu& cpu) {
  const Segment& cs = cpu.segments[kCs];
  const Segment& ss = cpu.segments[kSs];
  if (cpu.virtual_8086()) {
    EXPECT_EQ(cpu.cpl, 3);
    EXPECT_FALSE(cpu.long_mode());
    return;
  }
  EXPECT_EQ(cs.selector & 3, cpu.cpl);
  EXPECT_TRUE(cs.present());
  EXPECT_EQ(cs.attributes & 0x18, 0x18);
  EXPECT_NE(cs.type() & 1, 0);  // accessed
  if ((cs.type() & 4) != 0) {
    EXPECT_LE(cs.dpl(), cpu.cpl);
  } else {
    EXPECT_EQ(cs.dpl(), cpu.cpl);
  }
  if (cpu.code64()) {
    EXPECT_FALSE(cs.big());
    EXPECT_TRUE(canonical(cpu.rip));
  } else {
    EXPECT_LE(cpu.rip, cs.limit);
  }
  if (ss.attributes == 0) {
    EXPECT_TRUE(cpu.code64());
    EXPECT_NE(cpu.cpl, 3);
  } else {
    EXPECT_EQ(ss.dpl(), cpu.cpl);
    EXPECT_EQ(ss.attributes & 0x9a, 0x92);
  }
  for (const SegmentId which : {kEs, kDs, kFs, kGs}) {
    const Segment& segment = cpu.segments[which];
    if (segment.attributes != 0 && (segment.type() & 0xc) != 0xc) {
      EXPECT_GE(segment.dpl(), cpu.cpl);
    }
  }
}

// What the stacks below cross pages by: an empty entry of the in-line TLB must not pass for that of the page
// in which the access ends.
TEST(InLineTlb, AccessesAcrossTheFirstPagesAreNotTakenForHits) {
  Kit kit;
  kit.long_mode(0);
  for (std::uint64_t page = 0; page < 4; ++page) {
    const std::uint64_t linear = 0x10000 + page * 0x1000 - 4;
    kit.put<std::uint64_t>(linear, 0x1122334455667788 + page);
    kit.mmu().flush_all();
    std::uint64_t value = 0;
    EXPECT_TRUE(kit.mmu().load(linear, value));
    EXPECT_EQ(value, 0x1122334455667788 + page);
    kit.mmu().flush_all();
    EXPECT_TRUE(kit.mmu().store(linear, page));
    EXPECT_EQ(kit.get<std::uint64_t>(linear), page);
  }
}

class RandomTransfers : public ::testing::Test {
 protected:
  std::uint64_t any() { return random_(); }
  template <typename... T>
  std::uint64_t one_of(T... values) {
    const std::array<std::uint64_t, sizeof...(T)> list{static_cast<std::uint64_t>(values)...};
    return list[random_() % list.size()];
  }
  std::uint16_t selector() {
    if (any() % 8 == 0) {
      return static_cast<std::uint16_t>(any());
    }
    return static_cast<std::uint16_t>((any() % 0x18) * 8 + any() % 4);
  }
  std::uint64_t offset() {
    return one_of(0, 0x1000, 0x30000, 0x10000 - 1, 0xffffffff, 0xffffffff81000000, 0x800000000000,
                  0x7fffffffffff, any());
  }
  // The kit's descriptors with some bits turned; now and then one of random bytes.
  void scramble() {
    for (std::uint64_t at = 8; at < 0xb8; at += 8) {
      switch (any() % 4) {
        case 0:
          kit_.put(Kit::kGdt + at, kit_.get<std::uint64_t>(Kit::kGdt + at) ^ 1ULL << (40 + any() % 24));
          break;
        case 1:
          if (any() % 4 == 0) {
            kit_.put(Kit::kGdt + at, any());
          }
          break;
        default:
          break;
      }
    }
    for (std::uint32_t vector = 0; vector < 32; ++vector) {
      const GateSpec gate{.selector = selector(),
                          .offset = offset(),
                          .type = static_cast<std::uint8_t>(one_of(14, 14, 15, 6, any() % 32)),
                          .dpl = static_cast<std::uint8_t>(any() % 4),
                          .extra = static_cast<std::uint8_t>(any() % 4 == 0 ? any() % 8 : 0),
                          .present = any() % 8 != 0};
      if (kit_.cpu().long_mode()) {
        kit_.gate64(static_cast<std::uint8_t>(vector), gate);
      } else {
        kit_.gate32(static_cast<std::uint8_t>(vector), gate);
      }
    }
    kit_.call_gate(Kit::kGate, {.selector = selector(),
                                .offset = offset(),
                                .type = static_cast<std::uint8_t>(one_of(12, 12, 4, 5, any() % 16)),
                                .dpl = static_cast<std::uint8_t>(any() % 4),
                                .extra = static_cast<std::uint8_t>(any() % 32)});
    for (std::uint64_t at = 4; at < 0x60; at += 4) {
      kit_.put(Kit::kTss + at, static_cast<std::uint32_t>(one_of(0x20000, 0x28000, selector(), any())));
    }
  }
  void enter_some_mode() {
    kit_.make_tables();
    const auto ring = static_cast<std::uint8_t>(any() % 2 * 3);
    switch (any() % 3) {
      case 0:
        kit_.long_mode(ring);
        break;
      case 1:
        kit_.compatibility_mode(ring);
        break;
      default:
        kit_.protected_mode(ring);
        break;
    }
    const std::uint64_t sp = kit_.cpu().gpr[kRsp];
    for (std::uint64_t at = 0; at < 0x60; at += 4) {
      kit_.put(sp + at, static_cast<std::uint32_t>(one_of(0, selector(), 0x202, 0x23202, 0x250000, any())));
    }
    if (any() % 8 == 0) {
      kit_.cpu().gpr[kRsp] = one_of(0, 2, 0x1ffffe, 0x3ffffe, 0x800000000002, any());
    }
    if (any() % 8 == 0) {
      kit_.cpu().tr.limit = static_cast<std::uint32_t>(any() % 0x70);
    }
    if (any() % 8 == 0) {
      kit_.cpu().idt.limit = static_cast<std::uint16_t>(any() % 0x200);
    }
  }
  Outcome transfer() {
    const auto size = static_cast<std::uint32_t>(one_of(2, 4, 8));
    const std::uint32_t capped = kit_.cpu().code64() ? size : std::min(size, 4U);
    switch (any() % 5) {
      case 0:
        return far_jump(kit_.core(), selector(), offset(), capped);
      case 1:
        return far_call(kit_.core(), selector(), offset(), capped, kit_.cpu().rip + 7);
      case 2:
        return far_return(kit_.core(), capped, static_cast<std::uint32_t>(any() % 3 * 8));
      case 3:
        return interrupt_return(kit_.core(), capped);
      default: {
        const auto which = static_cast<SegmentId>(one_of(kEs, kSs, kDs, kFs, kGs));
        return load_segment(kit_.core(), which, selector()) ? Outcome::kNext : Outcome::kFault;
      }
    }
  }

  Kit kit_;
  std::mt19937_64 random_{20240607};
};

TEST_F(RandomTransfers, FaultsChangeNothingAndSuccessIsPossible) {
  int done = 0;
  for (int turn = 0; turn < 60000 && !::testing::Test::HasFailure(); ++turn) {
    SCOPED_TRACE(turn);
    enter_some_mode();
    if (turn % 4 != 0) {
      scramble();
    }
    const Snapshot before = snapshot(kit_.cpu());
    const Outcome outcome = transfer();
    if (kit_.mmu().stopped_for_io()) {
      EXPECT_EQ(outcome == Outcome::kIo || outcome == Outcome::kFault, true);
      kit_.cpu().io = {};
      expect_unchanged(kit_.cpu(), before);
    } else if (outcome == Outcome::kFault) {
      expect_unchanged(kit_.cpu(), before);
    } else {
      ++done;
      expect_possible(kit_.cpu());
    }
  }
  EXPECT_GT(done, 3000);
}

TEST_F(RandomTransfers, EventsEndInAHandlerOrShutDown) {
  int handled = 0;
  for (int turn = 0; turn < 60000 && !::testing::Test::HasFailure(); ++turn) {
    SCOPED_TRACE(turn);
    enter_some_mode();
    if (turn % 4 != 0) {
      scramble();
    }
    const auto kind = static_cast<EventKind>(any() % 5);
    const Fault fault{.vector = static_cast<std::uint8_t>(any() % 24),
                      .has_error_code = any() % 2 == 0,
                      .error_code = static_cast<std::uint32_t>(any() & 0xffff)};
    if (deliver_event(kit_.core(), fault, kind, 2)) {
      ++handled;
      expect_possible(kit_.cpu());
      EXPECT_EQ(kit_.cpu().other_flags & (flag::kTf | flag::kNt | flag::kVm), 0U);
    }
    kit_.cpu().io = {};
  }
  EXPECT_GT(handled, 3000);
}

}  // namespace
}  // namespace wisp::soft
