#include "hypervisor/soft/native_runner.h"

#include <asm/prctl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <new>

namespace wisp::soft {

struct NativeRunner::Shared {
  std::size_t count = 0;
  std::atomic<std::size_t> at = 0;  // the case that runs
  CaseData data{};
  std::array<Case, kMost> cases{};
  std::array<CaseResult, kMost> results{};
};

namespace {

// The child's own. Its signal handler knows only what is static; it must not use thread-local storage or the
// stack protector, since cases come with any registers.
struct Child {
  std::size_t count = 0;
  std::atomic<std::size_t>* at = nullptr;
  const std::uint8_t* data = nullptr;
  const Case* cases = nullptr;
  CaseResult* results = nullptr;
  std::uint8_t* code = nullptr;  // the code pages, writable
  bool running = false;
  std::size_t ticked_at = ~std::size_t{0};
};
constinit Child child;  // NOLINT(cppcoreguidelines-avoid-non-const-global-variables)

constexpr int kBadChild = 77;
constexpr std::size_t kYmmOffset = 576;
constexpr std::array kOrder{REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

#define WISP_BARE __attribute__((no_stack_protector, no_sanitize("address", "undefined", "thread")))

WISP_BARE void copy(std::uint8_t* to, const std::uint8_t* from, std::size_t size) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

WISP_BARE void take_result(CaseResult& result, const ucontext_t& context, bool hang) {
  const auto& registers = context.uc_mcontext.gregs;
  result.end = hang ? CaseResult::End::kHang : CaseResult::End::kException;
  result.vector = static_cast<std::uint8_t>(registers[REG_TRAPNO]);
  result.error = static_cast<std::uint32_t>(registers[REG_ERR]);
  result.cr2 = static_cast<std::uint64_t>(registers[REG_CR2]);
  for (std::size_t i = 0; i < kOrder.size(); ++i) {
    result.gpr[i] = static_cast<std::uint64_t>(registers[kOrder[i]]);
  }
  result.rip = static_cast<std::uint64_t>(registers[REG_RIP]);
  result.rflags = static_cast<std::uint64_t>(registers[REG_EFL]);
  const auto* state = reinterpret_cast<const std::uint8_t*>(context.uc_mcontext.fpregs);
  copy(result.vectors.data(), state, kXsaveSize);
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  copy(result.data.data(), reinterpret_cast<const std::uint8_t*>(kCaseData), kCaseDataSize);
}

// Puts a case's code into place, or INT3 back.
WISP_BARE void place_code(const Case& one, bool in) {
  const std::uint64_t offset = one.rip - kCaseCode;
  for (std::size_t i = 0; i < one.length && offset + i < kCaseCodeSize; ++i) {
    child.code[offset + i] = in ? one.bytes[i] : 0xcc;
  }
}

WISP_BARE void give_case(const Case& one, ucontext_t& context) {
  auto& registers = context.uc_mcontext.gregs;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  copy(reinterpret_cast<std::uint8_t*>(kCaseData), child.data, kCaseDataSize);
  place_code(one, true);
  for (std::size_t i = 0; i < kOrder.size(); ++i) {
    registers[kOrder[i]] = static_cast<greg_t>(one.gpr[i]);
  }
  registers[REG_RIP] = static_cast<greg_t>(one.rip);
  registers[REG_EFL] = static_cast<greg_t>(one.rflags | (one.single_step ? flag::kTf : 0));
  auto* state = reinterpret_cast<std::uint8_t*>(context.uc_mcontext.fpregs);
  copy(state, one.vectors.data(), 416);            // what follows is the kernel's
  copy(state + 512, one.vectors.data() + 512, 1);  // XSTATE_BV: x87, SSE, AVX; the rest stays
  copy(state + kYmmOffset, one.vectors.data() + kYmmOffset, kXsaveSize - kYmmOffset);
}

extern "C" WISP_BARE void wisp_case_signal(int signal, siginfo_t* /*info*/, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  std::size_t at = child.at->load(std::memory_order_relaxed);
  if (signal == SIGALRM) {
    if (!child.running || child.ticked_at != at) {
      child.ticked_at = at;
      return;
    }
  }
  if (child.running) {
    take_result(child.results[at], context, signal == SIGALRM);
    place_code(child.cases[at], false);
    ++at;
    child.at->store(at, std::memory_order_relaxed);
  }
  if (at == child.count) {
    ::syscall(SYS_exit_group, 0);
  }
  child.running = true;
  give_case(child.cases[at], context);
}

// Before anything else: a case may have left AC, NT or ID set.
extern "C" void wisp_case_entry(int signal, siginfo_t* info, void* context);
asm(R"(
  .globl wisp_case_entry
  .type wisp_case_entry, @function
wisp_case_entry:
  pushfq
  andq $~0x244000, (%rsp)
  popfq
  jmp wisp_case_signal
  .size wisp_case_entry, .-wisp_case_entry
)");

bool map_at(std::uint64_t address, std::size_t size, int protection, int fd) {
  const int flags = MAP_FIXED_NOREPLACE | (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
  void* wanted = reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  return ::mmap(wanted, size, protection, flags | MAP_POPULATE, fd, 0) == wanted;
}

[[noreturn]] void run_child() {
  const rlimit none{0, 0};
  ::setrlimit(RLIMIT_CORE, &none);
  const int fd = ::memfd_create("wisp-case-code", MFD_CLOEXEC);
  void* code = MAP_FAILED;
  if (fd >= 0 && ::ftruncate(fd, kCaseCodeSize) == 0) {
    code = ::mmap(nullptr, kCaseCodeSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (code == MAP_FAILED || !map_at(kCaseCode, kCaseCodeSize, PROT_READ | PROT_EXEC, fd) ||
      !map_at(kCaseData, kCaseDataSize + 0x1000, PROT_READ | PROT_WRITE, -1)) {
    ::_exit(kBadChild);
  }
  child.code = static_cast<std::uint8_t*>(code);
  std::memset(code, 0xcc, kCaseCodeSize);
  void* read_only = reinterpret_cast<void*>(kCaseReadOnly);  // NOLINT(performance-no-int-to-ptr)
  std::memset(read_only, kCaseReadOnlyByte, 0x1000);
  ::mprotect(read_only, 0x1000, PROT_READ);
  constexpr std::size_t kStack = 256U << 10;
  stack_t stack{};
  stack.ss_sp = std::malloc(kStack);  // NOLINT
  stack.ss_size = kStack;
  struct sigaction action{};
  action.sa_sigaction = wisp_case_entry;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  ::sigfillset(&action.sa_mask);
  bool good = stack.ss_sp != nullptr && ::sigaltstack(&stack, nullptr) == 0 &&
              ::syscall(SYS_arch_prctl, ARCH_SET_GS, kCaseGsBase) == 0;
  for (const int signal : {SIGTRAP, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGALRM}) {
    good = good && ::sigaction(signal, &action, nullptr) == 0;
  }
  const itimerval tick{{0, 100000}, {0, 100000}};
  if (!good || ::setitimer(ITIMER_REAL, &tick, nullptr) != 0) {
    ::_exit(kBadChild);
  }
  asm volatile("int3" : : : "memory");
  ::_exit(kBadChild);
}

}  // namespace

std::uint64_t NativeRunner::fs_base() {
  std::uint64_t base = 0;
  ::syscall(SYS_arch_prctl, ARCH_GET_FS, &base);
  return base;
}

NativeRunner::NativeRunner() {
  void* memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::abort();
  }
  shared_ = new (memory) Shared;
}

NativeRunner::~NativeRunner() {
  ::munmap(shared_, sizeof(Shared));
}

const CaseResult& NativeRunner::result(std::size_t i) const {
  return shared_->results[i];
}

bool NativeRunner::takes_any_stack_pointer() {
  Case one;
  // Long enough that an interrupt of the host's timer falls into it: going back from one is where they
  // differ.
  static constexpr std::array<std::uint8_t, 4> kCountDown{0xff, 0xc9, 0x75, 0xfc};
  std::ranges::copy(kCountDown, one.bytes.begin());
  one.length = kCountDown.size();
  one.rip = kCaseCode;
  one.gpr[kRcx] = 50'000'000;
  one.gpr[kRsp] = 0x123456789abcdef0;
  one.rflags = flag::kFixed | flag::kIf;
  one.vectors[512] = 7;
  one.vectors[25] = 0x1f;
  return run(std::span(&one, 1), CaseData{}).empty() && result(0).vector == vec::kBp;
}

std::string NativeRunner::run(std::span<const Case> cases, const CaseData& data) {
  shared_->count = std::min(cases.size(), kMost);
  shared_->at = 0;
  shared_->data = data;
  for (std::size_t i = 0; i < shared_->count; ++i) {
    shared_->cases[i] = cases[i];
    shared_->results[i].end = CaseResult::End::kNone;
  }
  const pid_t pid = ::fork();
  if (pid == 0) {
    child.count = shared_->count;
    child.at = &shared_->at;
    child.data = shared_->data.data();
    child.cases = shared_->cases.data();
    child.results = shared_->results.data();
    run_child();
  }
  int status = 0;
  if (pid < 0 || ::waitpid(pid, &status, 0) != pid) {
    return "cannot start a child process";
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
    return "";
  }
  return fmt::format("the child ended with status {:#x} in case {} of {}", status, shared_->at.load(),
                     shared_->count);
}

}  // namespace wisp::soft
