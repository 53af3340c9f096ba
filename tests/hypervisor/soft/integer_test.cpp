// Division, bit strings, compare-and-exchange, decimal numbers and moves, by what they must satisfy.
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/instruction_kit.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kData = 0x500000;  // linear
constexpr std::uint64_t kBacking = 0x200000;

__extension__ using Wide = unsigned __int128;

// Values at which things turn, and random ones.
std::uint64_t edge(std::mt19937_64& random) {
  constexpr std::array<std::uint64_t, 12> kEdges{
      0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fffffff, 0x80000000, 0x7fffffffffffffff, 1ULL << 63};
  const std::uint64_t value = random() % 3 == 0 ? random() : kEdges[random() % kEdges.size()];
  return random() % 4 == 0 ? ~value : random() % 4 == 0 ? value >> (random() % 64) : value;
}

// DIV and IDIV of the host, where the result fits; the caller knows.
struct Divided {
  std::uint64_t quotient = 0, remainder = 0;
};
Divided host_divide(bool is_signed, std::uint64_t high, std::uint64_t low, std::uint64_t divisor) {
  Divided result;
  if (is_signed) {
    asm("idivq %4"
        : "=a"(result.quotient), "=d"(result.remainder)
        : "a"(low), "d"(high), "r"(divisor)
        : "cc");
  } else {
    asm("divq %4" : "=a"(result.quotient), "=d"(result.remainder) : "a"(low), "d"(high), "r"(divisor) : "cc");
  }
  return result;
}

std::uint64_t extended(std::uint64_t value, unsigned bits, bool is_signed) {
  const unsigned shift = 64 - bits;
  return is_signed ? static_cast<std::uint64_t>(static_cast<std::int64_t>(value << shift) >> shift)
                   : value << shift >> shift;
}

// Dividends of 16 to 64 bits are divided by the host with 64-bit operands, which never overflows there.
TEST(Divide, AgreesWithTheHostAndFaultsExactlyWhereItMust) {
  std::mt19937_64 random(1);
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  const std::array<std::vector<std::uint8_t>, 4> codes{
      std::vector<std::uint8_t>{0xf6, 0xf3}, {0x66, 0xf7, 0xf3}, {0xf7, 0xf3}, {0x48, 0xf7, 0xf3}};
  int faults = 0;
  int divided = 0;
  for (int round = 0; round < 60000; ++round) {
    const unsigned which = static_cast<unsigned>(random() % 4);
    const std::uint32_t size = 1U << which;
    const unsigned bits = 8 * size;
    const bool is_signed = random() % 2 == 0;
    std::vector<std::uint8_t> code = codes[which];
    code.back() = is_signed ? 0xfb : 0xf3;  // by BL, BX, ...
    const std::uint64_t rax = edge(random);
    const std::uint64_t rdx = random() % 3 == 0                 ? edge(random)
                              : random() % 2 == 0               ? 0
                              : extended(rax, bits, true) >> 63 ? ~0ULL
                                                                : 0;
    const std::uint64_t rbx = edge(random);
    cpu.gpr[kRax] = rax;
    cpu.gpr[kRdx] = rdx;
    cpu.gpr[kRbx] = rbx;
    cpu.arithmetic_flags = flag::kArithmetic;
    const std::uint64_t divisor = extended(rbx, bits, is_signed);
    bool fits = divisor != 0;
    Divided expected;
    if (fits && size < 8) {
      const std::uint64_t dividend =
          size == 1
              ? extended(rax, 16, is_signed)
              : extended((rdx & size_mask(size)) << bits | (rax & size_mask(size)), 2 * bits, is_signed);
      // The one division of 64 bits that overflows.
      fits = !(is_signed && dividend == 1ULL << 63 && divisor == ~0ULL);
      if (fits) {
        expected = host_divide(is_signed, is_signed && dividend >> 63 != 0 ? ~0ULL : 0, dividend, divisor);
        fits = extended(expected.quotient, bits, is_signed) == expected.quotient;
      }
    } else if (fits && !is_signed) {
      fits = rdx < divisor;
      expected = fits ? host_divide(false, rdx, rax, divisor) : expected;
    } else if (fits) {
      // |quotient| < 2^63 judged on magnitudes.
      const bool negative = rdx >> 63 != 0;
      const bool other = divisor >> 63 != 0;
      Wide number = Wide{rdx} << 64 | rax;
      number = negative ? -number : number;
      const std::uint64_t by = other ? -divisor : divisor;
      fits = number / by <= (Wide{1} << 63) - (negative == other ? 1 : 0);
      expected = fits ? host_divide(true, rdx, rax, divisor) : expected;
    }
    const Outcome outcome = kit.run(code);
    ASSERT_EQ(outcome, fits ? Outcome::kNext : Outcome::kFault)
        << std::hex << rdx << ":" << rax << " / " << rbx << " size " << size << " signed " << is_signed;
    if (!fits) {
      ++faults;
      EXPECT_EQ(cpu.fault.vector, vec::kDe);
      EXPECT_FALSE(cpu.fault.has_error_code);
      EXPECT_EQ(cpu.gpr[kRax], rax);
      EXPECT_EQ(cpu.gpr[kRdx], rdx);
      continue;
    }
    ++divided;
    const auto merged = [size](std::uint64_t before, std::uint64_t value) {
      return size == 8   ? value
             : size == 4 ? value & 0xffffffff
                         : (before & ~size_mask(size)) | (value & size_mask(size));
    };
    if (size == 1) {
      ASSERT_EQ(cpu.gpr[kRax],
                (rax & ~0xffffULL) | (expected.remainder & 0xff) << 8 | (expected.quotient & 0xff));
      ASSERT_EQ(cpu.gpr[kRdx], rdx);
    } else {
      ASSERT_EQ(cpu.gpr[kRax], merged(rax, expected.quotient));
      ASSERT_EQ(cpu.gpr[kRdx], merged(rdx, expected.remainder));
    }
  }
  EXPECT_GT(faults, 5000);
  EXPECT_GT(divided, 5000);
}

