#include "hypervisor/soft/access_plan.h"

#include <algorithm>
#include <bit>
#include <optional>

namespace wisp::soft {
namespace {

// What a group may span: most lie inside one page then.
constexpr std::int64_t kMostSpan = 256;

struct Access {
  std::uint8_t base = 0;
  std::int64_t displacement = 0;
  std::uint32_t size = 0;
  bool write = false;
};

// The access of an instruction that is translated in line, where its address is a register and a constant.
std::optional<Access> access_of(const Insn& insn) {
  switch (insn.op) {
    case Op::kPush:
    case Op::kPushImm:
    case Op::kPushFlags:
    case Op::kCall:
      return insn.memory || (insn.op != Op::kCall && insn.operand_size != 8)
                 ? std::nullopt
                 : std::optional<Access>({.base = kRsp, .displacement = -8, .size = 8, .write = true});
    case Op::kPop:
      return insn.memory || insn.operand_size != 8
                 ? std::nullopt
                 : std::optional<Access>({.base = kRsp, .displacement = 0, .size = 8, .write = false});
    case Op::kReturn:
    case Op::kReturnImm:
      return Access{.base = kRsp, .displacement = 0, .size = 8, .write = false};
    case Op::kLeave:
      return insn.operand_size != 8
                 ? std::nullopt
                 : std::optional<Access>({.base = kRbp, .displacement = 0, .size = 8, .write = false});
    case Op::kNative:
    case Op::kDivide:
    case Op::kDivideSigned:
    case Op::kJumpIndirect: {
      const bool plain = insn.memory && insn.base < 16 && insn.index == kNoRegister &&
                         insn.address_size == 8 && insn.segment != kFs && insn.segment != kGs;
      const std::uint32_t size = insn.op == Op::kJumpIndirect ? 8 : insn.memory_size;
      if (!plain || size == 0 || size > 64) {
        return std::nullopt;
      }
      return Access{.base = insn.base,
                    .displacement = insn.displacement,
                    .size = size,
                    .write = (insn.rm_access & kWrites) != 0};
    }
    default:
      return std::nullopt;
  }
}

// What an instruction does to the general registers, and whether all that was looked up still holds after it.
struct Effect {
  std::uint16_t written = 0;    // a bit each
  std::int64_t rsp_change = 0;  // where RSP is not among them
  bool keeps = true;
};

std::uint16_t bit(std::uint8_t reg) {
  return static_cast<std::uint16_t>(1U << (reg & 15U));
}

std::uint16_t written_operands(const Insn& insn) {
  std::uint16_t written = insn.implicit_writes;
  const auto add = [&](OperandClass cls, std::uint8_t reg, std::uint8_t access, std::uint8_t size) {
    if (cls == OperandClass::kGpr && (access & kWrites) != 0) {
      written |= bit(reg);
      if (size == 1 && reg >= 4 && reg < 8) {
        written |= bit(static_cast<std::uint8_t>(reg - 4));  // AH to BH, where there is no REX prefix
      }
    }
  };
  add(insn.reg_class, insn.reg, insn.reg_access, insn.reg_size);
  if (!insn.memory) {
    add(insn.rm_class, insn.rm, insn.rm_access, insn.rm_size);
  }
  add(insn.vvvv_class, insn.vvvv, insn.vvvv_access, 8);
  return written;
}

// ADD and SUB of a constant to RSP, and the same by LEA.
std::optional<std::int64_t> constant_change_of_rsp(const Insn& insn) {
  if (insn.operand_size != 8) {
    return std::nullopt;
  }
  if (insn.op == Op::kLea && insn.reg == kRsp && insn.base == kRsp && insn.index == kNoRegister &&
      insn.address_size == 8) {
    return insn.displacement;
  }
  const bool group = insn.op == Op::kNative && insn.map == 0 && (insn.opcode == 0x81 || insn.opcode == 0x83);
  if (!group || insn.memory || insn.rm != kRsp || (insn.reg_field() != 0 && insn.reg_field() != 5)) {
    return std::nullopt;
  }
  const auto amount = static_cast<std::int64_t>(insn.immediate);
  return insn.reg_field() == 0 ? amount : -amount;
}

Effect effect_of(const Insn& insn) {
  if (const auto change = constant_change_of_rsp(insn)) {
    return {.rsp_change = *change};
  }
  switch (insn.op) {
    case Op::kNop:
    case Op::kClearInterrupt:
    case Op::kJumpIf:
    case Op::kSwapGs:
      return {};
    case Op::kNative:
    case Op::kDivide:
    case Op::kDivideSigned:
      return {.written = static_cast<std::uint16_t>(written_operands(insn) |
                                                    (insn.op == Op::kNative ? 0U : bit(kRax) | bit(kRdx)))};
    case Op::kLea:
      return {.written = bit(insn.reg), .keeps = insn.operand_size != 2};
    case Op::kPush:
    case Op::kPushImm:
    case Op::kPushFlags:
      return {.rsp_change = -8, .keeps = access_of(insn).has_value()};
    case Op::kPop:
      return {.written = bit(insn.rm), .rsp_change = 8, .keeps = access_of(insn).has_value()};
    case Op::kLeave:
      return {.written = static_cast<std::uint16_t>(bit(kRsp) | bit(kRbp)),
              .keeps = access_of(insn).has_value()};
    default:
      return {.keeps = false};
  }
}

struct Group {
  std::size_t first = 0;
  std::size_t last = 0;
  std::int64_t low = 0;  // from the base register as it is at the first access
  std::int64_t high = 0;
  std::int64_t first_low = 0;
  std::uint32_t count = 0;
  bool write = false;
};

constexpr std::uint8_t kNoGroup = 0xff;

}  // namespace

void plan_accesses(std::span<const Insn> block, AccessPlan& plan) {
  std::fill_n(plan.begin(), block.size(), PlannedAccess{});
  std::array<Group, kMaxBlockInstructions> groups;  // those that there are
  std::size_t group_count = 0;
  std::array<std::uint8_t, 16> open{};  // by base register
  open.fill(kNoGroup);
  std::int64_t rsp_change = 0;  // since the first access of RSP's group
  std::array<std::uint8_t, kMaxBlockInstructions> group_of{};
  group_of.fill(kNoGroup);

  for (std::size_t i = 0; i < block.size(); ++i) {
    const Insn& insn = block[i];
    if (const auto access = access_of(insn)) {
      std::uint8_t& now = open[access->base];
      const std::int64_t low = access->displacement + (access->base == kRsp ? rsp_change : 0);
      const std::int64_t high = low + access->size;
      if (now != kNoGroup && std::max(groups[now].high, high) - std::min(groups[now].low, low) <= kMostSpan) {
        Group& group = groups[now];
        group.low = std::min(group.low, low);
        group.high = std::max(group.high, high);
        group.write = group.write || access->write;
        group.last = i;
        ++group.count;
      } else {
        now = static_cast<std::uint8_t>(group_count++);
        const std::int64_t own = access->displacement;
        groups[now] = {.first = i,
                       .last = i,
                       .low = own,
                       .high = own + access->size,
                       .first_low = own,
                       .count = 1,
                       .write = access->write};
        if (access->base == kRsp) {
          rsp_change = 0;
        }
      }
      group_of[i] = now;
    }
    const Effect effect = effect_of(insn);
    if (!effect.keeps) {
      open.fill(kNoGroup);
    }
    for (unsigned written = effect.written; written != 0; written &= written - 1) {
      open[static_cast<std::size_t>(std::countr_zero(written))] = kNoGroup;
    }
    rsp_change += effect.rsp_change;
  }

  // Groups of one need no slot; the others take one from their first access to their last.
  std::array<std::size_t, kAccessSlots> busy_until{};
  std::array<bool, kAccessSlots> busy{};
  std::array<std::uint8_t, kMaxBlockInstructions> slot_of{};
  slot_of.fill(kNoGroup);
  for (std::size_t i = 0; i < block.size(); ++i) {
    const std::uint8_t number = group_of[i];
    if (number == kNoGroup || groups[number].count < 2) {
      continue;
    }
    const Group& group = groups[number];
    if (group.first == i) {
      for (std::uint8_t slot = 0; slot < kAccessSlots; ++slot) {
        if (!busy[slot] || busy_until[slot] < i) {
          busy[slot] = true;
          busy_until[slot] = group.last;
          slot_of[number] = slot;
          break;
        }
      }
      if (slot_of[number] != kNoGroup) {
        plan[i] = {.kind = PlannedAccess::Kind::kFirst,
                   .slot = slot_of[number],
                   .write = group.write,
                   .before = static_cast<std::uint16_t>(group.first_low - group.low),
                   .length = static_cast<std::uint16_t>(group.high - group.low)};
      }
    } else if (slot_of[number] != kNoGroup) {
      plan[i] = {.kind = PlannedAccess::Kind::kShared, .slot = slot_of[number]};
    }
  }
}

}  // namespace wisp::soft
