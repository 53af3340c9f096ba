// The translator: blocks of guest instructions as host code.
#pragma once

#include <cstdint>
#include <memory>

#include "base/error.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/physical_memory.h"

namespace wisp::soft {

class SharedCode;
class Stepper;

// The translations of one VM, shared by its processors. Thread-safe.
class Translator {
 public:
  // Whether this host's processor has what translated code needs (BMI2).
  [[nodiscard]] static bool possible();
  [[nodiscard]] static Result<std::unique_ptr<Translator>> create(PhysicalMemory& memory, SharedCode& shared);
  virtual ~Translator() = default;
  // Code in [gpa, gpa + size) was written: its translations are gone when this returns.
  virtual void code_written(std::uint64_t gpa, std::uint32_t size) = 0;
};

// Runs translated code on one processor.
class TranslatedRunner final {
 public:
  TranslatedRunner(Core core, SharedCode& shared, Stepper& stepper);
  ~TranslatedRunner();
  // Whether the processor is in a state that translated code can run in.
  [[nodiscard]] bool ready() const;
  // Runs until something happened that the caller must see to.
  [[nodiscard]] Outcome run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace wisp::soft
