// Which engine a machine runs on, and whether this host's is fit for it.
#pragma once

#include <functional>
#include <memory>

#include "base/clock.h"
#include "base/error.h"
#include "hypervisor/hypervisor.h"
#include "machine/config.h"

namespace wisp {

struct EngineChoice {
  std::unique_ptr<Hypervisor> engine;
  // See MachineServices::judge_engine.
  std::function<Result<void>(Vm&, Vcpu&)> judge;
};

// Errors say what this host lacks and what to do. The clock must outlive the choice.
[[nodiscard]] Result<EngineChoice> choose_engine(Accel accel, const Clock& clock);

}  // namespace wisp
