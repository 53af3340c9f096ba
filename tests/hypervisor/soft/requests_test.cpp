// Shoot-downs between processors: what was asked is done before it is over, and nobody waits for ever.
#include "hypervisor/soft/requests.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace wisp::soft {
namespace {

// A processor that only enters, looks at its run word, and leaves.
struct TestProcessor {
  TestProcessor() {
    party.cpu = cpu.get();
    party.wake = [this] { cpu->run.store(0, std::memory_order_seq_cst); };
    party.serve = [this](std::uint32_t /*bits*/) { cached.store(0, std::memory_order_relaxed); };
  }
  std::unique_ptr<Cpu> cpu = std::make_unique<Cpu>();
  Requests::Party party;
  std::atomic<std::uint64_t> cached = 0;  // what it copied of the shared value; 0: nothing
};

TEST(Requests, AProcessorOutsideServesWhenItEnters) {
  Requests requests;
  TestProcessor processor;
  requests.add(&processor.party);
  processor.cached = 7;
  requests.shoot_down(kFlushMemory, nullptr);
  EXPECT_EQ(processor.cached, 7U);
  EXPECT_EQ(processor.cpu->run, 0U) << "woken, whether it needs it or not";
  Requests::enter(processor.party);
  EXPECT_EQ(processor.cached, 0U);
  EXPECT_EQ(processor.cpu->requests, 0U);
  Requests::leave(processor.party);
}

TEST(Requests, OnesOwnProcessorIsLeftAlone) {
  Requests requests;
  TestProcessor processor;
  requests.add(&processor.party);
  Requests::enter(processor.party);
  requests.shoot_down(kFlushInline, processor.cpu.get());
  EXPECT_EQ(processor.cpu->requests, 0U);
  EXPECT_EQ(processor.cpu->run, kRunning);
  Requests::leave(processor.party);
}

// Three processors copy a value that two other threads retire. After a shoot-down nobody may still use one
// that was retired before it.
TEST(Requests, NothingRetiredIsUsedAfterAShootDown) {
  constexpr std::size_t kCount = 3;
  Requests requests;
  std::vector<std::unique_ptr<TestProcessor>> processors;
  for (std::size_t i = 0; i < kCount; ++i) {
    processors.push_back(std::make_unique<TestProcessor>());
    requests.add(&processors.back()->party);
  }
  std::atomic<std::uint64_t> current = 1;
  std::atomic<std::uint64_t> oldest_alive = 1;
  std::atomic<bool> stop = false;
  std::atomic<std::uint64_t> wrong = 0;
  std::atomic<std::uint64_t> used = 0;
  std::vector<std::thread> threads;
  for (const auto& owned : processors) {
    threads.emplace_back([&, processor = owned.get()] {
      while (!stop) {
        processor->cpu->run.exchange(1, std::memory_order_seq_cst);
        Requests::enter(processor->party);
        while (processor->cpu->run.load(std::memory_order_relaxed) != 0 && !stop) {
          if (processor->cached == 0) {
            processor->cached = current.load();
          }
          if (processor->cached < oldest_alive.load()) {
            ++wrong;
          }
          ++used;
        }
        Requests::leave(processor->party);
      }
    });
  }
  while (used == 0) {
    std::this_thread::yield();
  }
  // On a machine with fewer processors than threads each of these waits for a time slice.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  for (int i = 0; i < 20'000 && std::chrono::steady_clock::now() < end; ++i) {
    const std::uint64_t next = current.fetch_add(1) + 1;
    requests.shoot_down(kFlushMemory, nullptr);
    oldest_alive.store(next);
  }
  stop = true;
  for (const auto& processor : processors) {
    processor->party.wake();
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(wrong, 0U);
}

// Processors that shoot at one another from inside of guest code, all at once.
TEST(Requests, ShootersServeOneAnother) {
  constexpr std::size_t kCount = 4;
  Requests requests;
  std::vector<std::unique_ptr<TestProcessor>> processors;
  for (std::size_t i = 0; i < kCount; ++i) {
    processors.push_back(std::make_unique<TestProcessor>());
    requests.add(&processors.back()->party);
  }
  std::vector<std::thread> threads;
  for (const auto& owned : processors) {
    threads.emplace_back([&, processor = owned.get()] {
      for (int i = 0; i < 500; ++i) {
        processor->cpu->run.exchange(1, std::memory_order_seq_cst);
        Requests::enter(processor->party);
        requests.shoot_down(kFlushInline, processor->cpu.get());
        Requests::leave(processor->party);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace
}  // namespace wisp::soft
