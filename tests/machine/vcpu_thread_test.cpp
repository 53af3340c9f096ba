#include "machine/vcpu_thread.h"

#include <gtest/gtest.h>

#include <chrono>
#include <mutex>
#include <vector>

#include "support/fake_engine.h"

namespace wisp {
namespace {

constexpr std::uint16_t kPort = 0x100;
constexpr Gpa kMmio = 0x1000'0000;

// Reads give 0x10, 0x11, ...; writes are kept.
class Registers final : public IoHandler {
 public:
  void io_read(std::uint64_t /*offset*/, std::span<std::uint8_t> data) override {
    const std::lock_guard lock(mutex_);
    for (std::uint8_t& byte : data) {
      byte = next_++;
    }
  }
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override {
    const std::lock_guard lock(mutex_);
    writes_.push_back({offset, {data.begin(), data.end()}});
  }
  struct Write {
    std::uint64_t offset = 0;
    std::vector<std::uint8_t> data;
    bool operator==(const Write&) const = default;
  };
  [[nodiscard]] std::vector<Write> writes() {
    const std::lock_guard lock(mutex_);
    return writes_;
  }

 private:
  std::mutex mutex_;
  std::uint8_t next_ = 0x10;
  std::vector<Write> writes_;
};

class Events final : public VcpuEvents {
 public:
  [[nodiscard]] Result<void> vcpu_thread_started(std::uint32_t /*id*/) override {
    if (refuse_start) {
      return fail("no thread today");
    }
    return {};
  }
  void vcpu_reset_request(std::uint32_t /*id*/, bool /*fell_over*/) override {
    const std::lock_guard lock(mutex_);
    ++resets_;
    changed_.notify_all();
  }
  void vcpu_failed(std::uint32_t id, const std::string& message) override {
    const std::lock_guard lock(mutex_);
    failures_.push_back(fmt::format("{}: {}", id, message));
    changed_.notify_all();
  }
  [[nodiscard]] bool wait_for(std::size_t resets, std::size_t failures) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20),
                             [&] { return resets_ == resets && failures_.size() == failures; });
  }
  [[nodiscard]] std::vector<std::string> failures() {
    const std::lock_guard lock(mutex_);
    return failures_;
  }
  bool refuse_start = false;  // before the thread is started

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t resets_ = 0;
  std::vector<std::string> failures_;
};

class VcpuThreadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(ports_.add(MemoryRegion::io("port", registers_, 8), kPort));
    ASSERT_TRUE(memory_.add(MemoryRegion::io("mmio", registers_, 0x1000), kMmio));
    vm_ = *hypervisor_.create_vm({.max_vcpus = 4});
    make();
  }

  void make() {
    thread_ = std::make_unique<VcpuThread>(*vm_->create_vcpu(made_), memory_, ports_, events_);
    vcpu_ = hypervisor_.vm()->vcpu(made_++);
  }
  void park() {
    thread_->request_park();
    thread_->wait_parked();
  }

  AddressSpace memory_{"memory", 0};
  AddressSpace ports_{"ports", 0x10000};
  std::shared_ptr<Registers> registers_ = std::make_shared<Registers>();
  Events events_;
  FakeHypervisor hypervisor_;
  std::unique_ptr<Vm> vm_;
  std::uint32_t made_ = 0;
  std::unique_ptr<VcpuThread> thread_;
  FakeVcpu* vcpu_ = nullptr;
};

TEST_F(VcpuThreadTest, StartsParkedAndRunsNothing) {
  vcpu_->script(FakeExit::port_write(kPort, {1}));
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  EXPECT_GT(thread_->thread_id(), 0);
  EXPECT_TRUE(vcpu_->save());
  EXPECT_TRUE(registers_->writes().empty());
}

TEST_F(VcpuThreadTest, AStartThatIsRefusedGivesTheError) {
  events_.refuse_start = true;
  ASSERT_TRUE(thread_->start());
  const auto started = thread_->wait_started();
  ASSERT_FALSE(started);
  EXPECT_EQ(started.error().message, "no thread today");
  // What is asked of it afterwards does not hang.
  thread_->request_park();
  thread_->wait_parked();
}

TEST_F(VcpuThreadTest, HandsAccessesToTheSpacesElementByElement) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  vcpu_->script({FakeExit::port_write(kPort + 1, {1, 2, 3, 4}, 2), FakeExit::port_read(kPort, 2, 3),
                 FakeExit::mmio_write(kMmio + 0x10, {5, 6, 7, 8}), FakeExit::mmio_read(kMmio, 4),
                 FakeExit::port_read(0x9000, 1), FakeExit::halt()});
  thread_->resume();
  ASSERT_TRUE(vcpu_->wait_until_idle());
  EXPECT_EQ(registers_->writes(),
            (std::vector<Registers::Write>{{1, {1, 2}}, {1, {3, 4}}, {0x10, {5, 6, 7, 8}}}));
  EXPECT_EQ(vcpu_->answers(), (std::vector<std::vector<std::uint8_t>>{
                                  {0x10, 0x11, 0x12, 0x13, 0x14, 0x15}, {0x16, 0x17, 0x18, 0x19}, {0xff}}));
}

