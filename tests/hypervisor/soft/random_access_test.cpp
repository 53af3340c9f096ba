// A guest that writes anything anywhere: each model does a bounded amount of work for each access.
#include <gtest/gtest.h>

#include <cstring>
#include <ctime>
#include <random>

#include "hypervisor/soft/apic_kit.h"
#include "hypervisor/soft/pic.h"
#include "hypervisor/soft/pit.h"

namespace wisp::soft {
namespace {

constexpr int kAccesses = 200'000;
// Far above the fraction of a second that it takes, far below an endless loop or one of 2^32 turns.
constexpr double kBudgetSeconds = 20;

class Budget {
 public:
  Budget() : start_(std::clock()) {}
  ~Budget() { EXPECT_LT(static_cast<double>(std::clock() - start_) / CLOCKS_PER_SEC, kBudgetSeconds); }
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

 private:
  std::clock_t start_;
};

struct Dice {
  std::mt19937_64 engine{20240607};
  std::uint64_t operator()(std::uint64_t below) { return engine() % below; }
  // Small, all-ones and random numbers.
  std::uint64_t value() {
    switch ((*this)(4)) {
      case 0:
        return (*this)(4);
      case 1:
        return ~0ULL;
      case 2:
        return 1ULL << (*this)(64);
      default:
        return engine();
    }
  }
};

TEST(RandomAccess, LocalAndIoApic) {
  const Budget budget;
  Dice dice;
  ApicKit kit(4);
  for (int i = 0; i < kAccesses; ++i) {
    Lapic& cpu = kit.cpu(dice(4));
    switch (dice(10)) {
      case 0:
        cpu.write(static_cast<std::uint32_t>(dice(0x40) << 4), static_cast<std::uint32_t>(dice.value()));
        break;
      case 1:
        (void)cpu.read(static_cast<std::uint32_t>(dice(0x1000)));
        break;
      case 2:
        (void)cpu.write_msr(static_cast<std::uint32_t>(0x800 + dice(0x41)), dice.value());
        break;
      case 3:
        (void)cpu.read_msr(static_cast<std::uint32_t>(0x800 + dice(0x41)));
        break;
      case 4:
        (void)cpu.set_base(kApicBaseDefault | dice(8) << 9 | dice(2) << 8);
        break;
      case 5:
        kit.bus.deliver_msi(0xfee00000 | (dice.value() & 0xfffff), static_cast<std::uint32_t>(dice.value()));
        break;
      case 6: {
        const std::uint64_t value = dice.value();
        std::array<std::uint8_t, 8> bytes{};
        std::memcpy(bytes.data(), &value, sizeof value);
        const auto data = std::span(bytes).first(1 + dice(8));
        const std::uint64_t offset = dice(3) == 0 ? dice(0xff0) : dice(5) * 0x10;
        if (dice(4) == 0) {
          kit.ioapic.io_read(offset, data);
        } else {
          kit.ioapic.io_write(offset, data);
        }
        break;
      }
      case 7:
        kit.ioapic.set_level(static_cast<std::uint32_t>(dice(26)), dice(2) != 0);
        break;
      case 8:
        kit.now += dice(3) == 0 ? dice(1ULL << 40) : dice(1000);
        cpu.set_tsc_deadline(dice.value());
        cpu.poll_timer();
        if (const auto next = cpu.next_timer_ns()) {
          EXPECT_GE(*next, kit.now);
        }
        break;
      default:
        if (const auto vector = cpu.pending_vector()) {
          EXPECT_GE(*vector, 16);
          cpu.acknowledge(*vector);
        }
        if (cpu.take_init()) {
          cpu.reset(true);
        }
        (void)cpu.take_sipi();
        break;
    }
    if (i % 1000 == 0) {
      LapicState state = cpu.save();
      ASSERT_TRUE(cpu.load(state).has_value());
    }
  }
}

TEST(RandomAccess, Pic) {
  const Budget budget;
  Dice dice;
  PicPair pic([] {});
  constexpr std::array<std::uint16_t, 6> kPorts = {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1};
  for (int i = 0; i < kAccesses; ++i) {
    const std::uint16_t port = kPorts[dice(kPorts.size())];
    switch (dice(5)) {
      case 0:
        (void)pic.read(port);
        break;
      case 1:
        pic.set_level(static_cast<std::uint32_t>(dice(18)), dice(2) != 0);
        break;
      case 2:
        pic.pulse(static_cast<std::uint32_t>(dice(18)));
        break;
      case 3:
        if (pic.has_interrupt()) {
          (void)pic.acknowledge();
        }
        break;
      default:
        pic.write(port, static_cast<std::uint8_t>(dice.value()));
        break;
    }
  }
}

TEST(RandomAccess, Pit) {
  const Budget budget;
  Dice dice;
  std::uint64_t now = 0;
  int edges = 0;
  Pit pit([&] { return now; }, [&] { ++edges; });
  int polls = 0;
  for (int i = 0; i < kAccesses; ++i) {
    const auto port = static_cast<std::uint16_t>(dice(6) == 0 ? 0x61 : 0x40 + dice(5));
    if (dice(3) == 0) {
      (void)pit.read(port);
    } else {
      pit.write(port, static_cast<std::uint8_t>(dice.value()));
    }
    now += dice(5) == 0 ? dice(1ULL << 40) : dice(100'000);
    pit.poll();
    ++polls;
    if (const auto next = pit.next_event_ns()) {
      EXPECT_GE(*next, now);
    }
  }
  EXPECT_GT(edges, 0);
  EXPECT_LE(edges, polls) << "one poll, at most one edge";
}

TEST(RandomAccess, PitSurvivesAnyRecordItAccepts) {
  const Budget budget;
  Dice dice;
  std::uint64_t now = 0;
  Pit pit([&] { return now; }, [] {});
  StateWriter writer;
  pit.save(writer);
  int accepted = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::vector<std::uint8_t> bytes = writer.bytes();
    for (std::uint64_t n = 1 + dice(4); n != 0; --n) {
      bytes[dice(bytes.size())] = static_cast<std::uint8_t>(dice.value());
    }
    StateReader reader(bytes);
    accepted += pit.load(reader).has_value() ? 1 : 0;
    now += dice(1 << 20);
    pit.poll();
    (void)pit.next_event_ns();
    for (std::uint16_t port = 0x40; port < 0x43; ++port) {
      (void)pit.read(port);
    }
    (void)pit.read(0x61);
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace wisp::soft
