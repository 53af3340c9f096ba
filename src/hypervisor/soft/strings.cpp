// String instructions, and ports (SDM volume 2, MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, REP; IN, OUT).
//
// A repeated instruction does a bounded part of its work at a time and then jumps to itself, so that
// interrupts get in: registers always say what is done and what is left, as when it is interrupted by a
// fault. Inside a page it works on host memory directly.
#include <algorithm>
#include <array>
#include <cstring>

#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/operand.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kBudget = 64U << 10;  // bytes at a time
constexpr std::uint64_t kSingleCost = 16;     // of an element that goes through the MMU, in bytes

// --- ports

// Reads a port; false: the machine must answer first.
bool read_port(Core& core, std::uint16_t port, std::uint32_t size, std::uint64_t& value) {
  IoState& io = core.cpu.io;
  std::array<std::uint8_t, 8> bytes{};
  const std::span<std::uint8_t> data(bytes.data(), size);
  if (!core.env.port_read(port, data)) {
    if (io.answers_used == io.answer_count) {
      io.wanted = {
          .kind = IoState::Kind::kPortRead, .size = static_cast<std::uint8_t>(size), .address = port};
      io.waiting = true;
      return false;
    }
    bytes = io.answers[io.answers_used++].data;
  }
  note_breakpoints(core.cpu, port, size, Watched::kPort);
  value = 0;
  std::memcpy(&value, bytes.data(), size);
  return true;
}

// Writes a port; false: the machine must be told of earlier writes first.
bool write_port(Core& core, std::uint16_t port, std::uint32_t size, std::uint64_t value) {
  IoState& io = core.cpu.io;
  if (io.write_count == IoState::kMax) {
    return false;
  }
  note_breakpoints(core.cpu, port, size, Watched::kPort);
  std::array<std::uint8_t, 8> bytes{};
  std::memcpy(bytes.data(), &value, size);
  if (!core.env.port_write(port, std::span(bytes.data(), size))) {
    io.writes[io.write_count++] = {.kind = IoState::Kind::kPortWrite,
                                   .size = static_cast<std::uint8_t>(size),
                                   .address = port,
                                   .data = bytes};
  }
  return true;
}

// Ports are at most 4 bytes wide, whatever REX.W says.
std::uint32_t port_size(const Insn& insn) {
  return std::min<std::uint32_t>(insn.operand_size, 4);
}

Outcome in_or_out(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = port_size(insn);
  const bool immediate = insn.opcode < 0xe8;
  const auto port = static_cast<std::uint16_t>(immediate ? insn.immediate & 0xff : cpu.gpr[kRdx]);
  if (!port_allowed(core, port, size)) {
    return core.mmu.stopped();
  }
  if (insn.op == Op::kOut) {
    return write_port(core, port, size, cpu.gpr[kRax]) ? Outcome::kNext : Outcome::kIo;
  }
  std::uint64_t value = 0;
  if (!read_port(core, port, size, value)) {
    return Outcome::kIo;
  }
  std::uint64_t& rax = cpu.gpr[kRax];
  rax = size == 4 ? value : (rax & ~size_mask(size)) | value;
  return Outcome::kNext;
}

// --- strings

enum class Step : std::uint8_t {
  kDone,     // one or more elements
  kStopped,  // fault, or a device must answer
};

class StringInstruction final {
 public:
  StringInstruction(Core& core, const Insn& insn)
      : core_(core),
        cpu_(core.cpu),
        insn_(insn),
        size_(port_op() ? port_size(insn) : insn.operand_size),
        mask_(size_mask(insn.address_size)),
        down_((core.cpu.other_flags & flag::kDf) != 0) {}

  Outcome run() {
    // Also where a repetition is over before it began.
    if (port_op() && !port_allowed(core_, static_cast<std::uint16_t>(cpu_.gpr[kRdx]), size_)) {
      return core_.mmu.stopped();
    }
    if (insn_.repeat == 0) {
      return one() == Step::kDone ? Outcome::kNext : stopped();
    }
    set_sized(cpu_, kRcx, insn_.address_size, count());  // clears the upper half, even of a count of 0
    const std::uint64_t flags = cpu_.arithmetic_flags;
    const Outcome outcome = repeat();
    if (outcome != Outcome::kNext) {
      cpu_.arithmetic_flags = flags;  // comparisons write them at their end only
    }
    return outcome;
  }

