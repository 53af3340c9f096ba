#include "hypervisor/soft/guest_runner.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace wisp::soft {
namespace {

// Physical addresses. The kernel's part is also mapped at kHigh.
constexpr std::uint64_t kRamSize = 4U << 20;
constexpr std::uint64_t kPml4 = 0x1000, kLowPdpt = 0x2000, kLowPd = 0x3000, kCodePt = 0x4000,
                        kDataPt = 0x5000, kHighPdpt = 0x6000, kHighPd = 0x7000, kGdt = 0x8000, kIdt = 0x9000,
                        kTss = 0xb000, kHandlers = 0xc000, kStackTop = 0x20000, kCodePages = 0x200000,
                        kDataPages = 0x210000;
constexpr std::uint64_t kHigh = 0xffff800000000000;
constexpr std::uint64_t kKernelCode = 0x10;
constexpr std::uint64_t kUserCode = 0x33, kUserStack = 0x2b;  // as Linux has them

bool pushes_error(std::uint8_t vector) {
  return vector == vec::kDf || (vector >= vec::kTs && vector <= vec::kPf) || vector == vec::kAc ||
         vector == 21;
}

}  // namespace

class GuestRunner::Noting final : public BareEnvironment {
 public:
  void note(const std::string& what) override {
    if (notes.size() < 100) {
      notes.insert(what);
    }
  }
  std::set<std::string> notes{};
};

template <typename T>
void GuestRunner::put(std::uint64_t gpa, T value) {
  std::memcpy(ram_ + gpa, &value, sizeof value);
}

GuestRunner::GuestRunner(const ExecutionOptions& options)
    : environment_(std::make_unique<Noting>()), mmio_(std::make_unique<BareMmio>()) {
  void* memory = ::mmap(nullptr, kRamSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::abort();
  }
  ram_ = static_cast<std::uint8_t*>(memory);
  EXPECT_TRUE(space_.add_listener(&memory_));
  EXPECT_TRUE(space_.add(MemoryRegion::ram("ram", ram_, kRamSize), 0));
  auto code = make_shared_code(
      memory_,
      {.flush_inline = [](Cpu*) {}, .revoke_writes = [](Cpu*) {}, .wait_a_turn = [](Cpu*, std::uint32_t&) {}},
      options);
  EXPECT_TRUE(code);
  code_ = *code;
  auto processor = Processor::create(memory_, *mmio_, *environment_, code_);
  EXPECT_TRUE(processor);
  processor_ = std::move(*processor);
  make_tables();
  reset_cpu(processor_->cpu(), true);
  reset_state({}, 0);
  processor_->core().mmu.flush_all();
  // A processor that does not come back from a case is stopped, so that the case can be named.
  watchdog_ = std::jthread([this](const std::stop_token& stop) {
    std::uint64_t before = ~0ULL;
    int same = 0;
    while (!stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      const std::uint64_t now = progress_.load();
      same = now == before && now % 2 == 1 ? same + 1 : 0;
      before = now;
      if (same >= 20) {
        processor_->cpu().run = 0;
      }
      if (same >= 150) {
        std::fprintf(stderr, "a case at %#llx does not end, and the processor cannot be stopped\n",
                     static_cast<unsigned long long>(case_rip_.load()));
        std::abort();
      }
    }
  });
}

GuestRunner::~GuestRunner() {
  watchdog_ = {};
  processor_.reset();
  code_.reset();
  space_.remove_listener(&memory_);
  ::munmap(ram_, kRamSize);
}

const std::set<std::string>& GuestRunner::notes() const {
  return environment_->notes;
}

void GuestRunner::make_tables() {
  constexpr std::uint64_t kUserPage = 7;
  put(kPml4, kLowPdpt | kUserPage);
  put(kLowPdpt, kLowPd | kUserPage);
  put(kLowPd + 8 * (kCaseCode >> 21), kCodePt | kUserPage);
  put(kLowPd + 8 * (kCaseData >> 21), kDataPt | kUserPage);
  constexpr std::uint64_t kNoExecute = 1ULL << 63;
  for (std::uint64_t i = 0; i < 2; ++i) {
    put(kCodePt + 8 * i, (kCodePages + i * kPageSize) | 5);
    put(kDataPt + 8 * i, (kDataPages + i * kPageSize) | 7 | kNoExecute);
  }
  put(kDataPt + 16, (kDataPages + 2 * kPageSize) | 5 | kNoExecute);
  put(kPml4 + 8 * 256, kHighPdpt | 3);
  put(kHighPdpt, kHighPd | 3);
  put(kHighPd, std::uint64_t{0x83});
  std::memset(ram_ + kCodePages, 0xcc, kCaseCodeSize);
  std::memset(ram_ + kDataPages + kCaseDataSize, kCaseReadOnlyByte, kPageSize);
  put(kGdt + kKernelCode, 0x00af9b000000ffffULL);
  put(kGdt + (kUserStack & 0xf8), 0x00cff3000000ffffULL);
  put(kGdt + (kUserCode & 0xf8), 0x00affb000000ffffULL);
  std::memset(ram_ + kHandlers, 0xf4, 256);
  for (std::uint64_t vector = 0; vector < 256; ++vector) {
    const std::uint64_t handler = kHigh + kHandlers + vector;
    const std::uint64_t dpl = vector == vec::kBp || vector == vec::kOf ? 3 : 0;
    put(kIdt + vector * 16,
        (handler & 0xffff) | kKernelCode << 16 | (0x8e00 | dpl << 13) << 32 | (handler >> 16 & 0xffff) << 48);
    put(kIdt + vector * 16 + 8, handler >> 32);
  }
  put(kTss + 4, kHigh + kStackTop);
  put(kTss + 0x66, std::uint16_t{0x68});  // no I/O permission bitmap
}

