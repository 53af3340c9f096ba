#include "hypervisor/soft/mmu.h"

#include <unistd.h>

#include <algorithm>
#include <array>

#include "hypervisor/soft/executor.h"

namespace wisp::soft {
namespace {

constexpr std::size_t kEntries = 8192;
constexpr std::size_t kMaxFilled = 2048;

std::size_t entry_index(std::uint64_t page) {
  return (page ^ (page >> 13)) % kEntries;
}
std::size_t line_index(std::uint64_t linear) {
  return (linear >> 12) % kTlbEntries;
}
// A tag that no access to a page of this entry matches: that of the page before it. (An access that runs into
// the next page would match that one.)
std::uint64_t no_tag(std::size_t index, std::uint64_t bias) {
  return bias - (((index + kTlbEntries - 1) % kTlbEntries) << 12);
}

// One aligned number in one access; anything else byte by byte or as the library does it.
void copy_from_guest(std::uint8_t* out, const std::uint8_t* host, std::uint32_t size) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(host) & (size - 1)) == 0;
  if (size == 8 && aligned) {
    const auto value = __atomic_load_n(reinterpret_cast<const std::uint64_t*>(host), __ATOMIC_RELAXED);
    std::memcpy(out, &value, sizeof value);
  } else if (size == 4 && aligned) {
    const auto value = __atomic_load_n(reinterpret_cast<const std::uint32_t*>(host), __ATOMIC_RELAXED);
    std::memcpy(out, &value, sizeof value);
  } else if (size == 2 && aligned) {
    const auto value = __atomic_load_n(reinterpret_cast<const std::uint16_t*>(host), __ATOMIC_RELAXED);
    std::memcpy(out, &value, sizeof value);
  } else {
    std::memcpy(out, host, size);
  }
}
void copy_to_guest(std::uint8_t* host, const std::uint8_t* in, std::uint32_t size) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(host) & (size - 1)) == 0;
  if (size == 8 && aligned) {
    std::uint64_t value = 0;
    std::memcpy(&value, in, sizeof value);
    __atomic_store_n(reinterpret_cast<std::uint64_t*>(host), value, __ATOMIC_RELAXED);
  } else if (size == 4 && aligned) {
    std::uint32_t value = 0;
    std::memcpy(&value, in, sizeof value);
    __atomic_store_n(reinterpret_cast<std::uint32_t*>(host), value, __ATOMIC_RELAXED);
  } else if (size == 2 && aligned) {
    std::uint16_t value = 0;
    std::memcpy(&value, in, sizeof value);
    __atomic_store_n(reinterpret_cast<std::uint16_t*>(host), value, __ATOMIC_RELAXED);
  } else {
    std::memcpy(host, in, size);
  }
}

}  // namespace

Mmu::Mmu(Cpu& cpu, PhysicalMemory& memory, EngineMmio& mmio)
    : cpu_(cpu), memory_(memory), mmio_(mmio), entries_(kEntries), contexts_(4096) {
  flush_all();
}

std::uint64_t Mmu::context() const {
  return contexts_[(cpu_.cr4 & cr4::kPcide) != 0 ? cpu_.cr3 & 0xfff : 0];
}

const Mmu::Entry* Mmu::look_up(std::uint64_t linear, Access access, As as) {
  if (!cpu_.long_mode()) {
    linear &= 0xffffffff;
  } else if (!canonical(linear)) {
    (void)cpu_.raise(vec::kGp, 0);
    return nullptr;
  }
  const std::uint64_t page = linear >> 12;
  Entry& entry = entries_[entry_index(page)];
  if (entry.page == page && (entry.context == global_context_ || entry.context == context()) &&
      allowed(entry, access, as) && (access != Access::kWrite || entry.dirty)) [[likely]] {
    return &entry;
  }
  Entry found;
  if (!walk(linear, access, as, found)) {
    return nullptr;
  }
  entry = found;
  return &entry;
}

bool Mmu::translate(std::uint64_t linear, Access access, As as, Translation& out) {
  const Entry* entry = look_up(linear, access, as);
  if (entry == nullptr) {
    return false;
  }
  out = {.gpa = entry->gpa | (linear & kPageOffset),
         .page = entry->target,
         .global = entry->context == global_context_};
  return true;
}