 private:
  Outcome repeat() {
    // With the trap flag every iteration is a step, and breakpoints come behind the iteration that hits them.
    std::uint64_t budget = debug_active(cpu_) ? 1 : kBudget;
    while (count() != 0) {
      const std::uint32_t writes = cpu_.io.write_count;
      std::uint64_t elements = budget > 1 ? many(budget / size_) : 0;
      std::uint64_t cost = elements * size_;
      if (elements == 0) {
        if (one() == Step::kStopped) {
          return stopped();
        }
        elements = 1;
        cost = kSingleCost;
      }
      set_sized(cpu_, kRcx, insn_.address_size, count() - elements);
      if (ended_) {
        break;
      }
      // What a device answered belongs to the iteration that asked.
      const bool device = cpu_.io.answers_used != 0 || cpu_.io.write_count != writes;
      if (cost >= budget || device) {
        return count() != 0 ? Outcome::kJump : Outcome::kNext;
      }
      budget -= cost;
    }
    return Outcome::kNext;
  }

  [[nodiscard]] bool port_op() const { return insn_.op == Op::kInString || insn_.op == Op::kOutString; }
  [[nodiscard]] Outcome stopped() const { return full_ ? Outcome::kIo : core_.mmu.stopped(); }
  [[nodiscard]] std::uint64_t count() const { return sized(cpu_, kRcx, insn_.address_size); }
  [[nodiscard]] std::uint64_t source() const { return sized(cpu_, kRsi, insn_.address_size); }
  [[nodiscard]] std::uint64_t target() const { return sized(cpu_, kRdi, insn_.address_size); }
  [[nodiscard]] SegmentId source_segment() const { return static_cast<SegmentId>(insn_.segment); }
  void advance(Gpr reg, std::uint64_t elements) {
    const std::uint64_t bytes = elements * size_;
    set_sized(cpu_, reg, insn_.address_size, down_ ? cpu_.gpr[reg] - bytes : cpu_.gpr[reg] + bytes);
  }
  [[nodiscard]] bool locate_source(Access access, std::uint64_t& linear) {
    return linear_address(cpu_, source_segment(), source(), size_, access, linear);
  }
  [[nodiscard]] bool locate_target(Access access, std::uint64_t& linear) {
    return linear_address(cpu_, kEs, target(), size_, access, linear);
  }

  // After a read that waits for a device: the write that would follow must not fault once it was answered.
  [[nodiscard]] bool read_for_write(std::uint64_t from, std::uint64_t& value) {
    if (core_.mmu.read(from, &value, size_)) {
      return true;
    }
    std::uint64_t to = 0;
    if (core_.mmu.stopped_for_io() &&
        (!locate_target(Access::kWrite, to) || !core_.mmu.probe(to, size_, Access::kWrite))) {
      cpu_.io.waiting = false;
    }
    return false;
  }

  // --- one element, by way of the MMU

  Step one() {
    bool good = false;
    switch (insn_.op) {
      case Op::kMoveString:
        good = move_one();
        break;
      case Op::kStoreString:
        good = store_one();
        break;
      case Op::kLoadString:
        good = load_one();
        break;
      case Op::kScanString:
        good = scan_one();
        break;
      case Op::kCompareString:
        good = compare_one();
        break;
      case Op::kInString:
        good = in_one();
        break;
      default:
        good = out_one();
        break;
    }
    return good ? Step::kDone : Step::kStopped;
  }

  bool move_one() {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
    std::uint64_t value = 0;
    if (!locate_source(Access::kRead, from) || !read_for_write(from, value) ||
        !locate_target(Access::kWrite, to) || !core_.mmu.write(to, &value, size_)) {
      return false;
    }
    advance(kRsi, 1);
    advance(kRdi, 1);
    return true;
  }

  bool store_one() {
    std::uint64_t to = 0;
    if (!locate_target(Access::kWrite, to) || !core_.mmu.write(to, &cpu_.gpr[kRax], size_)) {
      return false;
    }
    advance(kRdi, 1);
    return true;
  }

  bool load_one() {
    std::uint64_t from = 0;
    std::uint64_t value = 0;
    if (!locate_source(Access::kRead, from) || !core_.mmu.read(from, &value, size_)) {
      return false;
    }
    std::uint64_t& rax = cpu_.gpr[kRax];
    rax = size_ >= 4 ? value : (rax & ~size_mask(size_)) | value;
    advance(kRsi, 1);
    return true;
  }

