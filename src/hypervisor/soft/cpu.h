// One processor of the software CPU, as both executors work on it. Translated code addresses it through the
// host stack pointer (the block's first byte), so it is plain data of fixed layout; everything in it belongs
// to the processor's own thread unless it is atomic.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "hypervisor/xsave_layout.h"

namespace wisp::soft {

enum Gpr : std::uint8_t {
  kRax,
  kRcx,
  kRdx,
  kRbx,
  kRsp,
  kRbp,
  kRsi,
  kRdi,
  kR8,
  kR9,
  kR10,
  kR11,
  kR12,
  kR13,
  kR14,
  kR15,  // NOLINT
};

// In the order of instruction encodings.
enum SegmentId : std::uint8_t { kEs, kCs, kSs, kDs, kFs, kGs };

// Bits of RFLAGS (SDM volume 1, 3.4.3).
namespace flag {
inline constexpr std::uint64_t kCf = 1U << 0;
inline constexpr std::uint64_t kFixed = 1U << 1;
inline constexpr std::uint64_t kPf = 1U << 2;
inline constexpr std::uint64_t kAf = 1U << 4;
inline constexpr std::uint64_t kZf = 1U << 6;
inline constexpr std::uint64_t kSf = 1U << 7;
inline constexpr std::uint64_t kTf = 1U << 8;
inline constexpr std::uint64_t kIf = 1U << 9;
inline constexpr std::uint64_t kDf = 1U << 10;
inline constexpr std::uint64_t kOf = 1U << 11;
inline constexpr std::uint64_t kIopl = 3U << 12;
inline constexpr std::uint64_t kNt = 1U << 14;
inline constexpr std::uint64_t kRf = 1U << 16;
inline constexpr std::uint64_t kVm = 1U << 17;
inline constexpr std::uint64_t kAc = 1U << 18;
inline constexpr std::uint64_t kId = 1U << 21;
inline constexpr std::uint64_t kArithmetic = kCf | kPf | kAf | kZf | kSf | kOf;
// What may be set at all, in this CPU (no virtual-8086 mode extensions).
inline constexpr std::uint64_t kAll =
    kArithmetic | kFixed | kTf | kIf | kDf | kIopl | kNt | kRf | kVm | kAc | kId;
}  // namespace flag

namespace cr0 {
inline constexpr std::uint64_t kPe = 1U << 0, kMp = 1U << 1, kEm = 1U << 2, kTs = 1U << 3, kEt = 1U << 4,
                               kNe = 1U << 5, kWp = 1U << 16, kAm = 1U << 18, kNw = 1U << 29, kCd = 1U << 30,
                               kPg = 1U << 31;
}
namespace cr4 {
inline constexpr std::uint64_t kVme = 1U << 0, kPvi = 1U << 1, kTsd = 1U << 2, kDe = 1U << 3, kPse = 1U << 4,
                               kPae = 1U << 5, kMce = 1U << 6, kPge = 1U << 7, kPce = 1U << 8,
                               kOsfxsr = 1U << 9, kOsxmmexcpt = 1U << 10, kUmip = 1U << 11,
                               kFsgsbase = 1U << 16, kPcide = 1U << 17, kOsxsave = 1U << 18, kSmep = 1U << 20,
                               kSmap = 1U << 21;
}
namespace efer {
inline constexpr std::uint64_t kSce = 1U << 0, kLme = 1U << 8, kLma = 1U << 10, kNxe = 1U << 11;
}

// Exception vectors (SDM volume 3, table 6-1).
namespace vec {
inline constexpr std::uint8_t kDe = 0, kDb = 1, kNmi = 2, kBp = 3, kOf = 4, kBr = 5, kUd = 6, kNm = 7,
                              kDf = 8, kTs = 10, kNp = 11, kSs = 12, kGp = 13, kPf = 14, kMf = 16, kAc = 17,
                              kMc = 18, kXm = 19;
}

// A segment register with its hidden part.
struct Segment {
  std::uint64_t base = 0;
  std::uint32_t limit = 0;  // last valid offset, granularity applied
  std::uint16_t selector = 0;
  std::uint16_t attributes = 0;  // as in a descriptor's bytes 5 and 6: type 3:0, S 4, DPL 6:5, P 7, AVL 12,
                                 // L 13, D/B 14, G 15. 0: a null selector was loaded
  [[nodiscard]] std::uint8_t type() const { return attributes & 0xf; }
  [[nodiscard]] bool is_code_or_data() const { return (attributes & 0x10) != 0; }
  [[nodiscard]] std::uint8_t dpl() const { return (attributes >> 5) & 3; }
  [[nodiscard]] bool present() const { return (attributes & 0x80) != 0; }
  [[nodiscard]] bool long_mode() const { return (attributes & 0x2000) != 0; }
  [[nodiscard]] bool big() const { return (attributes & 0x4000) != 0; }
};

struct TableRegister {
  std::uint64_t base = 0;
  std::uint16_t limit = 0;
};

// What stopped an instruction short of its end. Set together with a `false` result of the access that failed.
struct Fault {
  std::uint8_t vector = 0;
  bool has_error_code = false;
  std::uint32_t error_code = 0;
  std::uint64_t address = 0;  // #PF: the new CR2; #DB: bits for DR6
};

// How an instruction ended.
enum class Outcome : std::uint8_t {
  kNext,      // done: go on at rip + length (the caller moves rip)
  kJump,      // done: rip is set
  kFault,     // nothing of it happened (strings: the iterations before it did): deliver cpu.fault
  kIo,        // the machine must answer cpu.io first; then run the instruction again
  kHalt,      // done, rip is past it: wait for an interrupt
  kShutdown,  // triple fault
  kTrap,      // done, rip is set: deliver cpu.fault as a trap (INT n, INT3, #DB after the instruction)
};

// Accesses to ports and device registers. A read stops the instruction (Outcome::kIo); when it runs again,
// the answers are found here in the order in which they were asked. A write is taken down, and told to the
// machine before the next instruction.
struct IoState {
  enum class Kind : std::uint8_t { kPortRead, kPortWrite, kMmioRead, kMmioWrite };
  struct Access {
    Kind kind = Kind::kPortRead;
    std::uint8_t size = 0;
    std::uint64_t address = 0;
    std::array<std::uint8_t, 8> data{};
  };
  static constexpr std::size_t kMax = 128;  // XSAVE of all there is to a device takes 108
  std::array<Access, kMax> answers{};       // reads that the machine answered for this instruction
  std::uint32_t answer_count = 0;
  std::uint32_t answers_used = 0;  // by this run of the instruction
  Access wanted{};                 // the read that stopped it
  bool waiting = false;            // `wanted` is set
  std::array<Access, kMax> writes{};
  std::uint32_t write_count = 0;
};

// A software TLB that translated code looks up in line: entry `i` covers the page whose number ends in `i`.
// A tag is the negated address of the page and Cpu::tag_bias; one that never matches is that of a page with
// another number.
inline constexpr std::size_t kTlbEntries = 2048;
struct TlbBank {
  std::array<std::uint64_t, kTlbEntries> read_tag;
  std::array<std::uint64_t, kTlbEntries> write_tag;
  std::array<std::uint64_t, kTlbEntries> addend;  // host address less guest linear address
};
// Who looks: code of ring 3; of rings 0 to 2; of these with EFLAGS.AC set under SMAP.
inline constexpr std::size_t kBanks = 3;
enum Bank : std::uint8_t { kUserBank, kSupervisorBank, kSupervisorAcBank };

// From the linear address of code to its translation, for jumps whose target is not known beforehand.
inline constexpr std::size_t kJumpEntries = 16384;
// The entry of an address: this many bits of the sum of it and of its upper bits.
inline constexpr unsigned kJumpBits = 14;
static_assert(kJumpEntries == std::size_t{1} << kJumpBits);
[[nodiscard]] constexpr std::size_t jump_index(std::uint64_t linear) {
  return (linear + std::rotr(linear, kJumpBits)) % kJumpEntries;
}
// A tag that no address of this entry matches, nor is it one less than one that does
// (BlockEmitter::indirect()).
[[nodiscard]] constexpr std::uint64_t no_jump(std::size_t index) {
  return -static_cast<std::uint64_t>((index + kJumpEntries / 2) % kJumpEntries);
}
struct JumpBank {
  std::array<std::uint64_t, kJumpEntries> tag;   // negated linear address of the instruction
  std::array<std::uint64_t, kJumpEntries> code;  // host address of its translation
};

// Legacy part, header, upper halves of YMM.
inline constexpr std::size_t kXsaveSize = xsave::kYmm + xsave::kYmmSize;

inline constexpr std::uint64_t kBudget = 1ULL << 63;
// How many times PAUSE does nothing before it is told (Environment::pause()): far less than for what the host
// would leave a spinning thread its processor.
inline constexpr std::int64_t kPausesPerYield = 64;
// Of Cpu::run: also a mask of the bit that says whether there is a budget, so that one look is for both.
inline constexpr std::uint64_t kRunning = kBudget;

// RAX to R15, by the numbers that instructions use for them. Those that translated code keeps here and not in
// registers of the host, R10 and up, stand first.
class GeneralRegisters {
 public:
  constexpr GeneralRegisters() = default;
  constexpr GeneralRegisters(const std::array<std::uint64_t, 16>& values) { *this = values; }
  constexpr GeneralRegisters& operator=(const std::array<std::uint64_t, 16>& values) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      (*this)[i] = values[i];
    }
    return *this;
  }
  [[nodiscard]] constexpr operator std::array<std::uint64_t, 16>() const {
    std::array<std::uint64_t, 16> values{};
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = (*this)[i];
    }
    return values;
  }
  bool operator==(const GeneralRegisters&) const = default;
  [[nodiscard]] constexpr std::uint64_t& operator[](std::size_t number) { return places_[place_of(number)]; }
  [[nodiscard]] constexpr std::uint64_t operator[](std::size_t number) const {
    return places_[place_of(number)];
  }
  // In units of 8 bytes.
  [[nodiscard]] static constexpr std::size_t place_of(std::size_t number) { return (number + 6) % 16; }

 private:
  std::array<std::uint64_t, 16> places_{};
};