std::uint8_t* Mmu::in_line(std::uint64_t linear, std::uint32_t size, bool write) const {
  const TlbBank& bank = cpu_.tlb[cpu_.bank()];
  const std::size_t index = line_index(linear);
  const std::uint64_t tag = write ? bank.write_tag[index] : bank.read_tag[index];
  if (tag - cpu_.tag_bias + linear + size - 1 < kPageSize) [[likely]] {
    // Addresses of host memory come as numbers. NOLINTNEXTLINE(performance-no-int-to-ptr)
    return reinterpret_cast<std::uint8_t*>(linear + bank.addend[index]);
  }
  return nullptr;
}

bool Mmu::fill(std::uint64_t linear, std::uint32_t size, Access access) {
  const Entry* entry = look_up(linear, access, As::kCode);
  if (entry == nullptr || !entry->target || (linear & kPageOffset) + size > kPageSize) {
    return false;
  }
  const PhysicalPage& page = entry->target;
  bool write = access == Access::kWrite;
  if (write) {
    if (!page.writable) {
      return false;
    }
    if (memory_.dirty_log()) {
      page.info->dirty.store(1, std::memory_order_seq_cst);
    }
    if (page.info->code_lines.load(std::memory_order_seq_cst) != 0) {
      return false;
    }
  }
  const Bank bank_number = cpu_.bank();
  TlbBank& bank = cpu_.tlb[bank_number];
  const std::size_t index = line_index(linear);
  const std::uint64_t tag = cpu_.tag_bias - (linear & ~kPageOffset);
  const bool keep_write = bank.write_tag[index] == tag && bank.read_tag[index] == tag;
  bank.read_tag[index] = tag;
  bank.addend[index] = reinterpret_cast<std::uint64_t>(page.host) - (linear & ~kPageOffset);
  bank.write_tag[index] = write || keep_write ? tag : no_tag(index, cpu_.tag_bias);
  if (entry->context != global_context_ && filled_.size() <= kMaxFilled) {
    filled_.push_back(static_cast<std::uint16_t>(bank_number * kTlbEntries + index));
  }
  return true;
}

bool Mmu::read_part(std::uint64_t linear, std::uint8_t* out, std::uint32_t size, As as) {
  Translation where;
  if (!translate(linear, Access::kRead, as, where)) {
    return false;
  }
  if (!where.page) {
    return read_device(where.gpa, out, size);
  }
  copy_from_guest(out, where.page.host + (where.gpa & kPageOffset), size);
  return true;
}

bool Mmu::read(std::uint64_t linear, void* out, std::uint32_t size, As as) {
  watch(linear, size, false, as);
  auto* bytes = static_cast<std::uint8_t*>(out);
  if (as == As::kCode) {
    if (const std::uint8_t* host = in_line(linear, size, false)) [[likely]] {
      copy_from_guest(bytes, host, size);
      return true;
    }
    if (fill(linear, size, Access::kRead)) {
      copy_from_guest(bytes, in_line(linear, size, false), size);
      return true;
    }
  }
  const auto first =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(size, kPageSize - (linear & kPageOffset)));
  if (first == size) {
    return read_part(linear, bytes, size, as);
  }
  Translation second;
  return probe(linear, first, Access::kRead, as) && translate(linear + first, Access::kRead, as, second) &&
         read_part(linear, bytes, first, as) && read_part(linear + first, bytes + first, size - first, as);
}

bool Mmu::write_part(const Translation& where, const std::uint8_t* in, std::uint32_t size) {
  if (!where.page || !where.page.writable) {
    write_device(where.gpa, in, size);
    return true;
  }
  copy_to_guest(where.page.host + (where.gpa & kPageOffset), in, size);
  memory_.written(where.page, where.gpa, size);
  return true;
}

bool Mmu::write(std::uint64_t linear, const void* in, std::uint32_t size, As as) {
  watch(linear, size, true, as);
  const auto* bytes = static_cast<const std::uint8_t*>(in);
  if (as == As::kCode) {
    if (std::uint8_t* host = in_line(linear, size, true)) [[likely]] {
      copy_to_guest(host, bytes, size);
      return true;
    }
    if (fill(linear, size, Access::kWrite)) {
      copy_to_guest(in_line(linear, size, true), bytes, size);
      return true;
    }
  }
  const auto first =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(size, kPageSize - (linear & kPageOffset)));
  Translation where;
  if (!translate(linear, Access::kWrite, as, where)) {
    return false;
  }
  if (first == size) {
    return write_part(where, bytes, size);
  }
  Translation second;
  return translate(linear + first, Access::kWrite, as, second) && write_part(where, bytes, first) &&
         write_part(second, bytes + first, size - first);
}

