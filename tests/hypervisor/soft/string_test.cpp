// String instructions against a model that does one element after the other, with pages that fault, overlap,
// every element size and direction; then devices and ports.
#include <gtest/gtest.h>

#include <random>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/instruction_kit.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kWindow = 0x40000000;  // linear; eight pages of RAM
constexpr std::uint64_t kBacking = 0x200000;
constexpr std::uint64_t kPages = 8;

struct Pattern {
  std::uint8_t opcode = 0xa4;
  std::uint32_t size = 1;
  std::uint8_t repeat = 0;
  bool narrow_address = false;
};

std::vector<std::uint8_t> encode(const Pattern& pattern) {
  std::vector<std::uint8_t> bytes;
  if (pattern.narrow_address) {
    bytes.push_back(0x67);
  }
  if (pattern.repeat != 0) {
    bytes.push_back(pattern.repeat);
  }
  if (pattern.size == 2) {
    bytes.push_back(0x66);
  }
  if (pattern.size == 8) {
    bytes.push_back(0x48);
  }
  bytes.push_back(pattern.size == 1 ? pattern.opcode : pattern.opcode | 1);
  return bytes;
}

// What the instruction does, by its description in the manual: memory is the window's bytes.
class Model final {
 public:
  std::vector<std::uint8_t> memory;
  std::vector<bool> present;  // by page
  std::uint64_t rax = 0, rcx = 0, rsi = 0, rdi = 0, flags = 0;
  bool down = false;
  bool faulted = false;
  std::uint64_t fault_address = 0;

  void run(const Pattern& pattern) {
    const std::uint64_t before = flags;
    for (;;) {
      if (pattern.repeat != 0 && rcx == 0) {
        return;
      }
      if (!element(pattern)) {
        flags = before;  // a comparison that did not end has not happened
        return;
      }
      if (pattern.repeat == 0) {
        return;
      }
      --rcx;
      const bool compares = pattern.opcode == 0xa6 || pattern.opcode == 0xae;
      if (compares && ((flags & flag::kZf) != 0) != (pattern.repeat == 0xf3)) {
        return;
      }
    }
  }

 private:
  bool touch(std::uint64_t linear, std::uint32_t size) {
    for (const std::uint64_t at : {linear, linear + size - 1}) {
      const std::uint64_t page = (at - kWindow) / kPageSize;
      if (at < kWindow || page >= kPages || !present[page]) {
        faulted = true;
        fault_address = at == linear ? at : at & ~kPageOffset;
        return false;
      }
    }
    return true;
  }
  std::uint64_t get(std::uint64_t linear, std::uint32_t size) {
    std::uint64_t value = 0;
    std::memcpy(&value, memory.data() + (linear - kWindow), size);
    return value;
  }
  bool element(const Pattern& pattern) {
    const std::uint32_t size = pattern.size;
    const std::uint64_t step = down ? -std::uint64_t{size} : size;
    const std::uint64_t mask = size_mask(size);
    switch (pattern.opcode) {
      case 0xa4: {
        if (!touch(rsi, size) || !touch(rdi, size)) {
          return false;
        }
        const std::uint64_t value = get(rsi, size);
        std::memcpy(memory.data() + (rdi - kWindow), &value, size);
        rsi += step;
        rdi += step;
        return true;
      }
      case 0xaa:
        if (!touch(rdi, size)) {
          return false;
        }
        std::memcpy(memory.data() + (rdi - kWindow), &rax, size);
        rdi += step;
        return true;
      case 0xac:
        if (!touch(rsi, size)) {
          return false;
        }
        rax = size >= 4 ? get(rsi, size) : (rax & ~mask) | get(rsi, size);
        rsi += step;
        return true;
      case 0xae:
        if (!touch(rdi, size)) {
          return false;
        }
        compare(rax & mask, get(rdi, size), size);
        rdi += step;
        return true;
      default:
        if (!touch(rdi, size) || !touch(rsi, size)) {  // as the host's processor does
          return false;
        }
        compare(get(rsi, size), get(rdi, size), size);
        rsi += step;
        rdi += step;
        return true;
    }
  }
  // By the processor's own CMP.
  void compare(std::uint64_t a, std::uint64_t b, std::uint32_t size) {
    const unsigned shift = 64 - 8 * size;
    std::uint64_t host = 0;
    // At the top of a register the upper flags come out right; AF and PF are those of the low byte.
    asm("cmpq %2, %1; pushfq; popq %0" : "=r"(host) : "r"(a << shift), "r"(b << shift) : "cc");
    std::uint64_t low = 0;
    asm("cmpb %b2, %b1; pushfq; popq %0" : "=r"(low) : "q"(a), "q"(b) : "cc");
    constexpr std::uint64_t kLow = flag::kAf | flag::kPf;
    flags = (host & flag::kArithmetic & ~kLow) | (low & kLow);
  }
};

