// The decoder against Zydis: every opcode with every prefix, VEX form and ModRM shape in the three code
// sizes, and random bytes from a fixed seed. WISP_DECODER_CASES sets how many random ones (default 400,000).
#include "hypervisor/soft/decoder.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "hypervisor/soft/zydis_peer.h"

namespace wisp::soft {
namespace {

constexpr std::array kSizes{CodeSize::k16, CodeSize::k32, CodeSize::k64};
using Bytes = std::array<std::uint8_t, kMaxInsnLength>;

std::string hex(std::span<const std::uint8_t> bytes) {
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += fmt::format("{:02x} ", byte);
  }
  return text;
}

bool is_valid(const Insn& insn) {
  return insn.op != Op::kUndefined && insn.op != Op::kUnknown;
}

// Decodes cases with both, and keeps one example of each kind of disagreement.
class Examiner {
 public:
  ~Examiner() {
    std::size_t shown = 0;
    for (const auto& [kind, finding] : findings_) {
      if (++shown > 60) {
        ADD_FAILURE() << "and " << findings_.size() - 60 << " more kinds";
        break;
      }
      ADD_FAILURE() << kind << ", " << finding.count << " times, first " << finding.example;
    }
  }

  void look(const Bytes& bytes, CodeSize code) {
    ++cases_;
    const DecodeResult result = decode(bytes, code, ours_);
    peer_.decode(bytes, code, theirs_);
    const bool valid = result == DecodeResult::kDone && is_valid(ours_);
    if (result == DecodeResult::kTruncated) {
      found("truncated though 15 bytes were given", bytes, code);
      return;
    }
    if (theirs_.too_long && result == DecodeResult::kDone && valid) {
      found("longer than 15 bytes, taken", bytes, code);
      return;
    }
    const bool expected = theirs_.valid && in_model(theirs_);
    if (valid != expected) {
      const std::string what = valid
                                   ? (theirs_.valid ? fmt::format("taken, but {} is not in the model", name())
                                                    : std::string("taken, but Zydis refuses it"))
                                   : fmt::format("{} is refused", name());
      found(fmt::format("map {} opcode {:02x} /{} {}{}{}", ours_.map, ours_.opcode, ours_.reg_field(),
                        ours_.memory ? "memory " : "", ours_.vex ? "VEX " : "", what),
            bytes, code);
      return;
    }
    if (!valid) {
      return;
    }
    ++accepted_;
    const std::string text = difference(ours_, theirs_, code);
    if (!text.empty()) {
      found(fmt::format("map {} opcode {:02x} {}{}:{}", ours_.map, ours_.opcode, ours_.vex ? "VEX " : "",
                        name(), text),
            bytes, code);
    }
  }

  [[nodiscard]] std::uint64_t cases() const { return cases_; }
  [[nodiscard]] std::uint64_t accepted() const { return accepted_; }

 private:
  struct Finding {
    std::uint64_t count = 0;
    std::string example{};
  };
  std::string name() const {
    const char* text = ZydisMnemonicGetString(theirs_.insn.mnemonic);
    return text != nullptr ? text : "?";
  }
  void found(const std::string& kind, const Bytes& bytes, CodeSize code) {
    Finding& finding = findings_[kind];
    if (finding.count++ == 0) {
      finding.example = fmt::format("{}in {}-bit code", hex(bytes), 16 << static_cast<int>(code));
    }
  }

