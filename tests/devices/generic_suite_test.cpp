// What holds for every simple device: each is put through the same accesses, resets, saves and damaged
// records.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <functional>
#include <random>

#include "base/event_loop.h"
#include "boot/acpi_layout.h"
#include "devices/boot_timer.h"
#include "devices/debug_exit.h"
#include "devices/fake_parts.h"
#include "devices/i8042.h"
#include "devices/pc_testdev.h"
#include "devices/power.h"
#include "devices/rtc.h"
#include "devices/serial.h"
#include "devices/slot_hotplug.h"

namespace wisp {
namespace {

// The surroundings that any of the devices may need.
struct Bench {
  std::unique_ptr<EventLoop> loop = *EventLoop::create();
  FakeClock clock;
  Log log{-1};
  IrqRecord irq;
  FakeCharBackend backend;
  std::unique_ptr<IrqLine> line() { return std::make_unique<FakeIrqLine>(irq); }
};

struct Candidate {
  const char* name;
  std::uint64_t size;
  std::function<std::unique_ptr<Device>(Bench&)> make;
};

const Candidate kCandidates[] = {
    {"serial", kSerialPortCount, [](Bench& b) { return std::make_unique<Serial>(b.line(), &b.backend); }},
    {"rtc", kRtcPortCount, [](Bench& b) { return *Rtc::create(*b.loop, b.clock, b.line()); }},
    {"i8042", kI8042PortCount, [](Bench&) { return std::make_unique<I8042>([] {}); }},
    {"power", kPowerPortCount,
     [](Bench& b) { return std::make_unique<PowerDevice>(b.line(), PowerCallbacks{[] {}, [] {}}); }},
    {"debug-exit", 2, [](Bench&) { return std::make_unique<DebugExit>([](std::uint32_t) {}); }},
    {"test-register", kTestRegisterCount, [](Bench&) { return std::make_unique<TestRegister>(); }},
    {"test-irq-lines", kTestIrqCount,
     [](Bench& b) {
       std::vector<std::unique_ptr<IrqLine>> lines;
       for (std::uint32_t i = 0; i < kTestIrqCount; ++i) {
         lines.push_back(b.line());
       }
       return std::make_unique<TestIrqLines>(std::move(lines));
     }},
    {"firmware-config", kFirmwareConfigCount,
     [](Bench&) {
       return std::make_unique<FirmwareConfig>(MachineFacts{.cpus = 2, .max_cpus = 4, .ram_size = 1 << 30});
     }},
    {"boot-timer", kBootTimerPortCount,
     [](Bench& b) { return std::make_unique<BootTimer>(b.clock, 0, b.log); }},
    {"slot-hotplug", SlotHotplugRegisters::kSize,
     [](Bench&) { return std::make_unique<SlotHotplug>([] {}); }},
};

std::uint64_t cpu_ns() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(time.tv_nsec);
}

class EveryDevice : public ::testing::TestWithParam<Candidate> {
 protected:
  void SetUp() override { device_ = GetParam().make(bench_); }

