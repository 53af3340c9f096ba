// The processor's state at fixed numbers of instructions, as lines of a file: two runs with a virtual clock
// can be compared by it, those of the two executors above all (scripts/lockstep).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/unique_fd.h"
#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

class StateLog final {
 public:
  // A line for each `every` instructions from `from` on. Errors: the file cannot be made.
  [[nodiscard]] static Result<std::unique_ptr<StateLog>> create(const std::string& path, std::uint64_t every,
                                                                std::uint64_t from);
  // The number of retired instructions at which the next line is due.
  [[nodiscard]] std::uint64_t next() const { return next_; }
  // Writes a line where one is due.
  void look(const Cpu& cpu);

 private:
  StateLog(UniqueFd file, std::uint64_t every, std::uint64_t from)
      : file_(std::move(file)), every_(every), next_(from) {}
  const UniqueFd file_;
  const std::uint64_t every_;
  std::uint64_t next_;
};

}  // namespace wisp::soft