  ZydisPeer peer_{};
  Insn ours_{};
  PeerInsn theirs_{};
  std::map<std::string, Finding> findings_{};
  std::uint64_t cases_ = 0;
  std::uint64_t accepted_ = 0;
};

// What follows the opcode and ModRM in these tests: bytes that differ, with the sign bits both ways.
constexpr std::array<std::uint8_t, 11> kTail{0x9c, 0x31, 0x72, 0x53, 0xf4, 0x15,
                                             0xa6, 0x37, 0x58, 0x79, 0x1a};

Bytes assemble(std::initializer_list<std::span<const std::uint8_t>> parts) {
  Bytes bytes{};
  std::size_t at = 0;
  for (const auto part : parts) {
    for (const std::uint8_t byte : part) {
      if (at < bytes.size()) {
        bytes[at++] = byte;
      }
    }
  }
  for (std::size_t i = 0; at < bytes.size(); ++i) {
    bytes[at++] = kTail[i % kTail.size()];
  }
  return bytes;
}

using Part = std::vector<std::uint8_t>;

const std::vector<Part>& opcodes_of(unsigned map) {
  static const std::array<std::vector<Part>, 4> kOpcodes = [] {
    std::array<std::vector<Part>, 4> all;
    for (unsigned i = 0; i < 256; ++i) {
      const auto byte = static_cast<std::uint8_t>(i);
      all[0].push_back({byte});
      all[1].push_back({0x0f, byte});
      all[2].push_back({0x0f, 0x38, byte});
      all[3].push_back({0x0f, 0x3a, byte});
    }
    return all;
  }();
  return kOpcodes[map];
}

TEST(SoftDecoder, LegacyOpcodesWithEveryModrm) {
  Examiner examiner;
  const std::vector<Part> prefixes{{}, {0x66}, {0xf3}, {0xf2}, {0x66, 0xf3}, {0xf2, 0x66}, {0xf0}};
  const std::vector<Part> rexes{{}, {0x40}, {0x48}, {0x4f}};
  for (const CodeSize code : kSizes) {
    for (unsigned map = 0; map < 4; ++map) {
      for (const Part& opcode : opcodes_of(map)) {
        for (const Part& prefix : prefixes) {
          for (const Part& rex : rexes) {
            if (!rex.empty() && code != CodeSize::k64) {
              continue;
            }
            for (unsigned modrm = 0; modrm < 256; ++modrm) {
              const std::array byte{static_cast<std::uint8_t>(modrm)};
              examiner.look(assemble({prefix, rex, opcode, byte}), code);
            }
          }
        }
      }
    }
  }
  EXPECT_GT(examiner.accepted(), examiner.cases() / 4);
}

TEST(SoftDecoder, PrefixesTogether) {
  Examiner examiner;
  const std::vector<Part> prefixes{
      {0x67},       {0x66, 0x67}, {0x67, 0xf3}, {0x2e},       {0x36},       {0x3e},
      {0x26},       {0x64},       {0x65},       {0x65, 0x2e}, {0x64, 0x65}, {0xf2, 0xf3},
      {0xf3, 0xf2}, {0x66, 0x66}, {0xf0, 0x66}, {0xf0, 0xf3}, {0xf0, 0xf2}, {0x67, 0x64, 0x66},
      {0x40, 0x66}, {0x48, 0x40}, {0x48, 0xf3}, {0x4f, 0x41}};
  for (const CodeSize code : kSizes) {
    for (unsigned map = 0; map < 4; ++map) {
      for (const Part& opcode : opcodes_of(map)) {
        for (const Part& prefix : prefixes) {
          for (const unsigned modrm : {0x04U, 0x06U, 0x05U, 0x0dU, 0x17U, 0x44U, 0x86U, 0xbcU, 0x6dU, 0x28U,
                                       0x33U, 0x7aU, 0xc0U, 0xcaU, 0xd5U, 0xe4U, 0xefU, 0xf8U}) {
            const std::array byte{static_cast<std::uint8_t>(modrm)};
            examiner.look(assemble({prefix, opcode, byte}), code);
          }
        }
      }
    }
  }
}

// All ModRM and SIB bytes with all REX and address sizes, on one load, one vector load, one with an
// immediate.
TEST(SoftDecoder, AddressForms) {
  Examiner examiner;
  const std::vector<Part> opcodes{{0x8b}, {0x0f, 0x6f}, {0x81}, {0x0f, 0xb6}};
  for (const CodeSize code : kSizes) {
    for (const Part& opcode : opcodes) {
      for (const Part& prefix : {Part{}, Part{0x67}, Part{0x65}}) {
        for (unsigned rex = 0x3f; rex < 0x50; ++rex) {
          if (rex != 0x3f && code != CodeSize::k64) {
            continue;
          }
          const Part rex_part = rex == 0x3f ? Part{} : Part{static_cast<std::uint8_t>(rex)};
          for (unsigned modrm = 0; modrm < 192; modrm += 1) {
            const bool sib = (modrm & 7) == 4;
            if ((modrm >> 3 & 7) > 1) {
              continue;
            }
            for (unsigned second = 0; second < (sib ? 256U : 1U); ++second) {
              const std::array bytes{static_cast<std::uint8_t>(modrm), static_cast<std::uint8_t>(second)};
              examiner.look(assemble({prefix, rex_part, opcode, bytes}), code);
            }
          }
        }
      }
    }
  }
}

TEST(SoftDecoder, VexForms) {
  Examiner examiner;
  for (const CodeSize code : kSizes) {
    for (unsigned map = 0; map < 5; ++map) {
      for (unsigned opcode = 0; opcode < 256; ++opcode) {
        for (unsigned last = 0; last < 256; last += 1) {
          const unsigned vvvv = ~last >> 3 & 15;
          if (vvvv != 0 && vvvv != 5 && vvvv != 12) {
            continue;
          }
          for (const unsigned rxb : {7U, 0U, 5U}) {
            const std::array vex{std::uint8_t{0xc4}, static_cast<std::uint8_t>(rxb << 5 | map),
                                 static_cast<std::uint8_t>(last), static_cast<std::uint8_t>(opcode)};
            for (unsigned modrm = 0; modrm < 256; modrm += 1) {
              const unsigned mod = modrm >> 6;
              const unsigned rm = modrm & 7;
              if (!(mod == 3 && rm == 2) && !(mod == 1 && rm == 4) &&
                  !(mod == 0 && rm == 5 && (modrm & 8) != 0)) {
                continue;
              }
              const std::array byte{static_cast<std::uint8_t>(modrm)};
              examiner.look(assemble({vex, byte}), code);
            }
          }
        }
      }
    }
    // The short form, and prefixes that must not stand before VEX.
    for (unsigned opcode = 0; opcode < 256; ++opcode) {
      for (unsigned last = 0; last < 256; last += 3) {
        const std::array vex{std::uint8_t{0xc5}, static_cast<std::uint8_t>(last),
                             static_cast<std::uint8_t>(opcode)};
        for (const unsigned modrm : {0xc1U, 0xeaU, 0x44U, 0x15U, 0x9aU}) {
          const std::array byte{static_cast<std::uint8_t>(modrm)};
          examiner.look(assemble({vex, byte}), code);
        }
        for (const unsigned prefix : {0x66U, 0xf3U, 0xf2U, 0xf0U, 0x48U, 0x65U, 0x67U}) {
          const std::array before{static_cast<std::uint8_t>(prefix)};
          const std::array byte{std::uint8_t{0xc1}};
          examiner.look(assemble({before, vex, byte}), code);
        }
      }
    }
  }
}

TEST(SoftDecoder, RandomBytes) {
  const char* wanted = std::getenv("WISP_DECODER_CASES");
  const std::uint64_t cases = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 400000;
  Examiner examiner;
  std::mt19937_64 random(0x57495350);
  static constexpr std::array<std::uint8_t, 14> kPrefixes{0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x26, 0x2e,
                                                          0x36, 0x3e, 0x64, 0x65, 0x48, 0x41, 0x0f};
  for (std::uint64_t i = 0; i < cases; ++i) {
    Bytes bytes;
    const std::uint64_t low = random();
    const std::uint64_t high = random();
    std::memcpy(bytes.data(), &low, 8);
    std::memcpy(bytes.data() + 8, &high, 7);
    // Few to many prefixes: up to and over the longest there can be.
    const std::uint64_t kind = random();
    const std::size_t count = (kind & 7) == 0 ? kind >> 8 & 15 : (kind >> 8) % 3;
    for (std::size_t k = 0; k < count; ++k) {
      bytes[k] = kPrefixes[random() % kPrefixes.size()];
    }
    if ((kind & 0x70) == 0 && count + 1 < bytes.size()) {
      bytes[count] = 0xc4;
      bytes[count + 1] = static_cast<std::uint8_t>((bytes[count + 1] & 0xe0) | (1 + bytes[count + 1] % 3));
    }
    examiner.look(bytes, kSizes[(kind >> 60) % 3]);
  }
}

// Every instruction that decodes needs exactly its length: less is truncated, more changes nothing.
TEST(SoftDecoder, LengthIsExact) {
  for (const CodeSize code : kSizes) {
    for (unsigned map = 0; map < 4; ++map) {
      for (const Part& opcode : opcodes_of(map)) {
        for (const Part& prefix : {Part{}, Part{0x66}, Part{0xf3}, Part{0x67, 0x65}}) {
          for (const unsigned modrm : {0x03U, 0x05U, 0x06U, 0x44U, 0x84U, 0xc3U}) {
            const std::array byte{static_cast<std::uint8_t>(modrm)};
            const Bytes bytes = assemble({prefix, opcode, byte});
            Insn insn;
            if (decode(bytes, code, insn) != DecodeResult::kDone || !is_valid(insn)) {
              continue;
            }
            const std::size_t length = insn.length;
            Insn again;
            for (std::size_t given = 1; given < length; ++given) {
              ASSERT_EQ(decode(std::span(bytes).first(given), code, again), DecodeResult::kTruncated)
                  << hex(bytes) << given << " of " << length;
            }
            ASSERT_EQ(decode(std::span(bytes).first(length), code, again), DecodeResult::kDone) << hex(bytes);
            ASSERT_EQ(again.length, length);
            ASSERT_EQ(again.op, insn.op);
          }
        }
      }
    }
  }
}

TEST(SoftDecoder, FifteenBytesAreTheMost) {
  Insn insn;
  std::vector<std::uint8_t> bytes(14, 0x66);
  bytes.push_back(0x90);
  EXPECT_EQ(decode(bytes, CodeSize::k64, insn), DecodeResult::kDone);
  EXPECT_EQ(insn.length, 15);
  bytes.insert(bytes.begin(), 0x66);
  EXPECT_EQ(decode(bytes, CodeSize::k64, insn), DecodeResult::kTooLong);
  // ADD [eax + disp32], imm32 with five prefixes too many to end in time.
  bytes = {0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x81, 0x80, 1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_EQ(decode(bytes, CodeSize::k32, insn), DecodeResult::kDone);
  bytes.insert(bytes.begin(), 0x2e);
  EXPECT_EQ(decode(bytes, CodeSize::k32, insn), DecodeResult::kTooLong);
  // What is there so far could still become one.
  EXPECT_EQ(decode(std::span(bytes).first(14), CodeSize::k32, insn), DecodeResult::kTruncated);
  const std::vector<std::uint8_t> prefixes(15, 0x3e);
  EXPECT_EQ(decode(prefixes, CodeSize::k16, insn), DecodeResult::kTooLong);
}

}  // namespace
}  // namespace wisp::soft
