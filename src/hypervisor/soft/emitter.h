// Writes x86-64 machine code for generated code, which follows these rules: the host's stack pointer is the
// Cpu, and each guest register has one home, a host register or its place in the Cpu. Nothing here but what
// is said to changes the host's flags, which hold the guest's.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

// Host registers by their numbers in encodings.
enum class HostReg : std::uint8_t {
  kRax,
  kRcx,
  kRdx,
  kRbx,
  kRsp,
  kRbp,
  kRsi,
  kRdi,
  kR8,
  kR9,
  kR10,
  kR11,
  kR12,
  kR13,
  kR14,
  kR15,
};

// Scratch registers, free between instructions: kTemp is RCX, for JRCXZ.
inline constexpr HostReg kTemp = HostReg::kRcx;
inline constexpr HostReg kAddress = HostReg::kR14;  // linear address of a memory operand
inline constexpr HostReg kAddend = HostReg::kR15;   // what is added to it

inline constexpr std::uint8_t kInMemory = 0xff;
// Where each guest register lives.
inline constexpr std::array<std::uint8_t, 16> kHomes{
    0, 10, 2, 3, 11, 5, 6, 7, 8, 9, kInMemory, kInMemory, 12, 13, kInMemory, kInMemory};
[[nodiscard]] constexpr bool has_home(std::uint8_t guest) {
  return kHomes[guest] != kInMemory;
}
[[nodiscard]] constexpr HostReg home_of(std::uint8_t guest) {
  return static_cast<HostReg>(kHomes[guest]);
}

template <typename T>
[[nodiscard]] constexpr std::int32_t offset32(T offset) {
  return static_cast<std::int32_t>(offset);
}
[[nodiscard]] constexpr std::int32_t gpr_offset(std::uint8_t guest) {
  return static_cast<std::int32_t>(offsetof(Cpu, gpr) + 8 * GeneralRegisters::place_of(guest));
}

class Emitter final {
 public:
  // Writes at `write`; the code will run at `run`.
  Emitter(std::uint8_t* write, const std::uint8_t* run, std::size_t room)
      : start_(write), at_(write), end_(write + room), run_(run) {}

  [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(at_ - start_); }
  [[nodiscard]] bool full() const { return full_; }
  // Where the next byte will run.
  [[nodiscard]] const std::uint8_t* here() const { return run_ + size(); }
  // Where the byte `place` bytes from the start will run.
  [[nodiscard]] const std::uint8_t* here_at(std::size_t place) const { return run_ + place; }

  void byte(unsigned value) {
    if (at_ == end_) {
      full_ = true;
      return;
    }
    *at_++ = static_cast<std::uint8_t>(value);
  }
  // The bytes of a number, or of another object.
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  void number(const T& value) {
    if (static_cast<std::size_t>(end_ - at_) < sizeof value) {
      full_ = true;
      return;
    }
    std::memcpy(at_, &value, sizeof value);
    at_ += sizeof value;
  }

