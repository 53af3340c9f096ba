#include "hypervisor/soft/host_faults.h"

#include <ucontext.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <csignal>
#include <mutex>
#include <utility>

namespace wisp::soft {
namespace {

// A signal handler can know only what is static: the ranges of generated code.
struct Range {
  std::atomic<std::uint64_t> start = 0;
  std::atomic<std::uint64_t> end = 0;
  std::atomic<std::uint64_t> leave = 0;
  std::atomic<bool> used = false;
};
constexpr std::size_t kMaxRanges = 1024;
constinit std::array<Range, kMaxRanges> ranges;  // NOLINT(cppcoreguidelines-avoid-non-const-global-variables)
constexpr std::array kSignals{SIGFPE, SIGSEGV, SIGBUS, SIGILL};
// What was done with each before; written once, before the handler is there.
// NOLINTNEXTLINE(cppcoreguidelines-avoid-non-const-global-variables)
constinit std::array<struct sigaction, kSignals.size()> former{};

constexpr int kPageFaultTrap = 14;

void on_fault(int signal, siginfo_t* info, void* context) {
  auto* state = static_cast<ucontext_t*>(context);
  auto& registers = state->uc_mcontext.gregs;
  const auto rip = static_cast<std::uint64_t>(registers[REG_RIP]);
  const bool sent = info->si_code <= 0;  // by a process: no instruction raised it, and none brings it again
  if (!sent && registers[REG_TRAPNO] != kPageFaultTrap && signal != SIGBUS) {
    for (const Range& range : ranges) {
      if (rip >= range.start.load(std::memory_order_relaxed) &&
          rip < range.end.load(std::memory_order_relaxed)) {
        auto* cpu = reinterpret_cast<Cpu*>(registers[REG_RSP]);  // NOLINT(performance-no-int-to-ptr)
        cpu->scratch[2] = rip;
        const auto trap = static_cast<std::uint64_t>(registers[REG_TRAPNO]);
        registers[REG_R14] = std::bit_cast<greg_t>(kHostFault + trap);
        registers[REG_RIP] = static_cast<greg_t>(range.leave.load(std::memory_order_relaxed));
        return;
      }
    }
  }
  // Not ours: what was done before is done when the instruction runs again.
  for (std::size_t i = 0; i < kSignals.size(); ++i) {
    if (kSignals[i] == signal) {
      ::sigaction(signal, &former[i], nullptr);
    }
  }
  if (sent) {
    (void)::raise(signal);
  }
}

bool install() {
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  ::sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < kSignals.size(); ++i) {
    if (::sigaction(kSignals[i], nullptr, &former[i]) != 0 ||
        ::sigaction(kSignals[i], &action, nullptr) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

Result<HostFaultGuard> HostFaultGuard::create(const CodeMemory& memory, const Trampolines& trampolines) {
  static const bool kInstalled = install();
  if (!kInstalled) {
    return fail_errno(errno, "cannot handle the processor's exceptions in generated code");
  }
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    Range& range = ranges[i];
    if (!range.used.exchange(true)) {
      range.leave = reinterpret_cast<std::uint64_t>(trampolines.leave);
      range.start = reinterpret_cast<std::uint64_t>(memory.executable());
      range.end = reinterpret_cast<std::uint64_t>(memory.executable()) + memory.size();
      return HostFaultGuard(static_cast<int>(i));
    }
  }
  return fail("more than {} processors with generated code in one process", kMaxRanges);
}

HostFaultGuard::HostFaultGuard(HostFaultGuard&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}

HostFaultGuard::~HostFaultGuard() {
  if (slot_ >= 0) {
    Range& range = ranges[static_cast<std::size_t>(slot_)];
    range.end = 0;
    range.start = 0;
    range.used = false;
  }
}

}  // namespace wisp::soft
