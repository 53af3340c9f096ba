#include "sandbox/seccomp.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <functional>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace wisp {
namespace {

constexpr std::array kKinds = {ThreadKind::kMain, ThreadKind::kVcpu, ThreadKind::kIo, ThreadKind::kWorker,
                               ThreadKind::kEngine};

// Runs `body` in a child; returns its wait status.
template <typename Body>
int in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(body());
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status;
}

TEST(Seccomp, AnUnlistedCallEndsTheProcess) {
  for (const ThreadKind kind : kKinds) {
    const int status = in_child([kind] {
      if (!install_seccomp(kind)) {
        return 1;
      }
      ::syscall(SYS_mount, "a", "b", "c", 0, nullptr);
      return 0;
    });
    ASSERT_TRUE(WIFSIGNALED(status)) << thread_kind_name(kind) << " status " << status;
    EXPECT_EQ(WTERMSIG(status), SIGSYS);
  }
}

// By number for the x32 ABI, and by the 32-bit ABI's gate: a call that each kind lists in its own ABI. From a
// thread, which must not be all that ends.
TEST(Seccomp, CallsByAnotherAbiEndTheProcess) {
  const auto x32 = [] { ::syscall(0x40000000 | SYS_getpid); };
  const auto gate = [] {
    long number = 20;  // getpid there
    asm volatile("int $0x80" : "+a"(number) : : "memory", "r8", "r9", "r10", "r11");
  };
  std::vector<std::function<void()>> calls{x32};
  // A kernel may have no such gate.
  if (WIFEXITED(in_child([&] {
        gate();
        return 0;
      }))) {
    calls.emplace_back(gate);
  }
  for (const ThreadKind kind : kKinds) {
    for (const std::function<void()>& call : calls) {
      const int status = in_child([kind, &call] {
        std::thread([kind, &call] {
          if (install_seccomp(kind)) {
            call();
          }
        }).join();
        return 0;
      });
      ASSERT_TRUE(WIFSIGNALED(status)) << thread_kind_name(kind) << " status " << status;
      EXPECT_EQ(WTERMSIG(status), SIGSYS);
    }
  }
}

TEST(Seccomp, ListedCallsWork) {
  for (const ThreadKind kind : kKinds) {
    const int status = in_child([kind] {
      if (!install_seccomp(kind)) {
        return 1;
      }
      void* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      return page != MAP_FAILED && ::munmap(page, 4096) == 0 && ::syscall(SYS_gettid) > 0 ? 0 : 2;
    });
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
        << thread_kind_name(kind) << " status " << status;
  }
}

TEST(Seccomp, ArgumentsAreJudged) {
  const int status = in_child([] {
    if (!install_seccomp(ThreadKind::kIo, SeccompViolation::kErrno)) {
      return 1;
    }
    if (::mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED ||
        errno != EPERM) {
      return 2;
    }
    if (::socket(AF_INET, SOCK_STREAM, 0) >= 0 || errno != EPERM) {
      return 3;
    }
    return ::socket(AF_UNIX, SOCK_STREAM, 0) >= 0 ? 0 : 4;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(Seccomp, NoThreadMayStartPrograms) {
  for (const ThreadKind kind : kKinds) {
    for (const SyscallRule& rule : seccomp_rules(kind)) {
      for (const int never :
           {SYS_execve, SYS_execveat, SYS_ptrace, SYS_process_vm_writev, SYS_mount, SYS_setns, SYS_unshare,
            SYS_init_module, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd}) {
        EXPECT_NE(rule.number, never) << thread_kind_name(kind);
      }
    }
  }
}

TEST(Seccomp, NoRuleStandsTwice) {
  for (const ThreadKind kind : kKinds) {
    std::set<std::pair<int, int>> seen;
    for (const SyscallRule& rule : seccomp_rules(kind)) {
      EXPECT_TRUE(seen.emplace(rule.number, rule.argument).second)
          << thread_kind_name(kind) << " lists call " << rule.number << " twice";
    }
  }
}

}  // namespace
}  // namespace wisp