  // mov r64, [rsp + offset] and back; mov r64, r64.
  void load(HostReg reg, std::int32_t offset) { state_op(0x8b, reg, offset, true); }
  void store(std::int32_t offset, HostReg reg) { state_op(0x89, reg, offset, true); }
  void load32(HostReg reg, std::int32_t offset) { state_op(0x8b, reg, offset, false); }
  void move(HostReg to, HostReg from) {
    if (to != from) {
      rex(true, from, to);
      byte(0x89);
      byte(0xc0U | low(from) << 3 | low(to));
    }
  }
  void move32(HostReg to, HostReg from) {
    rex(false, from, to);
    byte(0x89);
    byte(0xc0U | low(from) << 3 | low(to));
  }
  // mov r64, imm (the shortest form).
  void constant(HostReg reg, std::uint64_t value) {
    if (value == static_cast<std::uint32_t>(value)) {
      rex(false, HostReg::kRax, reg);
      byte(0xb8U | low(reg));
      number(static_cast<std::uint32_t>(value));
    } else if (static_cast<std::int64_t>(value) == static_cast<std::int32_t>(value)) {
      rex(true, HostReg::kRax, reg);
      byte(0xc7);
      byte(0xc0U | low(reg));
      number(static_cast<std::int32_t>(value));
    } else {
      rex(true, HostReg::kRax, reg);
      byte(0xb8U | low(reg));
      number(value);
    }
  }
  // mov qword [rsp + offset], imm32 sign-extended.
  void store_constant(std::int32_t offset, std::int32_t value) {
    state_op(0xc7, HostReg::kRax, offset, true);
    number(value);
  }
  // lea to, [base + displacement], 64 bits or 32.
  void lea(HostReg to, HostReg base, std::int32_t displacement, bool wide = true) {
    rex(wide, to, base);
    byte(0x8d);
    memory(low(to), base, displacement);
  }
  // lea to, [base + index << scale + displacement]. The index is not RSP.
  void lea(HostReg to, HostReg base, HostReg index, unsigned scale, std::int32_t displacement,
           bool wide = true) {
    rex3(wide, to, index, base);
    byte(0x8d);
    sib_memory(low(to), base, index, scale, displacement);
  }
  // lea to, [index << scale + displacement].
  void lea_index(HostReg to, HostReg index, unsigned scale, std::int32_t displacement, bool wide = true) {
    rex3(wide, to, index, HostReg::kRax);
    byte(0x8d);
    byte(0x04U | low(to) << 3);
    byte(scale << 6 | low(index) << 3 | 5);
    number(displacement);
  }
  // mov reg, [rsp + index * 8 + offset]
  void load_indexed(HostReg reg, HostReg index, std::int32_t offset) {
    rex3(true, reg, index, HostReg::kRsp);
    byte(0x8b);
    sib_memory(low(reg), HostReg::kRsp, index, 3, offset);
  }
  // jmp [rsp + index * 8 + offset]
  void jump_indexed(HostReg index, std::int32_t offset) {
    rex3(false, HostReg::kRax, index, HostReg::kRsp);
    byte(0xff);
    sib_memory(4, HostReg::kRsp, index, 3, offset);
  }
  // mov reg, [base] and mov [base], reg with an index: guest memory.
  void load_guest(HostReg reg, HostReg base, HostReg index) {
    rex3(true, reg, index, base);
    byte(0x8b);
    sib_memory(low(reg), base, index, 0, 0);
  }
  void store_guest(HostReg base, HostReg index, HostReg reg) {
    rex3(true, reg, index, base);
    byte(0x89);
    sib_memory(low(reg), base, index, 0, 0);
  }
  // pext to, from, [rsp + offset]
  void extract(HostReg to, HostReg from, std::int32_t offset) {
    // VEX.LZ.F3.0F38.W1 F5 /r
    byte(0xc4);
    byte((high(to) ? 0U : 0x80U) | 0x40U | 0x20U | 2U);
    byte(0x80U | (~static_cast<unsigned>(from) & 0xfU) << 3 | 2U);
    byte(0xf5);
    memory(low(to), HostReg::kRsp, offset);
  }
  // shlx, shrx, sarx to, from, count: 64 bits.
  enum class Shift : std::uint8_t { kLeft = 1, kArithmeticRight = 2, kRight = 3 };  // the VEX prefix bits
  void shift(Shift kind, HostReg to, HostReg from, HostReg count) {
    byte(0xc4);
    byte((high(to) ? 0U : 0x80U) | 0x40U | (high(from) ? 0U : 0x20U) | 2U);
    byte(0x80U | (~static_cast<unsigned>(count) & 0xfU) << 3 | static_cast<unsigned>(kind));
    byte(0xf7);
    byte(0xc0U | low(to) << 3 | low(from));
  }
  // rorx to, from, count
  void rotate(HostReg to, HostReg from, unsigned count) {
    byte(0xc4);
    byte((high(to) ? 0U : 0x80U) | 0x40U | (high(from) ? 0U : 0x20U) | 3U);
    byte(0x80U | 0x78U | 3U);
    byte(0xf0);
    byte(0xc0U | low(to) << 3 | low(from));
    byte(count);
  }

  // A jump to code elsewhere in code memory.
  void jump(const std::uint8_t* target) {
    byte(0xe9);
    relative(target);
  }
  void call(const std::uint8_t* target) {
    byte(0xe8);
    relative(target);
  }
  // Jcc rel32 to a known place; `condition` as in the low bits of 0x70.
  void jump_if(unsigned condition, const std::uint8_t* target) {
    byte(0x0f);
    byte(0x80U | condition);
    relative(target);
  }
  // The same with a place that is set later: returns where its displacement stands.
  [[nodiscard]] std::size_t jump_later() {
    byte(0xe9);
    number(std::int32_t{0});
    return size();
  }
  [[nodiscard]] std::size_t jump_if_later(unsigned condition) {
    byte(0x0f);
    byte(0x80U | condition);
    number(std::int32_t{0});
    return size();
  }
  [[nodiscard]] std::size_t jump_if_later_short(unsigned condition) {
    byte(0x70U | condition);
    byte(0);
    return size();
  }
  // jrcxz, to anywhere, a place that is set later. It goes by a jump inside of a long NOP behind it: where it
  // is not taken, none of the code that runs is a jump taken, and none needs room where the host's processor
  // remembers those.
  [[nodiscard]] std::size_t far_jump_if_temp_zero() { return far_jump_on_temp(0xe3); }
  // The same where kTemp is not 1, which is lost.
  [[nodiscard]] std::size_t far_jump_unless_temp_one() { return far_jump_on_temp(0xe2); }  // loop
  // jrcxz +disp8, set later.
  [[nodiscard]] std::size_t jump_if_temp_zero() {
    byte(0xe3);
    byte(0);
    return size();
  }
  // The place of an earlier jump is here.
  void place(std::size_t after_displacement) {
    if (!full_) {
      const auto distance = static_cast<std::int32_t>(size() - after_displacement);
      std::memcpy(start_ + after_displacement - 4, &distance, 4);
    }
  }
  // It is `target`, elsewhere in code memory.
  void place_at(std::size_t after_displacement, const std::uint8_t* target) {
    patch(after_displacement - 4, static_cast<std::int32_t>(target - (run_ + after_displacement)));
  }
  // lea to, [base + disp32]; returns where the displacement stands, which patch() sets later.
  [[nodiscard]] std::size_t lea_long(HostReg to, HostReg base) {
    rex(true, to, base);
    byte(0x8d);
    byte(0x80U | low(to) << 3 | low(base));
    number(std::int32_t{0});
    return size() - sizeof(std::int32_t);
  }
  template <typename T>
  void patch(std::size_t place, T value) {
    if (!full_) {
      std::memcpy(start_ + place, &value, sizeof value);
    }
  }
  void place_short(std::size_t after_displacement) {
    if (!full_) {
      start_[after_displacement - 1] = static_cast<std::uint8_t>(size() - after_displacement);
    }
  }

