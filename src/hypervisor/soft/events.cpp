// Delivery of exceptions and interrupts (SDM volume 3, chapter 6; volume 2, INT n).
#include <array>
#include <optional>

#include "hypervisor/soft/descriptor.h"
#include "hypervisor/soft/stack_frame.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kDr6Fixed = 0xffff0ff0;
constexpr std::uint64_t kDr6Hits = 0xf;
constexpr std::uint64_t kDr6Access = 1U << 13;  // BD: a debug register was touched under DR7.GD
constexpr std::uint64_t kDr7GeneralDetect = 1U << 13;

struct Event {
  Fault fault{};
  EventKind kind = EventKind::kFault;
  [[nodiscard]] bool software() const { return kind == EventKind::kSoftwareInterrupt; }
  // The EXT bit of error codes of faults on the way.
  [[nodiscard]] std::uint32_t external() const { return software() ? 0 : 1; }
  // Error code that names the IDT's entry.
  [[nodiscard]] std::uint32_t gate_error() const { return fault.vector * 8U + 2U + external(); }
  [[nodiscard]] bool is_exception() const { return kind == EventKind::kFault || kind == EventKind::kTrap; }
};

// SDM volume 3, table 6-4.
enum class Severity : std::uint8_t { kBenign, kContributory, kPageFault, kDoubleFault };

Severity severity_of(const Event& event) {
  if (!event.is_exception()) {
    return Severity::kBenign;
  }
  switch (event.fault.vector) {
    case vec::kDe:
    case vec::kTs:
    case vec::kNp:
    case vec::kSs:
    case vec::kGp:
      return Severity::kContributory;
    case vec::kPf:
      return Severity::kPageFault;
    case vec::kDf:
      return Severity::kDoubleFault;
    default:
      return Severity::kBenign;
  }
}

// RFLAGS as pushed: faults set RF, so that the instruction is not stopped again by its breakpoint; a fault
// for a breakpoint does not. What comes after an instruction finds RF clear, or between two turns of a
// repeated one as it was.
std::uint64_t pushed_flags(const Cpu& cpu, const Event& event) {
  const std::uint64_t flags = cpu.rflags();
  switch (event.kind) {
    case EventKind::kFault: {
      const bool breakpoint = event.fault.vector == vec::kDb && (event.fault.address & kDr6Access) == 0;
      return breakpoint ? flags : flags | flag::kRf;
    }
    case EventKind::kTrap:
    case EventKind::kSoftwareInterrupt:
    case EventKind::kExternal:
    case EventKind::kNmi:
      break;
  }
  return flags;
}

bool pushes_error_code(const Event& event) {
  return event.fault.has_error_code && event.is_exception();
}

void clear_flags(Cpu& cpu, bool interrupts_off, std::uint64_t others) {
  cpu.other_flags &= ~others;
  if (interrupts_off) {
    cpu.interrupt_flag = 0;
  }
}

bool deliver_real_mode(Core& core, const Event& event) {
  Cpu& cpu = core.cpu;
  const std::uint32_t entry = event.fault.vector * 4U;
  if (entry + 3 > cpu.idt.limit) {
    return cpu.raise(vec::kGp, event.gate_error());
  }
  std::array<std::uint16_t, 2> target{};
  if (!core.mmu.load(cpu.idt.base + entry, target, As::kSystem)) {
    return false;
  }
  StackFrame frame(cpu.segments[kSs], cpu.gpr[kRsp], cpu.segments[kSs].big() ? 4 : 2, 2);
  frame.push(pushed_flags(cpu, event));
  frame.push(cpu.segments[kCs].selector);
  frame.push(cpu.rip);
  if (!frame.place(cpu, 0) || !frame.write(core, As::kCode)) {
    return false;
  }
  cpu.gpr[kRsp] = frame.sp();
  cpu.segments[kCs] = real_mode_segment(cpu, kCs, target[1]);
  cpu.rip = target[0];
  clear_flags(cpu, true, flag::kTf | flag::kAc | flag::kRf);
  return true;
}

// An interrupt or trap gate, read and checked.
struct Gate {
  std::uint16_t selector = 0;
  std::uint64_t offset = 0;
  std::uint32_t item = 4;  // bytes of what is pushed
  std::uint8_t ist = 0;
  bool interrupt = false;  // clears IF
};

