// Kicks are never lost, never late and never go to a thread that has ended.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <mutex>
#include <thread>

#include "hypervisor/engine_test.h"

namespace wisp {
namespace {

using EngineKick = EngineTest;
WISP_FOR_EACH_ENGINE(EngineKick);
using Clock = std::chrono::steady_clock;

// Counts at 0x2000 for ever.
void put_counter(BareGuest& guest) {
  guest.put(0x1000, {
                        0xff, 0x06, 0x00, 0x20,  // inc word [0x2000]
                        0xeb, 0xfa,              // jmp 0x1000
                    });
}

TEST_P(EngineKick, BeforeRunStopsItBeforeAnyGuestCode) {
  BareGuest guest = make();
  put_counter(guest);
  guest.start_real(0x1000);
  for (int i = 0; i < 100; ++i) {
    guest.vcpu().kick();
    guest.vcpu().kick();
    ASSERT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu().run()));
  }
  EXPECT_EQ(load_le<std::uint16_t>(guest.at(0x2000)), 0);
  EXPECT_EQ(must(guest.vcpu().regs()).rip, 0x1000U);
}

TEST_P(EngineKick, TakesInThePendingAccessFirst) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xe4, 0x11,              // in al, 0x11
                        0xff, 0x06, 0x00, 0x20,  // inc word [0x2000]
                        0xf4,                    // hlt
                    });
  guest.start_real(0x1000);
  const Exit exit = guest.run();
  const auto* read = std::get_if<PortReadExit>(&exit);
  ASSERT_NE(read, nullptr);
  read->data[0] = 0x77;
  EXPECT_FALSE(guest.vcpu().save().has_value());
  guest.complete();
  const CpuState state = must(guest.vcpu().save());
  EXPECT_EQ(state.regs.rax & 0xff, 0x77U);
  EXPECT_EQ(state.regs.rip, 0x1002U);
  EXPECT_EQ(load_le<std::uint16_t>(guest.at(0x2000)), 0);
}

TEST_P(EngineKick, WakesAHaltedCpu) {
  BareGuest guest = make();
  guest.put(0x1000, {0xf4, 0xeb, 0xfd});  // hlt; jmp to it
  guest.start_real(0x1000);
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    guest.vcpu().kick();
  });
  const auto start = Clock::now();
  EXPECT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu().run()));
  EXPECT_GE(Clock::now() - start, std::chrono::milliseconds(40));
  kicker.join();
}

TEST_P(EngineKick, ReachesAThreadThatBlocksAllSignals) {
  BareGuest guest = make();
  put_counter(guest);
  guest.start_real(0x1000);
  // Threads one after another, each with the signal blocked from its start.
  for (int i = 0; i < 20; ++i) {
    std::atomic<bool> stopped = false;
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    ASSERT_EQ(pthread_sigmask(SIG_SETMASK, &all, &before), 0);
    std::thread runner([&] {
      EXPECT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu().run()));
      stopped = true;
    });
    ASSERT_EQ(pthread_sigmask(SIG_SETMASK, &before, nullptr), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    EXPECT_FALSE(stopped);
    guest.vcpu().kick();
    runner.join();
  }
}

// Kicks that wait for their answer. The answer to the last of them must come, in time.
class Answers final {
 public:
  // By the kicker: asks, kicks, waits. False where no answer came.
  bool kick(Vcpu& vcpu) {
    std::unique_lock lock(mutex_);
    const std::uint32_t number = ++asked_;
    lock.unlock();
    vcpu.kick();
    lock.lock();
    return changed_.wait_for(lock, std::chrono::seconds(30), [&] { return answered_ >= number; });
  }
  // By the vCPU's thread, on each interruption.
  void answer() {
    const std::scoped_lock lock(mutex_);
    answered_ = asked_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint32_t asked_ = 0;
  std::uint32_t answered_ = 0;
};

// As many rounds as wanted, or fewer on a host that is busy with other things.
class Rounds final {
 public:
  explicit Rounds(std::uint32_t wanted) : left_(wanted) {}
  bool next() { return left_-- > 0 && (done_++ < 100 || Clock::now() < end_); }

 private:
  std::uint32_t left_;
  std::uint32_t done_ = 0;
  const Clock::time_point end_ = Clock::now() + std::chrono::seconds(5);
};

// Thousands of kicks against a guest that exits all the time: every one is answered.
TEST_P(EngineKick, NoneOfThousandsIsLost) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xff, 0x06, 0x00, 0x20,  // inc word [0x2000]
                        0xe6, 0x10,              // out 0x10, al
                        0xeb, 0xf8,              // jmp 0x1000
                    });
  guest.start_real(0x1000);
  Answers answers;
  std::atomic<bool> stop = false;
  std::uint64_t exits = 0;
  std::thread runner([&] {
    while (!stop) {
      const Exit exit = guest.vcpu().run();
      if (std::holds_alternative<InterruptedExit>(exit)) {
        answers.answer();
      } else {
        ASSERT_EQ(port_write_of(exit).port, 0x10);
        ++exits;
      }
    }
  });
  // A second kicker that waits for nothing, to meet the first in every state.
  std::thread noise([&] {
    while (!stop) {
      guest.vcpu().kick();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  });
  for (Rounds rounds(4000); rounds.next();) {
    ASSERT_TRUE(answers.kick(guest.vcpu())) << "a kick was lost";
  }
  stop = true;
  guest.vcpu().kick();
  runner.join();
  noise.join();
  EXPECT_GT(exits, 0U);
}

// A guest that never exits by itself, so that only the signal can end its run.
TEST_P(EngineKick, EndsAGuestThatNeverExits) {
  BareGuest guest = make();
  put_counter(guest);
  guest.start_real(0x1000);
  Answers answers;
  std::atomic<bool> stop = false;
  std::thread runner([&] {
    while (!stop) {
      ASSERT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu().run()));
      answers.answer();
    }
  });
  // Every second kick waits until the guest runs, so that it finds it inside.
  const auto* counter = static_cast<const volatile std::uint16_t*>(static_cast<void*>(guest.at(0x2000)));
  bool inside = false;
  for (Rounds rounds(2000); rounds.next(); inside = !inside) {
    const auto deadline = Clock::now() + std::chrono::seconds(30);
    for (const std::uint16_t before = *counter; inside && *counter == before;) {
      ASSERT_LT(Clock::now(), deadline) << "the guest does not run";
      std::this_thread::yield();
    }
    ASSERT_TRUE(answers.kick(guest.vcpu())) << "a kick was lost";
  }
  stop = true;
  guest.vcpu().kick();
  runner.join();
}

// Threads that end as soon as run() is back, while two others keep kicking.
TEST_P(EngineKick, RacesWithTheEndOfTheThread) {
  BareGuest guest = make();
  put_counter(guest);
  guest.start_real(0x1000);
  std::atomic<bool> stop = false;
  const auto kick_on = [&] {
    while (!stop) {
      guest.vcpu().kick();
    }
  };
  std::thread first(kick_on);
  std::thread second(kick_on);
  for (Rounds rounds(300); rounds.next();) {
    std::thread([&] { EXPECT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu().run())); }).join();
  }
  stop = true;
  first.join();
  second.join();
}

}  // namespace
}  // namespace wisp
