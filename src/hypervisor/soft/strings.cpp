// String instructions and port accesses.
//
// A repeated instruction does as many iterations as lie in a page at once, at most a bounded number in a
// call, and then comes back with rip unchanged, so that interrupts get in between. Registers are always those
// of the iterations that are done.
#include <algorithm>
#include <array>
#include <cstring>

#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/operand.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kMostBytes = 64U << 10;  // in one call

std::uint64_t address_mask(const Insn& insn) {
  return insn.address_size == 8 ? ~0ULL : insn.address_size == 4 ? 0xffffffffULL : 0xffffULL;
}

// One string instruction under way.
class Strings final {
 public:
  Strings(Core& core, const Insn& insn)
      : core_(core),
        cpu_(core.cpu),
        insn_(insn),
        size_(insn.operand_size),
        mask_(address_mask(insn)),
        down_((core.cpu.other_flags & flag::kDf) != 0) {}

  Outcome run() {
    if (insn_.repeat == 0) {
      return element() ? Outcome::kNext : core_.mmu.stopped();
    }
    const bool compares = insn_.op == Op::kScanString || insn_.op == Op::kCompareString;
    for (std::uint64_t done = 0; done < kMostBytes;) {
      const std::uint64_t left = cpu_.gpr[kRcx] & mask_;
      if (left == 0) {
        return Outcome::kNext;
      }
      std::uint64_t count = chunk(left);
      if (count == 0) {
        if (!element()) {
          return core_.mmu.stopped();
        }
        count = 1;
        // Answers belong to the iteration that asked.
        cpu_.io.answer_count = 0;
        cpu_.io.answers_used = 0;
      }
      operand::write_register(cpu_, kRcx, insn_.address_size, left - count);
      done += count * size_;
      if (compares && ((cpu_.arithmetic_flags & flag::kZf) != 0) != (insn_.repeat == 0xf3)) {
        return Outcome::kNext;
      }
      if (cpu_.io.write_count != 0) {
        break;
      }
    }
    return (cpu_.gpr[kRcx] & mask_) == 0 ? Outcome::kNext : Outcome::kJump;
  }

 private:
  [[nodiscard]] bool source(std::uint32_t size, std::uint64_t& linear) {
    return linear_address(cpu_, static_cast<SegmentId>(insn_.segment), cpu_.gpr[kRsi] & mask_, size,
                          Access::kRead, linear);
  }
  [[nodiscard]] bool target(std::uint32_t size, Access access, std::uint64_t& linear) {
    return linear_address(cpu_, kEs, cpu_.gpr[kRdi] & mask_, size, access, linear);
  }
  void advance(Gpr reg, std::uint64_t count) {
    const std::uint64_t bytes = count * size_;
    operand::write_register(cpu_, reg, insn_.address_size, cpu_.gpr[reg] + (down_ ? -bytes : bytes));
  }

  [[nodiscard]] bool load(std::uint64_t& value) {
    std::uint64_t linear = 0;
    value = 0;
    return source(size_, linear) && core_.mmu.read(linear, &value, size_);
  }

  void compare(std::uint64_t left, std::uint64_t right) {
    const unsigned bits = 8 * size_;
    const std::uint64_t mask = bits == 64 ? ~0ULL : (1ULL << bits) - 1;
    left &= mask;
    right &= mask;
    const std::uint64_t result = (left - right) & mask;
    const std::uint64_t top = 1ULL << (bits - 1);
    std::uint64_t flags = 0;
    flags |= left < right ? flag::kCf : 0;
    flags |= result == 0 ? flag::kZf : 0;
    flags |= (result & top) != 0 ? flag::kSf : 0;
    flags |= ((left ^ right) & (left ^ result) & top) != 0 ? flag::kOf : 0;
    flags |= ((left ^ right ^ result) & 0x10) != 0 ? flag::kAf : 0;
    flags |= __builtin_parity(static_cast<unsigned>(result & 0xff)) == 0 ? flag::kPf : 0;
    cpu_.arithmetic_flags = flags;
  }

