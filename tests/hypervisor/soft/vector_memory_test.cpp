// Gathers and masked moves against the host's own, where the host has them; what a mask leaves out is never
// touched.
#include <gtest/gtest.h>

#include <random>

#include "hypervisor/soft/host_features.h"
#include "hypervisor/soft/instruction_kit.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kData = 0x500000;  // linear
constexpr std::uint64_t kBacking = 0x200000;
constexpr std::uint64_t kHole = 0x600000;

using Ymm = std::array<std::uint8_t, 32>;

Ymm get_register(const Cpu& cpu, std::size_t reg) {
  Ymm value{};
  if ((cpu.vectors[512] & 2) != 0) {
    std::memcpy(value.data(), &cpu.vectors[160 + 16 * reg], 16);
  }
  if ((cpu.vectors[512] & 4) != 0) {
    std::memcpy(value.data() + 16, &cpu.vectors[576 + 16 * reg], 16);
  }
  return value;
}
void set_register(Cpu& cpu, std::size_t reg, const Ymm& value) {
  cpu.vectors[512] |= 6;
  std::memcpy(&cpu.vectors[160 + 16 * reg], value.data(), 16);
  std::memcpy(&cpu.vectors[576 + 16 * reg], value.data() + 16, 16);
}

// VEX.66.0F38: reg, vvvv, [rbx] or with `index` [rbx + index * scale].
std::vector<std::uint8_t> vex(std::uint8_t opcode, unsigned reg, unsigned vvvv, bool wide, bool w,
                              int index = -1, unsigned scale = 0) {
  const unsigned x = index >= 0 ? static_cast<unsigned>(index) >> 3 : 0;
  std::vector<std::uint8_t> code{
      0xc4, static_cast<std::uint8_t>(((reg < 8 ? 1U : 0U) << 7) | ((x ^ 1U) << 6) | 1U << 5 | 2),
      static_cast<std::uint8_t>((w ? 0x80U : 0U) | (~vvvv & 0xf) << 3 | (wide ? 4U : 0U) | 1), opcode};
  if (index >= 0) {
    code.push_back(static_cast<std::uint8_t>((reg & 7) << 3 | 4));
    code.push_back(static_cast<std::uint8_t>(scale << 6 | (static_cast<unsigned>(index) & 7) << 3 | 3));
  } else {
    code.push_back(static_cast<std::uint8_t>((reg & 7) << 3 | 3));
  }
  return code;
}

class GatherModel final {
 public:
  std::uint32_t data = 4, index = 4, length = 16;
  unsigned scale = 0;
  // As the manual says it: element after element.
  void run(Ymm& target, Ymm& mask, const Ymm& indexes, const std::uint8_t* base) const {
    const std::uint32_t count = length / std::max(data, index);
    for (std::uint32_t i = 0; i < count; ++i) {
      if ((mask[(i + 1) * data - 1] & 0x80) == 0) {
        continue;
      }
      std::int64_t at = 0;
      if (index == 8) {
        std::memcpy(&at, &indexes[i * 8], 8);
      } else {
        std::int32_t narrow = 0;
        std::memcpy(&narrow, &indexes[i * 4], 4);
        at = narrow;
      }
      std::memcpy(&target[i * data], base + at * (1LL << scale), data);
    }
    std::fill(target.begin() + count * data, target.end(), std::uint8_t{0});
    mask.fill(0);
  }
};

