// A processor in 64-bit mode with memory of every kind (RAM, ROM, nothing) and page tables that the test
// makes entry by entry.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hypervisor/soft/executor.h"
#include "memory/address_space.h"

namespace wisp::soft {

namespace pte {
inline constexpr std::uint64_t kP = 1, kW = 2, kU = 4, kA = 0x20, kD = 0x40, kPs = 0x80, kG = 0x100,
                               kNx = 1ULL << 63;
}

// Registers of the engine's own at one page; everything else is the machine's.
class OnePageMmio final : public EngineMmio {
 public:
  static constexpr std::uint64_t kPage = 0xfee00000;
  bool mmio_read(std::uint64_t gpa, std::span<std::uint8_t> data) override {
    if ((gpa & ~kPageOffset) != kPage) {
      return false;
    }
    std::memset(data.data(), 0x5a, data.size());
    ++reads;
    return true;
  }
  bool mmio_write(std::uint64_t gpa, std::span<const std::uint8_t> data) override {
    if ((gpa & ~kPageOffset) != kPage) {
      return false;
    }
    written.emplace_back(gpa, std::vector<std::uint8_t>(data.begin(), data.end()));
    return true;
  }
  int reads = 0;
  std::vector<std::pair<std::uint64_t, std::vector<std::uint8_t>>> written{};
};

class RecordingWatcher final : public CodeWatcher {
 public:
  void code_written(std::uint64_t gpa, std::uint32_t size) override { calls.emplace_back(gpa, size); }
  void forget_code(PageInfo& info, std::uint64_t gpa) override {
    calls.emplace_back(gpa, std::uint32_t{kPageSize});
    info.code_lines.store(0);
  }
  std::vector<std::pair<std::uint64_t, std::uint32_t>> calls{};
};

class PagingKit {
 public:
  static constexpr std::uint64_t kRamSize = 4U << 20;
  static constexpr std::uint64_t kRom = 0xf00000;       // one page
  static constexpr std::uint64_t kNothing = 0x1000000;  // no memory here
  static constexpr std::uint64_t kRoot = 0x10000;       // tables grow from here