TEST_F(VcpuThreadTest, ParksWithWholeState) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  // The park falls onto every step of accesses that need one more run() to be whole.
  std::size_t reads = 0;
  for (int i = 0; i < 300; ++i) {
    for (int j = 0; j <= i % 5; ++j) {
      vcpu_->script(FakeExit::port_read(kPort, 4));
      vcpu_->script(FakeExit::mmio_read(kMmio, 8));
      reads += 2;
    }
    thread_->resume();
    if (i % 3 == 0) {
      std::this_thread::yield();
    }
    park();
    // Fails where an access is pending or the thread is in run().
    const auto state = thread_->vcpu().save();
    ASSERT_TRUE(state) << state.error().message;
  }
  thread_->resume();
  ASSERT_TRUE(vcpu_->wait_until_idle());
  EXPECT_EQ(vcpu_->answers().size(), reads) << "none lost, none answered twice";
  std::vector<std::uint8_t> bytes;
  for (const auto& answer : vcpu_->answers()) {
    bytes.insert(bytes.end(), answer.begin(), answer.end());
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    ASSERT_EQ(bytes[i], static_cast<std::uint8_t>(0x10 + i)) << i;
  }
}

TEST_F(VcpuThreadTest, ThousandsOfParksAndResumesWithoutAnyPauseBetween) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  for (int i = 0; i < 5000; ++i) {
    thread_->resume();
    // The thread may not even have seen the wish to run.
    park();
    ASSERT_TRUE(thread_->vcpu().regs());
  }
  vcpu_->script(FakeExit::port_write(kPort, {7}));
  thread_->resume();
  ASSERT_TRUE(vcpu_->wait_until_idle());
  EXPECT_EQ(registers_->writes().size(), 1U);
}

TEST_F(VcpuThreadTest, ParkingTwiceAndResumingTwiceIsTheSameAsOnce) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  park();
  park();
  EXPECT_TRUE(thread_->vcpu().regs());
  thread_->resume();
  thread_->resume();
  ASSERT_TRUE(vcpu_->wait_until_idle());
  park();
  park();
  EXPECT_TRUE(thread_->vcpu().regs());
}

TEST_F(VcpuThreadTest, ManyParkAtTheSameTime) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  std::vector<std::unique_ptr<VcpuThread>> threads;
  threads.push_back(std::move(thread_));
  while (made_ < 4) {
    make();
    threads.push_back(std::move(thread_));
    ASSERT_TRUE(threads.back()->start() && threads.back()->wait_started());
  }
  for (int i = 0; i < 200; ++i) {
    for (std::uint32_t id = 0; id < 4; ++id) {
      hypervisor_.vm()->vcpu(id)->script(FakeExit::mmio_read(kMmio, 1));
    }
    for (const auto& one : threads) {
      one->resume();
    }
    for (const auto& one : threads) {
      one->request_park();
    }
    for (const auto& one : threads) {
      one->wait_parked();
    }
    for (const auto& one : threads) {
      ASSERT_TRUE(one->vcpu().save());
    }
  }
}

TEST_F(VcpuThreadTest, ATripleFaultAsksForAResetOnceAndRunsNoFurther) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  vcpu_->script({FakeExit::shutdown(), FakeExit::port_write(kPort, {1})});
  thread_->resume();
  ASSERT_TRUE(events_.wait_for(1, 0));
  park();
  EXPECT_TRUE(thread_->vcpu().reset());
  EXPECT_TRUE(registers_->writes().empty()) << "nothing ran after the fault";
  thread_->resume();
  ASSERT_TRUE(vcpu_->wait_until_idle());
  EXPECT_EQ(registers_->writes().size(), 1U);
  EXPECT_TRUE(events_.wait_for(1, 0));
}

TEST_F(VcpuThreadTest, AResetThatTheEngineReportsIsTheSame) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  vcpu_->script(FakeExit::reset());
  thread_->resume();
  EXPECT_TRUE(events_.wait_for(1, 0));
}

TEST_F(VcpuThreadTest, AnEngineErrorIsToldWithItsTextAndTheVcpuStaysPut) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  vcpu_->script({FakeExit::engine_error("emulation failure"), FakeExit::port_write(kPort, {1})});
  thread_->resume();
  ASSERT_TRUE(events_.wait_for(0, 1));
  EXPECT_EQ(events_.failures(), std::vector<std::string>{"0: emulation failure"});
  park();
  EXPECT_TRUE(thread_->vcpu().save());
  EXPECT_TRUE(registers_->writes().empty());
}

TEST_F(VcpuThreadTest, EndsInEveryState) {
  for (int state = 0; state < 4; ++state) {
    if (state > 0) {
      make();
      ASSERT_TRUE(thread_->start() && thread_->wait_started());
    }
    switch (state) {
      case 0:  // never started
      case 1:  // parked
        break;
      case 2:  // in run()
        thread_->resume();
        ASSERT_TRUE(vcpu_->wait_until_idle());
        break;
      default:  // stopped by a failure
        vcpu_->script(FakeExit::engine_error("x"));
        thread_->resume();
        ASSERT_TRUE(events_.wait_for(0, 1));
        break;
    }
    thread_.reset();
  }
}

TEST_F(VcpuThreadTest, EndsWhileAccessesGoOn) {
  ASSERT_TRUE(thread_->start() && thread_->wait_started());
  for (int i = 0; i < 2000; ++i) {
    vcpu_->script(FakeExit::port_read(kPort, 1));
  }
  thread_->resume();
  thread_.reset();
}

}  // namespace
}  // namespace wisp