TEST(Divide, TakesByteRegistersAndMemory) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRax] = 100;
  cpu.gpr[kRbx] = 0x0700;
  EXPECT_EQ(kit.run({0xf6, 0xf7}), Outcome::kNext);  // div bh
  EXPECT_EQ(cpu.gpr[kRax], 0x020eU);
  cpu.gpr[kRax] = 100;
  cpu.gpr[kRdi] = 9;
  EXPECT_EQ(kit.run({0x40, 0xf6, 0xf7}), Outcome::kNext);  // div dil
  EXPECT_EQ(cpu.gpr[kRax], 0x010bU);
  kit.map(kData, kBacking);
  kit.put<std::uint32_t>(kBacking + 8, 10);
  cpu.gpr[kRbx] = kData;
  cpu.gpr[kRax] = 77;
  cpu.gpr[kRdx] = 0;
  EXPECT_EQ(kit.run({0xf7, 0x73, 0x08}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 7U);
  EXPECT_EQ(cpu.gpr[kRdx], 7U);
  EXPECT_EQ(kit.faults({0xf7, 0xb3, 0x00, 0x10, 0x00, 0x00}), "#PF(0) at 0x501000");
}

TEST(BitStrings, ReachAsFarAsTheRegisterSays) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  std::mt19937_64 random(2);
  for (std::uint64_t page = 0; page < 4; ++page) {
    kit.map(kData + page * kPageSize, kBacking + page * kPageSize);
  }
  constexpr std::uint64_t kMiddle = kData + 2 * kPageSize;
  for (int round = 0; round < 20000; ++round) {
    constexpr std::array<std::uint8_t, 4> kOpcodes{0xa3, 0xab, 0xb3, 0xbb};
    const std::uint8_t opcode = kOpcodes[random() % 4];
    const std::uint32_t size = 2U << (random() % 3);
    const bool lock = opcode != 0xa3 && random() % 2 == 0;
    const auto bit = static_cast<std::int64_t>(random() % (4 * kPageSize)) * 4 - 8 * 4096;
    const std::int64_t kept = size == 2 ? static_cast<std::int16_t>(bit) : bit;
    cpu.gpr[kRbx] = kMiddle;
    cpu.gpr[kRcx] = static_cast<std::uint64_t>(bit) & size_mask(size);
    const auto offset = static_cast<std::uint64_t>(static_cast<std::int64_t>(2 * kPageSize * 8) + kept);
    const std::uint64_t byte = kBacking + offset / 8;
    const auto mask = static_cast<std::uint8_t>(1U << offset % 8);
    const auto before = static_cast<std::uint8_t>(random());
    *kit.at(byte) = before;
    cpu.arithmetic_flags = flag::kZf | flag::kOf;
    std::vector<std::uint8_t> code;
    if (lock) {
      code.push_back(0xf0);
    }
    if (size == 2) {
      code.push_back(0x66);
    }
    if (size == 8) {
      code.push_back(0x48);
    }
    code.insert(code.end(), {0x0f, opcode, 0x0b});  // [rbx], rcx
    ASSERT_EQ(kit.run(code), Outcome::kNext) << bit;
    const std::uint8_t after = opcode == 0xa3   ? before
                               : opcode == 0xab ? before | mask
                               : opcode == 0xb3 ? before & ~mask
                                                : before ^ mask;
    ASSERT_EQ(*kit.at(byte), after) << "bit " << bit << " size " << size << " opcode " << int{opcode};
    ASSERT_EQ((cpu.arithmetic_flags & flag::kCf) != 0, (before & mask) != 0);
    ASSERT_EQ(cpu.arithmetic_flags & flag::kZf, flag::kZf);
  }
}

