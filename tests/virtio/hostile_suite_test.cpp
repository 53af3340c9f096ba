// What any guest may do to any virtio device behind the MMIO transport, applied to every device. The outcome
// of each case is that the device either goes on or asks for a reset, that a reset brings it back, and that
// nothing of it takes much time, logs much or leaves guest RAM.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <array>
#include <random>
#include <string>

#include "support/sanitized.h"
#include "virtio/hostile_devices.h"
#include "virtio/support/mmio_harness.h"

namespace wisp {
namespace {

using namespace virtio_mmio;
using test::ChainBuilder;
using test::FakeDescriptor;
using test::FakeQueue;
using test::HostileDevice;
using test::kDescIndirect;
using test::kDescNext;
using test::kDescWrite;
using test::MmioHarness;

constexpr std::uint32_t kStarted =
    kVirtioStatusAcknowledge | kVirtioStatusDriver | kVirtioStatusFeaturesOk | kVirtioStatusDriverOk;

constexpr double kSlow = test::kSanitized ? 20 : 1;

// CPU time of this process since construction, in seconds.
class CpuTime final {
 public:
  CpuTime() : start_(now()) {}
  [[nodiscard]] double spent() const { return now() - start_; }

 private:
  static double now() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
  }
  double start_;
};

class Hostile : public testing::TestWithParam<HostileDevice> {
 protected:
  test::Keep keep_;  // outlives the harness
  MmioHarness guest_{
      [this](EventLoop& loop, const GuestMemory& memory) { return GetParam().make(loop, memory, keep_); }};

  void expect_alive() {
    EXPECT_EQ(guest_.read(kMagicValue), 0x74726976U);
    guest_.write(kStatus, 0);
    EXPECT_EQ(guest_.read(kStatus), 0U);
    EXPECT_EQ(guest_.read(kInterruptStatus), 0U);
    EXPECT_EQ(guest_.start(), kStarted);
    guest_.pump();
    EXPECT_FALSE(guest_.broken());
  }
  // One chain with a readable and a writable part, of 64 zeroed bytes each.
  ChainBuilder plain_chain() {
    if (buffer_ == 0) {
      buffer_ = guest_.guest().allocate(128);
    }
    return ChainBuilder().readable(buffer_, 64).writable(buffer_ + 64, 64);
  }
  Gpa buffer_ = 0;
};

TEST_P(Hostile, SaysWhatItIs) {
  EXPECT_EQ(guest_.read(kMagicValue), 0x74726976U);
  EXPECT_EQ(guest_.read(kVersion), 2U);
  EXPECT_EQ(guest_.read(kDeviceId), guest_.device().device_id());
  EXPECT_NE(guest_.read(kDeviceId), 0U);
  EXPECT_EQ(guest_.read(kStatus), 0U);
  EXPECT_NE(guest_.offered_features() & kVirtioFeatureVersion1, 0U);
  for (const std::uint32_t select : {2U, 3U, 0xffffffffU}) {
    guest_.write(kDeviceFeaturesSel, select);
    EXPECT_EQ(guest_.read(kDeviceFeatures), 0U);
  }
  for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
    guest_.write(kQueueSel, i);
    EXPECT_EQ(guest_.read(kQueueNumMax), guest_.device().queue_sizes()[i]);
    EXPECT_EQ(guest_.read(kQueueReady), 0U);
  }
  expect_alive();
}

TEST_P(Hostile, EveryAccessOfEveryWidthIsAnswered) {
  std::mt19937 random(1);
  for (const bool started : {false, true}) {
    if (started) {
      ASSERT_EQ(guest_.start(), kStarted);
    }
    for (std::size_t width = 1; width <= 8; ++width) {
      for (std::uint64_t offset = 0; offset + width <= kVirtioMmioSize; ++offset) {
        std::array<std::uint8_t, 8> bytes{};
        for (std::uint8_t& byte : bytes) {
          byte = static_cast<std::uint8_t>(random());
        }
        guest_.transport().io_write(offset, std::span(bytes).first(width));
        bytes.fill(0xa5);
        guest_.transport().io_read(offset, std::span(bytes).first(width));
        if (offset < kConfig && (width != 4 || offset % 4 != 0)) {
          EXPECT_EQ(bytes_to_u64(std::span(bytes).first(width)), 0U) << offset << " " << width;
        }
      }
      guest_.pump(1);
    }
    expect_alive();
  }
}

