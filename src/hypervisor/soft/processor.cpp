#include "hypervisor/soft/processor.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <cerrno>
#include <new>

#include "hypervisor/soft/shared_code.h"
#include "hypervisor/soft/stepper.h"
#include "hypervisor/soft/translator.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kDr6SingleStep = 1U << 14;
constexpr std::size_t kGuard = 4096;
constexpr std::size_t kStack =
    64U << 10;  // of generated code and of signal handlers in it: right below the Cpu

// Others trap by the TF they began with. These by the one they end with, or a user's TF would stop the kernel
// before its first instruction (Xen's advisory XSA-204 tells of hypervisors that had it otherwise).
bool traps_by_new_flag(Op op) {
  return op == Op::kSyscall || op == Op::kSysret;
}

// A Cpu with the stack that generated code uses below it.
class Frame final {
 public:
  static Result<Frame> create() {
    constexpr std::size_t kSize = kGuard + kStack + sizeof(Cpu);
    void* memory = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      return fail_errno(errno, "cannot map {} bytes for a software processor", kSize);
    }
    (void)::mprotect(memory, kGuard, PROT_NONE);
    return Frame(static_cast<std::uint8_t*>(memory));
  }
  Frame(Frame&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)), cpu_(other.cpu_) {}
  Frame& operator=(Frame&&) = delete;
  ~Frame() {
    if (memory_ != nullptr) {
      cpu_->~Cpu();
      ::munmap(memory_, kGuard + kStack + sizeof(Cpu));
    }
  }
  [[nodiscard]] Cpu& cpu() { return *cpu_; }

 private:
  explicit Frame(std::uint8_t* memory) : memory_(memory), cpu_(new(memory + kGuard + kStack) Cpu) {}
  std::uint8_t* memory_;
  Cpu* cpu_;
};

class ProcessorImpl final : public Processor {
 public:
  ProcessorImpl(Frame frame, PhysicalMemory& memory, EngineMmio& mmio, Environment& environment,
                std::shared_ptr<SharedCode> code)
      : frame_(std::move(frame)),
        mmu_(frame_.cpu(), memory, mmio),
        core_{frame_.cpu(), mmu_, memory, environment},
        shared_(std::move(code)) {}

  [[nodiscard]] Result<void> set_up() {
    WISP_ASSIGN(stepper_, Stepper::create(core_, *shared_));
    if (shared_->translator() != nullptr) {
      runner_ = std::make_unique<TranslatedRunner>(core_, *shared_, *stepper_);
    }
    mmu_.flush_all();
    return {};
  }

  Core& core() override { return core_; }
  Stop run() override;
  [[nodiscard]] std::string describe_work() const override;

 private:
  // True where the run ends, with `stop` set. `trap`: bits of DR6, for a #DB behind the instruction.
  bool finish(Outcome outcome, std::uint64_t trap, Stop& stop);
  [[nodiscard]] bool deliver(EventKind kind, std::uint8_t length = 0);
  [[nodiscard]] bool deliver_fault();
  [[nodiscard]] bool instruction_breakpoint();

  Frame frame_;
  Mmu mmu_;
  Core core_;
  std::shared_ptr<SharedCode> shared_;
  std::unique_ptr<Stepper> stepper_;
  std::unique_ptr<TranslatedRunner> runner_;
};

bool ProcessorImpl::deliver(EventKind kind, std::uint8_t length) {
  const Fault fault = core_.cpu.fault;
  return deliver_event(core_, fault, kind, length);
}

bool ProcessorImpl::deliver_fault() {
  // Takes time as an instruction does: where a handler faults before its first one, nothing else would, and
  // no timer that counts instructions would ever get in.
  --core_.cpu.instructions_left;
  return deliver(EventKind::kFault);
}

// DR7's execution breakpoints at rip (SDM volume 3, 17.3.1.1).
bool ProcessorImpl::instruction_breakpoint() {
  Cpu& cpu = core_.cpu;
  if ((cpu.dr7 & 0xff) == 0 || (cpu.other_flags & flag::kRf) != 0) {
    return false;
  }
  const std::uint64_t linear = cpu.code64() ? cpu.rip : (cpu.segments[kCs].base + cpu.rip) & 0xffffffff;
  std::uint64_t hits = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const bool enabled = (cpu.dr7 >> (2 * i) & 3) != 0;
    const bool execution = (cpu.dr7 >> (16 + 4 * i) & 0xf) == 0;
    if (enabled && execution && cpu.dr[i] == linear) {
      hits |= 1ULL << i;
    }
  }
  if (hits == 0) {
    return false;
  }
  cpu.fault = {.vector = vec::kDb, .address = hits};
  return true;
}

