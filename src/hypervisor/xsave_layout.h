// The XSAVE area in its standard format (SDM volume 1, 13.4), whose first half is that of FXSAVE (10.5.1).
#pragma once

#include <cstddef>
#include <cstdint>

namespace wisp::xsave {

// Bits of XCR0, XSTATE_BV and the like.
inline constexpr std::uint64_t kX87 = 1, kSse = 2, kAvx = 4;

inline constexpr std::uint32_t kControl = 0, kStatus = 2, kTag = 4, kOpcode = 6, kMxcsr = 24, kMxcsrMask = 28,
                               kStack = 32, kXmm = 160, kHeader = 512, kYmm = 576;
inline constexpr std::uint32_t kStackEnd = 160;
inline constexpr std::uint32_t kXmmEnd = 416;  // with 16 registers
inline constexpr std::uint32_t kHeaderSize = 64;
inline constexpr std::uint32_t kYmmSize = 256;

inline constexpr std::uint32_t kMxcsrBits = 0xffff;  // those that may be set
inline constexpr std::uint32_t kMxcsrInit = 0x1f80;
inline constexpr std::uint16_t kControlInit = 0x37f;
inline constexpr std::uint16_t kExceptions = 0x3f;      // of control and status word
inline constexpr std::uint16_t kErrorSummary = 0x8080;  // ES and B

inline constexpr std::size_t kMost = 64 * 1024;  // that a saved state may have

}  // namespace wisp::xsave
