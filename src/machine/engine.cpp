#include "machine/engine.h"

#include <cpuid.h>

#include "hypervisor/kvm/kvm_hypervisor.h"
#include "hypervisor/kvm/kvm_probe.h"
#include "hypervisor/soft/soft_hypervisor.h"
#include "sandbox/seccomp.h"

namespace wisp {
namespace {

Result<std::unique_ptr<Hypervisor>> open_soft(const soft::ExecutionOptions& execution,
                                              const EngineServices& services) {
  Log* log = &services.log;
  SoftOptions options{.execution = execution,
                      .note = [log](const std::string& text) { log->warning("{}", text); }};
  if (services.seccomp) {
    options.thread_started = [] { return install_seccomp(ThreadKind::kEngine); };
  }
  return SoftHypervisor::open(std::move(options));
}

// On a VM that is needed anyway: ending one takes the kernel long.
Result<void> judge_kvm(Vcpu& vcpu, const GuestMemory& memory, const Clock& clock) {
  const EngineReport report = describe(probe_ring0(vcpu, memory, clock));
  if (!report.usable) {
    return fail("/dev/kvm: {}; {}", report.summary, report.advice);
  }
  return {};
}

Result<EngineChoice> choose_kvm(bool probe, const EngineServices& services) {
  auto kvm = KvmHypervisor::open();
  if (!kvm) {
    return fail("{}; or run on the software CPU: -accel soft", kvm.error().message);
  }
  EngineChoice choice;
  choice.engine = *std::move(kvm);
  if (!probe) {
    return choice;
  }
  choice.judge_engine = [clock = &services.clock](Vcpu& vcpu, const GuestMemory& memory) -> Result<void> {
    if (auto verdict = judge_kvm(vcpu, memory, *clock); !verdict) {
      return fail("{}; or run on the software CPU: -accel soft", verdict.error().message);
    }
    return {};
  };
  return choice;
}

Result<EngineChoice> choose_soft(const soft::ExecutionOptions& execution, const EngineServices& services) {
  EngineChoice choice;
  WISP_ASSIGN(choice.engine, open_soft(execution, services));
  return choice;
}

Result<EngineChoice> choose_best(const MachineConfig& config, const EngineServices& services) {
  const soft::ExecutionOptions execution = config.execution;
  const auto say = [services](std::string_view why) {
    services.log.warning("-accel auto takes the software CPU: {}", why);
  };
  auto kvm = KvmHypervisor::open();
  if (!kvm) {
    say(kvm.error().message);
    return choose_soft(execution, services);
  }
  if (!processor_runs_guests()) {
    say("/dev/kvm is there, but the processor shows neither VMX nor SVM: it would interpret guest kernels");
    return choose_soft(execution, services);
  }
  EngineChoice choice;
  choice.engine = *std::move(kvm);
  if (!config.probe_kvm) {
    services.log.info("-accel auto takes KVM, unmeasured");
    return choice;
  }
  choice.judge_engine = [services](Vcpu& vcpu, const GuestMemory& memory) -> Result<void> {
    WISP_TRY(judge_kvm(vcpu, memory, services.clock));
    services.log.info("-accel auto takes KVM: it runs guests on the processor");
    return {};
  };
  choice.other_engine = [execution, services, say](const Error& why) -> Result<std::unique_ptr<Hypervisor>> {
    say(why.message);
    return open_soft(execution, services);
  };
  return choice;
}

}  // namespace

bool processor_runs_guests() {
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;
  constexpr std::uint32_t kVmx = 1U << 5;
  constexpr std::uint32_t kSvm = 1U << 2;
  return (__get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kVmx) != 0) ||
         (__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kSvm) != 0);
}

Result<EngineChoice> choose_engine(const MachineConfig& config, const EngineServices& services) {
  switch (config.accel) {
    case Accel::kKvm:
      return choose_kvm(config.probe_kvm, services);
    case Accel::kSoft:
      return choose_soft(config.execution, services);
    case Accel::kAuto:
      break;
  }
  return choose_best(config, services);
}

}  // namespace wisp