  // Whether a repeated comparison goes on after this one.
  void compared(std::uint64_t a, std::uint64_t b) {
    cpu_.arithmetic_flags = compare_flags(a, b, size_);
    const bool equal = (cpu_.arithmetic_flags & flag::kZf) != 0;
    ended_ = equal != (insn_.repeat == 0xf3);
  }

  bool scan_one() {
    std::uint64_t at = 0;
    std::uint64_t value = 0;
    if (!locate_target(Access::kRead, at) || !core_.mmu.read(at, &value, size_)) {
      return false;
    }
    compared(cpu_.gpr[kRax], value);
    advance(kRdi, 1);
    return true;
  }

  bool compare_one() {
    std::uint64_t first = 0;
    std::uint64_t second = 0;
    std::uint64_t a = 0;
    std::uint64_t b = 0;
    // The processor looks at the second operand first.
    if (!locate_target(Access::kRead, second) || !core_.mmu.read(second, &b, size_) ||
        !locate_source(Access::kRead, first) || !core_.mmu.read(first, &a, size_)) {
      return false;
    }
    compared(a, b);
    advance(kRsi, 1);
    advance(kRdi, 1);
    return true;
  }

  bool in_one() {
    std::uint64_t to = 0;
    std::uint64_t value = 0;
    if (!locate_target(Access::kWrite, to) || !core_.mmu.probe(to, size_, Access::kWrite) ||
        !read_port(core_, static_cast<std::uint16_t>(cpu_.gpr[kRdx]), size_, value) ||
        !core_.mmu.write(to, &value, size_)) {
      return false;
    }
    advance(kRdi, 1);
    return true;
  }

  bool out_one() {
    std::uint64_t from = 0;
    std::uint64_t value = 0;
    if (!locate_source(Access::kRead, from) || !core_.mmu.read(from, &value, size_)) {
      return false;
    }
    if (!write_port(core_, static_cast<std::uint16_t>(cpu_.gpr[kRdx]), size_, value)) {
      full_ = true;
      return false;
    }
    advance(kRsi, 1);
    return true;
  }

  // --- many elements, inside one page of each operand, upwards

  // How many of at most `most` elements from `offset` on lie in one page; sets `linear`. 0: none, or the
  // slow way must find out why.
  std::uint64_t run_of(SegmentId segment, std::uint64_t offset, std::uint64_t most, Access access,
                       std::uint64_t& linear) {
    if (!linear_address(cpu_, segment, offset, size_, access, linear)) {
      return 0;
    }
    const std::uint64_t room = std::min(kPageSize - (linear & kPageOffset), mask_ - offset);
    const std::uint64_t elements = std::min(most, room / size_);
    std::uint64_t last = 0;
    if (elements == 0 ||
        !linear_address(cpu_, segment, offset + (elements - 1) * size_, size_, access, last)) {
      return 0;
    }
    return elements;
  }
  [[nodiscard]] std::uint8_t* pin(std::uint64_t linear, std::uint64_t elements, Access access) {
    return core_.mmu.pin(linear, static_cast<std::uint32_t>(elements * size_), access);
  }

  // Does up to `most` elements; 0: do one the slow way.
  std::uint64_t many(std::uint64_t most) {
    most = std::min(most, count());
    if (down_ || most < 2 || cpu_.io.answer_count != 0) {
      return 0;
    }
    switch (insn_.op) {
      case Op::kMoveString:
        return move_many(most);
      case Op::kStoreString:
        return store_many(most);
      case Op::kScanString:
        return scan_many(most);
      case Op::kCompareString:
        return compare_many(most);
      default:
        return 0;
    }
  }

  std::uint64_t move_many(std::uint64_t most) {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
    const std::uint64_t readable = run_of(source_segment(), source(), most, Access::kRead, from);
    const std::uint64_t elements = readable == 0 ? 0 : run_of(kEs, target(), readable, Access::kWrite, to);
    if (elements == 0) {
      return 0;
    }
    const std::uint8_t* source_bytes = pin(from, elements, Access::kRead);
    std::uint8_t* target_bytes = source_bytes == nullptr ? nullptr : pin(to, elements, Access::kWrite);
    if (target_bytes == nullptr || !copy_upwards(target_bytes, source_bytes, elements * size_)) {
      return 0;
    }
    core_.mmu.wrote(to, static_cast<std::uint32_t>(elements * size_));
    advance(kRsi, elements);
    advance(kRdi, elements);
    return elements;
  }