std::uint8_t* Mmu::pin(std::uint64_t linear, std::uint32_t size, Access access, As as) {
  const bool write = access == Access::kWrite;
  watch(linear, size, write, as);
  if (as == As::kCode) {
    if (std::uint8_t* host = in_line(linear, size, write)) [[likely]] {
      return host;
    }
    if (fill(linear, size, access)) {
      return in_line(linear, size, write);
    }
  }
  if ((linear & kPageOffset) + size > kPageSize) {
    return nullptr;
  }
  Translation where;
  if (!translate(linear, access, as, where) || !where.page || (write && !where.page.writable)) {
    return nullptr;
  }
  if (write) {
    pinned_ = where;
    pinned_page_ = linear >> 12;
  }
  return where.page.host + (where.gpa & kPageOffset);
}

void Mmu::wrote(std::uint64_t linear, std::uint32_t size) {
  if (in_line(linear, size, true) != nullptr || pinned_page_ != linear >> 12) {
    return;
  }
  memory_.written(pinned_.page, (pinned_.gpa & ~kPageOffset) | (linear & kPageOffset), size);
}

bool Mmu::probe(std::uint64_t linear, std::uint32_t size, Access access, As as) {
  Translation where;
  if (!translate(linear, access, as, where)) {
    return false;
  }
  const std::uint64_t last = linear + size - 1;
  return (linear ^ last) < kPageSize || translate(last & ~kPageOffset, access, as, where);
}

bool Mmu::read_device(std::uint64_t gpa, std::uint8_t* out, std::uint32_t size) {
  for (std::uint32_t done = 0; done < size;) {
    const std::uint32_t part = std::min<std::uint32_t>(size - done, 8);
    const std::span<std::uint8_t> data(out + done, part);
    IoState& io = cpu_.io;
    if (!mmio_.mmio_read(gpa + done, data)) {
      if (io.answers_used < io.answer_count) {
        std::copy_n(io.answers[io.answers_used++].data.begin(), part, data.begin());
      } else if (io.answer_count == IoState::kMax) {
        std::ranges::fill(data, std::uint8_t{0xff});
      } else {
        io.wanted = {
            .kind = IoState::Kind::kMmioRead, .size = static_cast<std::uint8_t>(part), .address = gpa + done};
        io.waiting = true;
        return false;
      }
    }
    done += part;
  }
  return true;
}

void Mmu::write_device(std::uint64_t gpa, const std::uint8_t* in, std::uint32_t size) {
  for (std::uint32_t done = 0; done < size;) {
    const std::uint32_t part = std::min<std::uint32_t>(size - done, 8);
    const std::span<const std::uint8_t> data(in + done, part);
    IoState& io = cpu_.io;
    if (mmio_.mmio_write(gpa + done, data)) {
      // The engine's own.
    } else if (const int fd = memory_.doorbell(gpa + done, data); fd >= 0) {
      const std::uint64_t one = 1;
      (void)!::write(fd, &one, sizeof one);  // full: signalled already
    } else if (io.write_count < IoState::kMax) {
      IoState::Access& access = io.writes[io.write_count++];
      access = {
          .kind = IoState::Kind::kMmioWrite, .size = static_cast<std::uint8_t>(part), .address = gpa + done};
      std::ranges::copy(data, access.data.begin());
    }
    done += part;
  }
}

bool Mmu::write_physical(std::uint64_t gpa, const void* in, std::uint32_t size) {
  const auto* bytes = static_cast<const std::uint8_t*>(in);
  while (size != 0) {
    const auto part =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(size, kPageSize - (gpa & kPageOffset)));
    const PhysicalPage page = memory_.find(gpa);
    if (!page || !page.writable) {
      return false;
    }
    copy_to_guest(page.host + (gpa & kPageOffset), bytes, part);
    memory_.written(page, gpa, part);
    gpa += part;
    bytes += part;
    size -= part;
  }
  return true;
}

bool Mmu::read_physical(std::uint64_t gpa, void* out, std::uint32_t size) {
  auto* bytes = static_cast<std::uint8_t*>(out);
  while (size != 0) {
    const auto part =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(size, kPageSize - (gpa & kPageOffset)));
    const PhysicalPage page = memory_.find(gpa);
    if (!page) {
      return false;
    }
    copy_from_guest(bytes, page.host + (gpa & kPageOffset), part);
    gpa += part;
    bytes += part;
    size -= part;
  }
  return true;
}