bool ProcessorImpl::finish(Outcome outcome, std::uint64_t trap, Stop& stop) {
  Cpu& cpu = core_.cpu;
  switch (outcome) {
    case Outcome::kNext:
    case Outcome::kJump:
      break;
    case Outcome::kFault:
      if (!deliver_fault()) {
        stop = Stop::kShutdown;
        return true;
      }
      return false;
    case Outcome::kTrap: {
      const Op op = stepper_->last().op;
      const bool software = op == Op::kInterrupt || op == Op::kBreakpoint || op == Op::kOverflow;
      if (!deliver(software ? EventKind::kSoftwareInterrupt : EventKind::kTrap, stepper_->last().length)) {
        stop = Stop::kShutdown;
        return true;
      }
      return false;
    }
    case Outcome::kIo:
      stop = Stop::kIo;
      return true;
    case Outcome::kHalt:
      if (trap == 0) {
        stop = Stop::kHalt;
        return true;
      }
      break;  // the trap ends the wait at once
    case Outcome::kShutdown:
      stop = Stop::kShutdown;
      return true;
  }
  if (trap != 0) {
    cpu.fault = {.vector = vec::kDb, .address = trap};
    if (!deliver(EventKind::kTrap)) {
      stop = Stop::kShutdown;
      return true;
    }
  }
  if (cpu.io.write_count != 0) {
    stop = Stop::kIo;
    return true;
  }
  return false;
}

Processor::Stop ProcessorImpl::run() {
  Cpu& cpu = core_.cpu;
  for (;;) {
    const bool unfinished = cpu.io.answer_count != 0 || cpu.interrupt_shadow != 0;
    if (!unfinished && (cpu.run.load(std::memory_order_relaxed) == 0 ||
                        (cpu.no_interrupt_waits == 0 && cpu.interrupt_flag != 0) ||
                        (shared_->options().virtual_clock && cpu.budget_used_up()))) {
      return Stop::kAttention;
    }
    Stop stop = Stop::kAttention;
    if (runner_ && cpu.io.answer_count == 0 && runner_->ready()) {
      const Outcome outcome = runner_->run();
      // Translated code does not run with TF set, so an instruction has just set it, and left for that.
      const bool stepped = (cpu.other_flags & flag::kTf) != 0 && traps_by_new_flag(stepper_->last().op);
      if (finish(outcome, stepped ? kDr6SingleStep : 0, stop)) {
        return stop;
      }
      continue;
    }
    const bool trap_flag = (cpu.other_flags & flag::kTf) != 0;
    if (instruction_breakpoint()) {
      if (!deliver_fault()) {
        return Stop::kShutdown;
      }
      continue;
    }
    const std::uint8_t shadow = cpu.interrupt_shadow;
    const std::uint64_t hits_before = cpu.breakpoint_hits;
    const Outcome outcome = stepper_->step();
    // MOV SS holds a debug trap back with everything else: that of a single step for good, those of
    // breakpoints until behind the next instruction.
    const bool held = (cpu.interrupt_shadow & 2) != 0 && (shadow & 2) == 0;
    const bool stepped = outcome == Outcome::kJump && traps_by_new_flag(stepper_->last().op)
                             ? (cpu.other_flags & flag::kTf) != 0
                             : trap_flag;
    const std::uint64_t trap = held ? 0 : cpu.breakpoint_hits | (stepped ? kDr6SingleStep : 0);
    cpu.breakpoint_hits = held ? cpu.breakpoint_hits : outcome == Outcome::kIo ? hits_before : 0;
    if (finish(outcome, trap, stop)) {
      return stop;
    }
  }
}

std::string ProcessorImpl::describe_work() const {
  std::string text;
  if (runner_) {
    const RunnerStatistics& work = runner_->statistics();
    const TranslatorStatistics& all = shared_->translator()->statistics();
    text = fmt::format(
        "translated code was entered {} times; {} TLB fills, {} accesses and {} instructions interpreted, {} "
        "jumps "
        "linked, {} jump entries missed, {} translations looked up; all processors: {} blocks of {} "
        "instructions "
        "translated in {} ms, {} killed, {} KiB of code, cache thrown away {} times",
        work.entered, work.filled, work.slow_accesses, work.specials, work.links, work.misses, work.searches,
        all.blocks, all.instructions, all.nanoseconds / 1'000'000, all.killed, all.code_bytes >> 10,
        all.flushes);
  }
  return text;
}

}  // namespace

Result<std::unique_ptr<Processor>> Processor::create(PhysicalMemory& memory, EngineMmio& mmio,
                                                     Environment& environment,
                                                     std::shared_ptr<SharedCode> code) {
  WISP_ASSIGN(Frame frame, Frame::create());
  auto processor =
      std::make_unique<ProcessorImpl>(std::move(frame), memory, mmio, environment, std::move(code));
  WISP_TRY(processor->set_up());
  return processor;
}

}  // namespace wisp::soft