TEST(BitStrings, LockedOnesOfTwoProcessorsLoseNothing) {
  InstructionKit kit;
  kit.map(kData, kBacking);
  kit.cpu().gpr[kRbx] = kData;
  std::thread other([&kit] {
    for (int i = 0; i < 20000; ++i) {
      __atomic_fetch_add(reinterpret_cast<std::uint32_t*>(kit.at(kBacking)), 2, __ATOMIC_SEQ_CST);
    }
  });
  for (int i = 0; i < 20001; ++i) {
    kit.cpu().gpr[kRcx] = 0;
    ASSERT_EQ(kit.run({0xf0, 0x0f, 0xbb, 0x0b}), Outcome::kNext);  // lock btc [rbx], ecx
  }
  other.join();
  EXPECT_EQ(kit.get<std::uint32_t>(kBacking), 40001U);
}

TEST(CompareExchange, BothSizes) {
  InstructionKit kit;
  kit.map(kData, kBacking);
  Cpu& cpu = kit.cpu();
  const auto set = [&cpu](std::uint64_t a, std::uint64_t d, std::uint64_t b, std::uint64_t c) {
    cpu.gpr[kRax] = a;
    cpu.gpr[kRdx] = d;
    cpu.gpr[kRbx] = b;
    cpu.gpr[kRcx] = c;
    cpu.gpr[kRsi] = kData;
    cpu.arithmetic_flags = flag::kCf | flag::kOf;
  };
  const std::vector<std::uint8_t> eight{0xf0, 0x0f, 0xc7, 0x4e, 0x13};  // at an odd address, as may be
  kit.put<std::uint64_t>(kBacking + 0x13, 0x1122334455667788);
  set(0xf00000055667788, 0xf00000011223344, 0xf000000aaaaaaaa, 0xf000000bbbbbbbb);
  EXPECT_EQ(kit.run(eight), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + 0x13), 0xbbbbbbbbaaaaaaaaU);
  EXPECT_EQ(cpu.gpr[kRax], 0xf00000055667788U);  // as it was
  EXPECT_EQ(cpu.arithmetic_flags, flag::kCf | flag::kOf | flag::kZf);
  set(1, 2, 3, 4);
  EXPECT_EQ(kit.run(eight), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0xaaaaaaaaU);
  EXPECT_EQ(cpu.gpr[kRdx], 0xbbbbbbbbU);
  EXPECT_EQ(cpu.arithmetic_flags, flag::kCf | flag::kOf);

  const std::vector<std::uint8_t> sixteen{0xf0, 0x48, 0x0f, 0xc7, 0x4e, 0x20};
  kit.put<std::uint64_t>(kBacking + 0x20, 5);
  kit.put<std::uint64_t>(kBacking + 0x28, 6);
  set(5, 6, 7, 8);
  EXPECT_EQ(kit.run(sixteen), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + 0x20), 7U);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + 0x28), 8U);
  EXPECT_NE(cpu.arithmetic_flags & flag::kZf, 0U);
  set(7, 9, 1, 1);
  EXPECT_EQ(kit.run(sixteen), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + 0x20), 7U);
  EXPECT_EQ(cpu.gpr[kRax], 7U);
  EXPECT_EQ(cpu.gpr[kRdx], 8U);
  EXPECT_EQ(cpu.arithmetic_flags & flag::kZf, 0U);
  EXPECT_EQ(kit.faults({0xf0, 0x48, 0x0f, 0xc7, 0x4e, 0x18}), "#GP(0)");  // not aligned
}

