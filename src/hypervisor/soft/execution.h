// How the software CPU runs instructions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace wisp::soft {

enum class ExecutorChoice : std::uint8_t {
  kTranslate,  // translated code, and the interpreter for what it leaves out
  kInterpret,
};

struct ExecutionOptions {
  ExecutorChoice executor = ExecutorChoice::kTranslate;
  // The machine's time-stamp counter is what RDTSC gives on this host.
  bool native_tsc = false;
  // Time is counted in instructions (VirtualClock), and random numbers come from `seed`.
  bool virtual_clock = false;
  std::uint64_t seed = 1;
  // With a virtual clock: a file for the processor's state each so many instructions (StateLog); empty: none.
  std::string state_log = {};
  std::uint64_t state_log_every = 1'000'000;
  std::uint64_t state_log_from = 0;
  // What translated code compares with; empty: what this host's processor is quicker at
  // (HostFeatures::quick_loop).
  std::optional<bool> quick_loop = {};
  // With a virtual clock: Vcpu::run() returns InterruptedExit each so many instructions, and after each idle
  // time, for whoever compares two runs; 0: it does not.
  std::uint64_t pause_every = 0;
  // Say at the end of the VM what the executors did.
  bool statistics = false;
};

}  // namespace wisp::soft
