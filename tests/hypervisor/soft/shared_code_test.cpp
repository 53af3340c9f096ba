// Two processors that come to a page of code at the same time.
#include "hypervisor/soft/shared_code.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "hypervisor/soft/bare_environment.h"
#include "memory/address_space.h"

namespace wisp::soft {
namespace {

class SharedCodeTest : public testing::Test {
 protected:
  static constexpr std::uint64_t kGpa = kPageSize;

  void SetUp() override {
    ASSERT_TRUE(space_.add_listener(&memory_));
    ASSERT_TRUE(space_.add(MemoryRegion::ram("ram", ram_.data(), ram_.size()), 0));
    auto code = make_shared_code(memory_,
                                 {.flush_inline = [](Cpu*) {},
                                  .revoke_writes = [this](Cpu* self) { on_revoke_(self); },
                                  .wait_a_turn = [this](Cpu*, std::uint32_t&) { ++turns_; }},
                                 {.executor = ExecutorChoice::kInterpret});
    ASSERT_TRUE(code);
    code_ = *std::move(code);
    for (auto& processor : processors_) {
      auto made = Processor::create(memory_, mmio_, environment_, code_);
      ASSERT_TRUE(made);
      processor = *std::move(made);
    }
  }
  void TearDown() override {
    processors_ = {};
    code_.reset();
    space_.remove_listener(&memory_);
  }
  void watch(std::size_t who, std::uint64_t offset, std::uint32_t size = 16) {
    const PhysicalPage page = memory_.find(kGpa);
    code_->watch_code(page, kGpa + offset, size, processors_.at(who)->cpu(), processors_.at(who)->core().mmu);
  }
  [[nodiscard]] PageInfo& info() const { return *memory_.find(kGpa).info; }

  std::vector<std::uint8_t> ram_ = std::vector<std::uint8_t>(4 * kPageSize);
  AddressSpace space_{"memory", 0};
  PhysicalMemory memory_;
  BareMmio mmio_;
  BareEnvironment environment_;
  std::function<void(Cpu*)> on_revoke_ = [](Cpu*) {};
  std::atomic<int> turns_ = 0;
  std::shared_ptr<SharedCode> code_;
  std::array<std::unique_ptr<Processor>, 2> processors_;
};

// The others are asked once for a page. Who comes while they are waits until they have answered: if it asked
// in turn, the first would find the page unfinished again, and so on between the two of them.
TEST_F(SharedCodeTest, WhoComesSecondWaitsForTheFirst) {
  int asked = 0;
  std::atomic<bool> second_back = false;
  std::jthread second;
  on_revoke_ = [&](Cpu* self) {
    ++asked;
    EXPECT_EQ(self, &processors_[0]->cpu());
    second = std::jthread([&] {
      watch(1, 64);
      second_back = true;
    });
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (turns_ < 3 && std::chrono::steady_clock::now() < limit) {
      std::this_thread::yield();
    }
    EXPECT_GE(turns_, 3) << "it does not wait";
    EXPECT_FALSE(second_back);
  };
  watch(0, 0);
  second.join();
  EXPECT_TRUE(second_back);
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(info().code_lines, 3U);
  EXPECT_EQ(info().revoking, 0U);
  // More of a page that is watched costs nobody anything.
  watch(1, 128);
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(info().code_lines, 7U);
}

// The page's code is forgotten while the others are asked: they may have taken write access again.
TEST_F(SharedCodeTest, WhatIsForgottenMeanwhileIsAskedForAgain) {
  int asked = 0;
  on_revoke_ = [&](Cpu*) {
    if (++asked == 1) {
      code_->forget_code(info(), kGpa);
    }
  };
  watch(0, 0);
  EXPECT_EQ(asked, 2);
  EXPECT_EQ(info().code_lines, 1U);
}

// But not for ever: a processor that is in the middle of an instruction could not be stopped.
TEST_F(SharedCodeTest, WhatIsForgottenTimeAndAgainIsGivenUp) {
  int asked = 0;
  on_revoke_ = [&](Cpu*) {
    ++asked;
    code_->forget_code(info(), kGpa);
  };
  watch(0, 0);
  EXPECT_LE(asked, 3);
  EXPECT_EQ(info().code_lines, 0U);
  EXPECT_EQ(info().revoking, 0U);
}

}  // namespace
}  // namespace wisp::soft