TEST_P(Hostile, ConfigurationSpaceEndsWhereItEnds) {
  ASSERT_EQ(guest_.start(), kStarted);
  for (const std::uint64_t offset : {256ULL, 4096ULL, ~7ULL, ~1ULL, ~0ULL, 1ULL << 63}) {
    std::array<std::uint8_t, 8> bytes;
    bytes.fill(0xa5);
    const std::lock_guard lock(guest_.device().strand().mutex());
    guest_.device().read_config(offset, bytes);
    EXPECT_EQ(bytes_to_u64(bytes), 0U) << offset;
    guest_.device().write_config(offset, bytes);
  }
  expect_alive();
}

TEST_P(Hostile, FeaturesNotOfferedAreRefused) {
  const std::uint64_t offered = guest_.offered_features();
  for (int bit = 0; bit < 64; ++bit) {
    const std::uint64_t mask = 1ULL << bit;
    if ((offered & mask) == 0) {
      guest_.negotiate(kVirtioFeatureVersion1 | mask);
      EXPECT_EQ(guest_.read(kStatus) & kVirtioStatusFeaturesOk, 0U) << bit;
    }
  }
  guest_.negotiate(offered & ~kVirtioFeatureVersion1);
  EXPECT_EQ(guest_.read(kStatus) & kVirtioStatusFeaturesOk, 0U);
  // DRIVER_OK without FEATURES_OK starts nothing.
  guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk);
  EXPECT_EQ(guest_.read(kStatus) & kVirtioStatusDriverOk, 0U);
  expect_alive();
}

TEST_P(Hostile, AnyOrderOfStatusWritesCanBeReset) {
  std::mt19937 random(2);
  for (int round = 0; round < 200; ++round) {
    for (int i = 0; i < 8; ++i) {
      guest_.write(kStatus, random() & 0xff);
      if ((random() & 3) == 0) {
        guest_.write(kDriverFeaturesSel, random() & 1);
        guest_.write(kDriverFeatures, static_cast<std::uint32_t>(random()));
      }
    }
    guest_.pump(1);
    guest_.write(kStatus, 0);
    EXPECT_EQ(guest_.read(kStatus), 0U);
  }
  expect_alive();
}

TEST_P(Hostile, BadQueueSizesAskForAReset) {
  for (const std::uint32_t size : {0U, 3U, 0x7fffU, 0x8000U, 0xffffU, 0x10008U, 0xffffffffU}) {
    guest_.negotiate(guest_.offered_features());
    guest_.make_queues(16, true);
    guest_.place_queue(0, guest_.queue(0).config(), false);
    guest_.write(kQueueNum, size);
    guest_.write(kQueueReady, 1);
    const std::uint64_t pulses = guest_.pulses();
    guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk);
    EXPECT_TRUE(guest_.broken()) << size;
    EXPECT_EQ(guest_.read(kInterruptStatus), kInterruptConfig) << size;
    EXPECT_GT(guest_.pulses(), pulses);
    guest_.kick(0);
    guest_.pump();
    expect_alive();
  }
}

TEST_P(Hostile, RingsOutsideRamAskForAReset) {
  const Gpa end = guest_.guest().end();
  for (const Gpa gpa : {Gpa{0}, guest_.guest().base() - 16, end - 16, end, Gpa{0xfeb00000}, ~Gpa{15}}) {
    for (int ring = 0; ring < 3; ++ring) {
      guest_.negotiate(guest_.offered_features());
      guest_.make_queues(16, true);
      QueueConfig config = guest_.queue(0).config();
      (ring == 0 ? config.descriptor_table : ring == 1 ? config.available_ring : config.used_ring) = gpa;
      guest_.place_queue(0, config);
      guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk);
      EXPECT_TRUE(guest_.broken()) << gpa << " " << ring;
    }
  }
  expect_alive();
}

