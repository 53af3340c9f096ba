// One processor with memory, descriptor tables and page tables, put into a mode by the test, which then runs
// single instructions or delivers events.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "hypervisor/soft/bare_environment.h"
#include "hypervisor/soft/decoder.h"
#include "hypervisor/soft/executor.h"
#include "memory/address_space.h"

namespace wisp::soft {

class TestEnvironment final : public Environment {
 public:
  std::uint64_t read_tsc() override { return tsc; }
  CpuidEntry cpuid(std::uint32_t leaf, std::uint32_t subleaf) override {
    CpuidEntry entry{.leaf = leaf, .subleaf = subleaf};
    switch (leaf) {
      case 1:
        entry.ecx = 1U << 17 | 1U << 26;  // PCID, XSAVE
        entry.edx = 0x070020fc & ~4U;     // no debugging extensions until a test says so
        entry.edx |= debugging_extensions ? 4U : 0;
        break;
      case 7:
        entry.ebx = 1U << 0 | 1U << 1 | 1U << 7 | 1U << 20;
        entry.ecx = 1U << 2;
        entry.edx = 1U << 26 | 1U << 29;
        break;
      case 0xd:
        entry.eax = 7;
        break;
      case 0x16:
        entry.eax = 2500;
        break;
      case 0x80000001:
        entry.edx = 1U << 11 | 1U << 20 | 1U << 29;
        break;
      default:
        break;
    }
    return entry;
  }
  std::optional<std::uint64_t> read_msr(std::uint32_t index) override {
    const auto found = msrs.find(index);
    return found != msrs.end() ? std::optional(found->second) : std::nullopt;
  }
  MsrWrite write_msr(std::uint32_t index, std::uint64_t value) override {
    const auto found = msrs.find(index);
    if (found == msrs.end()) {
      return MsrWrite::kUnknown;
    }
    if (value == ~0ULL) {
      return MsrWrite::kBadValue;
    }
    found->second = value;
    return MsrWrite::kDone;
  }
  std::uint64_t read_cr8() override { return cr8; }
  void write_cr8(std::uint64_t value) override { cr8 = value; }
  bool port_read(std::uint16_t /*port*/, std::span<std::uint8_t> /*data*/) override { return false; }
  bool port_write(std::uint16_t /*port*/, std::span<const std::uint8_t> /*data*/) override { return false; }
  std::uint64_t hypercall(std::uint64_t number, std::span<const std::uint64_t, 4> arguments) override {
    return number + arguments[0] * 2 + arguments[1] * 3 + arguments[2] * 5 + arguments[3] * 7;
  }
  std::uint64_t random() override { return 0x1122334455667788; }
  void pause() override { ++pauses; }
  void note(const std::string& what) override { notes.push_back(what); }

  std::uint64_t tsc = 1000;
  std::uint64_t cr8 = 0;
  int pauses = 0;
  bool debugging_extensions = true;
  std::map<std::uint32_t, std::uint64_t> msrs{};
  std::vector<std::string> notes{};
};

// What a gate leads to, and who may.
struct GateSpec {
  std::uint16_t selector = 0;
  std::uint64_t offset = 0;
  std::uint8_t type = 14;
  std::uint8_t dpl = 0;
  std::uint8_t extra = 0;  // IST, or parameters
  bool present = true;
};

class SystemKit {
 public:
  static constexpr std::uint64_t kRamSize = 4U << 20;
  static constexpr std::uint64_t kTables = 0x1000, kPageTable = 0x4000, kGdt = 0x8000, kIdt = 0x9000,
                                 kTss = 0xb000, kLdt = 0xc000;
  static constexpr std::uint64_t kKernelStack = 0x20000, kIstStack = 0x28000, kUserStack = 0x250000;
  static constexpr std::uint64_t kPaged = 2U << 20;  // from here 4 KiB pages of ring 3
  static constexpr std::uint16_t kCode64 = 0x08, kData = 0x10, kUserCode32 = 0x1b, kUserData = 0x23,
                                 kUserCode64 = 0x2b, kTask = 0x30, kCode32 = 0x40, kAbsent = 0x48,
                                 kReadOnly = 0x50, kConforming = 0x58, kGate = 0x60, kLocal = 0x70,
                                 kCode16 = 0x80, kData16 = 0x88, kRing1 = 0x91, kBroken = 0x98,
                                 kExecuteOnly = 0xa0, kConforming32 = 0xa8;