struct alignas(4096) Cpu {
  // --- what translated code uses most: within 128 bytes of the start, for short instructions
  std::uint64_t tlb_mask = (kTlbEntries - 1) << 12;  // constants for translated code, as other masks here
  std::uint64_t page_mask = ~0xfffULL;
  std::uint64_t jump_mask = kJumpEntries - 1;
  std::uint64_t page_address = 0;        // translated code: linear address of the page it runs in
  std::uint64_t kept = 0;                // translated code, inside one instruction
  std::uint64_t shared_addends[4] = {};  // translated code, inside one block: see access_plan.h; 0: none
  std::atomic<std::uint64_t> run =
      kRunning;  // 0: leave translated code at the next block (any thread clears)
  GeneralRegisters gpr{};
  std::uint64_t rip = 0;
  std::uint64_t arithmetic_flags = 0;        // flag::kArithmetic only
  std::uint64_t other_flags = flag::kFixed;  // the rest of RFLAGS but IF
  std::uint64_t interrupt_flag = 0;          // flag::kIf or 0
  std::uint64_t no_interrupt_waits = 1;      // 0: an interrupt waits for IF
  std::uint64_t vectors_here = 0;            // 1: the host's vector registers hold the guest's
  std::uint64_t direction_mask = flag::kDf;
  std::uint64_t half_mask = ~1ULL;
  std::uint64_t sign_mask = 1ULL << 63;
  std::uint64_t repeat_mask = ~0x1fffULL;  // of a count in translated code: less than two pages
  std::uint64_t scratch[3] = {};           // between generated code and its stubs
  std::uint64_t host_rsp = 0;
  std::uint64_t instructions_left =
      kBudget;  // kBudget and how many may be retired until instruction_goal is reached
  std::int64_t pauses_left = kPausesPerYield;
  std::uint64_t step_next = 0;  // 1: translated code came out since the budget is less than its block
  std::array<Segment, 6> segments{};