TEST(Strings, DoWhatTheModelDoes) {
  std::mt19937_64 random(20240607);
  InstructionKit kit;
  const auto pick = [&random](std::uint64_t below) { return random() % below; };
  for (int round = 0; round < 6000; ++round) {
    Pattern pattern;
    constexpr std::array<std::uint8_t, 5> kOpcodes{0xa4, 0xaa, 0xac, 0xae, 0xa6};
    constexpr std::array<std::uint8_t, 3> kRepeats{0, 0xf3, 0xf2};
    pattern.opcode = kOpcodes[pick(kOpcodes.size())];
    pattern.size = 1U << pick(4);
    pattern.repeat = kRepeats[pick(kRepeats.size())];
    pattern.narrow_address = pick(4) == 0;
    Model model;
    model.memory.resize(kPages * kPageSize);
    // Few values, so that comparisons last.
    for (std::uint8_t& byte : model.memory) {
      byte = static_cast<std::uint8_t>(pick(64) == 0 ? pick(256) : 7);
    }
    model.present.assign(kPages, true);
    if (pick(2) == 0) {
      model.present[pick(kPages)] = false;
    }
    model.rax = pick(2) == 0 ? 0x0707070707070707 : random();
    model.rcx = pick(8) == 0 ? pick(9000) : pick(700);
    model.rsi = kWindow + kPageSize + pick(5 * kPageSize);
    // Often near each other.
    model.rdi = pick(2) == 0 ? kWindow + kPageSize + pick(5 * kPageSize) : model.rsi + pick(64) - 32;
    model.down = pick(3) == 0;
    model.flags = pick(2) == 0 ? flag::kArithmetic : 0;

    std::memcpy(kit.at(kBacking), model.memory.data(), model.memory.size());
    for (std::uint64_t page = 0; page < kPages; ++page) {
      kit.map(kWindow + page * kPageSize, kBacking + page * kPageSize);
      if (!model.present[page]) {
        kit.put<std::uint64_t>(kit.entry(kWindow + page * kPageSize, 0), 0);
      }
    }
    kit.mmu().flush_all();
    Cpu& cpu = kit.cpu();
    cpu.gpr[kRax] = model.rax;
    cpu.gpr[kRcx] = model.rcx;
    cpu.gpr[kRsi] = model.rsi;
    cpu.gpr[kRdi] = model.rdi;
    cpu.arithmetic_flags = model.flags;
    cpu.other_flags = flag::kFixed | (model.down ? flag::kDf : 0);
    model.run(pattern);
    Outcome outcome = Outcome::kJump;
    for (int calls = 0; outcome == Outcome::kJump && calls < 64; ++calls) {
      outcome = kit.run(encode(pattern));
    }
    const std::string where = "round " + std::to_string(round) + " opcode " + std::to_string(pattern.opcode) +
                              " size " + std::to_string(pattern.size);
    ASSERT_EQ(outcome, model.faulted ? Outcome::kFault : Outcome::kNext) << where;
    if (model.faulted) {
      ASSERT_EQ(cpu.fault.vector, vec::kPf) << where;
      ASSERT_EQ(cpu.fault.address, model.fault_address) << where;
    }
    ASSERT_EQ(cpu.gpr[kRax], model.rax) << where;
    ASSERT_EQ(cpu.gpr[kRcx], model.rcx) << where;
    ASSERT_EQ(cpu.gpr[kRsi], model.rsi) << where;
    ASSERT_EQ(cpu.gpr[kRdi], model.rdi) << where;
    ASSERT_EQ(cpu.arithmetic_flags, model.flags) << where;
    ASSERT_EQ(std::memcmp(kit.at(kBacking), model.memory.data(), model.memory.size()), 0) << where;
  }
}

