#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "hypervisor/soft/shared_code.h"
#include "hypervisor/soft/stepper.h"
#include "hypervisor/soft/translator.h"

namespace wisp::soft {
namespace {

TranslatedRunner& runner_of(Cpu* cpu) {
  return *static_cast<TranslatedRunner*>(cpu->runner);
}
const std::uint8_t* after(const CallSite& site) {
  return reinterpret_cast<const std::uint8_t*>(&site) + sizeof site;
}

}  // namespace

TranslatedRunner::TranslatedRunner(Core core, SharedCode& shared, Stepper& stepper)
    : core_(core),
      translator_(*shared.translator()),
      stepper_(stepper),
      native_tsc_(shared.options().native_tsc),
      count_(shared.options().virtual_clock) {
  core_.cpu.runner = this;
  core_.cpu.tag_bias = translator_.tag_bias();  // whoever makes a runner drops all tags after it
}

TranslatedRunner::~TranslatedRunner() {
  core_.cpu.runner = nullptr;
}

bool TranslatedRunner::ready() const {
  const Cpu& cpu = core_.cpu;
  return cpu.code64() && (cpu.cpl == 0 || cpu.cpl == 3) && (cpu.other_flags & (flag::kTf | flag::kRf)) == 0 &&
         (cpu.dr7 & 0xff) == 0 && cpu.interrupt_shadow == 0 &&
         !(cpu.cpl == 3 && (cpu.other_flags & flag::kAc) != 0 &&
           (cpu.cr0 & cr0::kAm) != 0);  // checks alignment
}

BlockMode TranslatedRunner::mode() {
  const Cpu& cpu = core_.cpu;
  if (cpu.cr0 != known_cr0_ || cpu.cr4 != known_cr4_ || cpu.xcr0 != known_xcr0_) [[unlikely]] {
    known_cr0_ = cpu.cr0;
    known_cr4_ = cpu.cr4;
    known_xcr0_ = cpu.xcr0;
    known_.x87 = (cpu.cr0 & (cr0::kEm | cr0::kTs)) == 0;
    known_.sse = known_.x87 && (cpu.cr4 & cr4::kOsfxsr) != 0;
    known_.avx = known_.x87 && (cpu.cr4 & cr4::kOsxsave) != 0 && (cpu.xcr0 & 6) == 6;
  }
  BlockMode mode = known_;
  mode.bank = cpu.bank();
  mode.tsc = native_tsc_ && (cpu.cr4 & cr4::kTsd) == 0;
  return mode;
}

bool TranslatedRunner::attention() const {
  const Cpu& cpu = core_.cpu;
  return cpu.run.load(std::memory_order_relaxed) == 0 ||
         (cpu.no_interrupt_waits == 0 && cpu.interrupt_flag != 0) || cpu.io.write_count != 0 ||
         (count_ && cpu.budget_used_up());
}

TranslatedBlock TranslatedRunner::block_at(std::uint64_t linear, Translation& where) {
  if (!canonical(linear) || !core_.mmu.translate(linear, Access::kExecute, As::kCode, where) || !where.page ||
      where.page.info == nullptr) {
    return {};
  }
  return translator_.find(where, mode(), core_.cpu, core_.mmu);
}

const std::uint8_t* TranslatedRunner::entry_at(std::uint64_t linear) {
  Cpu& cpu = core_.cpu;
  const Bank bank = cpu.bank();
  JumpBank& jumps = cpu.jumps[bank];
  const std::size_t index = jump_index(linear);
  if (jumps.tag[index] == -linear) [[likely]] {
    // Addresses of generated code come as numbers. NOLINTNEXTLINE(performance-no-int-to-ptr)
    return reinterpret_cast<const std::uint8_t*>(jumps.code[index]);
  }
  ++statistics_.searches;
  Translation where;
  const TranslatedBlock block = block_at(linear, where);
  if (block.outer == nullptr || translator_.generation() != generation_) {
    return nullptr;
  }
  jumps.tag[index] = -linear;
  jumps.code[index] = reinterpret_cast<std::uint64_t>(block.outer);
  core_.mmu.note_jump(bank, index, where.global);
  return block.outer;
}

void TranslatedRunner::follow_mode() {
  if (const std::uint32_t features = mode().features(); features != features_) [[unlikely]] {
    core_.mmu.flush_inline();
    features_ = features;
  }
}

Outcome TranslatedRunner::run() {
  Cpu& cpu = core_.cpu;
  if (const std::uint64_t generation = translator_.generation(); generation != generation_) {
    core_.mmu.flush_inline();  // jump entries lead to what was thrown away
    generation_ = generation;
  }
  follow_mode();
  const std::uint8_t* entry = entry_at(cpu.rip);
  if (entry == nullptr) {
    return stepper_.step();
  }
  ++statistics_.entered;
  cpu.scratch[1] = cpu.rip;
  outcome_ = Outcome::kNext;
  const std::uint64_t result = enter_code(translator_.stubs().trampolines, cpu, entry);
  if (result < kHostFault) [[likely]] {
    if (cpu.step_next != 0) {
      cpu.step_next = 0;
      return attention() ? Outcome::kNext : stepper_.step();
    }
    return outcome_;
  }
  const auto site = translator_.fault_site_of(cpu.scratch[2]);
  if (!site) {
    fmt::print(stderr, "wisp: exception {} in generated code at {:#x}, which no guest instruction explains\n",
               result - kHostFault, cpu.scratch[2]);
    std::abort();
  }
  cpu.rip = cpu.page_address + site->page_offset;
  if (count_) {
    cpu.instructions_left += site->unspent;
  }
  const auto vector = static_cast<std::uint8_t>(result - kHostFault);
  if (vector == vec::kGp) {
    (void)cpu.raise(vec::kGp, 0);
  } else {
    (void)cpu.raise(vector);
  }
  return Outcome::kFault;
}

const std::uint8_t* TranslatedRunner::leave(Outcome outcome) {
  outcome_ = outcome;
  return translator_.stubs().out;
}

// On at cpu.rip, in whatever block that is.
const std::uint8_t* TranslatedRunner::go_on() {
  Cpu& cpu = core_.cpu;
  if (attention() || !ready() || translator_.generation() != generation_) {
    return leave(Outcome::kNext);
  }
  follow_mode();
  const std::uint8_t* entry = entry_at(cpu.rip);
  if (entry == nullptr) {
    return leave(Outcome::kNext);
  }
  cpu.scratch[1] = cpu.rip;
  return entry;
}

TranslatedRunner::Before TranslatedRunner::before() {
  return {.kills = translator_.kills(), .rip = core_.cpu.rip, .mode = mode().key()};
}

const std::uint8_t* TranslatedRunner::interpreted(Outcome outcome, const Before& before, const CallSite& site,
                                                  const std::uint8_t* resume, bool vectors_here) {
  Cpu& cpu = core_.cpu;
  if (outcome != Outcome::kNext && outcome != Outcome::kJump) {
    return leave(outcome);
  }
  const bool here =
      resume != nullptr && outcome == Outcome::kNext && cpu.rip == before.rip + stepper_.last().length;
  if (here && !attention() && translator_.kills() == before.kills &&
      translator_.generation() == generation_ && cpu.interrupt_shadow == 0 && mode().key() == before.mode &&
      ready()) {
    if (count_) {
      const std::uint64_t rest = site.unspent - 1U;
      if (cpu.instructions_left < kBudget + rest) {
        return go_on();
      }
      cpu.instructions_left -= rest;
    }
    cpu.scratch[2] = vectors_here ? 1 : 0;
    std::ranges::fill(cpu.shared_addends, 0);  // what was looked up before may have changed
    return resume;
  }
  return go_on();
}

const std::uint8_t* TranslatedRunner::slow(const CallSite& site, std::uint64_t linear, bool vectors_here) {
  Cpu& cpu = core_.cpu;
  cpu.rip = cpu.page_address + site.page_offset;
  cpu.fault = {};
  if (core_.mmu.fill(linear, site.size, static_cast<Access>(site.access & ~kPlainFault)) &&
      translator_.generation() == generation_) {
    ++statistics_.filled;
    cpu.scratch[1] = linear;
    cpu.scratch[2] = vectors_here ? 1 : 0;
    return after(site);
  }
  ++statistics_.slow_accesses;
  if (count_) {
    cpu.instructions_left += site.unspent;
  }
  // Where an access goes on in another page, that page has a say.
  const bool one_page = (linear & kPageOffset) + site.size <= kPageSize;
  if (cpu.fault.vector == vec::kPf && one_page && (site.access & kPlainFault) != 0) {
    return leave(Outcome::kFault);
  }
  const auto* resume = reinterpret_cast<const std::uint8_t*>(&site) + site.next;
  const Before was = before();
  return interpreted(stepper_.step(), was, site, resume, vectors_here);
}

const std::uint8_t* TranslatedRunner::special(const CallSite& site, bool vectors_here) {
  Cpu& cpu = core_.cpu;
  cpu.rip = cpu.page_address + site.page_offset;
  ++statistics_.specials;
  if (count_) {
    cpu.instructions_left += site.unspent;
  }
  const Before was = before();
  if (site.size == 0) {
    // Not one of those that the block has taken off the budget.
    return count_ && cpu.budget_used_up() ? leave(Outcome::kNext)
                                          : interpreted(stepper_.step(), was, site, nullptr, vectors_here);
  }
  const std::uint8_t* resume = site.access != 0 ? after(site) : nullptr;
  return interpreted(stepper_.execute(after(site) + site.next), was, site, resume, vectors_here);
}

const std::uint8_t* TranslatedRunner::link(const CallSite& site) {
  ++statistics_.links;
  Cpu& cpu = core_.cpu;
  cpu.rip = cpu.page_address + site.page_offset;
  if (attention() || translator_.generation() != generation_) {
    return leave(Outcome::kNext);
  }
  Translation where;
  const TranslatedBlock block = block_at(cpu.rip, where);
  if (block.outer == nullptr || translator_.generation() != generation_) {
    return leave(Outcome::kNext);
  }
  std::uint64_t source_page = 0;
  std::memcpy(&source_page, after(site), sizeof source_page);
  (void)translator_.link(reinterpret_cast<const std::uint8_t*>(&site) + site.next, source_page, where,
                         mode());
  cpu.scratch[1] = cpu.rip;
  return block.outer;
}

const std::uint8_t* TranslatedRunner::miss(std::uint64_t linear) {
  ++statistics_.misses;
  Cpu& cpu = core_.cpu;
  cpu.rip = linear;
  // An entry that is there leads to a block that is dead: it came here from that.
  JumpBank& jumps = cpu.jumps[cpu.bank()];
  if (const std::size_t index = jump_index(linear); jumps.tag[index] == -linear) {
    jumps.tag[index] = no_jump(index);
  }
  return go_on();
}

// The jump itself faults where its target is not canonical; what a call has pushed stays, as on processors.
const std::uint8_t* TranslatedRunner::miss_of_jump(const CallSite& site, std::uint64_t linear) {
  if (canonical(linear)) [[likely]] {
    return miss(linear);
  }
  Cpu& cpu = core_.cpu;
  cpu.rip = cpu.page_address + site.page_offset;
  cpu.gpr[kRsp] -= static_cast<std::uint64_t>(std::int64_t{site.next});
  if (count_) {
    cpu.instructions_left += site.unspent;
  }
  (void)cpu.raise(vec::kGp, 0);
  return leave(Outcome::kFault);
}

const std::uint8_t* RunnerCalls::slow(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                      std::uint64_t vectors_here) {
  cpu->scratch[2] = 0;
  return runner_of(cpu).slow(*site, linear, vectors_here != 0);
}
const std::uint8_t* RunnerCalls::special(Cpu* cpu, const CallSite* site, std::uint64_t /*linear*/,
                                         std::uint64_t vectors_here) {
  cpu->scratch[2] = 0;
  return runner_of(cpu).special(*site, vectors_here != 0);
}
const std::uint8_t* RunnerCalls::link(Cpu* cpu, const CallSite* site, std::uint64_t /*linear*/,
                                      std::uint64_t /*vectors_here*/) {
  cpu->scratch[2] = 0;
  return runner_of(cpu).link(*site);
}
const std::uint8_t* RunnerCalls::miss_of_jump(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                              std::uint64_t /*vectors_here*/) {
  cpu->scratch[2] = 0;
  return runner_of(cpu).miss_of_jump(*site, linear);
}
const std::uint8_t* RunnerCalls::miss(Cpu* cpu, const CallSite* /*site*/, std::uint64_t linear,
                                      std::uint64_t /*vectors_here*/) {
  cpu->scratch[2] = 0;
  return runner_of(cpu).miss(linear);
}

}  // namespace wisp::soft
