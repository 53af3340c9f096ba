// The translator: blocks of guest instructions as host code, kept in a bounded cache that the processors of a
// VM share.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "base/error.h"
#include "hypervisor/soft/block_emitter.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/mmu.h"
#include "hypervisor/soft/physical_memory.h"

namespace wisp::soft {

class SharedCode;
class Stepper;
class TranslatedRunner;

struct TranslatorStatistics {
  std::uint64_t blocks = 0;        // translated since the start
  std::uint64_t instructions = 0;  // in them
  std::uint64_t killed = 0;        // blocks whose code was written
  std::uint64_t flushes = 0;       // times the cache was full
  std::uint64_t code_bytes = 0;    // in the cache now
  std::uint64_t nanoseconds = 0;   // spent translating, where ExecutionOptions::statistics is set
};

// A translated block, as the processors see it.
struct TranslatedBlock {
  const std::uint8_t* outer = nullptr;
  const std::uint8_t* inner = nullptr;
};

// Thread-safe.
class Translator final {
 public:
  // Whether this host's processor has what translated code needs (BMI2).
  [[nodiscard]] static bool possible();
  [[nodiscard]] static Result<std::unique_ptr<Translator>> create(SharedCode& shared);
  Translator(const Translator&) = delete;
  Translator& operator=(const Translator&) = delete;
  ~Translator();

  [[nodiscard]] const Stubs& stubs() const;
  // What the tags of the in-line TLB must be more than negated addresses: see Cpu::tag_bias.
  [[nodiscard]] std::uint64_t tag_bias() const;
  // The block that starts at the byte `where` (found at `linear` by the caller's page tables); null where
  // nothing can be translated there.
  [[nodiscard]] TranslatedBlock find(const Translation& where, const BlockMode& mode, Cpu& cpu, Mmu& mmu);
  // Makes the jump whose displacement stands at `displacement`, in a block of the page `source_page`, lead to
  // the block at `where`, as long as that lives. False: they are not of one physical page, or the block is
  // gone.
  bool link(const std::uint8_t* displacement, std::uint64_t source_page, const Translation& where,
            const BlockMode& mode);
  // The instruction whose host code holds `host`; empty: not in translated code.
  [[nodiscard]] std::optional<EmittedBlock::FaultSite> fault_site_of(std::uint64_t host) const;

  // Code in [gpa, gpa + size) was written: its translations are not entered any more when this returns.
  void code_written(std::uint64_t gpa, std::uint32_t size);
  // The same for the whole page, and nothing of it is watched any more: clears `lines`.
  void forget_page(std::uint64_t gpa, std::atomic<std::uint64_t>& lines);
  // Grow with each killed block, and with each time the whole cache was thrown away.
  [[nodiscard]] std::uint64_t kills() const;
  [[nodiscard]] std::uint64_t generation() const;
  [[nodiscard]] TranslatorStatistics statistics() const;

 private:
  struct Impl;
  explicit Translator(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// How often translated code asked for help, on one processor.
struct RunnerStatistics {
  std::uint64_t entered = 0;        // from outside
  std::uint64_t filled = 0;         // in-line TLB entries
  std::uint64_t slow_accesses = 0;  // interpreted, since they cannot go in line
  std::uint64_t specials = 0;       // instructions interpreted for what they are
  std::uint64_t links = 0;          // jumps linked
  std::uint64_t misses = 0;         // targets that were not among the jump entries
  std::uint64_t searches = 0;       // of the table of translations
};

// Runs translated code on one processor.
class TranslatedRunner final {
 public:
  TranslatedRunner(Core core, SharedCode& shared, Stepper& stepper);
  TranslatedRunner(const TranslatedRunner&) = delete;
  TranslatedRunner& operator=(const TranslatedRunner&) = delete;
  ~TranslatedRunner();
  // Whether the processor is in a state that translated code can run in: 64-bit code without single steps or
  // breakpoints.
  [[nodiscard]] bool ready() const;
  // Runs until something happened that the caller must see to. kNext and kJump: nothing but that it is time
  // to look at cpu.run and the like.
  [[nodiscard]] Outcome run();
  [[nodiscard]] const RunnerStatistics& statistics() const { return statistics_; }

 private:
  friend struct RunnerCalls;
  // The processor before an instruction that may end the block's assumptions.
  struct Before {
    std::uint64_t kills = 0;
    std::uint64_t rip = 0;
    std::uint32_t mode = 0;
  };
  [[nodiscard]] Before before();
  [[nodiscard]] BlockMode mode();
  [[nodiscard]] TranslatedBlock block_at(std::uint64_t linear, Translation& where);
  // The outer entry for a linear address, from the jump entries if one is there; null: nothing can be
  // translated.
  [[nodiscard]] const std::uint8_t* entry_at(std::uint64_t linear);
  // Jump entries of blocks made for other features go.
  void follow_mode();
  [[nodiscard]] const std::uint8_t* slow(const CallSite& site, std::uint64_t linear, bool vectors_here);
  [[nodiscard]] const std::uint8_t* special(const CallSite& site, bool vectors_here);
  // What follows an instruction that the interpreter ran at `rip`; `resume` is the code of the one behind it.
  [[nodiscard]] const std::uint8_t* interpreted(Outcome outcome, const Before& before, const CallSite& site,
                                                const std::uint8_t* resume, bool vectors_here);
  [[nodiscard]] const std::uint8_t* link(const CallSite& site);
  [[nodiscard]] const std::uint8_t* miss(std::uint64_t linear);
  [[nodiscard]] const std::uint8_t* miss_of_jump(const CallSite& site, std::uint64_t linear);
  [[nodiscard]] const std::uint8_t* go_on();
  [[nodiscard]] const std::uint8_t* leave(Outcome outcome);
  [[nodiscard]] bool attention() const;

  Core core_;
  Translator& translator_;
  Stepper& stepper_;
  const bool native_tsc_;
  const bool count_;
  Outcome outcome_ = Outcome::kNext;
  std::uint64_t generation_ = 0;  // of the cache, when it was last entered from outside
  std::uint32_t features_ = 0;    // of the mode for which the jump entries were made
  // The mode's features, and the registers that they follow from.
  BlockMode known_{};
  std::uint64_t known_cr0_ = ~0ULL, known_cr4_ = 0, known_xcr0_ = 0;
  RunnerStatistics statistics_;
};

// The functions that the stubs call.
struct RunnerCalls {
  static const std::uint8_t* slow(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                  std::uint64_t vectors_here);
  static const std::uint8_t* special(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                     std::uint64_t vectors_here);
  static const std::uint8_t* link(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                  std::uint64_t vectors_here);
  static const std::uint8_t* miss_of_jump(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                          std::uint64_t vectors_here);
  static const std::uint8_t* miss(Cpu* cpu, const CallSite* site, std::uint64_t linear,
                                  std::uint64_t vectors_here);
};

}  // namespace wisp::soft
