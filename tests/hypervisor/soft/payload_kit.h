// A processor with two megabytes of memory for small bare-metal programs, under each executor.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>

#include "hypervisor/soft/bare_environment.h"
#include "hypervisor/soft/processor.h"
#include "memory/address_space.h"

namespace wisp::soft {

class SayingNothing final : public BareEnvironment {
 public:
  void note(const std::string& what) override { ADD_FAILURE() << what; }
};

// Two megabytes mapped one to one by 4 KiB pages: the kernel's below 1 MiB, ring 3's above.
class Payload : public testing::TestWithParam<ExecutionOptions> {
 protected:
  static constexpr std::uint64_t kPml4 = 0x1000, kPdpt = 0x2000, kPd = 0x3000, kPt = 0x4000, kGdt = 0x8000,
                                 kIdt = 0x9000, kTss = 0xb000, kCode = 0x10000, kHandler = 0x18000,
                                 kStack = 0x30000, kIst = 0x38000, kUserCode = 0x100000,
                                 kUserStack = 0x110000, kData = 0x120000;
  static constexpr std::uint16_t kCode64 = 0x08, kStackSegment = 0x10, kUserCode64 = 0x2b, kUserData = 0x23;
  static constexpr std::uint64_t kRamSize = 4U << 20;

  void SetUp() override {
    void* memory = ::mmap(nullptr, kRamSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    ram_ = static_cast<std::uint8_t*>(memory);
    ASSERT_TRUE(space_.add_listener(&memory_));
    ASSERT_TRUE(space_.add(MemoryRegion::ram("ram", ram_, kRamSize), 0));
    auto code = make_shared_code(memory_,
                                 {.flush_inline = [](Cpu*) {},
                                  .revoke_writes = [](Cpu*) {},
                                  .wait_a_turn = [](Cpu*, std::uint32_t&) {}},
                                 GetParam());
    ASSERT_TRUE(code);
    auto processor = Processor::create(memory_, mmio_, environment_, *code);
    ASSERT_TRUE(processor);
    processor_ = std::move(*processor);
    make_machine();
  }
  void TearDown() override {
    processor_.reset();
    space_.remove_listener(&memory_);
    ::munmap(ram_, kRamSize);
  }

  Cpu& cpu() { return processor_->cpu(); }
  Core& core() { return processor_->core(); }
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
    std::copy(bytes.begin(), bytes.end(), ram_ + at);
  }
  void page(std::uint64_t linear, std::uint64_t entry) { put(kPt + linear / kPageSize * 8, entry); }
  void gate(std::uint64_t vector, std::uint64_t handler, std::uint64_t ist = 0, std::uint64_t dpl = 0) {
    put(kIdt + vector * 16, (handler & 0xffff) | std::uint64_t{kCode64} << 16 | ist << 32 |
                                (0x8e | dpl << 5) << 40 | (handler >> 16 & 0xffff) << 48);
    put(kIdt + vector * 16 + 8, handler >> 32);
  }
  // Runs from where rip stands to the next HLT.
  void run_to_halt() {
    cpu().run = kRunning;
    EXPECT_EQ(processor_->run(), Processor::Stop::kHalt) << std::hex << cpu().rip << ' ' << cpu().cr2;
  }
  Processor::Stop run() { return processor_->run(); }
  [[nodiscard]] int pauses() const { return environment_.pauses; }

  std::uint8_t* ram_ = nullptr;

  // The state that every program starts from.
  void make_machine() {
    put(kPml4, kPdpt | 7);
    put(kPdpt, kPd | 7);
    put(kPd, kPt | 7);
    for (std::uint64_t i = 0; i < 512; ++i) {
      put(kPt + i * 8, i * kPageSize | (i >= 256 ? 7U : 3U));
    }
    put(kGdt + kCode64, 0x00af9b000000ffffULL);
    put(kGdt + kStackSegment, 0x00cf93000000ffffULL);
    put(kGdt + (kUserData & 0xf8), 0x00cff3000000ffffULL);
    put(kGdt + (kUserCode64 & 0xf8), 0x00affb000000ffffULL);
    put(kTss + 4, kStack);
    put(kTss + 0x24, kIst);
    put(kTss + 0x66, std::uint16_t{0x68});
    Cpu& state = cpu();
    reset_cpu(state, true);
    state.cr3 = kPml4;
    state.cr4 = cr4::kPae | cr4::kPge | cr4::kOsfxsr | cr4::kOsxsave;
    state.xcr0 = 7;
    state.efer = efer::kLme | efer::kLma | efer::kSce | efer::kNxe;
    state.cr0 = cr0::kPe | cr0::kEt | cr0::kNe | cr0::kWp | cr0::kPg;
    state.gdt = {.base = kGdt, .limit = 0x3f};
    state.idt = {.base = kIdt, .limit = 0xfff};
    state.tr = {.base = kTss, .limit = 0x67, .selector = 0x30, .attributes = 0x8b};
    for (Segment& segment : state.segments) {
      segment = {.limit = 0xffffffff, .selector = kStackSegment, .attributes = 0xc093};
    }
    state.segments[kCs] = {.limit = 0xffffffff, .selector = kCode64, .attributes = 0xa09b};
    state.cpl = 0;
    state.rip = kCode;
    state.gpr[kRsp] = kStack - 0x1000;
    state.set_rflags(2);
    core().mmu.flush_all();
  }

 private:
  AddressSpace space_{"memory", 0};
  PhysicalMemory memory_;
  BareMmio mmio_;
  SayingNothing environment_;
  std::unique_ptr<Processor> processor_;
};

inline auto each_executor() {
  return testing::Values(ExecutionOptions{.executor = ExecutorChoice::kInterpret},
                         ExecutionOptions{.quick_loop = false}, ExecutionOptions{.quick_loop = true});
}
inline std::string executor_name(const testing::TestParamInfo<ExecutionOptions>& which) {
  if (which.param.executor == ExecutorChoice::kInterpret) {
    return "Interpreter";
  }
  return which.param.quick_loop.value_or(false) ? "TranslatorByLoop" : "Translator";
}

}  // namespace wisp::soft