TEST_P(Hostile, QueueRegistersAreFixedOnceInUse) {
  ASSERT_EQ(guest_.start(), kStarted);
  for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
    guest_.place_queue(
        i, {.size = 0xffff, .descriptor_table = ~0ULL, .available_ring = ~0ULL, .used_ring = ~0ULL});
    guest_.write(kQueueReady, 0);
    EXPECT_EQ(guest_.read(kQueueReady), 1U);
    guest_.kick(i);
    guest_.pump();
  }
  guest_.write(kDriverFeaturesSel, 0);
  guest_.write(kDriverFeatures, 0);
  EXPECT_EQ(guest_.read(kStatus), kStarted);
}

TEST_P(Hostile, QueuesAndNotificationsOutOfRangeDoNothing) {
  ASSERT_EQ(guest_.start(), kStarted);
  for (const std::uint32_t index : {std::uint32_t{guest_.queue_count()}, 0xffffU, 0x10000U, 0xffffffffU}) {
    guest_.write(kQueueSel, index);
    EXPECT_EQ(guest_.read(kQueueNumMax), 0U);
    EXPECT_EQ(guest_.read(kQueueReady), 0U);
    guest_.write(kQueueNum, 8);
    guest_.write(kQueueReady, 1);
    EXPECT_EQ(guest_.read(kQueueReady), 0U);
    guest_.write(kQueueNotify, index);
  }
  guest_.pump();
  EXPECT_EQ(guest_.read(kStatus), kStarted);
  for (const std::uint64_t offset : {kShmLenLow, kShmLenHigh, kShmBaseLow, kShmBaseHigh}) {
    EXPECT_EQ(guest_.read(offset), 0xffffffffU);
  }
}

TEST_P(Hostile, LeavingQueuesOutIsAllowed) {
  guest_.negotiate(guest_.offered_features());
  guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk);
  for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
    guest_.kick(i);
  }
  guest_.pump();
  expect_alive();
}

// Broken rings on each queue in turn: no time is lost, and a reset mends it.
TEST_P(Hostile, BrokenRingsCostNothing) {
  using Breaker = void (*)(test::FakeGuest&, FakeQueue&);
  const std::array<Breaker, 12> breakers{
      [](test::FakeGuest&, FakeQueue& q) { q.set_available_index(0x8000); },
      [](test::FakeGuest&, FakeQueue& q) { q.set_available_index(0xffff); },
      [](test::FakeGuest&, FakeQueue& q) { q.publish(0xffff); },
      [](test::FakeGuest& g, FakeQueue& q) {
        q.set_descriptor(0, {g.base(), 16, kDescNext | kDescWrite, 0});
        q.publish(0);
      },
      [](test::FakeGuest& g, FakeQueue& q) {
        q.set_descriptor(0, {g.base(), 16, kDescNext, 0x7fff});
        q.publish(0);
      },
      [](test::FakeGuest& g, FakeQueue& q) {
        q.set_descriptor(0, {g.end() - 8, 16, kDescWrite, 0});
        q.publish(0);
      },
      [](test::FakeGuest&, FakeQueue& q) {
        q.set_descriptor(0, {0xfeb00050, 4, kDescWrite, 0});
        q.publish(0);
      },
      [](test::FakeGuest& g, FakeQueue& q) {
        q.set_descriptor(0, {g.base(), 0xffffffff, kDescWrite, 0});
        q.publish(0);
      },
      [](test::FakeGuest& g, FakeQueue& q) {
        q.set_descriptor(0, {g.base(), 0xfffffff0, kDescIndirect, 0});
        q.publish(0);
      },
      [](test::FakeGuest&, FakeQueue& q) {
        q.set_descriptor(0, {0, 0, 0, 0});
        q.publish(0);
      },
      [](test::FakeGuest& g, FakeQueue& q) {
        // Every slot of the ring names the same head.
        q.set_descriptor(0, {g.base(), 16, kDescWrite, 0});
        for (std::uint16_t i = 0; std::size_t{i} < q.size(); ++i) {
          q.publish(0);
        }
      },
      [](test::FakeGuest& g, FakeQueue& q) {
        // Writable where readable is expected and the other way round, the biggest that RAM allows.
        const auto size = static_cast<std::uint32_t>(g.end() - g.base());
        for (std::uint16_t i = 0; std::size_t{i} < q.size(); ++i) {
          q.set_descriptor(i, {g.base(), size, (i & 1) != 0 ? kDescWrite : std::uint16_t{0}, 0});
        }
        q.set_available_index(q.size());
        for (std::uint16_t i = 0; std::size_t{i} < q.size(); ++i) {
          q.set_available_entry(i, i);
        }
      }};
  // The last one lets devices write all over guest RAM, rings included: that is the guest's own harm.
  for (std::uint16_t index = 0; index < guest_.queue_count(); ++index) {
    for (std::size_t i = 0; i < breakers.size(); ++i) {
      guest_.guest().clear();
      buffer_ = 0;
      ASSERT_EQ(guest_.start(), kStarted);
      breakers[i](guest_.guest(), guest_.queue(index));
      const CpuTime time;
      for (int round = 0; round < 4; ++round) {
        guest_.kick(index);
        guest_.pump(16);
      }
      EXPECT_LT(time.spent(), 0.2 * kSlow) << "case " << i << " on queue " << index;
    }
  }
  guest_.guest().clear();
  expect_alive();
}