TEST(Gather, EveryForm) {
  std::mt19937 random(3);
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  for (std::uint64_t page = 0; page < 4; ++page) {
    kit.map(kData + page * kPageSize, kBacking + page * kPageSize);
  }
  for (std::size_t i = 0; i < 4 * kPageSize; ++i) {
    *kit.at(kBacking + i) = static_cast<std::uint8_t>(random());
  }
  constexpr std::uint64_t kMiddle = 2 * kPageSize;
  for (int round = 0; round < 4000; ++round) {
    const auto opcode = static_cast<std::uint8_t>(0x90 + random() % 4);
    GatherModel model;
    const bool w = random() % 2 == 0;
    const bool wide = random() % 2 == 0;
    model.data = w ? 8 : 4;
    model.index = (opcode & 1) != 0 ? 8 : 4;
    model.length = wide ? 32 : 16;
    model.scale = random() % 4;
    const int index = static_cast<int>(random() % 16);
    const unsigned reg = (static_cast<unsigned>(index) + 1 + random() % 7) % 16;
    const unsigned vvvv = (static_cast<unsigned>(index) + 8 + random() % 7) % 16;
    Ymm indexes{};
    Ymm mask{};
    Ymm target{};
    for (std::size_t i = 0; i < 32; i += model.index) {
      const std::int64_t at = static_cast<std::int32_t>(random() % 900) - 450;
      std::memcpy(&indexes[i], &at, model.index);
    }
    for (std::uint8_t& byte : mask) {
      byte = static_cast<std::uint8_t>(random());
    }
    for (std::uint8_t& byte : target) {
      byte = static_cast<std::uint8_t>(random());
    }
    set_register(cpu, static_cast<std::size_t>(index), indexes);
    set_register(cpu, vvvv, mask);
    set_register(cpu, reg, target);
    cpu.gpr[kRbx] = kData + kMiddle;
    ASSERT_EQ(kit.run(vex(opcode, reg, vvvv, wide, w, index, model.scale)), Outcome::kNext);
    model.run(target, mask, indexes, kit.at(kBacking + kMiddle));
    ASSERT_EQ(get_register(cpu, reg), target) << int{opcode} << " " << w << " " << wide << " round " << round;
    ASSERT_EQ(get_register(cpu, vvvv), mask);
    ASSERT_EQ(get_register(cpu, static_cast<std::size_t>(index)), indexes);
  }
}

TEST(Gather, AFaultKeepsWhatWasGatheredAndGoesOnFromThere) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  kit.map(kData, kBacking);
  kit.put<std::uint32_t>(kBacking, 0x11111111);
  kit.put<std::uint32_t>(kBacking + 4, 0x22222222);
  Ymm indexes{};
  const std::array<std::int32_t, 4> where{0, static_cast<std::int32_t>((kHole - kData) / 4), 1, 1};
  std::memcpy(indexes.data(), where.data(), 16);
  Ymm mask;
  mask.fill(0xff);
  std::fill(mask.begin() + 12, mask.begin() + 16, std::uint8_t{0});
  Ymm target;
  target.fill(0xee);
  set_register(cpu, 4, indexes);  // index 4 is XMM4, not "none"
  set_register(cpu, 2, mask);
  set_register(cpu, 1, target);
  cpu.gpr[kRbx] = kData;
  const auto code = vex(0x90, 1, 2, false, false, 4, 2);
  EXPECT_EQ(kit.faults(code), "#PF(0) at 0x600000");
  std::uint32_t element = 0;
  std::memcpy(&element, get_register(cpu, 1).data(), 4);
  EXPECT_EQ(element, 0x11111111U);
  EXPECT_EQ(get_register(cpu, 2)[3], 0);
  EXPECT_EQ(get_register(cpu, 2)[7], 0xff);
  kit.map(kHole, kBacking + kPageSize);
  kit.put<std::uint32_t>(kBacking + kPageSize, 0x33333333);
  kit.put<std::uint32_t>(kBacking, 0);  // gathered already
  EXPECT_EQ(kit.run(code), Outcome::kNext);
  std::array<std::uint32_t, 4> all{};
  std::memcpy(all.data(), get_register(cpu, 1).data(), 16);
  EXPECT_EQ(all, (std::array<std::uint32_t, 4>{0x11111111, 0x33333333, 0x22222222, 0xeeeeeeee}));
  EXPECT_EQ(get_register(cpu, 2), Ymm{});
}