  // One iteration, without the count.
  [[nodiscard]] bool element() {
    std::uint64_t value = 0;
    std::uint64_t linear = 0;
    switch (insn_.op) {
      case Op::kMoveString:
        if (!load(value) || !target(size_, Access::kWrite, linear) ||
            !core_.mmu.write(linear, &value, size_)) {
          return false;
        }
        advance(kRsi, 1);
        advance(kRdi, 1);
        return true;
      case Op::kStoreString:
        if (!target(size_, Access::kWrite, linear) || !core_.mmu.write(linear, &cpu_.gpr[kRax], size_)) {
          return false;
        }
        advance(kRdi, 1);
        return true;
      case Op::kLoadString:
        if (!load(value)) {
          return false;
        }
        set_rax(value);
        advance(kRsi, 1);
        return true;
      case Op::kScanString:
        if (!target(size_, Access::kRead, linear) || !core_.mmu.read(linear, &value, size_)) {
          return false;
        }
        compare(cpu_.gpr[kRax], value);
        advance(kRdi, 1);
        return true;
      case Op::kCompareString: {
        std::uint64_t other = 0;
        if (!load(value) || !target(size_, Access::kRead, linear) || !core_.mmu.read(linear, &other, size_)) {
          return false;
        }
        compare(value, other);
        advance(kRsi, 1);
        advance(kRdi, 1);
        return true;
      }
      case Op::kInString:
        return in_element();
      default:
        return out_element();
    }
  }

  void set_rax(std::uint64_t value) {
    if (size_ == 1) {
      cpu_.gpr[kRax] = (cpu_.gpr[kRax] & ~0xffULL) | value;
    } else {
      operand::write_register(cpu_, kRax, size_, value);
    }
  }

  [[nodiscard]] bool in_element();
  [[nodiscard]] bool out_element();

  // Iterations done at once on host memory; 0: none can be.
  [[nodiscard]] std::uint64_t chunk(std::uint64_t left) {
    if (down_ || (insn_.op != Op::kMoveString && insn_.op != Op::kStoreString)) {
      return 0;
    }
    const auto room = [this](std::uint64_t offset) { return (kPageSize - (offset & kPageOffset)) / size_; };
    std::uint64_t to = 0;
    if (!target(size_, Access::kWrite, to)) {
      return 0;
    }
    std::uint64_t count = std::min(left, room(to));
    std::uint64_t from = 0;
    const bool moves = insn_.op == Op::kMoveString;
    if (moves) {
      if (!source(size_, from)) {
        return 0;
      }
      count = std::min(count, room(from));
    }
    const std::uint64_t limit = mask_ == ~0ULL ? count
                                               : std::min((mask_ - (cpu_.gpr[kRdi] & mask_)) / size_,
                                                          (mask_ - (cpu_.gpr[kRsi] & mask_)) / size_);
    count = std::min(count, limit);
    if (count < 2) {
      return 0;
    }
    const auto bytes = static_cast<std::uint32_t>(count * size_);
    std::uint64_t whole = 0;
    if (!target(bytes, Access::kWrite, whole) || (moves && !source(bytes, whole))) {
      return 0;
    }
    std::uint8_t* out = core_.mmu.pin(to, bytes, Access::kWrite);
    if (out == nullptr) {
      return 0;
    }
    if (moves) {
      const std::uint8_t* in = core_.mmu.pin(from, bytes, Access::kRead);
      if (in == nullptr) {
        return 0;
      }
      copy(out, in, count);
      advance(kRsi, count);
    } else {
      fill(out, count);
    }
    core_.mmu.wrote(to, bytes);
    advance(kRdi, count);
    return count;
  }

  // As if one by one: where the target runs into the source, what was just written is read again.
  void copy(std::uint8_t* out, const std::uint8_t* in, std::uint64_t count) const {
    const std::uint64_t bytes = count * size_;
    if (out + bytes <= in || in + bytes <= out) {
      std::memcpy(out, in, bytes);
      return;
    }
    for (std::uint64_t i = 0; i < bytes; i += size_) {
      std::array<std::uint8_t, 8> item{};
      std::memcpy(item.data(), in + i, size_);
      std::memcpy(out + i, item.data(), size_);
    }
  }
  void fill(std::uint8_t* out, std::uint64_t count) const {
    if (size_ == 1) {
      std::memset(out, static_cast<int>(cpu_.gpr[kRax] & 0xff), count);
      return;
    }
    if (cpu_.gpr[kRax] == 0) {
      std::memset(out, 0, count * size_);
      return;
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * size_, &cpu_.gpr[kRax], size_);
    }
  }

  Core& core_;
  Cpu& cpu_;
  const Insn& insn_;
  const std::uint32_t size_;
  const std::uint64_t mask_;
  const bool down_;
};

