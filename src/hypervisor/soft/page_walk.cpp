#include <array>

#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/mmu.h"
#include "hypervisor/soft/soft_cpuid.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kPresent = 1U << 0, kWritable = 1U << 1, kUser = 1U << 2, kAccessed = 1U << 5,
                        kDirty = 1U << 6, kLarge = 1U << 7, kGlobalBit = 1U << 8, kNoExecute = 1ULL << 63;
constexpr std::uint64_t kAddressBits = ((1ULL << kPhysicalBits) - 1) & ~0xfffULL;
constexpr std::uint64_t kReservedBits = 0x000fffffffffffffULL & ~((1ULL << kPhysicalBits) - 1);

// One entry of a paging structure in host memory.
struct Step {
  std::uint8_t* host = nullptr;
  std::uint64_t value = 0;
  PhysicalPage page{};
  std::uint64_t gpa = 0;
};

class Walker final {
 public:
  Walker(PhysicalMemory& memory, std::uint32_t entry_size) : memory_(memory), size_(entry_size) {}

  // False where there is no RAM for the entry: it reads as not present.
  bool read(std::uint64_t gpa) {
    Step& step = steps_[count_++];
    step.gpa = gpa;
    step.page = memory_.find(gpa);
    if (!step.page) {
      step.value = 0;
      return false;
    }
    step.host = step.page.host + (gpa & kPageOffset);
    step.value = size_ == 8 ? __atomic_load_n(reinterpret_cast<std::uint64_t*>(step.host), __ATOMIC_ACQUIRE)
                            : __atomic_load_n(reinterpret_cast<std::uint32_t*>(step.host), __ATOMIC_ACQUIRE);
    return true;
  }
  [[nodiscard]] std::uint64_t value() const { return steps_[count_ - 1].value; }