  PagingKit() {
    ram_ = static_cast<std::uint8_t*>(
        ::mmap(nullptr, kRamSize + kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_NE(ram_, MAP_FAILED);
    EXPECT_TRUE(space_.add_listener(&memory_));
    EXPECT_TRUE(space_.add(MemoryRegion::ram("ram", ram_, kRamSize), 0));
    EXPECT_TRUE(space_.add(MemoryRegion::rom("rom", ram_ + kRamSize, kPageSize), kRom));
    memory_.set_code_watcher(&watcher);
    cpu_ = std::make_unique<Cpu>();
    mmu_ = std::make_unique<Mmu>(*cpu_, memory_, mmio);
    long_mode();
  }
  ~PagingKit() {
    space_.remove_listener(&memory_);
    ::munmap(ram_, kRamSize + kPageSize);
  }
  PagingKit(const PagingKit&) = delete;
  PagingKit& operator=(const PagingKit&) = delete;

  Cpu& cpu() { return *cpu_; }
  Mmu& mmu() { return *mmu_; }
  PhysicalMemory& memory() { return memory_; }
  std::uint8_t* at(std::uint64_t gpa) { return ram_ + gpa; }
  std::uint8_t* rom() { return ram_ + kRamSize; }
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

  // --- modes; each forgets the tables of the one before

  void long_mode() {
    clear();
    cpu().efer = efer::kLme | efer::kLma | efer::kNxe;
    cpu().cr4 = cr4::kPae | cr4::kPge;
    cpu().cr0 = cr0::kPe | cr0::kWp | cr0::kPg;
    flat(0xa09b);
    mmu().flush_all();
  }
  void pae_mode() {
    clear();
    cpu().efer = efer::kNxe;
    cpu().cr4 = cr4::kPae | cr4::kPge;
    cpu().cr0 = cr0::kPe | cr0::kWp | cr0::kPg;
    flat(0xc09b);
    mmu().flush_all();
  }
  void legacy_mode(bool large_pages) {
    clear();
    cpu().efer = 0;
    cpu().cr4 = cr4::kPge | (large_pages ? cr4::kPse : 0);
    cpu().cr0 = cr0::kPe | cr0::kWp | cr0::kPg;
    flat(0xc09b);
    mmu().flush_all();
  }
  void unpaged_mode() {
    clear();
    cpu().efer = 0;
    cpu().cr4 = 0;
    cpu().cr0 = cr0::kPe;
    flat(0xc09b);
    mmu().flush_all();
  }
  void ring(std::uint8_t cpl) { cpu().cpl = cpl; }
  void ac(bool on) {
    cpu().other_flags = on ? cpu().other_flags | flag::kAc : cpu().other_flags & ~flag::kAc;
  }

  // --- 4-level tables

  std::uint64_t new_table() {
    next_ += kPageSize;
    return next_;
  }
  // Where the entry for `linear` at a level (3: PML4 to 0: page table) lies; makes the tables above it.
  std::uint64_t entry(std::uint64_t linear, unsigned level, std::uint64_t upper = 7) {
    std::uint64_t table = cpu().cr3 & ~0xfffULL;
    for (unsigned at = 3; at > level; --at) {
      const std::uint64_t here = table + (linear >> (12 + 9 * at) & 511) * 8;
      if ((get<std::uint64_t>(here) & pte::kP) == 0) {
        put(here, new_table() | upper);
      }
      table = get<std::uint64_t>(here) & 0x000ffffffffff000ULL;
    }
    return table + (linear >> (12 + 9 * level) & 511) * 8;
  }
  void map(std::uint64_t linear, std::uint64_t gpa, std::uint64_t flags = 7, unsigned level = 0) {
    put(entry(linear, level), gpa | flags | pte::kP);
  }

  // --- accesses as text: "" or "#PF(3) at 0x1000", "wait"
  std::string outcome(bool good) {
    if (good) {
      return "";
    }
    if (cpu().io.waiting) {
      return "wait";
    }
    const Fault& fault = cpu().fault;
    const std::string code = "(" + std::to_string(fault.error_code) + ")";
    if (fault.vector == vec::kPf) {
      std::array<char, 40> address{};
      (void)std::snprintf(address.data(), address.size(), " at 0x%llx",
                          static_cast<unsigned long long>(fault.address));
      return "#PF" + code + address.data();
    }
    return (fault.vector == vec::kGp ? "#GP" : "#" + std::to_string(fault.vector)) + code;
  }
  std::string read(std::uint64_t linear, As as = As::kCode) {
    cpu().fault = {};
    std::uint8_t byte = 0;
    return outcome(mmu().load(linear, byte, as));
  }
  std::string write(std::uint64_t linear, As as = As::kCode) {
    cpu().fault = {};
    return outcome(mmu().store(linear, std::uint8_t{0x11}, as));
  }
  std::string execute(std::uint64_t linear) {
    cpu().fault = {};
    Translation where;
    return outcome(mmu().translate(linear, Access::kExecute, As::kCode, where));
  }
  std::optional<std::uint64_t> gpa_of(std::uint64_t linear) {
    Translation where;
    return mmu().translate(linear, Access::kRead, As::kCode, where) ? std::optional(where.gpa) : std::nullopt;
  }

  OnePageMmio mmio;
  RecordingWatcher watcher;

 private:
  void clear() {
    std::memset(ram_, 0, kRamSize);
    next_ = kRoot;
    cpu().cr3 = kRoot;
    cpu().cpl = 0;
    cpu().other_flags = flag::kFixed;
    cpu().interrupt_flag = 0;
    cpu().io = {};
  }
  void flat(std::uint16_t code) {
    cpu().segments.fill({.limit = 0xffffffff, .selector = 0x10, .attributes = 0xc093});
    cpu().segments[kCs] = {.limit = 0xffffffff, .selector = 0x8, .attributes = code};
  }

  std::uint8_t* ram_ = nullptr;
  std::uint64_t next_ = kRoot;
  AddressSpace space_{"memory", 0};
  PhysicalMemory memory_;
  std::unique_ptr<Cpu> cpu_;
  std::unique_ptr<Mmu> mmu_;
};

}  // namespace wisp::soft