TEST(Gather, FromADeviceAsksForEachElementOnce) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  kit.map(kData, PagingKit::kNothing);
  Ymm indexes{};
  for (std::int32_t i = 0; i < 8; ++i) {
    std::memcpy(&indexes[static_cast<std::size_t>(i) * 4], &i, 4);
  }
  Ymm mask;
  mask.fill(0xff);
  set_register(cpu, 5, indexes);
  set_register(cpu, 2, mask);
  cpu.gpr[kRbx] = kData;
  std::vector<std::uint64_t> asked;
  const Outcome outcome = kit.run_with_answers(vex(0x90, 1, 2, true, false, 5, 2), [&asked](auto& access) {
    asked.push_back(access.address - PagingKit::kNothing);
    access.data.fill(static_cast<std::uint8_t>(asked.size()));
  });
  EXPECT_EQ(outcome, Outcome::kNext);
  EXPECT_EQ(asked, (std::vector<std::uint64_t>{0, 4, 8, 12, 16, 20, 24, 28}));
  EXPECT_EQ(get_register(cpu, 1)[31], 8);
}

TEST(Gather, RegistersThatAreTheSameAreUndefined) {
  InstructionKit kit;
  for (const auto& code : {vex(0x90, 1, 1, false, false, 5), vex(0x90, 5, 2, false, false, 5),
                           vex(0x90, 1, 5, false, false, 5), vex(0x90, 1, 2, false, false)}) {
    EXPECT_EQ(kit.run(code), Outcome::kFault);
    EXPECT_EQ(kit.cpu().fault.vector, vec::kUd);
  }
}

TEST(MaskMoves, LoadAndStoreOnlyWhatTheMaskSays) {
  std::mt19937 random(4);
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  // The operand runs into a page that is not there: elements there are masked off.
  kit.map(kData, kBacking);
  for (int round = 0; round < 3000; ++round) {
    constexpr std::array<std::uint8_t, 6> kOpcodes{0x2c, 0x2d, 0x2e, 0x2f, 0x8c, 0x8e};
    const std::uint8_t opcode = kOpcodes[random() % kOpcodes.size()];
    const bool integer = opcode >= 0x8c;
    const bool w = integer && random() % 2 == 0;
    const std::uint32_t size = integer ? (w ? 8 : 4) : (opcode & 1) != 0 ? 8 : 4;
    const bool store = opcode == 0x2e || opcode == 0x2f || opcode == 0x8e;
    const bool wide = random() % 2 == 0;
    const std::uint32_t length = wide ? 32 : 16;
    const std::uint32_t inside = static_cast<std::uint32_t>(random() % (length / size + 1)) * size;
    const std::uint64_t linear = kData + kPageSize - inside;
    Ymm mask{};
    Ymm source{};
    for (std::size_t i = 0; i < 32; ++i) {
      mask[i] = static_cast<std::uint8_t>(random());
      source[i] = static_cast<std::uint8_t>(random());
    }
    for (std::uint32_t i = inside; i < length; i += size) {
      mask[i + size - 1] &= 0x7f;
    }
    for (std::size_t i = 0; i < 64; ++i) {
      *kit.at(kBacking + kPageSize - 64 + i) = static_cast<std::uint8_t>(random());
    }
    Ymm memory{};
    std::memcpy(memory.data(), kit.at(kBacking + kPageSize - inside), inside);
    Ymm expected = store ? memory : Ymm{};
    for (std::uint32_t i = 0; i < length; i += size) {
      if ((mask[i + size - 1] & 0x80) != 0) {
        std::memcpy(&expected[i], store ? &source[i] : &memory[i], size);
      }
    }
    set_register(cpu, 3, mask);
    set_register(cpu, 9, source);
    cpu.gpr[kRbx] = linear;
    ASSERT_EQ(kit.run(vex(opcode, 9, 3, wide, w)), Outcome::kNext) << int{opcode};
    if (store) {
      ASSERT_EQ(std::memcmp(kit.at(kBacking + kPageSize - inside), expected.data(), inside), 0);
      ASSERT_EQ(get_register(cpu, 9), source);
    } else {
      ASSERT_EQ(get_register(cpu, 9), expected) << int{opcode} << " " << w << " " << wide;
    }
  }
}