bool read_gate(Core& core, const Event& event, Gate& gate) {
  Cpu& cpu = core.cpu;
  const bool wide = cpu.long_mode();
  const std::uint32_t size = wide ? 16 : 8;
  const std::uint32_t entry = event.fault.vector * size;
  if (entry + size - 1 > cpu.idt.limit) {
    return cpu.raise(vec::kGp, event.gate_error());
  }
  std::array<std::uint64_t, 2> bytes{};
  if (!core.mmu.read(cpu.idt.base + entry, bytes.data(), size, system_access(cpu))) {
    return false;
  }
  const Descriptor descriptor{.low = bytes[0], .high = bytes[1]};
  const std::uint8_t type = descriptor.type();
  const bool full = type == system_type::kInterruptGate || type == system_type::kTrapGate;
  const bool half = type == system_type::kInterruptGate16 || type == system_type::kTrapGate16;
  if (descriptor.is_code_or_data() || (!full && (wide || !half))) {
    if (!wide && type == system_type::kTaskGate && !descriptor.is_code_or_data()) {
      core.env.note("a task gate in the interrupt table");
    }
    return cpu.raise(vec::kGp, event.gate_error());
  }
  if (event.software() && descriptor.dpl() < cpu.cpl) {
    return cpu.raise(vec::kGp, event.gate_error());
  }
  if (!descriptor.present()) {
    return cpu.raise(vec::kNp, event.gate_error());
  }
  gate.selector = descriptor.gate_selector();
  gate.offset = wide   ? descriptor.gate_offset64()
                : full ? descriptor.gate_offset32()
                       : descriptor.gate_offset16();
  gate.item = wide ? 8 : full ? 4 : 2;
  gate.ist = wide ? descriptor.gate_ist() : 0;
  gate.interrupt = type == system_type::kInterruptGate || type == system_type::kInterruptGate16;
  return true;
}

// The handler's code segment, and the ring that it runs in.
bool handler_segment(Core& core, const Event& event, const Gate& gate, Descriptor& code, std::uint8_t& ring) {
  Cpu& cpu = core.cpu;
  const std::uint32_t external = event.external();
  if (null_selector(gate.selector)) {
    return cpu.raise(vec::kGp, external);
  }
  if (!need_descriptor(core, gate.selector, false, vec::kGp, external, code)) {
    return false;
  }
  if (!code.is_code() || code.dpl() > cpu.cpl || (cpu.long_mode() && (!code.long_mode() || code.big()))) {
    return selector_fault(cpu, vec::kGp, gate.selector, external);
  }
  if (!code.present()) {
    return selector_fault(cpu, vec::kNp, gate.selector, external);
  }
  ring = code.conforming() ? cpu.cpl : code.dpl();
  // Out of virtual-8086 mode it goes to ring 0 only.
  if (cpu.virtual_8086() && ring != 0) {
    return selector_fault(cpu, vec::kGp, gate.selector, external);
  }
  return true;
}

// The new stack's segment and top, or the present ones.
bool handler_stack(Core& core, const Event& event, const Gate& gate, std::uint8_t ring, Segment& ss,
                   std::uint64_t& sp) {
  Cpu& cpu = core.cpu;
  if (cpu.long_mode()) {
    if (gate.ist != 0) {
      if (!interrupt_stack(core, gate.ist, event.external(), sp)) {
        return false;
      }
      if (ring != cpu.cpl) {
        ss = null_stack(ring);
      }
    } else if (ring != cpu.cpl && !inner_stack(core, ring, event.external(), ss, sp)) {
      return false;
    }
    sp &= ~0xfULL;
    return true;
  }
  return ring == cpu.cpl || inner_stack(core, ring, event.external(), ss, sp);
}

