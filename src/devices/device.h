// The base of the machine's simple devices: registers behind port I/O or MMIO.
#pragma once

#include <string_view>

#include "base/error.h"
#include "base/state.h"
#include "memory/io_handler.h"

namespace wisp {

// Register accesses come from vCPU threads, the rest from control threads while vCPUs may run: each device
// takes its own lock. A device is reset to its power-up state by reset(), and load() of what save() gave
// restores it exactly, interrupts that it holds up included.
class Device : public IoHandler {
 public:
  // The name its state is kept under.
  [[nodiscard]] virtual std::string_view name() const = 0;
  virtual void reset() = 0;
  [[nodiscard]] virtual StateRecord save() const = 0;
  [[nodiscard]] virtual Result<void> load(const StateRecord& record) = 0;
};

}  // namespace wisp
