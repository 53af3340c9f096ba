#include "soft_guest_traps.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "soft_guest_machine.h"

namespace wisp::fuzz {
namespace {

constexpr std::size_t kGuard = 16U << 20;
constexpr std::size_t kCanary = 128U << 10;
constexpr int kPageFaultTrap = 14;

std::uint8_t* map(std::size_t size, int protection) {
  void* memory = ::mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::abort();
  }
  return static_cast<std::uint8_t*>(memory);
}

const std::vector<std::uint8_t>& pattern() {
  static const std::vector<std::uint8_t> kBytes = [] {
    std::vector<std::uint8_t> bytes(kCanary);
    std::uint32_t value = 1;
    for (std::uint8_t& byte : bytes) {
      value = value * 1664525 + 1013904223;
      byte = static_cast<std::uint8_t>(value >> 24);
    }
    return bytes;
  }();
  return kBytes;
}

// The handlers of the sanitizer and of the engine.
struct sigaction sanitizer_handler{};
struct sigaction engine_handler{};

void on_fault(int signal, siginfo_t* info, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto rip = registers[REG_RIP];
  if (registers[REG_TRAPNO] != kPageFaultTrap) {
    engine_handler.sa_sigaction(signal, info, context);
    if (registers[REG_RIP] != rip) {
      return;  // the guest's exception
    }
  } else {
    std::fprintf(stderr, "page fault at %p by code at %#llx\n", info->si_addr,
                 static_cast<unsigned long long>(rip));
  }
  if ((sanitizer_handler.sa_flags & SA_SIGINFO) != 0) {
    sanitizer_handler.sa_sigaction(signal, info, context);
  }
  std::abort();
}

}  // namespace

GuardedBlock::GuardedBlock(std::size_t size)
    : size_(size), data_(map(size + 2 * kGuard, PROT_NONE) + kGuard) {
  if (::mprotect(data_, size_, PROT_READ | PROT_WRITE) != 0) {
    std::abort();
  }
}
GuardedBlock::~GuardedBlock() {
  ::munmap(data_ - kGuard, size_ + 2 * kGuard);
}
void GuardedBlock::clear() {
  if (::madvise(data_, size_, MADV_DONTNEED) != 0) {
    std::abort();
  }
}

Canaries::Canaries() {
  for (int i = 0; i < 4; ++i) {
    std::uint8_t* block = map(kCanary + 2 * kGuard, PROT_READ | PROT_WRITE) + kGuard;
    std::memcpy(block, pattern().data(), kCanary);
    blocks_.push_back(block);
  }
}

void Canaries::check() const {
  for (const std::uint8_t* block : blocks_) {
    if (std::memcmp(block, pattern().data(), kCanary) != 0) {
      std::fprintf(stderr, "memory that belongs to nobody was written\n");
      std::abort();
    }
  }
}

void watch_page_faults() {
  ::sigaction(SIGSEGV, nullptr, &sanitizer_handler);
  {
    const Machine machine(Program{}, true);
  }  // the engine's handlers come with its first processor
  ::sigaction(SIGSEGV, nullptr, &engine_handler);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  ::sigemptyset(&action.sa_mask);
  if (::sigaction(SIGSEGV, &action, nullptr) != 0) {
    std::abort();
  }
}

}  // namespace wisp::fuzz
