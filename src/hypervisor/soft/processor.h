// A processor that runs: registers, MMU and the executors that share them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "hypervisor/soft/execution.h"
#include "hypervisor/soft/executor.h"

namespace wisp::soft {

// What the processors of one VM share: the memory that generated code lives in, and the translations.
class SharedCode;
// Both must make every processor but `self` (may be null) do so before it goes on with guest code, and return
// when they all have or are outside of guest code.
struct SharedCodeHooks {
  std::function<void(Cpu* self)> flush_inline;   // drop its in-line TLB and jump entries
  std::function<void(Cpu* self)> revoke_writes;  // drop its in-line write access
  // One turn of a wait for another processor that may be in one of these: does what that asks of `self`.
  // `turns` is 0 at first.
  std::function<void(Cpu* self, std::uint32_t& turns)> wait_a_turn;
};
[[nodiscard]] Result<std::shared_ptr<SharedCode>> make_shared_code(PhysicalMemory& memory,
                                                                   SharedCodeHooks hooks,
                                                                   const ExecutionOptions& options);

class Processor {
 public:
  // What is referred to outlives the processor.
  [[nodiscard]] static Result<std::unique_ptr<Processor>> create(PhysicalMemory& memory, EngineMmio& mmio,
                                                                 Environment& environment,
                                                                 std::shared_ptr<SharedCode> code);
  virtual ~Processor() = default;
  [[nodiscard]] virtual Core& core() = 0;
  [[nodiscard]] Cpu& cpu() { return core().cpu; }

  enum class Stop : std::uint8_t {
    kAttention,  // cpu.run is 0, or an interrupt waits and can be taken now
    kIo,         // cpu.io has something for the machine (a read to answer, writes to tell)
    kHalt,       // HLT was executed; rip is past it
    kShutdown,   // triple fault
  };
  // Runs guest code until one of these. Delivers exceptions, not interrupts: before each call the caller
  // delivers what is due, or, where IF or a shadow forbids it, sets cpu.no_interrupt_waits to 0.
  // An instruction that has answers in cpu.io, or stands in an interrupt shadow, is run whatever cpu.run
  // says: only after it can the caller save the state, or deliver anything.
  [[nodiscard]] virtual Stop run() = 0;
  // What its executors did so far, in one line.
  [[nodiscard]] virtual std::string describe_work() const = 0;
};

}  // namespace wisp::soft