TEST(MaskMoves, AStoreThatFaultsWritesNothing) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  kit.map(kData, kBacking);
  Ymm mask;
  mask.fill(0xff);
  set_register(cpu, 3, mask);
  set_register(cpu, 9, mask);
  cpu.gpr[kRbx] = kData + kPageSize - 8;
  EXPECT_EQ(kit.faults(vex(0x2e, 9, 3, true, false)), "#PF(2) at 0x501000");
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + kPageSize - 8), 0U);
}

TEST(MaskMoves, BytesOfXmmAndMmx) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  kit.map(kData, kBacking);
  cpu.gpr[kRdi] = kData + 3;
  Ymm data{};
  Ymm mask{};
  for (std::uint8_t i = 0; i < 16; ++i) {
    data[i] = static_cast<std::uint8_t>(i + 1);
    mask[i] = i % 3 == 0 ? 0x80 : 0x7f;
  }
  set_register(cpu, 1, data);
  set_register(cpu, 2, mask);
  EXPECT_EQ(kit.run({0x66, 0x0f, 0xf7, 0xca}), Outcome::kNext);
  for (std::uint8_t i = 0; i < 16; ++i) {
    EXPECT_EQ(*kit.at(kBacking + 3 + i), i % 3 == 0 ? i + 1 : 0);
  }
  // Nothing is touched where no byte is chosen.
  set_register(cpu, 2, Ymm{});
  cpu.gpr[kRdi] = kHole;
  EXPECT_EQ(kit.run({0x66, 0x0f, 0xf7, 0xca}), Outcome::kNext);

  // MM1 and MM2 are physical registers; the image counts from the top of the stack.
  cpu.vectors[512] |= 1;
  const unsigned top = 5;
  cpu.vectors[3] = static_cast<std::uint8_t>(top << 3);  // FSW.TOP
  const auto slot = [](unsigned mm) { return 32 + 16 * ((mm - top) & 7); };
  const std::uint64_t value = 0x8877665544332211;
  const std::uint64_t chosen = 0x80008000000000ff;
  std::memcpy(&cpu.vectors[slot(1)], &value, 8);
  std::memcpy(&cpu.vectors[slot(2)], &chosen, 8);
  cpu.gpr[kRdi] = kData + 0x100;
  EXPECT_EQ(kit.run({0x0f, 0xf7, 0xca}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + 0x100), 0x8800660000000011U);
  // An MMX instruction puts the top at 0 and marks all registers as in use.
  EXPECT_EQ(cpu.vectors[3] & 0x38, 0);
  EXPECT_EQ(cpu.vectors[4], 0xff);
  std::uint64_t moved = 0;
  std::memcpy(&moved, &cpu.vectors[32 + 16], 8);
  EXPECT_EQ(moved, value);
}

TEST(MaskMoves, RegistersInTheirInitialStateAreZeroWhateverTheImageHolds) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  kit.map(kData, kBacking);
  cpu.vectors[512] = 0;
  std::fill(cpu.vectors.begin() + 160, cpu.vectors.begin() + 416, std::uint8_t{0xff});
  cpu.gpr[kRdi] = kHole;
  EXPECT_EQ(kit.run({0x66, 0x0f, 0xf7, 0xca}), Outcome::kNext);  // the mask is zero
  cpu.gpr[kRbx] = kHole;
  EXPECT_EQ(kit.run(vex(0x2c, 9, 3, true, false)), Outcome::kNext);
  EXPECT_EQ(get_register(cpu, 9), Ymm{});
  EXPECT_EQ(get_register(cpu, 3), Ymm{});
}

}  // namespace
}  // namespace wisp::soft
