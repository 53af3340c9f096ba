#include "hypervisor/soft/soft_vcpu.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>

#include "hypervisor/soft/executor.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kNsPerSecond = 1'000'000'000;

void wait_on(std::atomic<std::uint32_t>& word, std::uint32_t value, std::optional<std::uint64_t> until_ns) {
  timespec until{};
  if (until_ns) {
    until.tv_sec = static_cast<time_t>(*until_ns / kNsPerSecond);
    until.tv_nsec = static_cast<long>(*until_ns % kNsPerSecond);
  }
  // Absolute, by CLOCK_MONOTONIC.
  ::syscall(SYS_futex, &word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, value, until_ns ? &until : nullptr,
            nullptr, FUTEX_BITSET_MATCH_ANY);
}

void wake_one(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, nullptr, nullptr, 0);
}

}  // namespace

// --- from other threads
//
// Whoever has something for the processor makes it visible first and then clears cpu.run; the processor sets
// cpu.run before it looks. Either it sees what there is, or cpu.run stays 0 and the executors come back.

void SoftVcpu::wake() {
  cpu().run.store(0, std::memory_order_seq_cst);
  if (asleep_.exchange(0, std::memory_order_seq_cst) != 0) {
    wake_one(asleep_);
  }
}

void SoftVcpu::kick() {
  kicked_.store(true, std::memory_order_release);
  wake();
}

void SoftVcpu::pic_changed() {
  if (lapic_->accepts_ext_int()) {
    wake();
  }
}

// --- accesses that the machine answers

Exit SoftVcpu::access_exit(IoState::Access& access) {
  const std::span<std::uint8_t> data(access.data.data(), access.size);
  const auto port = static_cast<std::uint16_t>(access.address);
  access_pending_ = true;
  switch (access.kind) {
    case IoState::Kind::kPortRead:
      return PortReadExit{.port = port, .data = data};
    case IoState::Kind::kPortWrite:
      return PortWriteExit{.port = port, .data = data};
    case IoState::Kind::kMmioRead:
      return MmioReadExit{.address = access.address, .data = data};
    case IoState::Kind::kMmioWrite:
      return MmioWriteExit{.address = access.address, .data = data};
  }
  return InterruptedExit{};
}

// Takes in what the machine put into cpu.io.wanted.
void SoftVcpu::take_answer() {
  IoState& io = cpu().io;
  access_pending_ = false;
  if (read_asked_) {
    read_asked_ = false;
    io.waiting = false;
    if (io.answer_count < IoState::kMax) {
      io.answers[io.answer_count++] = io.wanted;
    }
  }
}

std::optional<Exit> SoftVcpu::next_access() {
  IoState& io = cpu().io;
  if (writes_told_ < io.write_count) {
    return access_exit(io.writes[writes_told_++]);
  }
  writes_told_ = 0;
  io.write_count = 0;
  if (!io.waiting) {
    return std::nullopt;
  }
  if (io.answer_count == IoState::kMax) {
    return EngineErrorExit{
        fmt::format("vCPU {}: the instruction at {:#x} reads more device registers than one "
                    "instruction can",
                    config_.index, cpu().rip)};
  }
  read_asked_ = true;
  return access_exit(io.wanted);
}

// --- events

void SoftVcpu::take_init_and_startup() {
  if (lapic_->take_init()) {
    reset_cpu(cpu(), false);
    lapic_->reset(true);
    processor_->core().mmu.flush_all();
    cpu().halted = false;
    shut_down_ = false;
    nmi_waits_ = false;
    loaded_event_.reset();
    run_state_ = config_.index == 0 ? CpuRunState::kRunnable : CpuRunState::kInitReceived;
  }
  if (run_state_ == CpuRunState::kRunnable) {
    (void)lapic_->take_sipi();  // means nothing to a processor that runs
  } else if (const auto vector = lapic_->take_sipi()) {
    start_at(cpu(), *vector);
    run_state_ = CpuRunState::kRunnable;
  }
}

bool SoftVcpu::interrupt_waits() const {
  return lapic_->pending_vector().has_value() ||
         (parts_.chipset.pic().has_interrupt() && lapic_->accepts_ext_int());
}

SoftVcpu::Due SoftVcpu::deliver_interrupt() {
  std::uint8_t vector = 0;
  if (parts_.chipset.pic().has_interrupt() && lapic_->accepts_ext_int()) {
    vector = parts_.chipset.pic().acknowledge();
  } else if (const auto pending = lapic_->pending_vector()) {
    vector = *pending;
    lapic_->acknowledge(vector);
  } else {
    return Due::kNothing;
  }
  cpu().halted = false;
  return deliver_event(processor_->core(), Fault{.vector = vector}, EventKind::kExternal) ? Due::kDelivered
                                                                                          : Due::kShutdown;
}