TEST(CompareExchange, AcrossPagesAndWhereItMayNotWrite) {
  InstructionKit kit;
  kit.map(kData, kBacking);
  kit.map(kData + kPageSize, kBacking + 0x5000);
  Cpu& cpu = kit.cpu();
  kit.put<std::uint32_t>(kBacking + 0xffc, 0x55667788);
  kit.put<std::uint32_t>(kBacking + 0x5000, 0x11223344);
  cpu.gpr[kRsi] = kData + 0xffc;
  cpu.gpr[kRax] = 0x55667788;
  cpu.gpr[kRdx] = 0x11223344;
  cpu.gpr[kRbx] = 1;
  cpu.gpr[kRcx] = 2;
  EXPECT_EQ(kit.run({0xf0, 0x0f, 0xc7, 0x0e}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint32_t>(kBacking + 0xffc), 1U);
  EXPECT_EQ(kit.get<std::uint32_t>(kBacking + 0x5000), 2U);
  EXPECT_NE(cpu.arithmetic_flags & flag::kZf, 0U);
  // It writes whether or not it is equal, so it faults either way.
  kit.map(kData, kBacking, pte::kU);
  kit.mmu().flush_all();
  cpu.gpr[kRsi] = kData;
  EXPECT_EQ(kit.faults({0x0f, 0xc7, 0x0e}), "#PF(3) at 0x500000");
  EXPECT_EQ(kit.faults({0x48, 0x0f, 0xc7, 0x0e}), "#PF(3) at 0x500000");
}

// --- decimal numbers, by what they are for

std::uint64_t packed(unsigned number) {
  return number / 10 % 10 << 4 | number % 10;
}

TEST(Decimal, AdditionAndSubtractionOfPackedNumbers) {
  InstructionKit kit;
  kit.code32();
  Cpu& cpu = kit.cpu();
  for (unsigned a = 0; a < 100; ++a) {
    for (unsigned b = 0; b < 100; ++b) {
      for (unsigned carry = 0; carry < 2; ++carry) {
        const std::uint64_t sum = packed(a) + packed(b) + carry;
        cpu.gpr[kRax] = 0x12345600 | (sum & 0xff);
        cpu.arithmetic_flags =
            (sum > 0xff ? flag::kCf : 0) | (((packed(a) ^ packed(b) ^ sum) & 0x10) != 0 ? flag::kAf : 0);
        ASSERT_EQ(kit.run({0x27}), Outcome::kNext);
        ASSERT_EQ(cpu.gpr[kRax], 0x12345600 | packed((a + b + carry) % 100)) << a << " " << b;
        ASSERT_EQ((cpu.arithmetic_flags & flag::kCf) != 0, a + b + carry > 99);
        const std::uint64_t difference = packed(a) - packed(b) - carry;
        cpu.gpr[kRax] = 0x12345600 | (difference & 0xff);
        cpu.arithmetic_flags = (packed(a) < packed(b) + carry ? flag::kCf : 0) |
                               (((packed(a) ^ packed(b) ^ difference) & 0x10) != 0 ? flag::kAf : 0);
        ASSERT_EQ(kit.run({0x2f}), Outcome::kNext);
        ASSERT_EQ(cpu.gpr[kRax], 0x12345600 | packed((a + 100 - b - carry) % 100)) << a << " " << b;
        ASSERT_EQ((cpu.arithmetic_flags & flag::kCf) != 0, a < b + carry);
      }
    }
  }
}

// The manual's operation, word by word, for all that is not a decimal number too.
TEST(Decimal, EveryByteAndFlagOfDaaAndDas) {
  InstructionKit kit;
  kit.code32();
  Cpu& cpu = kit.cpu();
  for (unsigned value = 0; value < 256; ++value) {
    for (unsigned flags = 0; flags < 4; ++flags) {
      const bool cf = (flags & 1) != 0;
      const bool af = (flags & 2) != 0;
      for (const bool add : {true, false}) {
        auto al = static_cast<std::uint8_t>(value);
        bool new_cf = false;
        bool new_af = false;
        if ((value & 0xf) > 9 || af) {
          const unsigned wide = add ? al + 6U : al - 6U;
          new_cf = cf || wide > 0xff;
          al = static_cast<std::uint8_t>(wide);
          new_af = true;
        }
        if (value > 0x99 || cf) {
          al = static_cast<std::uint8_t>(add ? al + 0x60 : al - 0x60);
          new_cf = true;
        } else if (add) {
          new_cf = false;
        }
        cpu.gpr[kRax] = value;
        cpu.arithmetic_flags = (cf ? flag::kCf : 0) | (af ? flag::kAf : 0);
        ASSERT_EQ(kit.run({static_cast<std::uint8_t>(add ? 0x27 : 0x2f)}), Outcome::kNext);
        ASSERT_EQ(cpu.gpr[kRax], al) << value << " " << flags << " " << add;
        const std::uint64_t expected = (new_cf ? flag::kCf : 0) | (new_af ? flag::kAf : 0) |
                                       (al == 0 ? flag::kZf : 0) | ((al & 0x80) != 0 ? flag::kSf : 0) |
                                       (__builtin_parity(al) == 0 ? flag::kPf : 0);
        ASSERT_EQ(cpu.arithmetic_flags & ~flag::kOf, expected) << value << " " << flags << " " << add;
      }
    }
  }
}

TEST(Decimal, UnpackedNumbers) {
  InstructionKit kit;
  kit.code32();
  Cpu& cpu = kit.cpu();
  for (unsigned a = 0; a < 10; ++a) {
    for (unsigned b = 0; b < 10; ++b) {
      cpu.gpr[kRax] = 0x200 + a + b;
      cpu.arithmetic_flags = a + b > 15 ? flag::kAf : 0;
      ASSERT_EQ(kit.run({0x37}), Outcome::kNext);
      ASSERT_EQ(cpu.gpr[kRax], 0x200 + (a + b) / 10 * 0x100 + (a + b) % 10);
      ASSERT_EQ((cpu.arithmetic_flags & flag::kCf) != 0, a + b > 9);
      cpu.gpr[kRax] = 0x200 | ((a - b) & 0xff);
      cpu.arithmetic_flags = a < b ? flag::kAf : 0;
      ASSERT_EQ(kit.run({0x3f}), Outcome::kNext);
      ASSERT_EQ(cpu.gpr[kRax] & 0xff, (a + 10 - b) % 10);
      ASSERT_EQ((cpu.arithmetic_flags & flag::kCf) != 0, a < b);
      cpu.gpr[kRax] = a * b;
      ASSERT_EQ(kit.run({0xd4, 10}), Outcome::kNext);
      ASSERT_EQ(cpu.gpr[kRax], (a * b / 10) << 8 | a * b % 10);
      ASSERT_EQ((cpu.arithmetic_flags & flag::kZf) != 0, a * b % 10 == 0);
      ASSERT_EQ(kit.run({0xd5, 10}), Outcome::kNext);
      ASSERT_EQ(cpu.gpr[kRax], a * b);
    }
  }
  EXPECT_EQ(kit.run({0xd4, 0}), Outcome::kFault);
  EXPECT_EQ(cpu.fault.vector, vec::kDe);
}

// --- moves

TEST(Moves, LeaTruncatesToItsSizes) {
  InstructionKit kit;
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbx] = 0x1122334455667788;
  cpu.gpr[kRcx] = 0x10;
  cpu.gpr[kRax] = ~0ULL;
  EXPECT_EQ(kit.run({0x48, 0x8d, 0x44, 0x8b, 0xfc}), Outcome::kNext);  // lea rax, [rbx+rcx*4-4]
  EXPECT_EQ(cpu.gpr[kRax], 0x11223344556677c4U);
  EXPECT_EQ(kit.run({0x8d, 0x44, 0x8b, 0xfc}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0x556677c4U);
  cpu.gpr[kRax] = ~0ULL;
  EXPECT_EQ(kit.run({0x66, 0x8d, 0x44, 0x8b, 0xfc}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0xffffffffffff77c4U);
  EXPECT_EQ(kit.run({0x67, 0x48, 0x8d, 0x44, 0x8b, 0xfc}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0x556677c4U);
  EXPECT_EQ(kit.run({0x48, 0x8d, 0x05, 0x00, 0x01, 0x00, 0x00}), Outcome::kNext);  // [rip+0x100]
  EXPECT_EQ(cpu.gpr[kRax], 0x401107U);
}

TEST(Moves, OffsetsOfTheAccumulator) {
  InstructionKit kit;
  kit.map(kData, kBacking);
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRax] = 0x1122334455667788;
  EXPECT_EQ(kit.run({0x48, 0xa3, 0x08, 0x00, 0x50, 0, 0, 0, 0, 0}), Outcome::kNext);
  EXPECT_EQ(kit.get<std::uint64_t>(kBacking + 8), 0x1122334455667788U);
  cpu.gpr[kRax] = ~0ULL;
  EXPECT_EQ(kit.run({0xa0, 0x0f, 0x00, 0x50, 0, 0, 0, 0, 0}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0xffffffffffffff11U);
  EXPECT_EQ(kit.run({0xa1, 0x08, 0x00, 0x50, 0, 0, 0, 0, 0}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0x55667788U);
  cpu.segments[kGs].base = kData - 0x10;
  EXPECT_EQ(kit.run({0x65, 0x66, 0xa1, 0x1e, 0, 0, 0, 0, 0, 0, 0}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRax], 0x55661122U);
  EXPECT_EQ(kit.faults({0xa2, 0, 0, 0, 0, 0, 0, 0x80, 0}), "#GP(0)");
}

TEST(Moves, Xlat) {
  InstructionKit kit;
  kit.map(kData, kBacking);
  *kit.at(kBacking + 0xf0) = 0x42;
  kit.cpu().gpr[kRbx] = kData;
  kit.cpu().gpr[kRax] = 0xaaaaaaaaaaaaaaf0;
  EXPECT_EQ(kit.run({0xd7}), Outcome::kNext);
  EXPECT_EQ(kit.cpu().gpr[kRax], 0xaaaaaaaaaaaaaa42U);
}

TEST(Moves, SegmentRegistersInRealMode) {
  InstructionKit kit;
  kit.code16();
  Cpu& cpu = kit.cpu();
  cpu.cr0 &= ~cr0::kPe;
  kit.mmu().flush_all();
  cpu.gpr[kRax] = 0xffff1234;
  EXPECT_EQ(kit.run({0x8e, 0xc0}), Outcome::kNext);  // mov es, ax
  EXPECT_EQ(cpu.segments[kEs].selector, 0x1234);
  EXPECT_EQ(cpu.segments[kEs].base, 0x12340U);
  EXPECT_EQ(cpu.interrupt_shadow, 0);
  EXPECT_EQ(kit.run({0x8e, 0xd0}), Outcome::kNext);  // mov ss, ax
  EXPECT_EQ(cpu.interrupt_shadow, 2);
  cpu.segments[kSs].base = 0;
  EXPECT_EQ(kit.run({0x8c, 0xc3}), Outcome::kNext);  // mov bx, es
  EXPECT_EQ(cpu.gpr[kRbx] & 0xffff, 0x1234U);
  // les di, [0x100]; lds si, [0x100]
  kit.put<std::uint32_t>(0x12340 + 0x100, 0x56789abc);
  cpu.segments[kDs] = cpu.segments[kEs];
  EXPECT_EQ(kit.run({0xc4, 0x3e, 0x00, 0x01}), Outcome::kNext);
  EXPECT_EQ(cpu.gpr[kRdi] & 0xffff, 0x9abcU);
  EXPECT_EQ(cpu.segments[kEs].base, 0x56780U);
  EXPECT_EQ(kit.run({0xc5, 0x36, 0x00, 0x01}), Outcome::kNext);
  EXPECT_EQ(cpu.segments[kDs].selector, 0x5678);
  EXPECT_EQ(cpu.gpr[kRsi] & 0xffff, 0x9abcU);
}

TEST(Moves, LoadFarPointerChangesNothingWhereTheSegmentCannotBeLoaded) {
  InstructionKit kit;
  kit.map(kData, kBacking);
  kit.put<std::uint64_t>(kBacking, 0x0050'0000'1234ULL);  // selector 0x50 of a table that is not there
  Cpu& cpu = kit.cpu();
  cpu.gpr[kRbx] = kData;
  cpu.gpr[kRax] = 9;
  const Segment before = cpu.segments[kFs];
  EXPECT_EQ(kit.faults({0x0f, 0xb4, 0x03}), "#GP(80)");
  EXPECT_EQ(cpu.gpr[kRax], 9U);
  EXPECT_EQ(cpu.segments[kFs].selector, before.selector);
}

}  // namespace
}  // namespace wisp::soft