TEST(Strings, OverlappingCopiesRepeatThePattern) {
  for (const std::uint32_t size : {1U, 2U, 4U, 8U}) {
    for (std::uint64_t distance = 1; distance < 40; ++distance) {
      InstructionKit kit;
      kit.map(kWindow, kBacking);
      std::vector<std::uint8_t> expected(kPageSize);
      for (std::size_t i = 0; i < 64; ++i) {
        expected[i] = static_cast<std::uint8_t>(i + 1);
      }
      std::memcpy(kit.at(kBacking), expected.data(), kPageSize);
      for (std::size_t at = 0; at < 3000 / size; ++at) {
        std::array<std::uint8_t, 8> element{};
        std::memcpy(element.data(), expected.data() + at * size, size);
        std::memcpy(expected.data() + at * size + distance, element.data(), size);
      }
      kit.cpu().gpr[kRsi] = kWindow;
      kit.cpu().gpr[kRdi] = kWindow + distance;
      kit.cpu().gpr[kRcx] = 3000 / size;
      ASSERT_EQ(kit.run(encode({.opcode = 0xa4, .size = size, .repeat = 0xf3})), Outcome::kNext);
      ASSERT_EQ(std::memcmp(kit.at(kBacking), expected.data(), kPageSize), 0) << size << " " << distance;
    }
  }
}

TEST(Strings, TwoPagesThatAreOne) {
  InstructionKit kit;
  kit.map(kWindow, kBacking);
  kit.map(kWindow + 0x5000, kBacking);
  *kit.at(kBacking) = 0xab;
  kit.cpu().gpr[kRsi] = kWindow;
  kit.cpu().gpr[kRdi] = kWindow + 0x5001;
  kit.cpu().gpr[kRcx] = 100;
  EXPECT_EQ(kit.run({0xf3, 0xa4}), Outcome::kNext);
  for (std::uint64_t i = 0; i <= 100; ++i) {
    EXPECT_EQ(*kit.at(kBacking + i), 0xab) << i;
  }
}

TEST(Strings, ALongOneLetsInterruptsIn) {
  InstructionKit kit;
  for (std::uint64_t page = 0; page < 64; ++page) {
    kit.map(kWindow + page * kPageSize, kBacking + page * kPageSize);
  }
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRdi] = kWindow;
  cpu.gpr[kRcx] = 64 * kPageSize;
  cpu.gpr[kRax] = 0x33;
  const std::uint64_t rip = cpu.rip;
  int calls = 1;
  while (kit.run({0xf3, 0xaa}) == Outcome::kJump) {
    EXPECT_EQ(cpu.rip, rip);
    EXPECT_EQ(cpu.gpr[kRdi] - kWindow + cpu.gpr[kRcx], 64 * kPageSize);
    ++calls;
  }
  EXPECT_GE(calls, 3);
  EXPECT_LE(calls, 8);
  EXPECT_EQ(*kit.at(kBacking + 64 * kPageSize - 1), 0x33);
}

TEST(Strings, WithTheTrapFlagEachIterationIsAStep) {
  InstructionKit kit;
  kit.map(kWindow, kBacking);
  kit.cpu().other_flags |= flag::kTf;
  kit.cpu().gpr[kRdi] = kWindow;
  kit.cpu().gpr[kRcx] = 3;
  EXPECT_EQ(kit.run({0xf3, 0xaa}), Outcome::kJump);
  EXPECT_EQ(kit.cpu().gpr[kRcx], 2U);
  EXPECT_EQ(kit.run({0xf3, 0xaa}), Outcome::kJump);
  EXPECT_EQ(kit.run({0xf3, 0xaa}), Outcome::kNext);
  EXPECT_EQ(kit.cpu().gpr[kRcx], 0U);
}

TEST(Strings, RegistersOf32BitsWrapAndAreExtended) {
  InstructionKit kit;
  kit.map(0xfffff000, kBacking);
  kit.map(0, kBacking + kPageSize);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRdi] = 0xdead0000fffffffe;
  cpu.gpr[kRcx] = 0xbeef000000000004;
  cpu.gpr[kRax] = 0x44;
  EXPECT_EQ(kit.run({0x67, 0xf3, 0xaa}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRdi], 2U);
  EXPECT_EQ(cpu.gpr[kRcx], 0U);
  EXPECT_EQ(*kit.at(kBacking + 0xfff), 0x44);
  EXPECT_EQ(*kit.at(kBacking + kPageSize + 1), 0x44);
  EXPECT_EQ(*kit.at(kBacking + kPageSize + 2), 0);
}