// Delivers what can be delivered between two instructions.
SoftVcpu::Due SoftVcpu::deliver_one() {
  Cpu& cpu = processor_->cpu();
  Core& core = processor_->core();
  if (loaded_event_) {
    const LoadedEvent event = *loaded_event_;
    loaded_event_.reset();
    cpu.halted = false;
    return deliver_event(core, event.fault, event.kind) ? Due::kDelivered : Due::kShutdown;
  }
  nmi_waits_ = lapic_->take_nmi() || nmi_waits_;
  if (nmi_waits_ && !cpu.nmi_masked) {
    if (cpu.interrupt_shadow == 0) {
      nmi_waits_ = false;
      cpu.halted = false;
      return deliver_event(core, Fault{.vector = vec::kNmi}, EventKind::kNmi) ? Due::kDelivered
                                                                              : Due::kShutdown;
    }
    cpu.run.store(0, std::memory_order_relaxed);  // back after the instruction in the shadow
  }
  return cpu.interrupt_flag != 0 && cpu.interrupt_shadow == 0 ? deliver_interrupt() : Due::kNothing;
}

// The same, and has the executors stop for an interrupt that must wait.
SoftVcpu::Due SoftVcpu::deliver_due() {
  const Due due = deliver_one();
  cpu().no_interrupt_waits = interrupt_waits() ? 0 : 1;
  return due;
}

void SoftVcpu::look_for_interrupt() {
  if (interrupt_waits()) {
    cpu().run.store(0, std::memory_order_relaxed);
  }
}

// --- time

// When the guest's time brings something about next. With a virtual clock the PIT's edges are among it.
std::optional<std::uint64_t> SoftVcpu::next_event_ns() const {
  const auto timer = lapic_->next_timer_ns();
  const auto pit = parts_.virtual_clock != nullptr ? parts_.chipset.next_timer_ns() : std::nullopt;
  return timer && pit ? std::min(*timer, *pit) : timer ? timer : pit;
}

void SoftVcpu::arm_timer() {
  const auto next = next_event_ns();
  if (parts_.virtual_clock != nullptr) {
    // Stops at the very instruction.
    constexpr std::uint64_t kNoEnd = 1ULL << 40;
    const std::uint64_t now = parts_.clock.now_ns();
    std::uint64_t budget = !next ? kNoEnd : *next > now ? std::min(*next - now, kNoEnd) : 0;
    // An instruction that waits for a device may stand beyond the next look.
    const auto look_at = [&budget, retired = cpu().retired()](std::uint64_t count) {
      budget = std::min(budget, count > retired ? count - retired : 0);
    };
    if (parts_.state_log != nullptr) {
      look_at(parts_.state_log->next());
    }
    if (parts_.pause_every != 0) {
      look_at(next_pause_);
    }
    cpu().set_budget(budget);
    return;
  }
  if (!next) {
    return;  // a timer that is still set wakes the processor for nothing, once
  }
  const std::uint64_t now = parts_.clock.now_ns();
  if (*next <= now) {
    cpu().run.store(0, std::memory_order_relaxed);
    return;
  }
  if (timer_due_ns_ > now && timer_due_ns_ <= *next) {
    return;  // comes early, and is set anew then
  }
  timer_due_ns_ = *next;
  timer_.arm(*next - now);
}

std::uint64_t SoftVcpu::host_now() {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * kNsPerSecond + static_cast<std::uint64_t>(time.tv_nsec);
}

// Whether there is something to do before it is time to sleep, or `until`.
bool SoftVcpu::look_for_work(std::uint64_t now, std::uint64_t until) {
  const std::uint64_t end = std::min(now + halt_poll_.window(), until);
  while (cpu().run.load(std::memory_order_acquire) != 0) {
    if (host_now() >= end) {
      return false;
    }
    _mm_pause();
  }
  return true;
}

// Idle with a virtual clock. Where no device works beside the processor nothing else can happen until the
// next event, and time jumps there; else it passes as the host's does, so that the guest's time-outs leave
// devices theirs.
void SoftVcpu::sleep_virtually(std::optional<std::uint64_t> until) {
  const std::uint64_t now = parts_.clock.now_ns();
  const std::uint64_t wait = until && *until > now ? *until - now : 0;
  if (until && (wait == 0 || !parts_.memory.has_doorbells())) {
    parts_.virtual_clock->skip(wait);
    return;
  }
  const std::uint64_t start = host_now();
  asleep_.store(1, std::memory_order_seq_cst);
  if (cpu().run.load(std::memory_order_seq_cst) != 0) {
    wait_on(asleep_, 1, until ? std::optional(start + wait) : std::nullopt);
  }
  asleep_.store(0, std::memory_order_relaxed);
  const std::uint64_t slept = host_now() - start;
  parts_.virtual_clock->skip(until ? std::min(slept, wait) : slept);
}