  // One random thing that a guest or the outside may do.
  void step(std::mt19937& random) {
    const std::uint64_t offset = random() % GetParam().size;
    const std::size_t size = 1 + random() % std::min<std::uint64_t>(8, GetParam().size - offset);
    switch (random() % 16) {
      case 0:
        bench_.backend.offer(std::string(random() % 40, static_cast<char>(random())));
        break;
      case 1:
        bench_.backend.room = random() % 20;
        break;
      case 2:
        bench_.clock.advance(random() % 3'000'000'000U);
        break;
      case 3:
        bench_.loop->run_once(0);
        break;
      case 4:
      case 5:
      case 6:
      case 7:
        (void)in(*device_, offset, size);
        break;
      default:
        out(*device_, offset, std::uint64_t{random()} << 32 | random(), size);
        break;
    }
  }

  Bench bench_;
  std::unique_ptr<Device> device_;
};

TEST_P(EveryDevice, AnswersEveryWidthAtEveryOffset) {
  for (std::size_t size = 1; size <= 8; ++size) {
    for (std::uint64_t offset = 0; offset + size <= GetParam().size; ++offset) {
      for (const std::uint64_t value : {std::uint64_t{0}, UINT64_MAX, std::uint64_t{0x0102030405060708}}) {
        out(*device_, offset, value, size);
        (void)in(*device_, offset, size);
      }
    }
  }
}

TEST_P(EveryDevice, FillsEveryByteOfARead) {
  for (std::size_t size = 1; size <= 8; ++size) {
    for (std::uint64_t offset = 0; offset + size <= GetParam().size; ++offset) {
      // From the same state twice, into buffers with different rubbish in them.
      const StateRecord before = device_->save();
      std::vector<std::uint8_t> one(size, 0x00);
      std::vector<std::uint8_t> two(size, 0xff);
      device_->io_read(offset, one);
      ASSERT_TRUE(device_->load(before));
      device_->io_read(offset, two);
      EXPECT_EQ(one, two) << offset << "+" << size;
    }
  }
}

TEST_P(EveryDevice, HasItsOwnNameInItsRecord) {
  EXPECT_EQ(device_->name(), GetParam().name);
  EXPECT_EQ(device_->save().name, GetParam().name);
}

TEST_P(EveryDevice, WhatItSavesItLoadsToTheSameStateFromAnyPoint) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    step(random);
    if (i % 7 != 0) {
      continue;
    }
    bench_.backend.room = 0;
    const StateRecord record = device_->save();
    EXPECT_EQ(device_->save().bytes, record.bytes) << "saving changes nothing";
    Bench other_bench;
    other_bench.clock.now = bench_.clock.now.load();
    other_bench.backend.room = 0;
    const auto other = GetParam().make(other_bench);
    ASSERT_TRUE(other->load(record));
    EXPECT_EQ(other->save().bytes, record.bytes);
    // Both answer alike from here on.
    std::mt19937 one(static_cast<std::uint32_t>(i));
    for (int access = 0; access < 20; ++access) {
      const std::uint64_t offset = one() % GetParam().size;
      const std::uint64_t value = one();
      if (one() % 2 == 0) {
        EXPECT_EQ(in(*device_, offset, 1), in(*other, offset, 1));
      } else {
        out(*device_, offset, value);
        out(*other, offset, value);
      }
    }
  }
}

TEST_P(EveryDevice, ResetAtAnyPointGivesThePowerUpStateAgain) {
  std::mt19937 random(2);
  device_->reset();
  const std::vector<std::uint8_t> fresh = device_->save().bytes;
  for (int i = 0; i < 500; ++i) {
    for (int j = 0; j < 10; ++j) {
      step(random);
    }
    device_->reset();
    if (GetParam().name != std::string("rtc")) {  // whose time and memory are on a battery
      ASSERT_EQ(device_->save().bytes, fresh);
    }
    device_->reset();
    EXPECT_FALSE(bench_.irq.level);
  }
}

TEST_P(EveryDevice, DamagedRecordsAreRefusedOrHarmless) {
  std::mt19937 random(3);
  for (int i = 0; i < 3000; ++i) {
    StateRecord record = device_->save();
    switch (random() % 4) {
      case 0:
        record.bytes.resize(random() % (record.bytes.size() + 1));
        break;
      case 1:
        record.version = random() % 4;
        break;
      default:
        break;
    }
    for (std::size_t flips = random() % 4; flips > 0 && !record.bytes.empty(); --flips) {
      record.bytes[random() % record.bytes.size()] = static_cast<std::uint8_t>(random());
    }
    if (device_->load(record).has_value()) {
      const StateRecord taken = device_->save();
      ASSERT_TRUE(device_->load(taken)) << "what was accepted is a state like any other";
    }
    for (int j = 0; j < 5; ++j) {
      step(random);
    }
  }
  StateRecord future = device_->save();
  future.version = 1000;
  EXPECT_FALSE(device_->load(future));
  future.version = 0;
  EXPECT_FALSE(device_->load(future));
}

TEST_P(EveryDevice, RandomAccessesStayWithinTheirCpuBudget) {
  std::mt19937 random(4);
  const std::uint64_t start = cpu_ns();
  for (int i = 0; i < 100'000; ++i) {
    step(random);
    bench_.backend.written.clear();
  }
  // 100 us each on average would be a hundred times too many, sanitizers included.
  EXPECT_LT(cpu_ns() - start, std::uint64_t{100'000} * 100'000);
}

INSTANTIATE_TEST_SUITE_P(All, EveryDevice, ::testing::ValuesIn(kCandidates), [](const auto& tested) {
  std::string name = tested.param.name;
  std::erase(name, '-');
  return name;
});

}  // namespace
}  // namespace wisp
