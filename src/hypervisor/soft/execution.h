// How the software CPU runs instructions.
#pragma once

#include <cstdint>

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
  // Say at the end of the VM what the executors did.
  bool statistics = false;
};

}  // namespace wisp::soft