TEST_P(Hostile, RandomRingsCostNothing) {
  std::mt19937_64 random(3);
  const CpuTime time;
  for (int round = 0; round < 100; ++round) {
    ASSERT_EQ(guest_.start(), kStarted);
    const Gpa base = guest_.guest().allocate(0);
    for (std::uint16_t index = 0; index < guest_.queue_count(); ++index) {
      FakeQueue& queue = guest_.queue(index);
      for (std::uint16_t i = 0; std::size_t{i} < queue.size(); ++i) {
        FakeDescriptor descriptor;
        descriptor.address = base + random() % 0x10000;
        descriptor.length = static_cast<std::uint32_t>(random() % ((random() & 7) == 0 ? 0x8000 : 64));
        descriptor.flags = static_cast<std::uint16_t>(random() & (kDescNext | kDescWrite));
        descriptor.next = static_cast<std::uint16_t>(random() % queue.size());
        queue.set_descriptor(i, descriptor);
        queue.set_available_entry(i, static_cast<std::uint16_t>(random() % queue.size()));
        guest_.guest().store(base + 8 * (random() % 0x2000), random());
      }
      queue.set_available_index(static_cast<std::uint16_t>(random() % (queue.size() + 1U)));
      guest_.kick(index);
    }
    guest_.pump(4);
  }
  EXPECT_LT(time.spent(), 5 * kSlow);
  expect_alive();
}

TEST_P(Hostile, ResetAtEveryPointOfWork) {
  const CpuTime time;
  for (int rounds = 0; rounds < 6; ++rounds) {
    for (const bool machine_reset : {false, true}) {
      ASSERT_EQ(guest_.start(), kStarted);
      for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
        guest_.queue(i).add(plain_chain());
        guest_.queue(i).add(plain_chain());
        guest_.kick(i);
      }
      guest_.pump(rounds);
      if (machine_reset) {
        guest_.transport().reset();
      } else {
        guest_.write(kStatus, 0);
      }
      const std::uint64_t pulses = guest_.pulses();
      static_cast<void>(guest_.guest().take_dirty_pages());
      guest_.pump();
      // After a reset nothing of the device reaches the guest any more.
      EXPECT_EQ(guest_.pulses(), pulses);
      EXPECT_EQ(guest_.read(kInterruptStatus), 0U);
      for (const bool dirty : guest_.guest().take_dirty_pages()) {
        ASSERT_FALSE(dirty);
      }
    }
  }
  EXPECT_LT(time.spent(), 2 * kSlow);
  expect_alive();
}

