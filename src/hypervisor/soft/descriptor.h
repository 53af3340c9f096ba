// Descriptors of segments, gates and system segments as they lie in descriptor tables (SDM volume 3, 3.4.5,
// 3.5, 5.8.3 and 6.11). Private to the instructions and events that read them.
#pragma once

#include <cstdint>

#include "hypervisor/soft/executor.h"

namespace wisp::soft {

// Types of system descriptors (SDM volume 3, table 3-2).
namespace system_type {
inline constexpr std::uint8_t kTss16 = 1, kLdt = 2, kTss16Busy = 3, kCallGate16 = 4, kTaskGate = 5,
                              kInterruptGate16 = 6, kTrapGate16 = 7, kTss = 9, kTssBusy = 11, kCallGate = 12,
                              kInterruptGate = 14, kTrapGate = 15;
}

// The bytes of a descriptor; `high` is used by system descriptors and gates of IA-32e mode only.
struct Descriptor {
  std::uint64_t low = 0;
  std::uint64_t high = 0;

  // As Segment::attributes.
  [[nodiscard]] std::uint16_t attributes() const { return static_cast<std::uint16_t>((low >> 40) & 0xf0ff); }
  [[nodiscard]] std::uint8_t type() const { return (low >> 40) & 0xf; }
  [[nodiscard]] bool is_code_or_data() const { return (low >> 44 & 1) != 0; }
  [[nodiscard]] bool is_code() const { return (low >> 43 & 3) == 3; }
  [[nodiscard]] bool is_writable_data() const { return (low >> 41 & 0xd) == 9; }
  [[nodiscard]] bool is_readable() const { return is_code_or_data() && (!is_code() || (low >> 41 & 1) != 0); }
  // Of a code segment.
  [[nodiscard]] bool conforming() const { return (low >> 42 & 1) != 0; }
  [[nodiscard]] std::uint8_t dpl() const { return (low >> 45) & 3; }
  [[nodiscard]] bool present() const { return (low >> 47 & 1) != 0; }
  [[nodiscard]] bool long_mode() const { return (low >> 53 & 1) != 0; }
  [[nodiscard]] bool big() const { return (low >> 54 & 1) != 0; }

  [[nodiscard]] std::uint32_t base() const {
    return static_cast<std::uint32_t>((low >> 16 & 0xffffff) | (low >> 56 << 24));
  }
  [[nodiscard]] std::uint64_t wide_base() const { return base() | high << 32; }
  // In bytes, granularity applied.
  [[nodiscard]] std::uint32_t limit() const {
    const auto raw = static_cast<std::uint32_t>((low & 0xffff) | (low >> 32 & 0xf0000));
    return (low >> 55 & 1) != 0 ? raw << 12 | 0xfff : raw;
  }
  // The upper half's type bits, which must be 0 in IA-32e mode.
  [[nodiscard]] std::uint8_t high_type() const { return (high >> 40) & 0x1f; }

