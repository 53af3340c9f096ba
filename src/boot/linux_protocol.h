// Offsets and values of the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst): the
// same in the first sectors of a bzImage and in struct boot_params.
#pragma once

#include <cstdint>

#include "memory/gpa.h"

namespace wisp::linux_protocol {

// struct boot_params
inline constexpr std::size_t kBootParamsSize = 0x1000;
inline constexpr std::size_t kAcpiRsdpAddr = 0x070;     // u64
inline constexpr std::size_t kExtRamdiskImage = 0x0C0;  // u32, bits 63:32
inline constexpr std::size_t kExtRamdiskSize = 0x0C4;   // u32
inline constexpr std::size_t kExtCmdLinePtr = 0x0C8;    // u32
inline constexpr std::size_t kE820Entries = 0x1E8;      // u8
inline constexpr std::size_t kE820Table = 0x2D0;        // 20 bytes each
inline constexpr std::size_t kE820EntrySize = 20;
inline constexpr std::size_t kE820MaxEntries = 128;

// Setup header, in both
inline constexpr std::size_t kSetupHeader = 0x1F1;
inline constexpr std::size_t kSetupHeaderEnd = 0x290;   // nothing of it may lie beyond in boot_params
inline constexpr std::size_t kSetupSects = 0x1F1;       // u8
inline constexpr std::size_t kSysSize = 0x1F4;          // u32, in units of 16 bytes
inline constexpr std::size_t kBootFlag = 0x1FE;         // u16, 0xAA55
inline constexpr std::size_t kJump = 0x200;             // u16; the second byte gives the header's length
inline constexpr std::size_t kMagicOffset = 0x202;      // "HdrS"
inline constexpr std::size_t kVersion = 0x206;          // u16
inline constexpr std::size_t kTypeOfLoader = 0x210;     // u8
inline constexpr std::size_t kLoadFlags = 0x211;        // u8
inline constexpr std::size_t kCode32Start = 0x214;      // u32
inline constexpr std::size_t kRamdiskImage = 0x218;     // u32
inline constexpr std::size_t kRamdiskSize = 0x21C;      // u32
inline constexpr std::size_t kCmdLinePtr = 0x228;       // u32
inline constexpr std::size_t kInitrdAddrMax = 0x22C;    // u32, 2.03
inline constexpr std::size_t kKernelAlignment = 0x230;  // u32, 2.05
inline constexpr std::size_t kRelocatable = 0x234;      // u8, 2.05
inline constexpr std::size_t kXLoadFlags = 0x236;       // u16, 2.12
inline constexpr std::size_t kCmdlineSize = 0x238;      // u32, 2.06
inline constexpr std::size_t kPrefAddress = 0x258;      // u64, 2.10
inline constexpr std::size_t kInitSize = 0x260;         // u32, 2.10

inline constexpr std::uint32_t kMagic = 0x5372'6448;  // "HdrS"
inline constexpr std::uint16_t kBootFlagValue = 0xAA55;
inline constexpr std::uint8_t kLoaderUndefined = 0xFF;  // type_of_loader: no number assigned
inline constexpr std::uint8_t kLoadedHigh = 0x01;       // loadflags
inline constexpr std::uint16_t kXlfKernel64 = 0x0001;   // xloadflags: 64-bit entry at 0x200
inline constexpr std::uint64_t kEntry64 = 0x200;

// For kernels without a setup header of their own (vmlinux, vmlinux.bin): COMMAND_LINE_SIZE of x86 with its
// zero, and any place below 4 GiB for the initrd.
inline constexpr std::uint32_t kCommandLineMax = 2047;
inline constexpr Gpa kInitrdLast = 0xFFFF'FFFF;

}  // namespace wisp::linux_protocol