TEST_P(Hostile, PausedDevicesKeepStill) {
  ASSERT_EQ(guest_.start(), kStarted);
  for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
    guest_.queue(i).add(plain_chain());
    guest_.kick(i);
  }
  guest_.pump(1);
  guest_.transport().pause();
  guest_.transport().pause();
  const std::uint64_t pulses = guest_.pulses();
  static_cast<void>(guest_.guest().take_dirty_pages());
  for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
    guest_.kick(i);
    const Queue* queue = guest_.device().queue(i);
    ASSERT_NE(queue, nullptr);
    EXPECT_EQ(queue->in_flight(), 0U) << i;
  }
  guest_.pump();
  EXPECT_EQ(guest_.pulses(), pulses);
  for (const bool dirty : guest_.guest().take_dirty_pages()) {
    ASSERT_FALSE(dirty);
  }
  guest_.transport().resume();
  guest_.transport().resume();
  guest_.pump();
  // Reset while paused, and life goes on after it.
  guest_.transport().pause();
  guest_.transport().reset();
  guest_.transport().resume();
  expect_alive();
}

TEST_P(Hostile, SavedStateIsRestoredExactly) {
  for (const bool started : {false, true}) {
    guest_.transport().reset();
    if (started) {
      ASSERT_EQ(guest_.start(), kStarted);
      for (std::uint16_t i = 0; i < guest_.queue_count(); ++i) {
        guest_.queue(i).add(plain_chain());
        guest_.kick(i);
      }
      guest_.pump();
    }
    guest_.transport().pause();
    const StateRecord saved = guest_.transport().save();
    const std::shared_ptr<MmioTransport> twin = guest_.make_twin();
    twin->pause();
    const Result<void> loaded = twin->load(saved);
    ASSERT_TRUE(loaded.has_value()) << loaded.error().message;
    const StateRecord again = twin->save();
    EXPECT_EQ(again.name, saved.name);
    EXPECT_EQ(again.version, saved.version);
    EXPECT_EQ(again.bytes, saved.bytes);
    twin->resume();
    guest_.pump();
    guest_.transport().resume();
  }
}

TEST_P(Hostile, DamagedStateIsRefusedOrHarmless) {
  ASSERT_EQ(guest_.start(), kStarted);
  guest_.transport().pause();
  const StateRecord saved = guest_.transport().save();
  const std::shared_ptr<MmioTransport> twin = guest_.make_twin();
  twin->pause();
  for (std::size_t size = 0; size < saved.bytes.size(); ++size) {
    StateRecord cut = saved;
    cut.bytes.resize(size);
    EXPECT_FALSE(twin->load(cut).has_value()) << size;
  }
  StateRecord longer = saved;
  longer.bytes.push_back(0);
  EXPECT_FALSE(twin->load(longer).has_value());
  StateRecord newer = saved;
  newer.version = 99;
  EXPECT_FALSE(twin->load(newer).has_value());
  StateRecord other = saved;
  other.name = "toaster";
  EXPECT_FALSE(twin->load(other).has_value());
  for (std::size_t i = 0; i < saved.bytes.size(); ++i) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      StateRecord damaged = saved;
      damaged.bytes[i] = static_cast<std::uint8_t>(damaged.bytes[i] ^ flip);
      static_cast<void>(twin->load(damaged));
      twin->resume();
      guest_.pump(1);
      twin->pause();
    }
  }
  EXPECT_TRUE(twin->load(saved).has_value());
}

TEST_P(Hostile, LogsStayBounded) {
  ASSERT_EQ(guest_.start(), kStarted);
  for (int i = 0; i < 5000; ++i) {
    guest_.write(kQueueSel, 0);
    guest_.write(kQueueNum, 3);
    guest_.write(kStatus, 1);
    guest_.write(kDriverFeatures, 1);
  }
  EXPECT_LT(guest_.logged(), 8192U);
  EXPECT_GT(guest_.logged(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Devices, Hostile, testing::ValuesIn(test::hostile_devices()),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace wisp