  // --- the rest of the architectural state
  Segment ldtr{}, tr{};
  TableRegister gdt{}, idt{};
  std::uint64_t cr0 = 0x60000010, cr2 = 0, cr3 = 0, cr4 = 0;  // CR8 is in the local APIC
  std::uint64_t efer = 0;
  std::uint64_t xcr0 = 1;
  std::array<std::uint64_t, 4> dr{};
  std::uint64_t dr6 = 0xffff0ff0, dr7 = 0x400;
  struct Msrs {
    std::uint64_t star = 0, lstar = 0, cstar = 0, sfmask = 0, kernel_gs_base = 0, tsc_aux = 0;
    std::uint64_t sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
    std::uint64_t pat = 0x0007040600070406, misc_enable = 1, tsc_adjust = 0;
    std::uint64_t mtrr_def_type = 0, spec_ctrl = 0;
    std::array<std::uint64_t, 16> mtrr_variable{};
    std::array<std::uint64_t, 11> mtrr_fixed{};
    std::uint64_t kvm_wall_clock = 0, kvm_system_time = 0;
  } msr{};
  std::uint64_t tsc_offset = 0;  // guest TSC = machine's TSC + this

  alignas(64) std::array<std::uint8_t, kXsaveSize> vectors{};  // x87, SSE and AVX as XSAVE stores them

