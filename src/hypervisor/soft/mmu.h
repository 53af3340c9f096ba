// Linear addresses to host memory: the page walk (SDM volume 3, chapter 4), the TLBs that cache it, and the
// accesses that instructions make.
//
// Every access returns false where it did not happen: then cpu.fault is set, or cpu.io.waiting is, where a
// device must answer first (see stopped()).
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "hypervisor/soft/cpu.h"
#include "hypervisor/soft/physical_memory.h"

namespace wisp::soft {

// Device registers outside RAM that the engine answers by itself (local APIC, I/O APIC), and doorbells.
class EngineMmio {
 public:
  virtual ~EngineMmio() = default;
  // Whether the engine answered; otherwise the machine must.
  [[nodiscard]] virtual bool mmio_read(std::uint64_t gpa, std::span<std::uint8_t> data) = 0;
  [[nodiscard]] virtual bool mmio_write(std::uint64_t gpa, std::span<const std::uint8_t> data) = 0;
};

enum class Access : std::uint8_t { kRead, kWrite, kExecute };

// Who accesses: the running code, or the processor itself on its behalf (descriptor tables, TSS, IDT: always
// with supervisor rights).
enum class As : std::uint8_t { kCode, kSystem };

struct Translation {
  std::uint64_t gpa = 0;  // of the very byte
  PhysicalPage page{};    // none: a device, or nothing
};

// The linear addresses of one page in which nothing cached may be used any more.
class Mmu final {
 public:
  Mmu(Cpu& cpu, PhysicalMemory& memory, EngineMmio& mmio);
  Mmu(const Mmu&) = delete;
  Mmu& operator=(const Mmu&) = delete;

  // `size` bytes at a linear address, at most 64; may cross pages. Reads of aligned 2, 4 and 8 bytes are
  // atomic. A write that crosses pages happens whole or not at all.
  [[nodiscard]] bool read(std::uint64_t linear, void* out, std::uint32_t size, As as = As::kCode);
  [[nodiscard]] bool write(std::uint64_t linear, const void* in, std::uint32_t size, As as = As::kCode);
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  [[nodiscard]] bool load(std::uint64_t linear, T& out, As as = As::kCode) {
    return read(linear, &out, sizeof out, as);
  }
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  [[nodiscard]] bool store(std::uint64_t linear, const T& in, As as = As::kCode) {
    return write(linear, &in, sizeof in, as);
  }

  // The host bytes behind [linear, linear + size), where they lie in one page of RAM (ROM too for reads) that
  // the access may use; null with no fault set where they do not, null with cpu.fault set where the access
  // faults. After writing through it, call wrote().
  [[nodiscard]] std::uint8_t* pin(std::uint64_t linear, std::uint32_t size, Access access, As as = As::kCode);
  // Tells of a write through pin(); cheap where the page holds no code.
  void wrote(std::uint64_t linear, std::uint32_t size);

  // Whether the access would fault; sets cpu.fault and returns false then. Touches nothing but A and D bits.
  [[nodiscard]] bool probe(std::uint64_t linear, std::uint32_t size, Access access, As as = As::kCode);

  // The page walk, cached. Sets accessed and dirty bits.
  [[nodiscard]] bool translate(std::uint64_t linear, Access access, As as, Translation& out);

  // Whether the access that returned false waits for a device (else it faulted).
  [[nodiscard]] bool stopped_for_io() const { return cpu_.io.waiting; }
  [[nodiscard]] Outcome stopped() const { return cpu_.io.waiting ? Outcome::kIo : Outcome::kFault; }

  // Physical accesses of the paravirtual clock and the like: false where there is no RAM.
  [[nodiscard]] bool write_physical(std::uint64_t gpa, const void* in, std::uint32_t size);
  [[nodiscard]] bool read_physical(std::uint64_t gpa, void* out, std::uint32_t size);

  // Fills the in-line TLB of the running code's bank for a page, for translated code. False: the access
  // faults (cpu.fault is set) or cannot go in line (no fault set): interpret the instruction.
  [[nodiscard]] bool fill(std::uint64_t linear, std::uint32_t size, Access access);

  // After CR0, CR3, CR4 or EFER changed, or an invalidation. flush_all() drops everything, flush_context()
  // what is not global (CR3 written), flush_page() one page in all contexts (INVLPG).
  void flush_all();
  void flush_context();
  void flush_page(std::uint64_t linear);
  // Takes away write access to a page of guest RAM (it holds code now, or its dirt is logged).
  void revoke_write(const std::uint8_t* host_page);

 private:
  struct Walk {
    std::uint64_t gpa = 0;
    bool writable = false, user = false, executable = true, dirty = false, global = false;
    std::uint8_t key = 0;
  };
  [[nodiscard]] bool walk(std::uint64_t linear, Access access, bool user, bool ac, Walk& out);
  [[nodiscard]] bool walk_legacy(std::uint64_t linear, Access access, bool user, bool ac, Walk& out);
  [[nodiscard]] bool page_fault(std::uint64_t linear, Access access, bool user, bool present, bool reserved);
  [[nodiscard]] bool rights(std::uint64_t linear, Access access, bool user, bool ac, const Walk& walk);
  [[nodiscard]] bool read_part(std::uint64_t linear, std::uint8_t* out, std::uint32_t size, As as);
  [[nodiscard]] bool write_part(const Translation& where, const std::uint8_t* in, std::uint32_t size);
  [[nodiscard]] bool read_device(std::uint64_t gpa, std::uint8_t* out, std::uint32_t size);
  [[nodiscard]] bool write_device(std::uint64_t gpa, const std::uint8_t* in, std::uint32_t size);

  // Backs the in-line TLB: bigger, holds all contexts' pages.
  struct Entry {
    std::uint64_t tag = ~0ULL;  // linear page | bank bits
    std::uint64_t context = 0;  // CR3 (with PCID), or kGlobal
    std::uint64_t gpa = 0;
    PhysicalPage page{};
    bool write = false, read = false, execute = false;
  };

  Cpu& cpu_;
  PhysicalMemory& memory_;
  EngineMmio& mmio_;
  std::vector<Entry> entries_;
  std::vector<std::uint16_t> filled_;  // in-line entries that are not global, since the last flush_context()
};

}  // namespace wisp::soft