  // Sets accessed bits, and the dirty bit of the last entry where asked. False: an entry changed meanwhile.
  bool mark(bool dirty, std::size_t first) {
    for (std::size_t i = first; i < count_; ++i) {
      Step& step = steps_[i];
      const std::uint64_t bits = kAccessed | (dirty && i + 1 == count_ ? kDirty : 0);
      if ((step.value & bits) == bits || !step.page.writable) {
        continue;
      }
      bool done = false;
      if (size_ == 8) {
        std::uint64_t expected = step.value;
        done = __atomic_compare_exchange_n(reinterpret_cast<std::uint64_t*>(step.host), &expected,
                                           step.value | bits, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
      } else {
        auto expected = static_cast<std::uint32_t>(step.value);
        done = __atomic_compare_exchange_n(reinterpret_cast<std::uint32_t*>(step.host), &expected,
                                           static_cast<std::uint32_t>(step.value | bits), false,
                                           __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
      }
      if (!done) {
        return false;
      }
      memory_.written(step.page, step.gpa, size_);
    }
    return true;
  }

 private:
  PhysicalMemory& memory_;
  const std::uint32_t size_;
  std::array<Step, 4> steps_{};
  std::size_t count_ = 0;
};

}  // namespace

bool Mmu::page_fault(std::uint64_t linear, Access access, As as, bool present, bool reserved) {
  const bool fetch_bit =
      (cpu_.cr4 & cr4::kSmep) != 0 || ((cpu_.efer & efer::kNxe) != 0 && (cpu_.cr4 & cr4::kPae) != 0);
  const std::uint32_t code = (present ? 1U : 0U) | (access == Access::kWrite ? 2U : 0U) |
                             (user_access(as) ? 4U : 0U) | (reserved ? 8U : 0U) |
                             (access == Access::kExecute && fetch_bit ? 16U : 0U);
  return cpu_.raise(vec::kPf, code, linear);
}

// SDM volume 3, 4.6.
bool Mmu::allowed(const Entry& entry, Access access, As as) const {
  if (user_access(as)) {
    return entry.user && (access != Access::kWrite || entry.writable) &&
           (access != Access::kExecute || entry.executable);
  }
  if (access == Access::kExecute) {
    return entry.executable && !(entry.user && (cpu_.cr4 & cr4::kSmep) != 0);
  }
  if (entry.user && (cpu_.cr4 & cr4::kSmap) != 0 &&
      (as == As::kSystem || (cpu_.other_flags & flag::kAc) == 0)) {
    return false;
  }
  return access != Access::kWrite || entry.writable || (cpu_.cr0 & cr0::kWp) == 0;
}

// SDM volume 3, 4.3 to 4.5 and 4.8.
bool Mmu::walk(std::uint64_t linear, Access access, As as, Entry& entry) {
  entry.page = linear >> 12;
  entry.context = context();
  if ((cpu_.cr0 & cr0::kPg) == 0) {
    entry.gpa = linear & ~kPageOffset;
    entry.target = memory_.find(entry.gpa);
    entry.writable = entry.user = entry.executable = entry.dirty = true;
    return true;
  }
  const bool pae = (cpu_.cr4 & cr4::kPae) != 0;
  const bool nx = (cpu_.efer & efer::kNxe) != 0;
  const bool long_mode = cpu_.long_mode();
  const unsigned levels = long_mode ? 4 : pae ? 3 : 2;
  const unsigned index_bits = pae ? 9 : 10;
  const std::uint32_t entry_size = pae ? 8 : 4;
  const std::uint64_t index_mask = (1ULL << index_bits) - 1;
  for (int attempt = 0; attempt < 64; ++attempt) {
    Walker walker(memory_, entry_size);
    std::uint64_t table = long_mode ? cpu_.cr3 & kAddressBits
                          : pae     ? cpu_.cr3 & 0xffffffe0
                                    : cpu_.cr3 & 0xfffff000;
    entry.writable = entry.user = true;
    entry.executable = true;
    unsigned level = levels;
    std::uint64_t value = 0;
    unsigned shift = 0;
    for (;; --level) {
      shift = 12 + (level - 1) * index_bits;
      const bool pointer = !long_mode && pae && level == 3;  // PDPTE of PAE: no rights, two index bits
      const std::uint64_t index = (linear >> shift) & (pointer ? 3 : index_mask);
      if (!walker.read(table + index * entry_size) || (walker.value() & kPresent) == 0) {
        return page_fault(linear, access, as, false, false);
      }
      value = walker.value();
      const bool large = level > 1 && (value & kLarge) != 0 &&
                         (pae ? (long_mode ? level < 4 : level == 2) : (cpu_.cr4 & cr4::kPse) != 0);
      if (pae) {
        std::uint64_t reserved = kReservedBits | (nx ? 0 : kNoExecute);
        reserved |= long_mode && level == 4 ? kLarge : 0;
        reserved |= pointer ? 0x1e6ULL | 0xfff0000000000000ULL : 0;
        reserved |= !long_mode && !pointer ? 0x7ff0000000000000ULL : 0;
        reserved |= large ? ((1ULL << shift) - 1) & ~0x1fffULL : 0;
        if ((value & reserved) != 0) {
          return page_fault(linear, access, as, true, true);
        }
      } else if (large && (value & (1U << 21)) != 0) {
        return page_fault(linear, access, as, true, true);
      }
      if (!pointer) {
        entry.writable = entry.writable && (value & kWritable) != 0;
        entry.user = entry.user && (value & kUser) != 0;
        entry.executable = entry.executable && (!pae || !nx || (value & kNoExecute) == 0);
      }
      if (level == 1 || large) {
        break;
      }
      table = pae ? value & kAddressBits : value & 0xfffff000;
    }
    if (!allowed(entry, access, as)) {
      return page_fault(linear, access, as, true, false);
    }
    const bool dirty = access == Access::kWrite;
    if (!walker.mark(dirty, !long_mode && pae ? 1 : 0)) {
      continue;
    }
    const std::uint64_t offset_mask = (1ULL << shift) - 1;
    std::uint64_t base = pae ? value & kAddressBits & ~offset_mask : value & 0xfffff000 & ~offset_mask;
    if (!pae && shift == 22) {
      base |= (value >> 13 & 0xff) << 32;  // PSE-36
    }
    entry.gpa = base | (linear & offset_mask & ~kPageOffset);
    entry.dirty = dirty || (value & kDirty) != 0;
    entry.target = memory_.find(entry.gpa);
    if ((value & kGlobalBit) != 0 && (cpu_.cr4 & cr4::kPge) != 0) {
      entry.context = global_context_;
    }
    if (shift == 30) {
      huge_.set(large_slot(linear, 30));
    } else if (shift != 12) {
      // INVLPG may name either half of a page of 4 MiB.
      const std::uint64_t first = linear >> shift << shift;
      large_.set(large_slot(first, 21));
      large_.set(large_slot(first + (shift == 22 ? 1U << 21 : 0), 21));
    }
    return true;
  }
  // Another processor keeps changing the entries: as if this one came in between.
  return page_fault(linear, access, as, false, false);
}

}  // namespace wisp::soft
