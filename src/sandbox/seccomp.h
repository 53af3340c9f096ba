// System-call filters (seccomp, filter mode) as data: one list per thread kind.
//
// A filter is installed by the thread it holds, once, when the thread has everything it needs to start. A
// call that is not listed ends the whole process (SECCOMP_RET_KILL_PROCESS), after which the kernel's audit
// log names it.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "base/error.h"

namespace wisp {

enum class ThreadKind : std::uint8_t {
  kMain,    // main event loop: control and devices
  kVcpu,    // guest entry and register accesses
  kIo,      // an iothread's event loop
  kWorker,  // blocking file I/O for aio=threads
  kEngine,  // timers and eventfds of the software CPU
};

// A call, and what its arguments may be: where `argument` is not kAny, that argument masked with `mask` must
// equal one of the `values`.
struct SyscallRule {
  static constexpr int kAny = -1;
  int number = 0;
  int argument = kAny;
  std::uint64_t mask = ~0ULL;
  std::span<const std::uint64_t> values = {};
};

// What a thread kind may call.
[[nodiscard]] std::span<const SyscallRule> seccomp_rules(ThreadKind kind);
[[nodiscard]] std::string_view thread_kind_name(ThreadKind kind);

enum class SeccompViolation : std::uint8_t {
  kKill,   // end the process
  kErrno,  // fail the call with EPERM: for tests
};

// Sets no_new_privs for the calling thread and those that it starts later: no program that one of them
// executes gets rights by set-user-id bits or file capabilities.
[[nodiscard]] Result<void> forbid_new_privileges();

// Sets no_new_privs and installs the filter for the calling thread. Threads that it starts later inherit the
// filter and may install their own on top: a call must then be allowed by both.
[[nodiscard]] Result<void> install_seccomp(ThreadKind kind,
                                           SeccompViolation violation = SeccompViolation::kKill);

}  // namespace wisp