  // Pads with NOPs, few of them, until `ahead` bytes further on the address is divisible by `alignment` (8 at
  // most).
  void align(unsigned alignment, unsigned ahead = 0) {
    static constexpr std::array<std::array<std::uint8_t, 7>, 8> kNops{
        {{},
         {0x90},
         {0x66, 0x90},
         {0x0f, 0x1f, 0x00},
         {0x0f, 0x1f, 0x40, 0x00},
         {0x0f, 0x1f, 0x44, 0x00, 0x00},
         {0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00},
         {0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00}}};
    const std::size_t padding = -(reinterpret_cast<std::uintptr_t>(here()) + ahead) & (alignment - 1);
    for (std::size_t i = 0; i < padding; ++i) {
      byte(kNops[padding][i]);
    }
  }

  void rex(bool wide, HostReg reg, HostReg rm) {
    const unsigned value = (wide ? 8U : 0U) | (high(reg) ? 4U : 0U) | (high(rm) ? 1U : 0U);
    if (value != 0) {
      byte(0x40U | value);
    }
  }
  void rex3(bool wide, HostReg reg, HostReg index, HostReg base) {
    const unsigned value =
        (wide ? 8U : 0U) | (high(reg) ? 4U : 0U) | (high(index) ? 2U : 0U) | (high(base) ? 1U : 0U);
    if (value != 0) {
      byte(0x40U | value);
    }
  }
  // ModRM (and SIB) of [base + displacement].
  void memory(unsigned reg, HostReg base, std::int32_t displacement) {
    const bool sib = low(base) == 4;
    const bool none = displacement == 0 && low(base) != 5;
    const bool small = displacement >= -128 && displacement < 128;
    byte((none ? 0U : small ? 0x40U : 0x80U) | reg << 3 | (sib ? 4U : low(base)));
    if (sib) {
      byte(0x24);
    }
    displace(none, small, displacement);
  }
  void sib_memory(unsigned reg, HostReg base, HostReg index, unsigned scale, std::int32_t displacement) {
    const bool none = displacement == 0 && low(base) != 5;
    const bool small = displacement >= -128 && displacement < 128;
    byte((none ? 0U : small ? 0x40U : 0x80U) | reg << 3 | 4U);
    byte(scale << 6 | low(index) << 3 | low(base));
    displace(none, small, displacement);
  }
  [[nodiscard]] static constexpr unsigned low(HostReg reg) { return static_cast<unsigned>(reg) & 7U; }
  [[nodiscard]] static constexpr bool high(HostReg reg) { return static_cast<unsigned>(reg) >= 8; }

 private:
  [[nodiscard]] std::size_t far_jump_on_temp(unsigned opcode) {
    byte(opcode);
    byte(3);
    byte(0x0f);  // nop [rcx + rbp * 8 + disp32], whose last five bytes are the jump
    byte(0x1f);
    byte(0x84);
    return jump_later();
  }
  void state_op(unsigned opcode, HostReg reg, std::int32_t offset, bool wide) {
    rex(wide, reg, HostReg::kRsp);
    byte(opcode);
    memory(low(reg), HostReg::kRsp, offset);
  }
  void displace(bool none, bool small, std::int32_t displacement) {
    if (none) {
      return;
    }
    if (small) {
      byte(static_cast<std::uint8_t>(displacement));
    } else {
      number(displacement);
    }
  }
  void relative(const std::uint8_t* target) {
    const std::int64_t distance = target - (here() + 4);
    number(static_cast<std::int32_t>(distance));
  }

  std::uint8_t* start_;
  std::uint8_t* at_;
  std::uint8_t* end_;
  const std::uint8_t* run_;
  bool full_ = false;
};

}  // namespace wisp::soft
