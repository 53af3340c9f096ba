// Which engine a machine runs on, and whether this host's is fit for it.
#pragma once

#include <functional>
#include <memory>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "hypervisor/hypervisor.h"
#include "machine/config.h"
#include "memory/guest_memory.h"

namespace wisp {

struct EngineChoice {
  std::unique_ptr<Hypervisor> engine;
  // See MachineServices: the same names.
  std::function<Result<void>(Vcpu&, const GuestMemory&)> judge_engine;
  std::function<Result<std::unique_ptr<Hypervisor>>(const Error& why)> other_engine;
};

// What the engines need; all of it outlives the choice.
struct EngineServices {
  const Clock& clock;
  Log& log;
  bool seccomp = true;  // filter the system calls of an engine's own threads
};

// Takes what the configuration names; for kAuto KVM where the host has it and its processor can run guests,
// else the software CPU, and says in one line of the log which and why. Errors say what this host lacks and
// what to do.
[[nodiscard]] Result<EngineChoice> choose_engine(const MachineConfig& config, const EngineServices& services);

// Whether this host's processor shows that it can run guests (VMX or SVM in CPUID). A /dev/kvm without it
// interprets guests' kernels, slower than the software CPU and not completely.
[[nodiscard]] bool processor_runs_guests();

}  // namespace wisp