  // Copies as element after element does. False: not this way.
  [[nodiscard]] bool copy_upwards(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) const {
    const auto distance =
        static_cast<std::uint64_t>(to - from);  // the host's addresses: large if `to` is below
    if (distance >= bytes) {
      std::memmove(to, from, bytes);
      return true;
    }
    if (distance == 0) {
      return true;
    }
    if (distance < size_) {
      return false;  // each element changes the one after it while that is read
    }
    // The first `distance` bytes over and over.
    for (std::size_t done = 0; done < bytes;) {
      const std::size_t part = std::min<std::size_t>(distance + done, bytes - done);
      std::memcpy(to + done, from, part);
      done += part;
    }
    return true;
  }

  std::uint64_t store_many(std::uint64_t most) {
    std::uint64_t to = 0;
    const std::uint64_t elements = run_of(kEs, target(), most, Access::kWrite, to);
    std::uint8_t* bytes = elements == 0 ? nullptr : pin(to, elements, Access::kWrite);
    if (bytes == nullptr) {
      return 0;
    }
    const std::size_t total = elements * size_;
    const std::uint64_t value = cpu_.gpr[kRax];
    const bool same =
        std::uint64_t{static_cast<std::uint8_t>(value)} * (0x0101010101010101 & size_mask(size_)) ==
        (value & size_mask(size_));
    if (same) {
      std::memset(bytes, static_cast<int>(value & 0xff), total);
    } else {
      for (std::size_t at = 0; at < total; at += size_) {
        std::memcpy(bytes + at, &value, size_);
      }
    }
    core_.mmu.wrote(to, static_cast<std::uint32_t>(total));
    advance(kRdi, elements);
    return elements;
  }

  [[nodiscard]] std::uint64_t element_at(const std::uint8_t* bytes, std::uint64_t index) const {
    std::uint64_t value = 0;
    std::memcpy(&value, bytes + index * size_, size_);
    return value;
  }

  std::uint64_t scan_many(std::uint64_t most) {
    std::uint64_t at = 0;
    const std::uint64_t elements = run_of(kEs, target(), most, Access::kRead, at);
    const std::uint8_t* bytes = elements == 0 ? nullptr : pin(at, elements, Access::kRead);
    if (bytes == nullptr) {
      return 0;
    }
    const std::uint64_t wanted = cpu_.gpr[kRax] & size_mask(size_);
    const bool while_equal = insn_.repeat == 0xf3;
    std::uint64_t done = 0;
    std::uint64_t value = 0;
    do {
      value = element_at(bytes, done++);
    } while (done < elements && (value == wanted) == while_equal);
    compared(wanted, value);
    advance(kRdi, done);
    return done;
  }

  std::uint64_t compare_many(std::uint64_t most) {
    std::uint64_t first = 0;
    std::uint64_t second = 0;
    const std::uint64_t readable = run_of(source_segment(), source(), most, Access::kRead, first);
    const std::uint64_t elements = readable == 0 ? 0 : run_of(kEs, target(), readable, Access::kRead, second);
    if (elements == 0) {
      return 0;
    }
    const std::uint8_t* left = pin(first, elements, Access::kRead);
    const std::uint8_t* right = left == nullptr ? nullptr : pin(second, elements, Access::kRead);
    if (right == nullptr) {
      return 0;
    }
    const bool while_equal = insn_.repeat == 0xf3;
    std::uint64_t done = 0;
    std::uint64_t a = 0;
    std::uint64_t b = 0;
    do {
      a = element_at(left, done);
      b = element_at(right, done++);
    } while (done < elements && (a == b) == while_equal);
    compared(a, b);
    advance(kRsi, done);
    advance(kRdi, done);
    return done;
  }

  Core& core_;
  Cpu& cpu_;
  const Insn& insn_;
  const std::uint32_t size_;
  const std::uint64_t mask_;
  const bool down_;
  bool ended_ = false;  // a comparison stopped the repetition
  bool full_ = false;   // no room for another write to a port
};

}  // namespace

Outcome execute_string(Core& core, const Insn& insn) {
  if (insn.op == Op::kIn || insn.op == Op::kOut) {
    return in_or_out(core, insn);
  }
  return StringInstruction(core, insn).run();
}

}  // namespace wisp::soft
