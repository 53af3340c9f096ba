// Which accesses of a block share a look-up.
#include "hypervisor/soft/access_plan.h"

#include <gtest/gtest.h>

#include <vector>

#include "hypervisor/soft/decoder.h"

namespace wisp::soft {
namespace {

using Kind = PlannedAccess::Kind;

class Plan {
 public:
  explicit Plan(const std::vector<std::vector<std::uint8_t>>& code) {
    for (const auto& bytes : code) {
      EXPECT_EQ(decode(bytes, CodeSize::k64, insns_.emplace_back()), DecodeResult::kDone);
    }
    plan_accesses(insns_, plan_);
  }
  [[nodiscard]] const PlannedAccess& operator[](std::size_t i) const { return plan_.at(i); }

 private:
  std::vector<Insn> insns_;
  AccessPlan plan_{};
};

TEST(AccessPlan, PushesShareOneLookUp) {
  const Plan plan({{0x55}, {0x53}, {0x51}});  // push rbp, rbx, rcx
  EXPECT_EQ(plan[0].kind, Kind::kFirst);
  EXPECT_TRUE(plan[0].write);
  EXPECT_EQ(plan[0].before, 16);
  EXPECT_EQ(plan[0].length, 24);
  EXPECT_EQ(plan[1].kind, Kind::kShared);
  EXPECT_EQ(plan[2].kind, Kind::kShared);
  EXPECT_EQ(plan[1].slot, plan[0].slot);
}

TEST(AccessPlan, FollowsConstantChangesOfTheStackPointer) {
  // push rbp; sub rsp, 0x20; mov [rsp+8], rax; add rsp, 0x20; pop rbp; ret
  const Plan plan({{0x55},
                   {0x48, 0x83, 0xec, 0x20},
                   {0x48, 0x89, 0x44, 0x24, 8},
                   {0x48, 0x83, 0xc4, 0x20},
                   {0x5d},
                   {0xc3}});
  EXPECT_EQ(plan[0].kind, Kind::kFirst);
  EXPECT_EQ(plan[0].before, 0x18);  // the store lies at -8 - 0x20 + 8
  EXPECT_EQ(plan[0].length, 0x18 + 16);
  EXPECT_EQ(plan[2].kind, Kind::kShared);
  EXPECT_EQ(plan[4].kind, Kind::kShared);
  EXPECT_EQ(plan[5].kind, Kind::kShared);
}

TEST(AccessPlan, ARegisterThatChangesEndsItsGroup) {
  // mov rax, [rbx]; mov rcx, [rbx+8]; mov rbx, [rbx+16]; mov rdx, [rbx]
  const Plan plan({{0x48, 0x8b, 3}, {0x48, 0x8b, 0x4b, 8}, {0x48, 0x8b, 0x5b, 16}, {0x48, 0x8b, 0x13}});
  EXPECT_EQ(plan[0].kind, Kind::kFirst);
  EXPECT_FALSE(plan[0].write);
  EXPECT_EQ(plan[0].length, 24);
  EXPECT_EQ(plan[2].kind, Kind::kShared);
  EXPECT_EQ(plan[3].kind, Kind::kAlone);
}

TEST(AccessPlan, AHighByteIsAPartOfItsRegister) {
  // mov rax, [rbx]; mov bh, 1; mov rcx, [rbx+8]
  const Plan plan({{0x48, 0x8b, 3}, {0xb7, 1}, {0x48, 0x8b, 0x4b, 8}});
  EXPECT_EQ(plan[0].kind, Kind::kAlone);
  EXPECT_EQ(plan[2].kind, Kind::kAlone);
}

TEST(AccessPlan, WhatTheInterpreterRunsEndsAllGroups) {
  // mov rax, [rbx]; cpuid; mov rax, [rbx+8]
  const Plan plan({{0x48, 0x8b, 3}, {0x0f, 0xa2}, {0x48, 0x8b, 0x43, 8}});
  EXPECT_EQ(plan[0].kind, Kind::kAlone);
  EXPECT_EQ(plan[2].kind, Kind::kAlone);
}

TEST(AccessPlan, FarApartIsNotShared) {
  // mov rax, [rbx]; mov rax, [rbx+0x1000]; mov rcx, [rbx+0x1008]
  const Plan plan({{0x48, 0x8b, 3}, {0x48, 0x8b, 0x83, 0, 0x10, 0, 0}, {0x48, 0x8b, 0x8b, 8, 0x10, 0, 0}});
  EXPECT_EQ(plan[0].kind, Kind::kAlone);
  EXPECT_EQ(plan[1].kind, Kind::kFirst);
  EXPECT_EQ(plan[1].before, 0);
  EXPECT_EQ(plan[1].length, 16);
  EXPECT_EQ(plan[2].kind, Kind::kShared);
}

TEST(AccessPlan, SlotsAreLimitedAndUsedAgain) {
  // Two rounds over five registers: one of the groups finds no slot. Then, once they are over, there are
  // slots again.
  std::vector<std::vector<std::uint8_t>> code;
  constexpr std::array<std::uint8_t, 5> kModrm{0x03, 0x06, 0x07, 0x45,
                                               0x02};  // [rbx] [rsi] [rdi] [rbp+0] [rdx]
  for (int round = 0; round < 2; ++round) {
    for (const std::uint8_t modrm : kModrm) {
      code.push_back(modrm == 0x45 ? std::vector<std::uint8_t>{0x48, 0x8b, modrm, 0}
                                   : std::vector<std::uint8_t>{0x48, 0x8b, modrm});
    }
  }
  code.insert(code.end(), {{0x49, 0x8b, 0x01}, {0x49, 0x8b, 0x41, 8}});  // mov rax, [r9]; mov rax, [r9+8]
  const Plan plan(code);
  std::size_t first = 0;
  for (std::size_t i = 0; i < 10; ++i) {
    first += plan[i].kind == Kind::kFirst ? 1U : 0U;
  }
  EXPECT_EQ(first, kAccessSlots);
  EXPECT_EQ(plan[10].kind, Kind::kFirst);
  EXPECT_EQ(plan[11].kind, Kind::kShared);
}

}  // namespace
}  // namespace wisp::soft