void GuestRunner::reset_state(const Case& one, std::uint64_t fs_base) {
  Cpu& cpu = processor_->cpu();
  cpu.cr0 = cr0::kPe | cr0::kMp | cr0::kEt | cr0::kNe | cr0::kWp | cr0::kAm | cr0::kPg;
  cpu.cr3 = kPml4;
  cpu.cr4 =
      cr4::kPae | cr4::kPge | cr4::kOsfxsr | cr4::kOsxmmexcpt | cr4::kOsxsave | cr4::kFsgsbase | cr4::kUmip;
  cpu.efer = efer::kLme | efer::kLma | efer::kSce | efer::kNxe;
  cpu.xcr0 = 7;
  cpu.gdt = {.base = kHigh + kGdt, .limit = 0x3f};
  cpu.idt = {.base = kHigh + kIdt, .limit = 0xfff};
  cpu.tr = {.base = kHigh + kTss, .limit = 0x67, .selector = 0x38, .attributes = 0x8b};
  cpu.segments = {};
  cpu.segments[kCs] = {.limit = 0xffffffff, .selector = kUserCode, .attributes = 0xa0fb};
  cpu.segments[kSs] = {.limit = 0xffffffff, .selector = kUserStack, .attributes = 0xc0f3};
  cpu.segments[kFs].base = fs_base;
  cpu.segments[kGs].base = kCaseGsBase;
  cpu.cpl = 3;
  cpu.rip = one.rip;
  cpu.gpr = one.gpr;
  cpu.set_rflags(one.rflags | (one.single_step ? flag::kTf : 0));
  cpu.vectors = one.vectors;
  cpu.vectors_here = 0;
  cpu.halted = false;
  cpu.interrupt_shadow = 0;
  cpu.io.waiting = false;
  cpu.io.answer_count = 0;
  cpu.io.write_count = 0;
  cpu.cr2 = 0;
  cpu.run = 1;
}

void GuestRunner::write_code(const Case& one, bool in) {
  const std::uint64_t offset = one.rip - kCaseCode;
  for (std::size_t i = 0; i < one.length && offset + i < kCaseCodeSize; ++i) {
    const std::uint64_t gpa = kCodePages + offset + i;
    ram_[gpa] = in ? one.bytes[i] : 0xcc;
    memory_.written(memory_.find(gpa), gpa, 1);
  }
}

void GuestRunner::run(const Case& one, const CaseData& data, std::uint64_t fs_base, CaseResult& result) {
  std::memcpy(ram_ + kDataPages, data.data(), data.size());
  write_code(one, true);
  reset_state(one, fs_base);
  case_rip_ = one.rip;
  ++progress_;
  const Processor::Stop stop = processor_->run();
  ++progress_;
  Cpu& cpu = processor_->cpu();
  write_code(one, false);
  result.end = stop == Processor::Stop::kHalt ? CaseResult::End::kException : CaseResult::End::kHang;
  result.gpr = cpu.gpr;
  result.vectors = cpu.vectors;
  std::memcpy(result.data.data(), ram_ + kDataPages, result.data.size());
  result.cr2 = cpu.cr2;
  result.rip = cpu.rip;
  result.rflags = cpu.rflags();
  if (result.end != CaseResult::End::kException) {
    return;
  }
  result.vector = static_cast<std::uint8_t>(cpu.rip - 1 - kHigh - kHandlers);
  std::uint64_t frame = cpu.gpr[kRsp] - kHigh;
  const auto pop = [&] {
    std::uint64_t value = 0;
    std::memcpy(&value, ram_ + frame % kRamSize, sizeof value);
    frame += 8;
    return value;
  };
  result.error = pushes_error(result.vector) ? static_cast<std::uint32_t>(pop()) : 0;
  result.rip = pop();
  pop();
  result.rflags = pop();
  result.gpr[kRsp] = pop();
}

}  // namespace wisp::soft
