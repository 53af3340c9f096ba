// A hostile guest in ring 0 of the software CPU: nothing outside its memory is touched, it always stops when
// it is told to, and both executors make the same of it.
//
// One byte of the input decides what is done. Differential: one vCPU whose time is counted in instructions
// runs under the interpreter and under the translator; they are compared at every exit and at equal numbers
// of instructions. Else: one or two vCPUs run under either, with the host's time, and are kicked.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>

#include "hypervisor/soft/xsave_area.h"
#include "soft_guest_machine.h"
#include "soft_guest_program.h"
#include "soft_guest_traps.h"

namespace wisp::fuzz {
namespace {

constexpr int kMostExits = 300;
constexpr std::uint64_t kMostPauses = 40;
constexpr int kMostIdle = 8;
constexpr int kRounds = 4;
constexpr std::chrono::microseconds kRound{400};
constexpr std::chrono::seconds kPatience{60};      // the host may be busy
constexpr std::uint64_t kMostCpuNs = 300'000'000;  // of a comparison, beside its other limits

constexpr std::size_t kInterrupted = 0;

bool ends(const Machine::Step& step) {
  const Exit shutdown{ShutdownExit{}};
  const Exit error{EngineErrorExit{}};
  return step.kind == shutdown.index() || step.kind == error.index();
}

// Threads that work for a run, and whether they came to their end.
class Workers final {
 public:
  template <typename Work>
  void start(Work work) {
    {
      const std::lock_guard lock(mutex_);
      ++running_;
    }
    threads_.emplace_back([this, work = std::move(work)] {
      work();
      const std::lock_guard lock(mutex_);
      --running_;
      done_.notify_all();
    });
  }
  // Whether all ended within the time.
  template <typename Duration>
  [[nodiscard]] bool wait(Duration time) {
    std::unique_lock lock(mutex_);
    return done_.wait_for(lock, time, [this] { return running_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  int running_ = 0;
  std::vector<std::jthread> threads_;
};

std::uint64_t thread_cpu_ns() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(time.tv_nsec);
}

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// --- one or two vCPUs, kicked

void run_kicked(const Program& program) {
  Machine machine(program, program.interpreter);
  if (!machine.start()) {
    return;
  }
  const bool parallel = program.parallel && machine.vcpu_count() == 2;
  std::atomic<bool> stop = false;
  Workers workers;
  const auto run = [&](std::size_t first, std::size_t count) {
    std::array<bool, 2> ended{};
    for (int exits = 0; exits < kMostExits && !stop.load(); ++exits) {
      const std::size_t vcpu = first + static_cast<std::size_t>(exits) % count;
      if (ended.at(vcpu)) {
        continue;
      }
      const Machine::Step step = machine.step(vcpu);
      ended.at(vcpu) = ends(step);
      if (!parallel && (step.kind == kInterrupted || exits % 8 == 7)) {
        machine.act(false);
      }
    }
  };
  if (parallel) {
    workers.start([&] { run(0, 1); });
    workers.start([&] { run(1, 1); });
  } else {
    workers.start([&] { run(0, machine.vcpu_count()); });
  }
  const auto kick = [&machine] {
    for (std::size_t i = 0; i < machine.vcpu_count(); ++i) {
      machine.kick(i);
    }
  };
  for (int round = 0; round < kRounds && !workers.wait(kRound); ++round) {
    if (parallel) {
      machine.act(true);
      machine.act(true);
    }
    kick();
  }
  stop = true;
  kick();
  if (!workers.wait(kPatience)) {
    give_up("a vCPU does not stop when it is kicked");
  }
}

// --- two executors, in step

// What is in an XSAVE area but not the guest's to see: where x87's last instruction and operand were (the
// host's own), the host's MXCSR_MASK, and whether a component in its initial state is said to be so.
void settle(std::vector<std::uint8_t>& area) {
  const std::uint8_t present = area.at(xsave::kHeader);
  const auto clear = [&area](std::size_t from, std::size_t end) {
    std::fill(area.begin() + static_cast<std::ptrdiff_t>(from),
              area.begin() + static_cast<std::ptrdiff_t>(end), std::uint8_t{0});
  };
  clear(xsave::kOpcode, xsave::kMxcsr);
  clear(xsave::kMxcsrMask, xsave::kStack);
  if ((present & xsave::kX87) == 0) {
    clear(xsave::kControl, xsave::kMxcsr);
    clear(xsave::kStack, xsave::kStackEnd);
    area[xsave::kControl] = xsave::kControlInit & 0xff;
    area[xsave::kControl + 1] = xsave::kControlInit >> 8;
  }
  if ((present & xsave::kSse) == 0) {
    clear(xsave::kXmm, xsave::kXmmEnd);
  }
  if ((present & xsave::kAvx) == 0) {
    clear(xsave::kYmm, area.size());
  }
  area[xsave::kHeader] = 0;
}

std::optional<std::string> difference(CpuState a, CpuState b) {
  settle(a.xsave);
  settle(b.xsave);
  if (a.regs != b.regs) {
    return "registers";
  }
  if (a.sregs != b.sregs) {
    return "system registers";
  }
  if (a.debug != b.debug) {
    return "debug registers";
  }
  if (a.xsave != b.xsave) {
    const auto at = std::ranges::mismatch(a.xsave, b.xsave).in1 - a.xsave.begin();
    return "extended state at " + std::to_string(at);
  }
  if (a.xcr0 != b.xcr0) {
    return "XCR0";
  }
  if (a.msrs != b.msrs) {
    return "MSRs";
  }
  if (a.lapic.regs != b.lapic.regs) {
    return "local APIC";
  }
  if (a.run_state != b.run_state || a.events.interrupt.shadow != b.events.interrupt.shadow ||
      a.events.nmi.masked != b.events.nmi.masked || a.events.nmi.pending != b.events.nmi.pending) {
    return "events";
  }
  return std::nullopt;
}

std::optional<std::string> memory_difference(const Machine& a, const Machine& b) {
  const auto mine = a.blocks();
  const auto others = b.blocks();
  for (std::size_t i = 0; i < mine.size(); ++i) {
    const std::uint8_t* one = mine[i]->data();
    const std::uint8_t* other = others[i]->data();
    if (std::memcmp(one, other, mine[i]->size()) == 0) {
      continue;
    }
    for (std::size_t at = 0; at < mine[i]->size(); ++at) {
      // An instruction that faults may have looked further before, or not.
      const std::uint8_t looked = i == 0 && a.in_tables(at) ? 0x60 : 0;
      if (((one[at] ^ other[at]) & ~looked) != 0) {
        return "memory block " + std::to_string(i) + " at offset " + std::to_string(at);
      }
    }
  }
  return std::nullopt;
}

// For whoever looks into a finding: WISP_FUZZ_TRACE=N compares after each N instructions and tells of it.
std::uint64_t traced() {
  static const char* const kText = std::getenv("WISP_FUZZ_TRACE");
  return kText == nullptr ? 0 : std::max(1ULL, std::strtoull(kText, nullptr, 10));
}

void tell(const char* who, const Machine::Step& step, const CpuState& state) {
  const CpuRegs& regs = state.regs;
  const CpuSpecialRegs& sregs = state.sregs;
  const auto out = [](const char* name, std::uint64_t value) {
    std::fprintf(stderr, " %s %llx", name, static_cast<unsigned long long>(value));
  };
  std::fprintf(stderr, "%s: exit %zu at %llx;", who, step.kind,
               static_cast<unsigned long long>(step.address));
  out("rip", regs.rip);
  out("rflags", regs.rflags);
  out("rax", regs.rax);
  out("rcx", regs.rcx);
  out("rdx", regs.rdx);
  out("rbx", regs.rbx);
  out("rsp", regs.rsp);
  out("rbp", regs.rbp);
  out("rsi", regs.rsi);
  out("rdi", regs.rdi);
  out("r8", regs.r8);
  out("r15", regs.r15);
  out("cr0", sregs.cr0);
  out("cr2", sregs.cr2);
  out("cr3", sregs.cr3);
  out("cr4", sregs.cr4);
  out("efer", sregs.efer);
  out("cs", sregs.cs.selector);
  out("tsc", state.msrs.empty() ? 0 : state.msrs.front().value);
  out("dr6", state.debug.dr6);
  std::uint32_t mxcsr = 0;
  std::memcpy(&mxcsr, state.xsave.data() + xsave::kMxcsr, sizeof mxcsr);
  out("mxcsr", mxcsr);
  std::fprintf(stderr, "\n");
}

// Where the executors part.
struct Parting {
  std::string what{};
  Machine::Step steps[2]{};
  CpuState states[2]{};
  bool settled = false;  // the states are known
};

class Comparison final {
 public:
  // `apart`: instructions from one action to the next, where the program pauses more often than that.
  Comparison(const Program& program, std::uint64_t apart)
      : pauses_for_action_(std::max<std::uint64_t>(1, apart / program.pause_every)),
        interpreted_(program, true),
        translated_(program, false) {}

  std::optional<Parting> run() {
    if (!interpreted_.start()) {
      return std::nullopt;
    }
    if (!translated_.start()) {
      return Parting{.what = "only one of the executors takes the state"};
    }
    std::uint64_t pauses = 0;
    int idle = 0;
    for (int exits = 0; exits < kMostExits * static_cast<int>(pauses_for_action_); ++exits) {
      Parting now{.steps = {interpreted_.step(0), translated_.step(0)}};
      const bool end = ends(now.steps[0]);
      const bool last = end || (thread_cpu_ns() > kMostCpuNs && traced() == 0) ||
                        pauses + 1 == kMostPauses * pauses_for_action_ || idle == kMostIdle;
      compare(now, last || pauses % 8 == 7);
      if (!now.what.empty()) {
        // What the TLBs hold of tables that changed need not be the same.
        const bool changed = interpreted_.tables_changed() || translated_.tables_changed();
        return changed ? std::nullopt : std::optional(std::move(now));
      }
      if (last) {
        break;
      }
      if (now.steps[0].kind == kInterrupted) {
        ++pauses;
        idle = now.states[0].run_state == CpuRunState::kHalted ? idle + 1 : 0;
        if (traced() != 0) {
          tell("both", now.steps[0], now.states[0]);
        }
        if (pauses % pauses_for_action_ == 0) {
          interpreted_.act(false);
          translated_.act(false);
        }
      }
    }
    return std::nullopt;
  }

 private:
  void compare(Parting& now, bool with_memory) {
    now.settled = now.steps[0].kind == kInterrupted && now.steps[1].kind == kInterrupted;
    if (now.settled) {
      now.states[0] = interpreted_.state();
      now.states[1] = translated_.state();
    }
    if (now.steps[0] != now.steps[1]) {
      now.what = "exits";
    } else if (now.settled) {
      now.what = difference(now.states[0], now.states[1]).value_or("");
    }
    // Costs most.
    if (now.what.empty() && with_memory && (now.settled || ends(now.steps[0]))) {
      now.what = memory_difference(interpreted_, translated_).value_or("");
    }
  }

  const std::uint64_t pauses_for_action_;
  Machine interpreted_;
  Machine translated_;
};

void run_differential(const Program& program) {
  Program first = program;
  first.pause_every = traced() != 0 ? traced() : program.pause_every;
  std::optional<Parting> parting = Comparison(first, program.pause_every).run();
  if (!parting) {
    return;
  }
  // Once more in the smallest steps, which may tell more.
  Program closer = program;
  closer.pause_every = 1;
  if (auto exact = Comparison(closer, program.pause_every).run()) {
    parting = std::move(exact);
  }
  std::fprintf(stderr, "the executors part: %s\n", parting->what.c_str());
  if (parting->settled) {
    tell("interpreter", parting->steps[0], parting->states[0]);
    tell("translator", parting->steps[1], parting->states[1]);
  } else {
    for (const Machine::Step& step : parting->steps) {
      std::fprintf(stderr, "exit %zu at %llx\n", step.kind, static_cast<unsigned long long>(step.address));
    }
  }
  std::abort();
}

}  // namespace
}  // namespace wisp::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace wisp::fuzz;
  static const Canaries& canaries = *new Canaries;
  static const bool kWatched = (watch_page_faults(), true);
  (void)kWatched;
  if (size < 16) {
    return -1;
  }
  const Program program = make_program(Input(data, size));
  if (program.differential) {
    Workers workers;
    workers.start([&program] { run_differential(program); });
    if (!workers.wait(kPatience)) {
      give_up("a vCPU does not come to its pause");
    }
  } else {
    run_kicked(program);
  }
  canaries.check();
  return 0;
}
