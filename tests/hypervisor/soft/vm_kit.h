// A VM of the software CPU with one vCPU, by way of the engine's seam, for guests of a few instructions under
// either executor.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>

#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/soft_hypervisor.h"
#include "memory/address_space.h"

namespace wisp::soft {

class VmKit : public testing::TestWithParam<ExecutorChoice> {
 protected:
  static constexpr std::uint64_t kRamSize = 1U << 20;
  static constexpr std::uint64_t kPml4 = 0x1000, kPdpt = 0x2000, kPd = 0x3000, kPt = 0x4000, kGdt = 0x8000,
                                 kIdt = 0x9000, kTss = 0xb000, kCode = 0x10000, kHandler = 0x18000,
                                 kStack = 0x30000, kData = 0x40000;
  static constexpr std::uint16_t kCode64 = 0x08, kDataSegment = 0x10;

  void SetUp() override {
    void* memory = ::mmap(nullptr, kRamSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    ram_ = static_cast<std::uint8_t*>(memory);
    SoftOptions options;
    options.execution = execution();
    options.execution.executor = GetParam();
    auto hypervisor = SoftHypervisor::open(options);
    ASSERT_TRUE(hypervisor);
    auto vm = (*hypervisor)->create_vm({});
    ASSERT_TRUE(vm);
    vm_ = std::move(*vm);
    ASSERT_TRUE(space_.add_listener(&vm_->memory_listener()));
    ASSERT_TRUE(space_.add(MemoryRegion::ram("ram", ram_, kRamSize), 0));
    auto vcpu = vm_->create_vcpu(0);
    ASSERT_TRUE(vcpu);
    vcpu_ = std::move(*vcpu);
  }
  void TearDown() override {
    vcpu_.reset();
    space_.remove_listener(&vm_->memory_listener());
    vm_.reset();
    ::munmap(ram_, kRamSize);
  }

  [[nodiscard]] virtual ExecutionOptions execution() const { return {}; }

  template <typename T>
  void put(std::uint64_t gpa, T value) {
    std::memcpy(ram_ + gpa, &value, sizeof value);
  }
  std::uint64_t get(std::uint64_t gpa) {
    std::uint64_t value = 0;
    std::memcpy(&value, ram_ + gpa, sizeof value);
    return value;
  }
  void code(std::uint64_t at, std::initializer_list<std::uint8_t> bytes) {
    std::ranges::copy(bytes, ram_ + at);
    vm_->host_write_hook()(at, bytes.size());
  }
  void fill(std::uint64_t at, std::size_t size, std::initializer_list<std::uint8_t> bytes) {
    for (std::size_t i = 0; i < size; ++i) {
      ram_[at + i] = bytes.begin()[i % bytes.size()];
    }
  }
  void gate(std::uint64_t vector, std::uint64_t handler) {
    put(kIdt + vector * 16,
        (handler & 0xffff) | std::uint64_t{kCode64} << 16 | 0x8eULL << 40 | (handler >> 16 & 0xffff) << 48);
    put(kIdt + vector * 16 + 8, handler >> 32);
  }

  static CpuSegment segment(std::uint16_t selector, std::uint8_t type, bool wide) {
    return {.limit = 0xffffffff,
            .selector = selector,
            .type = type,
            .present = true,
            .long_mode = wide,
            .default_big = !wide,
            .granularity = true};
  }
  // 64-bit mode, with the first MiB mapped one to one.
  CpuState long_mode() {
    put(kPml4, kPdpt | 3);
    put(kPdpt, kPd | 3);
    put(kPd, kPt | 3);
    for (std::uint64_t i = 0; i < 256; ++i) {
      put(kPt + i * 8, i * 0x1000 | 3);
    }
    put(kGdt + kCode64, 0x00af9b000000ffffULL);
    put(kGdt + kDataSegment, 0x00cf93000000ffffULL);
    auto saved = vcpu_->save();
    EXPECT_TRUE(saved);
    CpuState state = *saved;
    CpuSpecialRegs& sregs = state.sregs;
    sregs.cr0 = cr0::kPe | cr0::kEt | cr0::kNe | cr0::kWp | cr0::kPg;
    sregs.cr3 = kPml4;
    sregs.cr4 = cr4::kPae | cr4::kOsfxsr | cr4::kOsxsave;
    sregs.efer = efer::kLme | efer::kLma | efer::kSce | efer::kNxe;
    sregs.cs = segment(kCode64, 0xb, true);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(kDataSegment, 0x3, false);
    sregs.gdt = {.base = kGdt, .limit = 0x3f};
    sregs.idt = {.base = kIdt, .limit = 0xfff};
    state.regs = {.rsp = kStack, .rip = kCode, .rflags = 2};
    state.run_state = CpuRunState::kRunnable;
    return state;
  }
  // Runs to the next exit.
  Exit run() { return vcpu_->run(); }
  // Runs until it halts, which shows as a kick that finds it halted.
  CpuState run_to_halt() {
    EXPECT_TRUE(std::holds_alternative<InterruptedExit>(run_and_kick()));
    auto state = vcpu_->save();
    if (!state) {
      ADD_FAILURE() << state.error().message;
      return {};
    }
    EXPECT_EQ(state->run_state, CpuRunState::kHalted) << std::hex << state->regs.rip;
    return *state;
  }
  // Runs, and kicks after a while. A processor that does not come back ends the test program.
  Exit run_and_kick(std::chrono::milliseconds after = std::chrono::milliseconds(30)) {
    std::promise<void> back;
    const std::jthread kicker([this, after, returned = back.get_future()] {
      if (returned.wait_for(after) == std::future_status::ready) {
        return;
      }
      vcpu_->kick();
      if (returned.wait_for(std::chrono::seconds(20)) != std::future_status::ready) {
        std::fprintf(stderr, "the processor cannot be stopped\n");
        std::abort();
      }
    });
    Exit exit = vcpu_->run();
    back.set_value();
    return exit;
  }

  std::uint8_t* ram_ = nullptr;
  AddressSpace space_{"memory", 0};
  std::unique_ptr<Vm> vm_;
  std::unique_ptr<Vcpu> vcpu_;
};

// For INSTANTIATE_TEST_SUITE_P.
[[nodiscard]] inline auto both_executors() {
  return testing::Values(ExecutorChoice::kInterpret, ExecutorChoice::kTranslate);
}
[[nodiscard]] inline std::string executor_name(const testing::TestParamInfo<ExecutorChoice>& which) {
  return which.param == ExecutorChoice::kInterpret ? "Interpreter" : "Translator";
}

}  // namespace wisp::soft
