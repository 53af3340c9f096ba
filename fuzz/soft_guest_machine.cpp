#include "soft_guest_machine.h"

#include <cstdio>
#include <cstdlib>

#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/soft_hypervisor.h"

namespace wisp::fuzz {
namespace {

template <typename T>
T must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().message.c_str());
    std::abort();
  }
  if constexpr (!std::is_void_v<T>) {
    return *std::move(result);
  }
}

constexpr std::uint64_t kEntryAddress = 0x000ffffffffff000;
constexpr std::uint64_t kAccessedAndDirty = 0x60;

bool same_table(const std::uint8_t* now, const std::vector<std::uint8_t>& before, std::size_t entry_size) {
  for (std::size_t i = 0; i < before.size(); i += entry_size) {
    std::uint64_t a = 0;
    std::uint64_t b = 0;
    std::memcpy(&a, now + i, entry_size);
    std::memcpy(&b, before.data() + i, entry_size);
    if (((a ^ b) & ~kAccessedAndDirty) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

// Kept from run to run: making it costs more than most runs.
struct Machine::Memory {
  GuardedBlock low{kLowSize};
  GuardedBlock rom{kRomSize};
  GuardedBlock middle{kMiddleSize};
  GuardedBlock far{kFarSize};
  bool used = false;

  static Memory& get() {
    static std::array<Memory, 2> both;
    Memory& memory = both[0].used ? both[1] : both[0];
    if (memory.used) {
      std::abort();
    }
    memory.used = true;
    for (GuardedBlock* block : {&memory.low, &memory.rom, &memory.middle, &memory.far}) {
      block->clear();
    }
    return memory;
  }
};

Machine::Machine(const Program& program, bool interpreter) : program_(program), memory_(Memory::get()) {
  SoftOptions options;
  options.execution.executor =
      interpreter ? soft::ExecutorChoice::kInterpret : soft::ExecutorChoice::kTranslate;
  options.execution.virtual_clock = program.differential;
  options.execution.quick_loop = program.quick_loop;
  options.execution.pause_every = program.differential ? program.pause_every : 0;
  options.note = [](const std::string& /*text*/) {};
  hypervisor_ = must(SoftHypervisor::open(options));
  const std::uint32_t count = program.two_vcpus ? 2 : 1;
  vm_ = must(hypervisor_->create_vm({.max_vcpus = count, .topology = {.cores = count}}));
  place_memory();
  for (std::uint32_t i = 0; i < lines_.size(); ++i) {
    lines_[i] = must(vm_->irq_line(i * 2));
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    vcpus_.push_back(must(vm_->create_vcpu(i)));
  }
  next_answer_.resize(count);
}

Machine::~Machine() {
  vcpus_.clear();
  for (auto& line : lines_) {
    line.reset();
  }
  space_.remove_listener(&vm_->memory_listener());
  vm_.reset();
  memory_.used = false;
}

void Machine::place_memory() {
  must(space_.add_listener(&vm_->memory_listener()));
  must(space_.add(MemoryRegion::ram("low", memory_.low.data(), kLowSize), kLowRam));
  must(space_.add(MemoryRegion::rom("rom", memory_.rom.data(), kRomSize), kRom));
  middle_ = MemoryRegion::ram("middle", memory_.middle.data(), kMiddleSize);
  must(space_.add(middle_, kMiddleRam));
  must(space_.add(MemoryRegion::ram("far", memory_.far.data(), kFarSize), kFarRam));
}

std::uint8_t* Machine::host(std::uint64_t gpa, std::size_t size) const {
  const auto in = [&](std::uint64_t start, const GuardedBlock& block) {
    return gpa >= start && gpa - start < block.size() && size <= block.size() - (gpa - start)
               ? block.data() + (gpa - start)
               : nullptr;
  };
  for (std::uint8_t* found : {in(kLowRam, memory_.low), in(kRom, memory_.rom), in(kMiddleRam, memory_.middle),
                              in(kFarRam, memory_.far)}) {
    if (found != nullptr) {
      return found;
    }
  }
  return nullptr;
}

void Machine::write(std::uint64_t gpa, std::span<const std::uint8_t> bytes) {
  if (std::uint8_t* to = host(gpa, bytes.size()); to != nullptr && !bytes.empty()) {
    std::memcpy(to, bytes.data(), bytes.size());
  }
}

std::vector<const GuardedBlock*> Machine::blocks() const {
  return {&memory_.low, &memory_.rom, &memory_.middle, &memory_.far};
}

bool Machine::start() {
  for (const MemoryWrite& one : program_.memory) {
    write(one.gpa, one.bytes);
  }
  for (std::size_t i = 0; i < vcpus_.size(); ++i) {
    CpuState state = must(vcpus_[i]->save());
    const std::uint64_t apic_base = state.sregs.apic_base;
    state.regs = program_.regs;
    state.sregs = program_.sregs;
    state.sregs.apic_base = apic_base;
    state.debug = program_.debug;
    state.xcr0 = program_.xcr0;
    for (const CpuMsr& msr : program_.msrs) {
      std::erase_if(state.msrs, [&](const CpuMsr& known) { return known.index == msr.index; });
      state.msrs.push_back(msr);
    }
    state.events.interrupt.shadow = program_.shadow;
    state.run_state = program_.halted ? CpuRunState::kHalted : CpuRunState::kRunnable;
    if (i != 0) {
      state.regs.rip += 0x400;
      state.regs.rsp -= 0x400;
    }
    if (!vcpus_[i]->load(state)) {
      return false;
    }
  }
  first_sregs_ = must(vcpus_[0]->special_regs());
  if (program_.differential && (first_sregs_.cr0 & soft::cr0::kPg) != 0) {
    std::vector<std::uint64_t> seen;
    const bool pae = (first_sregs_.cr4 & soft::cr4::kPae) != 0;
    const bool long_mode = (first_sregs_.efer & soft::efer::kLma) != 0;
    note_tables(first_sregs_.cr3 & kEntryAddress, long_mode ? 4 : pae ? 3 : 2, seen);
  }
  return true;
}

void Machine::note_tables(std::uint64_t gpa, unsigned level, std::vector<std::uint64_t>& seen) {
  const std::uint8_t* table = host(gpa, 0x1000);
  const std::uint64_t key = gpa | level;
  if (table == nullptr || std::ranges::find(seen, key) != seen.end()) {
    return;
  }
  seen.push_back(key);
  if (std::ranges::find(tables_, gpa, [](const auto& known) { return known.first; }) == tables_.end()) {
    tables_.emplace_back(gpa, std::vector<std::uint8_t>(table, table + 0x1000));
  }
  if (level == 1) {
    return;
  }
  const std::size_t size = (first_sregs_.cr4 & soft::cr4::kPae) != 0 ? 8 : 4;
  for (std::size_t at = 0; at < 0x1000; at += size) {
    std::uint64_t entry = 0;
    std::memcpy(&entry, table + at, size);
    if ((entry & 1) != 0 && (entry & 0x80) == 0) {
      note_tables(entry & kEntryAddress, level - 1, seen);
    }
  }
}

bool Machine::tables_changed() {
  const CpuSpecialRegs sregs = must(vcpus_[0]->special_regs());
  if (sregs.cr3 != first_sregs_.cr3 || ((sregs.cr0 ^ first_sregs_.cr0) & soft::cr0::kPg) != 0 ||
      ((sregs.cr4 ^ first_sregs_.cr4) & (soft::cr4::kPae | soft::cr4::kPse)) != 0) {
    return true;
  }
  const std::size_t size = (first_sregs_.cr4 & soft::cr4::kPae) != 0 ? 8 : 4;
  return std::ranges::any_of(
      tables_, [&](const auto& table) { return !same_table(host(table.first, 0x1000), table.second, size); });
}

bool Machine::in_tables(std::uint64_t gpa) const {
  return std::ranges::any_of(tables_, [gpa](const auto& table) { return (gpa ^ table.first) < 0x1000; });
}

CpuState Machine::state() {
  return must(vcpus_[0]->save());
}

void Machine::answer(std::size_t vcpu, std::span<std::uint8_t> data) {
  for (std::uint8_t& byte : data) {
    std::size_t& next = next_answer_[vcpu];
    byte = program_.answers.empty() ? 0xff : program_.answers[next++ % program_.answers.size()];
  }
}

Machine::Step Machine::step(std::size_t vcpu) {
  const Exit exit = vcpus_[vcpu]->run();
  Step step{.kind = exit.index()};
  if (const auto* read = std::get_if<PortReadExit>(&exit)) {
    step.address = read->port;
    answer(vcpu, read->data);
    step.data.assign(read->data.begin(), read->data.end());
  } else if (const auto* device = std::get_if<MmioReadExit>(&exit)) {
    step.address = device->address;
    answer(vcpu, device->data);
    step.data.assign(device->data.begin(), device->data.end());
  } else if (const auto* write_exit = std::get_if<PortWriteExit>(&exit)) {
    step.address = write_exit->port;
    step.data.assign(write_exit->data.begin(), write_exit->data.end());
  } else if (const auto* stored = std::get_if<MmioWriteExit>(&exit)) {
    step.address = stored->address;
    step.data.assign(stored->data.begin(), stored->data.end());
  }
  return step;
}

void Machine::act(bool running) {
  if (program_.actions.empty()) {
    return;
  }
  apply(program_.actions[next_action_++ % program_.actions.size()], running);
}

void Machine::apply(const Action& action, bool running) {
  switch (action.kind) {
    case Action::Kind::kNone:
      break;
    case Action::Kind::kPulse:
      lines_.at(action.a % lines_.size())->pulse();
      break;
    case Action::Kind::kLevel:
      lines_.at(action.a % lines_.size())->set_level((action.b & 1) != 0);
      break;
    case Action::Kind::kMessage:
      must(vm_->msi_line({.address = 0xfee00000 | (action.value & 0xff00cULL) | (action.b & 0x0fULL) << 12,
                          .data = action.a | (action.value & 0x4700U)}))
          ->pulse();
      break;
    case Action::Kind::kHostWrite: {
      const std::uint64_t gpa =
          (action.a & 1) != 0 ? kCode + action.value % 0x2000U : action.value % kLowSize;
      if (std::uint8_t* to = host(gpa, 1)) {
        __atomic_store_n(to, action.b, __ATOMIC_RELAXED);
        vm_->host_write_hook()(gpa, 1);
      }
      break;
    }
    case Action::Kind::kDirtyOn:
      must(vm_->set_dirty_log(true));
      if (logged_.empty()) {
        note_logged(running);
      }
      break;
    case Action::Kind::kDirtyTake:
      take_log((action.a & 1) != 0 ? kLowRam : kFarRam, running);
      break;
    case Action::Kind::kDirtyOff:
      must(vm_->set_dirty_log(false));
      logged_.clear();
      break;
    case Action::Kind::kRemoveMiddle:
      move_middle();
      break;
    case Action::Kind::kSaveAndLoad:
      if (!running) {
        save_and_load();
      }
      break;
    case Action::Kind::kPlatform:
      if (!running) {
        must(vm_->load_platform(must(vm_->save_platform())));
      }
      break;
    case Action::Kind::kReset:
      if (!running && action.a < 0x20) {
        for (const auto& vcpu : vcpus_) {
          (void)vcpu->reset();
        }
      }
      break;
    case Action::Kind::kRegisters:
      if (!running) {
        change_registers(action);
      }
      break;
  }
}

// Low RAM as it is when a log starts. While vCPUs run nobody can say what that is.
void Machine::note_logged(bool running) {
  if (!running) {
    logged_.assign(memory_.low.data(), memory_.low.data() + kLowSize);
  }
}

// What has changed since the last time must be in the log.
void Machine::take_log(std::uint64_t gpa, bool running) {
  const auto log = vm_->take_dirty_log(gpa);
  if (!log || gpa != kLowRam) {
    return;
  }
  for (std::size_t at = 0; at < logged_.size(); at += 0x1000) {
    const std::size_t page = at / 0x1000;
    if ((log->at(page / 64) >> (page % 64) & 1) == 0 &&
        std::memcmp(memory_.low.data() + at, logged_.data() + at, 0x1000) != 0) {
      std::fprintf(stderr, "page %zu was written, and the dirty log does not say so\n", page);
      std::abort();
    }
  }
  logged_.clear();
  note_logged(running);
}

void Machine::move_middle() {
  must(middle_there_ ? space_.remove(middle_) : space_.add(middle_, kMiddleRam));
  middle_there_ = !middle_there_;
}

void Machine::save_and_load() {
  for (const auto& vcpu : vcpus_) {
    if (auto state = vcpu->save()) {
      must(vcpu->load(*state));
    }
  }
}

void Machine::change_registers(const Action& action) {
  CpuRegs regs = must(vcpus_[0]->regs());
  if ((action.a & 1) != 0) {
    regs.rip = kCode + action.value % 0x800U;
  }
  if ((action.a & 2) != 0) {
    regs.rsp = interesting_address(action.b);
  }
  if ((action.a & 4) != 0) {
    regs.rcx = action.value;
  }
  if ((action.a & 8) != 0) {
    regs.rdi = interesting_address(action.b);
    regs.rsi = interesting_address(static_cast<std::uint8_t>(action.value));
  }
  must(vcpus_[0]->set_regs(regs));
}

}  // namespace wisp::fuzz
