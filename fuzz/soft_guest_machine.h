// A VM of the software CPU as a Program describes it, run step by step.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "hypervisor/hypervisor.h"
#include "memory/address_space.h"
#include "soft_guest_program.h"
#include "soft_guest_traps.h"

namespace wisp::fuzz {

class Machine final {
 public:
  // `interpreter` in place of the program's choice.
  Machine(const Program& program, bool interpreter);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // False where the program's state is none that may exist: there is nothing to run.
  [[nodiscard]] bool start();

  // Runs a vCPU until its next exit and answers that. What is told of it stays valid until the next step.
  struct Step {
    std::size_t kind = 0;  // index in Exit
    std::uint64_t address = 0;
    std::vector<std::uint8_t> data{};
    bool operator==(const Step&) const = default;
  };
  [[nodiscard]] Step step(std::size_t vcpu);
  // After an InterruptedExit: what comes next of the program's actions. With vCPUs that run, only what a
  // control thread may do.
  void act(bool running);
  void kick(std::size_t vcpu) { vcpus_[vcpu]->kick(); }
  [[nodiscard]] std::size_t vcpu_count() const { return vcpus_.size(); }
  [[nodiscard]] CpuState state();

  // All of guest memory, block by block.
  [[nodiscard]] std::vector<const GuardedBlock*> blocks() const;
  // Whether the paging structures are other than at the start, but for accessed and dirty bits, or others are
  // in use: what the TLBs hold may then differ from what they say.
  [[nodiscard]] bool tables_changed();
  // Whether a byte of physical memory belongs to them.
  [[nodiscard]] bool in_tables(std::uint64_t gpa) const;

 private:
  void place_memory();
  void write(std::uint64_t gpa, std::span<const std::uint8_t> bytes);
  [[nodiscard]] std::uint8_t* host(std::uint64_t gpa, std::size_t size) const;
  void apply(const Action& action, bool running);
  void note_logged(bool running);
  void take_log(std::uint64_t gpa, bool running);
  void move_middle();
  void save_and_load();
  void change_registers(const Action& action);
  void answer(std::size_t vcpu, std::span<std::uint8_t> data);
  void note_tables(std::uint64_t gpa, unsigned level, std::vector<std::uint64_t>& seen);

  const Program& program_;
  struct Memory;
  Memory& memory_;
  AddressSpace space_{"memory", 0};
  MemoryRegionPtr middle_;
  bool middle_there_ = true;
  std::unique_ptr<Hypervisor> hypervisor_;
  std::unique_ptr<Vm> vm_;
  std::array<std::unique_ptr<IrqLine>, 8> lines_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  std::size_t next_action_ = 0;
  std::vector<std::size_t> next_answer_;
  std::vector<std::pair<std::uint64_t, std::vector<std::uint8_t>>> tables_;  // pages as they were
  std::vector<std::uint8_t> logged_;  // low RAM when the dirty log was last taken; empty: not known
  CpuSpecialRegs first_sregs_;
};

}  // namespace wisp::fuzz