TEST(Strings, SegmentOverridesMoveTheSourceOnly) {
  InstructionKit kit;
  kit.map(kWindow, kBacking);
  kit.map(kWindow + kPageSize, kBacking + kPageSize);
  kit.cpu().segments[kFs].base = kWindow + kPageSize;
  *kit.at(kBacking + kPageSize + 0x10) = 0x5c;
  kit.cpu().gpr[kRsi] = 0x10;
  kit.cpu().gpr[kRdi] = kWindow + 0x20;
  EXPECT_EQ(kit.run({0x64, 0xa4}), Outcome::kNext);
  EXPECT_EQ(*kit.at(kBacking + 0x20), 0x5c);
}

TEST(Strings, WritesIntoCodeAreTold) {
  InstructionKit kit;
  kit.map(kWindow, kBacking);
  kit.memory().find(kBacking).info->code_lines.store(1ULL << 10);
  kit.cpu().gpr[kRdi] = kWindow + 9 * 64;
  kit.cpu().gpr[kRcx] = 100;
  EXPECT_EQ(kit.run({0xf3, 0xaa}), Outcome::kNext);
  EXPECT_FALSE(kit.watcher.calls.empty());
}

TEST(Strings, EachIterationAsksTheDeviceOnce) {
  InstructionKit kit;
  kit.map(kWindow, PagingKit::kNothing);
  kit.map(kWindow + kPageSize, kBacking);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRsi] = kWindow;
  cpu.gpr[kRdi] = kWindow + kPageSize;
  cpu.gpr[kRcx] = 3;
  std::vector<std::uint64_t> asked;
  Outcome outcome = Outcome::kJump;
  for (int calls = 0; calls < 20 && outcome != Outcome::kNext; ++calls) {
    outcome = kit.run_with_answers({0xf3, 0xa5}, [&asked](IoState::Access& access) {
      asked.push_back(access.address);
      access.data.fill(static_cast<std::uint8_t>(asked.size()));
    });
  }
  EXPECT_EQ(outcome, Outcome::kNext);
  EXPECT_EQ(asked, (std::vector<std::uint64_t>{PagingKit::kNothing, PagingKit::kNothing + 4,
                                               PagingKit::kNothing + 8}));
  EXPECT_EQ(kit.get<std::uint32_t>(kBacking), 0x01010101U);
  EXPECT_EQ(kit.get<std::uint32_t>(kBacking + 8), 0x03030303U);
  EXPECT_EQ(cpu.gpr[kRcx], 0U);
}

TEST(Strings, ADeviceIsNotReadWhenTheWriteWouldFault) {
  InstructionKit kit;
  kit.map(kWindow, PagingKit::kNothing);
  kit.cpu().gpr[kRsi] = kWindow;
  kit.cpu().gpr[kRdi] = kWindow + kPageSize;
  kit.cpu().gpr[kRcx] = 3;
  EXPECT_EQ(kit.run({0xf3, 0xa5}), Outcome::kFault);
  EXPECT_FALSE(kit.cpu().io.waiting);
  EXPECT_EQ(kit.cpu().fault.address, kWindow + kPageSize);
}

TEST(Strings, ToADeviceEveryElementIsAWrite) {
  InstructionKit kit;
  kit.map(kWindow, PagingKit::kNothing);
  kit.cpu().gpr[kRdi] = kWindow + 4;
  kit.cpu().gpr[kRcx] = 20;
  kit.cpu().gpr[kRax] = 0xa1b2c3d4;
  std::vector<std::uint64_t> written;
  Outcome outcome = Outcome::kJump;
  while (outcome == Outcome::kJump) {
    outcome = kit.run({0xf3, 0xab});
    for (std::uint32_t i = 0; i < kit.cpu().io.write_count; ++i) {
      written.push_back(kit.cpu().io.writes[i].address);
    }
    kit.cpu().io.write_count = 0;
  }
  ASSERT_EQ(written.size(), 20U);
  for (std::size_t i = 0; i < written.size(); ++i) {
    EXPECT_EQ(written[i], PagingKit::kNothing + 4 + 4 * i);
  }
}

// --- ports

