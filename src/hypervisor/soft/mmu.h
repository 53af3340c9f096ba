// Linear addresses to host memory: the page walk (SDM volume 3, chapter 4), the TLBs that cache it, and the
// accesses that instructions make.
//
// Every access returns false where it did not happen: then cpu.fault is set, or cpu.io.waiting is, where a
// device must answer first (see stopped()).
#pragma once

#include <bitset>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "hypervisor/soft/breakpoints.h"
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
  bool global = false;    // the same in all contexts
};

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

  // After CR0, CR4 or EFER changed: drops everything.
  void flush_all();
  // After CR3 was written: drops what is not global; with `keep` (CR3's bit 63) what was cached of the new
  // context earlier stays.
  void flush_context(bool keep = false);
  // INVLPG: one page, in the present context and among the global ones.
  void flush_page(std::uint64_t linear);
  // INVPCID: a context, or all with or without global pages.
  void flush_pcid(std::uint16_t pcid);
  // The in-line TLB and the jump entries alone: what they were filled from stays.
  void flush_inline();
  // Takes away in-line write access to all pages, and to one page of guest RAM (it holds code now).
  void revoke_writes();
  void revoke_write(const std::uint8_t* host_page);
  // An entry of cpu.jumps was filled; `global`: its page belongs to all contexts.
  void note_jump(std::size_t bank, std::size_t index, bool global);

 private:
  // What is known of a page of one context: rights as the page tables give them, all levels taken together.
  struct Entry {
    std::uint64_t page = ~0ULL;  // linear address >> 12
    std::uint64_t context = 0;   // its number, or that of the global pages
    std::uint64_t gpa = 0;
    PhysicalPage target{};
    bool writable = false, user = false, executable = false, dirty = false;
  };
  [[nodiscard]] bool user_access(As as) const { return cpu_.cpl == 3 && as == As::kCode; }
  [[nodiscard]] bool allowed(const Entry& entry, Access access, As as) const;
  [[nodiscard]] bool page_fault(std::uint64_t linear, Access access, As as, bool present, bool reserved);
  [[nodiscard]] const Entry* look_up(std::uint64_t linear, Access access, As as);
  [[nodiscard]] bool walk(std::uint64_t linear, Access access, As as, Entry& entry);
  [[nodiscard]] std::uint8_t* in_line(std::uint64_t linear, std::uint32_t size, bool write) const;
  [[nodiscard]] bool read_part(std::uint64_t linear, std::uint8_t* out, std::uint32_t size, As as);
  [[nodiscard]] bool write_part(const Translation& where, const std::uint8_t* in, std::uint32_t size);
  [[nodiscard]] bool read_device(std::uint64_t gpa, std::uint8_t* out, std::uint32_t size);
  void write_device(std::uint64_t gpa, const std::uint8_t* in, std::uint32_t size);
  void watch(std::uint64_t linear, std::uint32_t size, bool write, As as) {
    if (as == As::kCode) {
      note_breakpoints(cpu_, linear, size, write ? Watched::kWrite : Watched::kRead);
    }
  }
  [[nodiscard]] std::uint64_t context() const;
  void clear_line(std::size_t bank, std::size_t index);

  Cpu& cpu_;
  PhysicalMemory& memory_;
  EngineMmio& mmio_;
  std::vector<Entry> entries_;           // backs the in-line TLB: bigger, of all contexts
  std::vector<std::uint64_t> contexts_;  // number of each PCID's present context
  std::uint64_t next_context_ = 1;       // no number is used twice
  std::uint64_t global_context_ = 0;
  std::vector<std::uint16_t> filled_;  // in-line entries that are not global, since they were last dropped
  std::vector<std::uint16_t> filled_jumps_;  // the same for cpu.jumps
  // Where a large page of 1 << shift bytes is noted.
  [[nodiscard]] static std::size_t large_slot(std::uint64_t linear, unsigned shift) {
    return (linear >> shift) * 0x9e3779b97f4a7c15ULL >> 52;
  }
  std::bitset<4096> large_;        // 2 MiB regions (hashed) of which large pages were cached
  std::bitset<4096> huge_;         // the same for pages of 1 GiB
  std::bitset<65536> jump_pages_;  // pages (by the end of their numbers) with jump entries
  Translation pinned_{};           // the last pin() for writing
  std::uint64_t pinned_page_ = ~0ULL;
};

}  // namespace wisp::soft