  // --- between instructions
  std::uint8_t interrupt_shadow = 0;  // bit 0: after STI, bit 1: after MOV SS; for one instruction
  bool nmi_masked = false;
  bool halted = false;
  std::uint8_t cpl = 0;  // SS.DPL, cached
  Fault fault{};
  std::uint64_t breakpoint_hits = 0;  // of DR7's data breakpoints, in bits of DR6, by the present instruction
  IoState io{};
  std::uint64_t instruction_goal = 0;       // see retired()
  std::atomic<std::uint32_t> requests = 0;  // of other threads: see requests.h
  std::uint32_t id = 0;                     // APIC id
  std::uint64_t tag_bias = 0;  // added to all tags of the in-line TLB: see BlockEmitter::compare_tag()
  void* runner = nullptr;      // who answers the calls of translated code

  std::array<TlbBank, kBanks> tlb;
  std::array<JumpBank, kBanks> jumps;

  // Instructions since the start. All that ran where the translator counts them (a virtual clock), else the
  // interpreter's. A repeated string instruction counts once for each slice that it is done in.
  [[nodiscard]] std::uint64_t retired() const { return instruction_goal - (instructions_left - kBudget); }
  void set_budget(std::uint64_t instructions) {
    instruction_goal = retired() + instructions;
    instructions_left = kBudget + instructions;
  }
  [[nodiscard]] bool budget_used_up() const { return instructions_left <= kBudget; }

  [[nodiscard]] std::uint64_t rflags() const { return arithmetic_flags | other_flags | interrupt_flag; }
  void set_rflags(std::uint64_t value) {
    arithmetic_flags = value & flag::kArithmetic;
    interrupt_flag = value & flag::kIf;
    other_flags = (value & flag::kAll & ~(flag::kArithmetic | flag::kIf)) | flag::kFixed;
  }
  [[nodiscard]] bool protected_mode() const { return (cr0 & cr0::kPe) != 0; }
  [[nodiscard]] bool long_mode() const { return (efer & efer::kLma) != 0; }
  // 64-bit code, not compatibility mode.
  [[nodiscard]] bool code64() const { return long_mode() && segments[kCs].long_mode(); }
  [[nodiscard]] bool virtual_8086() const { return (other_flags & flag::kVm) != 0; }
  [[nodiscard]] std::uint32_t iopl() const { return (other_flags >> 12) & 3; }
  [[nodiscard]] Bank bank() const {
    if (cpl == 3) {
      return kUserBank;
    }
    return (other_flags & flag::kAc) != 0 ? kSupervisorAcBank : kSupervisorBank;
  }
  // Records a fault; returns false, so that an access can end with `return cpu.raise(...)`.
  bool raise(std::uint8_t vector) {
    fault = {.vector = vector};
    return false;
  }
  bool raise(std::uint8_t vector, std::uint32_t error_code, std::uint64_t address = 0) {
    fault = {.vector = vector, .has_error_code = true, .error_code = error_code, .address = address};
    return false;
  }
};

}  // namespace wisp::soft