  SystemKit() {
    ram_ = static_cast<std::uint8_t*>(
        ::mmap(nullptr, kRamSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_NE(ram_, MAP_FAILED);
    EXPECT_TRUE(space_.add_listener(&memory_));
    EXPECT_TRUE(space_.add(MemoryRegion::ram("ram", ram_, kRamSize), 0));
    cpu_ = std::make_unique<Cpu>();
    mmu_ = std::make_unique<Mmu>(*cpu_, memory_, mmio_);
    core_ = std::make_unique<Core>(Core{.cpu = *cpu_, .mmu = *mmu_, .memory = memory_, .env = env});
    reset_cpu(*cpu_, true);
    mmu_->flush_all();
    make_tables();
  }
  ~SystemKit() {
    space_.remove_listener(&memory_);
    ::munmap(ram_, kRamSize);
  }
  SystemKit(const SystemKit&) = delete;
  SystemKit& operator=(const SystemKit&) = delete;

  Cpu& cpu() { return *cpu_; }
  Core& core() { return *core_; }
  Mmu& mmu() { return *mmu_; }

  template <typename T>
  void put(std::uint64_t gpa, T value) {
    std::memcpy(ram_ + gpa, &value, sizeof value);
  }
  template <typename T>
  T get(std::uint64_t gpa) {
    T value;
    std::memcpy(&value, ram_ + gpa, sizeof value);
    return value;
  }
  std::uint8_t* at(std::uint64_t gpa) { return ram_ + gpa; }

  // --- descriptors

  void descriptor(std::uint16_t selector, std::uint32_t base, std::uint32_t raw_limit,
                  std::uint16_t attributes) {
    put(kGdt + (selector & 0xfff8U),
        std::uint64_t{raw_limit & 0xffff} | std::uint64_t{base & 0xffffff} << 16 |
            std::uint64_t{attributes & 0xf0ffU} << 40 | std::uint64_t{raw_limit >> 16 & 0xf} << 48 |
            std::uint64_t{base >> 24} << 56);
  }
  static std::uint64_t gate_low(const GateSpec& spec) {
    const std::uint64_t rights = spec.type | spec.dpl << 5 | (spec.present ? 0x80 : 0);
    return (spec.offset & 0xffff) | std::uint64_t{spec.selector} << 16 | std::uint64_t{spec.extra} << 32 |
           rights << 40 | (spec.offset >> 16 & 0xffff) << 48;
  }
  void gate64(std::uint8_t vector, const GateSpec& spec) {
    put(kIdt + vector * 16U, gate_low(spec));
    put(kIdt + vector * 16U + 8, spec.offset >> 32);
  }
  void gate32(std::uint8_t vector, const GateSpec& spec) { put(kIdt + vector * 8U, gate_low(spec)); }
  void call_gate(std::uint16_t selector, const GateSpec& spec) {
    put(kGdt + selector, gate_low(spec));
    put(kGdt + selector + 8, spec.offset >> 32);
  }

  // Page tables and descriptors as the tests find them.
  void make_tables() {
    put<std::uint64_t>(kTables, (kTables + 0x1000) | 7);
    put<std::uint64_t>(kTables + 0x1000, (kTables + 0x2000) | 7);
    put<std::uint64_t>(kTables + 0x2000, 0x83);  // ring 0, 2 MiB
    put<std::uint64_t>(kTables + 0x2008, kPageTable | 7);
    for (std::uint64_t i = 0; i < 512; ++i) {
      put<std::uint64_t>(kPageTable + i * 8, (kPaged + i * 0x1000) | 7);
    }
    descriptor(kCode64, 0, 0xfffff, 0xa09b);
    descriptor(kData, 0, 0xfffff, 0xc093);
    descriptor(kUserCode32, 0, 0xfffff, 0xc0fb);
    descriptor(kUserData, 0, 0xfffff, 0xc0f3);
    descriptor(kUserCode64, 0, 0xfffff, 0xa0fb);
    descriptor(kTask, kTss, 0x67, 0x89);
    descriptor(kCode32, 0, 0xfffff, 0xc09b);
    descriptor(kAbsent, 0, 0xfffff, 0xc013);
    descriptor(kReadOnly, 0, 0xfffff, 0xc0f0);
    descriptor(kConforming, 0, 0xfffff, 0xa09e);
    descriptor(kLocal, kLdt, 0xf, 0x82);
    descriptor(kCode16, 0x10000, 0xffff, 0x9b);
    descriptor(kData16, 0x10000, 0xffff, 0x93);
    descriptor(kRing1, 0, 0xfffff, 0xc0b3);
    descriptor(kBroken, 0, 0xfffff, 0xe09b);  // L and D
    descriptor(kExecuteOnly, 0, 0xfffff, 0xc0f9);
    descriptor(kConforming32, 0, 0xfffff, 0xc09f);
  }

  // --- modes

  void real_mode() {
    reset_cpu(cpu(), true);
    cpu().segments[kCs].base = 0;
    cpu().segments[kCs].selector = 0;
    cpu().rip = 0x1000;
    cpu().gpr[kRsp] = 0x8000;
    mmu_->flush_all();
  }
  // 32-bit flat protected mode without paging.
  void protected_mode(std::uint8_t ring) {
    tables();
    cpu().cr0 = cr0::kPe | cr0::kEt;
    cpu().cr4 = 0;
    cpu().efer = 0;
    cpu().tr = {.base = kTss, .limit = 0x67, .selector = kTask, .attributes = 0x8b};
    put<std::uint32_t>(kTss + 4, kKernelStack);
    put<std::uint16_t>(kTss + 8, kData);
    segments(ring == 0 ? kCode32 : kUserCode32, ring == 0 ? kData : kUserData, ring);
    mmu_->flush_all();
  }
  void long_mode(std::uint8_t ring) {
    tables();
    cpu().cr3 = kTables;
    cpu().cr4 = cr4::kPae | cr4::kOsfxsr | cr4::kOsxsave;
    cpu().xcr0 = 7;
    cpu().efer = efer::kLme | efer::kLma | efer::kSce | efer::kNxe;
    cpu().cr0 = cr0::kPe | cr0::kEt | cr0::kNe | cr0::kWp | cr0::kPg;
    cpu().tr = {.base = kTss, .limit = 0x67, .selector = kTask, .attributes = 0x8b};
    std::memset(ram_ + kTss, 0, 0x68);
    put<std::uint64_t>(kTss + 4, kKernelStack);
    put<std::uint64_t>(kTss + 0x24, kIstStack);
    segments(ring == 0 ? kCode64 : kUserCode64, ring == 0 ? kData : kUserData, ring);
    mmu_->flush_all();
  }
  void compatibility_mode(std::uint8_t ring) {
    long_mode(ring);
    segments(ring == 0 ? kCode32 : kUserCode32, ring == 0 ? kData : kUserData, ring);
  }

  // --- running

  CodeSize code_size() {
    const Segment& cs = cpu().segments[kCs];
    return cpu().code64() ? CodeSize::k64 : cs.big() ? CodeSize::k32 : CodeSize::k16;
  }
  Insn decoded(std::initializer_list<std::uint8_t> bytes) {
    const std::vector<std::uint8_t> code(bytes);
    Insn insn;
    EXPECT_EQ(decode(code, code_size(), insn), DecodeResult::kDone);
    EXPECT_EQ(insn.length, code.size());
    return insn;
  }
  // One instruction of the system or extended-state group; rip stays where the group leaves it.
  Outcome run(std::initializer_list<std::uint8_t> bytes) {
    const Insn insn = decoded(bytes);
    cpu().fault = {};
    if (insn.op == Op::kUndefined) {  // as the interpreter's loop does
      (void)cpu().raise(vec::kUd);
      return Outcome::kFault;
    }
    if (group_of(insn.op) == OpGroup::kExtendedState) {
      return execute_extended_state(core(), insn);
    }
    EXPECT_EQ(group_of(insn.op), OpGroup::kSystem);
    return execute_system(core(), insn);
  }

  // The fault as text: "#GP(8)", "#UD".
  std::string fault() {
    static const std::map<std::uint8_t, std::string> kNames{
        {vec::kDb, "#DB"}, {vec::kUd, "#UD"}, {vec::kNm, "#NM"}, {vec::kTs, "#TS"}, {vec::kNp, "#NP"},
        {vec::kSs, "#SS"}, {vec::kGp, "#GP"}, {vec::kPf, "#PF"}, {vec::kMf, "#MF"}, {vec::kAc, "#AC"}};
    const Fault& fault = cpu().fault;
    const auto found = kNames.find(fault.vector);
    std::string text = found != kNames.end() ? found->second : "#" + std::to_string(fault.vector);
    if (fault.has_error_code) {
      text += "(" + std::to_string(fault.error_code) + ")";
    }
    return text;
  }
  // Runs, and tells the fault or "" where there is none.
  std::string faults(std::initializer_list<std::uint8_t> bytes) {
    const Outcome outcome = run(bytes);
    return outcome == Outcome::kFault ? fault() : "";
  }

  TestEnvironment env;

 private:
  void tables() {
    reset_cpu(cpu(), true);
    cpu().gdt = {.base = kGdt, .limit = 0xb7};
    cpu().idt = {.base = kIdt, .limit = 0xfff};
    cpu().rip = 0x30000;
  }
  void segments(std::uint16_t code, std::uint16_t data, std::uint8_t ring) {
    const auto load = [this](SegmentId which, std::uint16_t selector) {
      const auto low = get<std::uint64_t>(kGdt + (selector & 0xfff8U));
      cpu().segments[which] = {.base = 0,
                               .limit = 0xffffffff,
                               .selector = selector,
                               .attributes = static_cast<std::uint16_t>(low >> 40 & 0xf0ff)};
    };
    load(kCs, code);
    for (const SegmentId which : {kEs, kSs, kDs, kFs, kGs}) {
      load(which, data);
    }
    cpu().cpl = ring;
    cpu().gpr[kRsp] = ring == 0 ? kKernelStack - 0x1000 : kUserStack;
  }

  std::uint8_t* ram_ = nullptr;
  AddressSpace space_{"memory", 0};
  PhysicalMemory memory_;
  BareMmio mmio_;
  std::unique_ptr<Cpu> cpu_;
  std::unique_ptr<Mmu> mmu_;
  std::unique_ptr<Core> core_;
};

}  // namespace wisp::soft
