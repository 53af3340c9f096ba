// Chains per second through the device's side of a split virtqueue, and the allocations each costs. The
// driver's part is one store per round: the rings are laid out once and published again and again.
//
//   bench_virtio_queue
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <new>

#include "virtio/queue.h"
#include "virtio/support/fake_queue.h"

namespace {

std::atomic<std::uint64_t> allocations = 0;

}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) {
    return memory;
  }
  std::abort();
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace wisp {
namespace {

constexpr std::uint16_t kSize = 256;
constexpr int kRuns = 9;
constexpr int kRounds = 20000;

// CPU time of this thread: what others do on the machine matters less.
double cpu_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

struct Figures {
  double ns_per_chain = 0;
  double allocations_per_chain = 0;
};

// `parts` buffers per chain, the first of them readable; one interrupt decision per `batch` chains.
Figures measure(std::uint16_t parts, bool indirect, std::uint16_t batch) {
  test::FakeGuest guest;
  test::FakeQueue driver(guest, kSize, true);
  const Gpa buffer = guest.allocate(4096);
  std::uint16_t chains = 0;
  const std::uint16_t descriptors = indirect ? 1 : parts;
  for (; (chains + 1) * descriptors <= kSize; ++chains) {
    test::ChainBuilder chain;
    if (indirect) {
      chain.indirect();
    }
    for (std::uint16_t i = 0; i < parts; ++i) {
      i == 0 ? chain.readable(buffer, 16) : chain.writable(buffer, 512);
    }
    driver.set_available_entry(chains, driver.build(chain));
  }
  // Slots beyond the heads stay unused: rounds are cut to a number of chains that divides the ring.
  std::uint16_t round = 1;
  while (round * 2 <= chains) {
    round = static_cast<std::uint16_t>(round * 2);
  }
  for (std::uint16_t i = 0; i < kSize; ++i) {
    const auto entry = guest.load<std::uint16_t>(driver.available_ring() + 4 + 2ULL * (i % round));
    driver.set_available_entry(i, entry);
  }
  Queue queue = Queue::activate(driver.config(), guest.memory(),
                                kVirtioFeatureVersion1 | kVirtioFeatureEventIdx | kVirtioFeatureIndirectDesc)
                    .value();
  DescriptorChain chain;
  std::uint16_t index = 0;
  const auto turn = [&] {
    index = static_cast<std::uint16_t>(index + round);
    driver.set_available_index(index);
    std::uint16_t done = 0;
    while (queue.pop(chain) == PopResult::kChain) {
      queue.push(chain, chain.writable_size());
      if (++done % batch == 0) {
        static_cast<void>(queue.take_interrupt_wish());
      }
    }
    static_cast<void>(queue.enable_notifications());
    if (done != round) {
      std::abort();
    }
  };
  turn();
  std::array<double, kRuns> runs{};
  const std::uint64_t before = allocations;
  for (double& run : runs) {
    const double start = cpu_ns();
    for (int i = 0; i < kRounds; ++i) {
      turn();
    }
    run = cpu_ns() - start;
  }
  const double total = static_cast<double>(kRounds) * round;
  std::ranges::sort(runs);
  return {runs[kRuns / 2] / total, static_cast<double>(allocations - before) / (total * kRuns)};
}

}  // namespace
}  // namespace wisp

int main() {
  std::printf("%-44s %12s %14s %12s\n", "chain", "ns/chain", "chains/s", "allocations");
  for (const std::uint16_t parts : {std::uint16_t{1}, std::uint16_t{3}, std::uint16_t{16}}) {
    for (const bool indirect : {false, true}) {
      const wisp::Figures figures = wisp::measure(parts, indirect, 8);
      std::printf("%2u buffers, %-8s dirty log on, batch of 8   %12.1f %14.0f %12.3f\n", parts,
                  indirect ? "indirect" : "direct", figures.ns_per_chain, 1e9 / figures.ns_per_chain,
                  figures.allocations_per_chain);
    }
  }
  return 0;
}