TEST(Ports, InTakesTheAnswerAndKeepsWhatItDoesNotWrite) {
  struct Case {
    std::vector<std::uint8_t> code;
    std::uint16_t port;
    std::uint8_t size;
    std::uint64_t rax;
  };
  for (const Case& one :
       {Case{{0xe4, 0x60}, 0x60, 1, 0x1111111111111188}, Case{{0x66, 0xed}, 0x3f8, 2, 0x1111111111117788},
        Case{{0xed}, 0x3f8, 4, 0x55667788}, Case{{0x48, 0xed}, 0x3f8, 4, 0x55667788}}) {
    InstructionKit kit;
    kit.cpu().gpr[kRax] = 0x1111111111111111;
    kit.cpu().gpr[kRdx] = 0xffff03f8;
    EXPECT_EQ(kit.run(one.code), Outcome::kIo);
    EXPECT_EQ(kit.cpu().gpr[kRax], 0x1111111111111111U);
    EXPECT_EQ(kit.cpu().io.wanted.kind, IoState::Kind::kPortRead);
    EXPECT_EQ(kit.cpu().io.wanted.address, one.port);
    EXPECT_EQ(kit.cpu().io.wanted.size, one.size);
    const Outcome outcome = kit.run_with_answers(
        one.code, [](IoState::Access& access) { access.data = {0x88, 0x77, 0x66, 0x55}; });
    EXPECT_EQ(outcome, Outcome::kNext);
    EXPECT_EQ(kit.cpu().gpr[kRax], one.rax);
  }
}

TEST(Ports, OutIsTakenDown) {
  InstructionKit kit;
  kit.cpu().gpr[kRax] = 0x11223344;
  EXPECT_EQ(kit.run({0xe7, 0xf4}), Outcome::kNext);
  ASSERT_EQ(kit.cpu().io.write_count, 1U);
  const IoState::Access& access = kit.cpu().io.writes[0];
  EXPECT_EQ(access.kind, IoState::Kind::kPortWrite);
  EXPECT_EQ(access.address, 0xf4U);
  EXPECT_EQ(access.size, 4);
  EXPECT_EQ(access.data[0], 0x44);
  EXPECT_EQ(access.data[3], 0x11);
}

TEST(Ports, NoWriteIsLostWhereThereIsNoRoom) {
  InstructionKit kit;
  kit.cpu().io.write_count = IoState::kMax;
  EXPECT_EQ(kit.run({0xe6, 0x80}), Outcome::kIo);  // again, once the others are told
  kit.cpu().io.write_count = 0;
  EXPECT_EQ(kit.run({0xe6, 0x80}), Outcome::kNext);
  EXPECT_EQ(kit.cpu().io.write_count, 1U);
}

TEST(Ports, StringsGoElementByElement) {
  InstructionKit kit;
  kit.map(kWindow, kBacking);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRdx] = 0x1f0;
  cpu.gpr[kRdi] = kWindow;
  cpu.gpr[kRcx] = 4;
  std::uint8_t next = 1;
  Outcome outcome = Outcome::kJump;
  while (outcome == Outcome::kJump) {
    outcome = kit.run_with_answers(
        {0x66, 0xf3, 0x6d}, [&next](IoState::Access& access) { access.data[0] = access.data[1] = next++; });
  }
  EXPECT_EQ(outcome, Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking), 0x0404030302020101U);
  cpu.gpr[kRsi] = kWindow;
  cpu.gpr[kRcx] = 4;
  std::vector<std::uint8_t> out;
  outcome = Outcome::kJump;
  while (outcome == Outcome::kJump) {
    outcome = kit.run({0xf3, 0x6e});
    for (std::uint32_t i = 0; i < cpu.io.write_count; ++i) {
      EXPECT_EQ(cpu.io.writes[i].address, 0x1f0U);
      out.push_back(cpu.io.writes[i].data[0]);
    }
    cpu.io.write_count = 0;
  }
  EXPECT_EQ(out, (std::vector<std::uint8_t>{1, 1, 2, 2}));
  // The port is not read where its value could not be stored.
  cpu.gpr[kRdi] = kWindow + kPageSize;
  cpu.gpr[kRcx] = 1;
  EXPECT_EQ(kit.run({0xf3, 0x6c}), Outcome::kFault);
  EXPECT_FALSE(cpu.io.waiting);
}

TEST(Ports, ARepeatOfNothingTouchesNothing) {
  InstructionKit kit;
  kit.cpu().gpr[kRcx] = 0;
  kit.cpu().gpr[kRdi] = 0xdead000000000000;
  EXPECT_EQ(kit.run({0xf3, 0x6c}), Outcome::kNext);
  EXPECT_EQ(kit.run({0xf3, 0xa4}), Outcome::kNext);
  EXPECT_EQ(kit.run({0xf3, 0xa6}), Outcome::kNext);
}

}  // namespace
}  // namespace wisp::soft