bool deliver_protected(Core& core, const Event& event) {
  Cpu& cpu = core.cpu;
  Gate gate;
  Descriptor code;
  std::uint8_t ring = 0;
  if (!read_gate(core, event, gate) || !handler_segment(core, event, gate, code, ring)) {
    return false;
  }
  const bool long_mode = cpu.long_mode();
  const bool inner = ring != cpu.cpl;
  Segment ss = cpu.segments[kSs];
  std::uint64_t sp = cpu.gpr[kRsp];
  if (!handler_stack(core, event, gate, ring, ss, sp)) {
    return false;
  }
  StackFrame frame(ss, sp, long_mode ? 8 : ss.big() ? 4 : 2, gate.item);
  const bool from_virtual_8086 = cpu.virtual_8086();
  if (from_virtual_8086) {
    for (const SegmentId which : {kGs, kFs, kDs, kEs}) {
      frame.push(cpu.segments[which].selector);
    }
  }
  if (inner || long_mode) {
    frame.push(cpu.segments[kSs].selector);
    frame.push(cpu.gpr[kRsp]);
  }
  frame.push(pushed_flags(cpu, event));
  frame.push(cpu.segments[kCs].selector);
  frame.push(cpu.rip);
  if (pushes_error_code(event)) {
    frame.push(event.fault.error_code);
  }
  const std::uint32_t external = event.external();
  const std::uint32_t stack_error = inner && !long_mode ? (ss.selector & 0xfffcU) | external : external;
  if (!frame.place(cpu, stack_error) ||
      !code_offset_valid(cpu, segment_of(gate.selector, code), gate.offset, external) ||
      !mark_accessed(core, gate.selector, code) ||
      !frame.write(core, ring < 3 ? system_access(cpu) : As::kCode)) {
    return false;
  }
  clear_flags(cpu, gate.interrupt, flag::kTf | flag::kNt | flag::kRf | flag::kVm);
  enter_code_segment(cpu, segment_of(gate.selector, code), ring);
  if (inner) {
    cpu.segments[kSs] = ss;
  }
  set_stack_pointer(cpu, frame.sp());
  if (from_virtual_8086) {
    for (const SegmentId which : {kGs, kFs, kDs, kEs}) {
      cpu.segments[which] = {};
    }
  }
  cpu.rip = gate.offset;
  return true;
}

// What an exception leaves in control and debug registers before its handler runs.
void record(Cpu& cpu, const Event& event) {
  if (!event.is_exception()) {
    return;
  }
  if (event.fault.vector == vec::kPf) {
    cpu.cr2 = event.fault.address;
  } else if (event.fault.vector == vec::kDb) {
    cpu.dr6 = (cpu.dr6 & ~kDr6Hits) | event.fault.address | kDr6Fixed;
    cpu.dr7 &= ~kDr7GeneralDetect;
  }
}

// What to deliver after `second` came up in the delivery of `first` (SDM volume 3, table 6-5); nothing: the
// processor shuts down.
std::optional<Event> combined(const Event& first, const Event& second) {
  const Severity a = severity_of(first);
  const Severity b = severity_of(second);
  if (b == Severity::kBenign) {
    return second;
  }
  switch (a) {
    case Severity::kBenign:
      return second;
    case Severity::kContributory:
      if (b == Severity::kPageFault) {
        return second;
      }
      break;
    case Severity::kPageFault:
      break;
    case Severity::kDoubleFault:
      return std::nullopt;
  }
  return Event{.fault = {.vector = vec::kDf, .has_error_code = true}};
}

}  // namespace

bool deliver_event(Core& core, const Fault& fault, EventKind kind, std::uint8_t length) {
  Cpu& cpu = core.cpu;
  cpu.interrupt_shadow = 0;
  cpu.halted = false;
  // What a device answered to the instruction before it goes unused: it asks anew, if it ever runs.
  cpu.io.answer_count = 0;
  if (kind == EventKind::kNmi) {
    cpu.nmi_masked = true;
  }
  Event event{.fault = fault, .kind = kind};
  // Each turn is graver than the one before, up to the double fault: at most four.
  for (;;) {
    record(cpu, event);
    const bool real_mode = !cpu.protected_mode();
    if (real_mode ? deliver_real_mode(core, event) : deliver_protected(core, event)) {
      return true;
    }
    if (core.mmu.stopped_for_io()) {
      // The tables lie in a device: nothing that a processor could go on from.
      cpu.io.waiting = false;
      (void)cpu.raise(vec::kGp, event.external());
    }
    if (event.software()) {
      cpu.rip -= length;
      if (!cpu.code64()) {
        cpu.rip &= cpu.segments[kCs].big() ? 0xffffffff : 0xffff;
      }
    }
    const std::optional<Event> next = combined(event, {.fault = cpu.fault});
    if (!next) {
      return false;
    }
    event = *next;
  }
}

bool debug_active(const Cpu& cpu) {
  return (cpu.other_flags & flag::kTf) != 0 || (cpu.dr7 & 0xff) != 0;
}

}  // namespace wisp::soft
