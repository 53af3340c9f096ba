// Instructions with the state before them, and what became of it: the common language of the host's own
// processor and the software CPU in the differential test.
#pragma once

#include <array>
#include <cstdint>

#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/insn.h"

namespace wisp::soft {

// The same linear addresses on both sides, all of ring 3.
inline constexpr std::uint64_t kCaseCode =
    0x10000000;  // two pages of INT3 to run in, not writable; then nothing
inline constexpr std::uint64_t kCaseCodeSize = 0x2000;
inline constexpr std::uint64_t kCaseData = 0x20000000;  // two pages to read and write, not to run in
inline constexpr std::uint64_t kCaseDataSize = 0x2000;
inline constexpr std::uint64_t kCaseReadOnly = kCaseData + kCaseDataSize;  // one page; then nothing
inline constexpr std::uint64_t kCaseGsBase = kCaseData + 0x800;

struct Case {
  static constexpr std::size_t kMostBytes = 160;
  std::array<std::uint8_t, kMostBytes> bytes{};
  std::uint8_t length = 0;
  bool sequence = false;     // more than one instruction
  bool single_step = false;  // with TF set, for what may jump to itself
  std::uint64_t rip = 0;
  std::uint64_t target = 0;  // linear address of the memory operand, where there is one
  std::array<std::uint64_t, 16> gpr{};
  std::uint64_t rflags = 0;
  alignas(64) std::array<std::uint8_t, kXsaveSize> vectors{};
};

struct CaseResult {
  enum class End : std::uint8_t { kNone, kException, kHang };
  End end = End::kNone;
  std::uint8_t vector = 0;  // #BP or #DB where the instruction ended well
  std::uint32_t error = 0;
  std::uint64_t cr2 = 0;  // of #PF
  std::array<std::uint64_t, 16> gpr{};
  std::uint64_t rip = 0;
  std::uint64_t rflags = 0;
  alignas(64) std::array<std::uint8_t, kXsaveSize> vectors{};
  alignas(64) std::array<std::uint8_t, kCaseDataSize> data{};
};

// What the data pages hold before each case.
using CaseData = std::array<std::uint8_t, kCaseDataSize>;
inline constexpr std::uint8_t kCaseReadOnlyByte = 0x3c;

}  // namespace wisp::soft
