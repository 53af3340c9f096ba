// The interpreter: fetches, decodes and runs one instruction at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "hypervisor/soft/code_memory.h"
#include "hypervisor/soft/decoder.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/host_faults.h"
#include "hypervisor/soft/native_code.h"
#include "hypervisor/soft/shared_code.h"

namespace wisp::soft {

class Stepper final {
 public:
  [[nodiscard]] static Result<std::unique_ptr<Stepper>> create(Core core, SharedCode& shared);
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Runs the instruction at cpu.rip and moves rip past it where it is done. Does not deliver faults.
  [[nodiscard]] Outcome step();
  // The same for an instruction that is already decoded and whose address is cpu.rip.
  // It is the bytes of an Insn, which need not be aligned.
  [[nodiscard]] Outcome execute(const std::uint8_t* decoded);
  // What step() ran last.
  [[nodiscard]] const Insn& last() const { return *last_; }

 private:
  // Code generated for one native instruction; goes with the instruction's bytes.
  struct Key {
    std::array<std::uint8_t, 16> bytes{};
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    std::size_t operator()(const Key& key) const;
  };
  struct Cached {
    std::uint64_t gpa = ~0ULL;
    const std::atomic<std::uint32_t>* page_version = nullptr;
    std::uint32_t version = 0;
    CodeSize code_size = CodeSize::k64;
    const std::uint8_t* thunk = nullptr;
    std::uint32_t thunk_age = 0;
    Insn insn{};
  };

  // An instruction that begins in one page and ends in another.
  struct Crossing {
    Cached first{};
    std::uint64_t second_gpa = ~0ULL;
    const std::atomic<std::uint32_t>* second_version = nullptr;
    std::uint32_t version = 0;  // of the second page
  };

  Stepper(Core core, SharedCode& shared, CodeMemory memory);
  [[nodiscard]] bool fetch(Cached*& found);
  [[nodiscard]] bool fetch_across(std::uint64_t linear, const Translation& first, CodeSize size,
                                  Cached*& found);
  std::uint32_t watch(const Translation& where, std::uint32_t size);
  [[nodiscard]] Outcome run(const Insn& insn, const std::uint8_t** thunk);
  [[nodiscard]] Outcome native(const Insn& insn, const std::uint8_t** thunk);
  [[nodiscard]] Outcome native_on_memory(const Insn& insn, const std::uint8_t* code);
  [[nodiscard]] Outcome operand_faulted(const Insn& insn, const std::uint8_t* code);
  [[nodiscard]] Outcome enter(const std::uint8_t* code);
  [[nodiscard]] const std::uint8_t* thunk_for(const Insn& insn);
  void forget_thunks();
  [[nodiscard]] Outcome undefined(const Insn& insn);
  [[nodiscard]] CodeSize code_size() const;

  Core core_;
  SharedCode& shared_;
  CodeMemory code_;
  Trampolines trampolines_{};
  std::size_t code_used_ = 0;
  std::size_t code_floor_ = 0;
  std::uint32_t thunk_age_ = 1;  // changes when the thunks are thrown away
  std::optional<HostFaultGuard> guard_;
  std::unordered_map<Key, const std::uint8_t*, KeyHash> thunks_;
  std::vector<Cached> cache_;
  std::vector<Crossing> crossings_;
  Cached uncached_;  // of instructions that lie where nothing watches, or came decoded
  const Insn* last_ = nullptr;
};

}  // namespace wisp::soft
