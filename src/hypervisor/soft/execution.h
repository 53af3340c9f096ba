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
};

}  // namespace wisp::soft