  // Of gates.
  [[nodiscard]] std::uint16_t gate_selector() const { return static_cast<std::uint16_t>(low >> 16); }
  [[nodiscard]] std::uint16_t gate_offset16() const { return static_cast<std::uint16_t>(low); }
  [[nodiscard]] std::uint32_t gate_offset32() const {
    return static_cast<std::uint32_t>((low & 0xffff) | (low >> 32 & 0xffff0000));
  }
  [[nodiscard]] std::uint64_t gate_offset64() const { return gate_offset32() | high << 32; }
  [[nodiscard]] std::uint8_t gate_parameters() const { return (low >> 32) & 0x1f; }
  [[nodiscard]] std::uint8_t gate_ist() const { return (low >> 32) & 7; }
};

[[nodiscard]] constexpr bool null_selector(std::uint16_t selector) {
  return (selector & 0xfffc) == 0;
}
[[nodiscard]] constexpr std::uint8_t rpl_of(std::uint16_t selector) {
  return selector & 3;
}

// How the processor accesses its own tables: with supervisor rights, which running code in rings 0 to 2
// without EFLAGS.AC has as well; through its in-line TLB that is quicker.
[[nodiscard]] inline As system_access(const Cpu& cpu) {
  return cpu.bank() == kSupervisorBank ? As::kCode : As::kSystem;
}

enum class Lookup : std::uint8_t {
  kFound,
  kOutside,  // the table does not reach so far; no fault is set
  kStopped,  // reading it faulted, or a device must answer
};
// Reads the descriptor that a selector names; `wide`: all 16 bytes of a system descriptor of IA-32e mode.
[[nodiscard]] Lookup read_descriptor(Core& core, std::uint16_t selector, bool wide, Descriptor& out);
// The same, where a selector outside of its table is fault `vector` with the selector (and `external`, the
// EXT bit) as error code.
[[nodiscard]] bool need_descriptor(Core& core, std::uint16_t selector, bool wide, std::uint8_t vector,
                                   std::uint32_t external, Descriptor& out);

// Sets bits in the type of a descriptor in its table: accessed (1), or busy of a TSS (2).
[[nodiscard]] bool set_type_bits(Core& core, std::uint16_t selector, std::uint8_t bits,
                                 Descriptor& descriptor);
[[nodiscard]] inline bool mark_accessed(Core& core, std::uint16_t selector, Descriptor& descriptor) {
  return (descriptor.type() & 1) != 0 || set_type_bits(core, selector, 1, descriptor);
}

[[nodiscard]] Segment segment_of(std::uint16_t selector, const Descriptor& descriptor);
// What a segment register holds after real or virtual-8086 mode loaded a selector.
[[nodiscard]] Segment real_mode_segment(const Cpu& cpu, SegmentId which, std::uint16_t selector);

// A fault whose error code is a selector: false.
inline bool selector_fault(Cpu& cpu, std::uint8_t vector, std::uint16_t selector,
                           std::uint32_t external = 0) {
  return cpu.raise(vector, (selector & 0xfffcU) | external);
}

// Whether code that goes on at `offset` of `cs` is inside its limit, or canonical; else #GP(external).
[[nodiscard]] bool code_offset_valid(Cpu& cpu, const Segment& cs, std::uint64_t offset,
                                     std::uint32_t external = 0);

// Whether [offset, offset + size) lies inside a segment outside of 64-bit mode.
[[nodiscard]] bool inside_limit(const Segment& segment, std::uint64_t offset, std::uint32_t size);

// CS with a privilege level; the selector's RPL becomes it.
inline void enter_code_segment(Cpu& cpu, Segment cs, std::uint8_t cpl) {
  cs.selector = static_cast<std::uint16_t>((cs.selector & 0xfffc) | cpl);
  cpu.segments[kCs] = cs;
  cpu.cpl = cpl;
}
// What SYSCALL and its like load without looking at a descriptor: base 0, no limit.
[[nodiscard]] constexpr Segment flat_code(std::uint16_t selector, std::uint8_t dpl, bool long_mode) {
  return {.limit = 0xffffffff,
          .selector = selector,
          .attributes = static_cast<std::uint16_t>((long_mode ? 0xa09b : 0xc09b) | dpl << 5)};
}
[[nodiscard]] constexpr Segment flat_stack(std::uint16_t selector, std::uint8_t dpl) {
  return {
      .limit = 0xffffffff, .selector = selector, .attributes = static_cast<std::uint16_t>(0xc093 | dpl << 5)};
}
// The null SS of 64-bit handlers in rings 0 to 2.
[[nodiscard]] constexpr Segment null_stack(std::uint8_t cpl) {
  return {.selector = cpl};
}

// The stack for an inner ring, from the TSS: `ss` is valid outside of IA-32e mode only, where it is a null
// selector with the ring as RPL. False: #TS, or #SS where the stack segment is not there.
[[nodiscard]] bool inner_stack(Core& core, std::uint8_t ring, std::uint32_t external, Segment& ss,
                               std::uint64_t& sp);
// RSP of IST entry `index` (1 to 7).
[[nodiscard]] bool interrupt_stack(Core& core, std::uint8_t index, std::uint32_t external, std::uint64_t& sp);

// Segment registers that the code of ring `cpl` may not hold become null (returns to an outer ring).
void drop_inner_segments(Cpu& cpu, std::uint8_t cpl);

}  // namespace wisp::soft