void Mmu::clear_line(std::size_t bank, std::size_t index) {
  cpu_.tlb[bank].read_tag[index] = no_tag(index, cpu_.tag_bias);
  cpu_.tlb[bank].write_tag[index] = no_tag(index, cpu_.tag_bias);
}

void Mmu::flush_inline() {
  for (std::size_t bank = 0; bank < kBanks; ++bank) {
    for (std::size_t index = 0; index < kTlbEntries; ++index) {
      clear_line(bank, index);
    }
    for (std::size_t index = 0; index < kJumpEntries; ++index) {
      cpu_.jumps[bank].tag[index] = no_jump(index);
    }
  }
  filled_.clear();
  filled_jumps_.clear();
  jump_pages_.reset();
  pinned_page_ = ~0ULL;
}

void Mmu::flush_all() {
  flush_inline();
  // What was cached belongs to numbers that nobody has any more.
  global_context_ = next_context_++;
  for (std::uint64_t& number : contexts_) {
    number = next_context_++;
  }
  large_.reset();
  huge_.reset();
}

void Mmu::flush_context(bool keep) {
  if (filled_.size() > kMaxFilled || filled_jumps_.size() > kMaxFilled) {
    flush_inline();
  } else {
    for (const std::uint16_t entry : filled_) {
      clear_line(entry / kTlbEntries, entry % kTlbEntries);
    }
    for (const std::uint16_t entry : filled_jumps_) {
      const std::size_t index = entry % kJumpEntries;
      cpu_.jumps[entry / kJumpEntries].tag[index] = no_jump(index);
    }
    filled_.clear();
    filled_jumps_.clear();
    pinned_page_ = ~0ULL;
  }
  if (!keep) {
    contexts_[(cpu_.cr4 & cr4::kPcide) != 0 ? cpu_.cr3 & 0xfff : 0] = next_context_++;
  }
}

void Mmu::flush_pcid(std::uint16_t pcid) {
  contexts_[pcid & 0xfffU] = next_context_++;
  if ((cpu_.cr3 & 0xfff) == pcid) {
    flush_context(true);
  }
}

void Mmu::flush_page(std::uint64_t linear) {
  const std::uint64_t page = linear >> 12;
  if (large_.test(large_slot(linear, 21)) || huge_.test(large_slot(linear, 30))) {
    flush_all();  // one of several entries that were made of one large page
    return;
  }
  pinned_page_ = ~0ULL;
  const std::uint64_t tag = cpu_.tag_bias - (linear & ~kPageOffset);
  const std::size_t index = line_index(linear);
  for (std::size_t bank = 0; bank < kBanks; ++bank) {
    if (cpu_.tlb[bank].read_tag[index] == tag || cpu_.tlb[bank].write_tag[index] == tag) {
      clear_line(bank, index);
    }
  }
  Entry& entry = entries_[entry_index(page)];
  if (entry.page == page) {
    entry = Entry{};
  }
  if (jump_pages_.test(page % jump_pages_.size())) {
    // The entries of one page stand side by side.
    const std::size_t first = jump_index(linear & ~kPageOffset);
    for (JumpBank& bank : cpu_.jumps) {
      for (std::size_t offset = 0; offset < kPageSize; ++offset) {
        const std::size_t i = (first + offset) % kJumpEntries;
        if ((-bank.tag[i]) >> 12 == page) {
          bank.tag[i] = no_jump(i);
        }
      }
    }
  }
}

void Mmu::revoke_writes() {
  for (TlbBank& bank : cpu_.tlb) {
    for (std::size_t i = 0; i < kTlbEntries; ++i) {
      bank.write_tag[i] = no_tag(i, cpu_.tag_bias);
    }
  }
}

void Mmu::revoke_write(const std::uint8_t* host_page) {
  const std::uint64_t host = reinterpret_cast<std::uint64_t>(host_page) - cpu_.tag_bias;
  for (TlbBank& bank : cpu_.tlb) {
    for (std::size_t i = 0; i < kTlbEntries; ++i) {
      if (bank.addend[i] - bank.write_tag[i] == host) {
        bank.write_tag[i] = no_tag(i, cpu_.tag_bias);
      }
    }
  }
}

void Mmu::note_jump(std::size_t bank, std::size_t index, bool global) {
  jump_pages_.set((-cpu_.jumps[bank].tag[index] >> 12) % jump_pages_.size());
  if (!global && filled_jumps_.size() <= kMaxFilled) {
    filled_jumps_.push_back(static_cast<std::uint16_t>(bank * kJumpEntries + index));
  }
}

}  // namespace wisp::soft
