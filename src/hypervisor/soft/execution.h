// How the software CPU runs instructions.
#pragma once

#include <cstdint>

namespace wisp::soft {

enum class ExecutorChoice : std::uint8_t {
  kTranslate,  // translated code, and the interpreter for what it leaves out
  kInterpret,
  kCompare,  // both, in step; a difference ends the process with a report
};

struct ExecutionOptions {
  ExecutorChoice executor = ExecutorChoice::kTranslate;
  bool count_instructions = false;  // exactly, for virtual time
};

}  // namespace wisp::soft