// Reads a port: the engine's, or what the machine answered; false: the machine must answer first.
bool read_port(Core& core, std::uint16_t port, std::uint8_t* out, std::uint32_t size) {
  IoState& io = core.cpu.io;
  if (core.env.port_read(port, std::span(out, size))) {
    return true;
  }
  if (io.answers_used < io.answer_count) {
    std::copy_n(io.answers[io.answers_used++].data.begin(), size, out);
    return true;
  }
  io.wanted = {.kind = IoState::Kind::kPortRead, .size = static_cast<std::uint8_t>(size), .address = port};
  io.waiting = true;
  return false;
}

void write_port(Core& core, std::uint16_t port, const std::uint8_t* in, std::uint32_t size) {
  if (core.env.port_write(port, std::span(in, size))) {
    return;
  }
  IoState& io = core.cpu.io;
  if (io.write_count < IoState::kMax) {
    IoState::Access& access = io.writes[io.write_count++];
    access = {.kind = IoState::Kind::kPortWrite, .size = static_cast<std::uint8_t>(size), .address = port};
    std::copy_n(in, size, access.data.begin());
  }
}

bool Strings::in_element() {
  std::uint64_t linear = 0;
  std::array<std::uint8_t, 8> data{};
  const auto port = static_cast<std::uint16_t>(cpu_.gpr[kRdx]);
  // All that can fault comes before the read, which may have an effect.
  if (!target(size_, Access::kWrite, linear) || !core_.mmu.probe(linear, size_, Access::kWrite) ||
      !read_port(core_, port, data.data(), size_) || !core_.mmu.write(linear, data.data(), size_)) {
    return false;
  }
  advance(kRdi, 1);
  return true;
}

bool Strings::out_element() {
  std::uint64_t value = 0;
  if (!load(value)) {
    return false;
  }
  std::array<std::uint8_t, 8> data{};
  std::memcpy(data.data(), &value, sizeof value);
  write_port(core_, static_cast<std::uint16_t>(cpu_.gpr[kRdx]), data.data(), size_);
  advance(kRsi, 1);
  return true;
}

Outcome in_out(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  const std::uint32_t size = std::min<std::uint32_t>(insn.operand_size, 4);
  const auto port =
      static_cast<std::uint16_t>(insn.immediate_size != 0 ? insn.immediate & 0xff : cpu.gpr[kRdx] & 0xffff);
  if (!port_allowed(core, port, size)) {
    return core.mmu.stopped();
  }
  std::array<std::uint8_t, 8> data{};
  if (insn.op == Op::kOut) {
    std::memcpy(data.data(), &cpu.gpr[kRax], sizeof data);
    write_port(core, port, data.data(), size);
    return Outcome::kNext;
  }
  if (!read_port(core, port, data.data(), size)) {
    return Outcome::kIo;
  }
  std::uint64_t value = 0;
  std::memcpy(&value, data.data(), size);
  if (size == 1) {
    cpu.gpr[kRax] = (cpu.gpr[kRax] & ~0xffULL) | value;
  } else {
    operand::write_register(cpu, kRax, size, value);
  }
  return Outcome::kNext;
}

}  // namespace

Outcome execute_string(Core& core, const Insn& insn) {
  if (insn.op == Op::kIn || insn.op == Op::kOut) {
    return in_out(core, insn);
  }
  if (insn.op == Op::kInString || insn.op == Op::kOutString) {
    Insn narrow = insn;
    narrow.operand_size = std::min<std::uint8_t>(insn.operand_size, 4);
    if (!port_allowed(core, static_cast<std::uint16_t>(core.cpu.gpr[kRdx]), narrow.operand_size)) {
      return core.mmu.stopped();
    }
    return Strings(core, narrow).run();
  }
  return Strings(core, insn).run();
}

}  // namespace wisp::soft
