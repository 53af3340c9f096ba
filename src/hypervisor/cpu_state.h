// The state of one x86-64 processor as plain data, the same for every engine: what one engine saves, another
// loads. Field meanings follow the Intel SDM volume 3; layouts of blobs are named at each field.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace wisp {

struct CpuRegs {
  std::uint64_t rax = 0, rbx = 0, rcx = 0, rdx = 0, rsi = 0, rdi = 0, rsp = 0, rbp = 0;
  std::uint64_t r8 = 0, r9 = 0, r10 = 0, r11 = 0, r12 = 0, r13 = 0, r14 = 0, r15 = 0;
  std::uint64_t rip = 0;
  std::uint64_t rflags = 2;
  bool operator==(const CpuRegs&) const = default;
};

// A segment register with its hidden part. `limit` is in bytes (granularity already applied).
struct CpuSegment {
  std::uint64_t base = 0;
  std::uint32_t limit = 0;
  std::uint16_t selector = 0;
  std::uint8_t type = 0;  // descriptor type, 4 bits
  std::uint8_t dpl = 0;
  bool present = false;
  bool system = false;  // true: a system descriptor (LDT, TSS); false: code or data
  bool long_mode = false;
  bool default_big = false;  // D/B
  bool granularity = false;
  bool available = false;
  bool unusable = false;
  bool operator==(const CpuSegment&) const = default;
};

struct CpuTable {
  std::uint64_t base = 0;
  std::uint16_t limit = 0;
  bool operator==(const CpuTable&) const = default;
};

struct CpuSpecialRegs {
  CpuSegment cs, ds, es, fs, gs, ss, tr, ldt;
  CpuTable gdt, idt;
  std::uint64_t cr0 = 0x60000010, cr2 = 0, cr3 = 0, cr4 = 0, cr8 = 0;
  std::uint64_t efer = 0;
  std::uint64_t apic_base = 0;
  bool operator==(const CpuSpecialRegs&) const = default;
};

struct CpuDebugRegs {
  std::array<std::uint64_t, 4> db{};
  std::uint64_t dr6 = 0xffff0ff0;
  std::uint64_t dr7 = 0x400;
  bool operator==(const CpuDebugRegs&) const = default;
};

struct CpuMsr {
  std::uint32_t index = 0;
  std::uint64_t value = 0;
  bool operator==(const CpuMsr&) const = default;
};

// An exception or interrupt that was raised but not yet delivered, and the shadows that delay one.
struct CpuEvents {
  struct {
    bool injected = false;
    bool pending = false;
    std::uint8_t vector = 0;
    bool has_error_code = false;
    std::uint32_t error_code = 0;
    bool has_payload = false;
    std::uint64_t payload = 0;
  } exception;
  struct {
    bool injected = false;
    std::uint8_t vector = 0;
    bool soft = false;
    std::uint8_t shadow = 0;  // bit 0: STI, bit 1: MOV SS
  } interrupt;
  struct {
    bool injected = false;
    bool pending = false;
    bool masked = false;
  } nmi;
  std::uint32_t sipi_vector = 0;
};

enum class CpuRunState : std::uint8_t { kRunnable, kUninitialized, kInitReceived, kHalted, kSipiReceived };

// The register page of a local APIC, as in memory at its base (SDM volume 3, table "Local APIC Register
// Address Map").
struct LapicState {
  std::array<std::uint8_t, 1024> regs{};
};

// One CPUID answer (SDM volume 2, CPUID). Without `has_subleaf` it answers every sub-leaf.
struct CpuidEntry {
  std::uint32_t leaf = 0;
  std::uint32_t subleaf = 0;
  bool has_subleaf = false;
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  bool operator==(const CpuidEntry&) const = default;
};

struct CpuState {
  CpuRegs regs;
  CpuSpecialRegs sregs;
  CpuDebugRegs debug;
  std::vector<std::uint8_t> xsave;  // XSAVE area, standard (non-compacted) format
  std::uint64_t xcr0 = 1;
  std::vector<CpuMsr> msrs;
  LapicState lapic;
  CpuEvents events;
  CpuRunState run_state = CpuRunState::kRunnable;
  std::uint64_t tsc_khz = 0;      // 0: unknown
  std::vector<CpuidEntry> cpuid;  // what the guest sees; empty: what the engine shows by itself
};

}  // namespace wisp