std::uint64_t SoftVcpu::virtual_ns() const {
  return parts_.virtual_clock != nullptr ? parts_.virtual_clock->now_ns() : 0;
}

bool SoftVcpu::pause_due() {
  const std::uint64_t retired = cpu().retired();
  if (parts_.pause_every == 0 || retired < next_pause_) {
    return false;
  }
  next_pause_ = retired + parts_.pause_every;
  return true;
}

// HLT, or the wait for a start-up message.
void SoftVcpu::sleep() {
  const bool timed = run_state_ == CpuRunState::kRunnable;
  if (parts_.virtual_clock != nullptr) {
    sleep_virtually(timed ? next_event_ns() : std::nullopt);
    return;
  }
  const auto until = timed ? lapic_->next_timer_ns() : std::nullopt;
  if (timer_due_ns_ != 0) {
    // The sleep has its own end; the timer would only wake another thread.
    timer_.disarm();
    timer_due_ns_ = 0;
  }
  const std::uint64_t start = host_now();
  if (!look_for_work(start, until.value_or(~0ULL))) {
    asleep_.store(1, std::memory_order_seq_cst);
    if (cpu().run.load(std::memory_order_seq_cst) != 0) {
      wait_on(asleep_, 1, until);
    }
    asleep_.store(0, std::memory_order_relaxed);
  }
  if (parts_.halt_poll) {
    halt_poll_.waited(host_now() - start);
  }
}

bool SoftVcpu::stopped_until_woken() {
  return run_state_ != CpuRunState::kRunnable || cpu().halted;
}

void SoftVcpu::serve_requests(std::uint32_t bits) {
  Mmu& mmu = processor_->core().mmu;
  if ((bits & kFlushMemory) != 0) {
    mmu.flush_all();
  } else if ((bits & kFlushInline) != 0) {
    mmu.flush_inline();
  } else if ((bits & kRevokeWrites) != 0) {
    mmu.revoke_writes();
  }
}

// --- the loop

Exit SoftVcpu::run() {
  if (!thread_prepared_) {
    thread_prepared_ = true;
    // Sleeps end on time; the kernel would else put 50 µs of slack on them.
    (void)::prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    if (parts_.virtual_clock != nullptr) {
      parts_.virtual_clock->enter_thread();
    }
  }
  take_answer();
  for (;;) {
    if (auto exit = next_access()) {
      return *std::move(exit);
    }
    Cpu& cpu = processor_->cpu();
    cpu.run.exchange(kRunning, std::memory_order_seq_cst);
    const bool in_the_middle = cpu.io.answer_count != 0;
    if (kicked_.load(std::memory_order_acquire)) {
      if (!in_the_middle) {
        kicked_.store(false, std::memory_order_relaxed);
        return InterruptedExit{};
      }
      cpu.run.store(0, std::memory_order_relaxed);  // this one instruction, whose state nobody could save
    }
    if (!in_the_middle) {
      if (parts_.state_log != nullptr) {
        parts_.state_log->look(cpu);
      }
      if (pause_due()) {
        return InterruptedExit{};
      }
      lapic_->poll_timer();
      if (parts_.virtual_clock != nullptr) {
        parts_.chipset.poll_timer();
      }
      take_init_and_startup();
      if (run_state_ == CpuRunState::kRunnable && !shut_down_) {
        // Both use guest memory by what the processor knows of it: whoever changes that waits for them.
        Requests::enter(party_);
        if (clock_unpublished_) {
          publish_clock(true);
        }
        if (deliver_due() == Due::kShutdown) {
          shut_down_ = true;
        }
        Requests::leave(party_);
      }
      if (shut_down_) {
        return ShutdownExit{};
      }
      if (stopped_until_woken()) {
        if (parts_.pause_every != 0) {
          // Without an end in sight whoever pauses the processor must bring about what wakes it.
          if (run_state_ == CpuRunState::kRunnable && next_event_ns()) {
            sleep();
          }
          return InterruptedExit{};
        }
        sleep();
        continue;
      }
    }
    arm_timer();
    Requests::enter(party_);
    const Processor::Stop stop = processor_->run();
    Requests::leave(party_);
    if (stop == Processor::Stop::kHalt) {
      cpu.halted = true;
    } else if (stop == Processor::Stop::kShutdown) {
      shut_down_ = true;
    }
  }
}

}  // namespace wisp::soft
