// A hostile guest as fuzzer input describes it: registers, tables and code to start with, and what the
// machine around it does and answers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "hypervisor/cpu_state.h"
#include "input.h"

namespace wisp::fuzz {

// The guest's physical memory: RAM at 0, at 2 MiB and at 4 GiB, ROM below 1 MiB, and nothing between.
inline constexpr std::uint64_t kLowRam = 0, kLowSize = 512U << 10;
inline constexpr std::uint64_t kRom = 0xf0000, kRomSize = 64U << 10;
inline constexpr std::uint64_t kMiddleRam = 2U << 20, kMiddleSize = 256U << 10;
inline constexpr std::uint64_t kFarRam = 4ULL << 30, kFarSize = 64U << 10;
// What lies in low RAM.
inline constexpr std::uint64_t kPml4 = 0x1000, kPdpt = 0x2000, kPd = 0x3000, kPt = 0x4000, kPtNext = 0x5000,
                               kPd32 = 0x6000, kPt32 = 0x7000, kPdptPae = 0x8000, kGdt = 0x9000,
                               kIdt64 = 0xa000, kTss = 0xb000, kHandlers = 0xc000, kIdt32 = 0xd000,
                               kLdt = 0xe000, kStack = 0x1f000, kIst = 0x1e000, kCode = 0x20000,
                               kCodeEnd = 0x40000, kData = 0x40000;

enum class Mode : std::uint8_t { kReal, kProtected16, kProtected32, kPaging32, kPae, kCompat, kLong };

// A store to guest memory before the guest starts; what is not RAM there is left out.
struct MemoryWrite {
  std::uint64_t gpa = 0;
  std::vector<std::uint8_t> bytes{};
};

// What is done to the machine while the guest stands still.
struct Action {
  enum class Kind : std::uint8_t {
    kNone,
    kPulse,      // an interrupt pin
    kLevel,      // the same, held
    kMessage,    // an MSI
    kHostWrite,  // into RAM, as a device does
    kDirtyOn,
    kDirtyTake,
    kDirtyOff,
    kRemoveMiddle,  // the RAM at 2 MiB goes or comes back
    kSaveAndLoad,   // of the processor
    kPlatform,      // the same of the interrupt controllers
    kReset,
    kRegisters,  // a few bits of a register turn
  };
  Kind kind = Kind::kNone;
  std::uint8_t a = 0, b = 0;
  std::uint32_t value = 0;
};

struct Program {
  bool differential = false;
  bool interpreter = false;
  bool quick_loop = false;  // see ExecutionOptions
  bool two_vcpus = false;
  bool parallel = false;  // both at the same time
  bool loops = false;     // the code starts again at its end
  std::uint64_t pause_every = 1;
  Mode mode = Mode::kReal;
  // Applied to the state after power-up.
  CpuRegs regs{};
  CpuSpecialRegs sregs{};
  CpuDebugRegs debug{};
  std::vector<CpuMsr> msrs{};
  std::uint64_t xcr0 = 7;
  bool halted = false;
  std::uint8_t shadow = 0;
  std::vector<MemoryWrite> memory{};
  std::vector<Action> actions{};
  std::vector<std::uint8_t> answers{};
};

// Reads the whole input.
[[nodiscard]] Program make_program(Input input);

// Addresses that are worth trying, linear and physical.
[[nodiscard]] std::uint64_t interesting_address(std::uint8_t which);

// Guest code of structured instructions, and stores; until the input ends (soft_guest_code.cpp).
void make_code(Input& input, Mode mode, Program& program);

}  // namespace wisp::fuzz
