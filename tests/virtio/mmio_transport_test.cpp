#include "virtio/mmio_transport.h"

#include <gtest/gtest.h>

#include <array>
#include <string>

#include "virtio/support/mmio_harness.h"

namespace wisp {
namespace {

using namespace virtio_mmio;
using test::ChainBuilder;
using test::MmioHarness;

constexpr std::uint32_t kStarted =
    kVirtioStatusAcknowledge | kVirtioStatusDriver | kVirtioStatusFeaturesOk | kVirtioStatusDriverOk;

// Echoes: returns each chain with one byte written. What the transport tells it is counted.
class EchoDevice final : public VirtioDevice {
 public:
  using VirtioDevice::VirtioDevice;
  [[nodiscard]] std::string_view name() const override { return "echo"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 42; }
  [[nodiscard]] std::uint64_t features() const override { return 1ULL << 3; }
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return kSizes; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override {
    read_config_bytes(config, offset, data);
  }
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override {
    for (std::size_t i = 0; i < data.size() && offset + i < config.size(); ++i) {
      config[static_cast<std::size_t>(offset) + i] = data[i];
    }
  }
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override {
    if (refuse) {
      return fail("told to refuse");
    }
    active = std::move(activation);
    return {};
  }
  void notify(std::uint16_t index) override {
    ++notified;
    Queue& q = *active->queues[index];
    DescriptorChain chain;
    while (q.pop(chain) == PopResult::kChain) {
      q.push(chain, static_cast<std::uint32_t>(chain.write(0, std::array<std::uint8_t, 1>{7})));
    }
    if (q.broken()) {
      active->interrupts->needs_reset();
    }
    if (q.take_interrupt_wish()) {
      active->interrupts->queue_used(index);
    }
    static_cast<void>(q.enable_notifications());
  }
  void reset() override {
    ++resets;
    active.reset();
  }
  [[nodiscard]] bool kicks_handled_elsewhere() const override { return elsewhere; }
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override {
    return active && active->queues[index] ? &*active->queues[index] : nullptr;
  }
  [[nodiscard]] StateRecord save() const override { return {.name = "echo", .version = 1, .bytes = {}}; }
  [[nodiscard]] Result<void> load(const StateRecord&) override { return {}; }

  std::array<std::uint8_t, 6> config{1, 2, 3, 4, 5, 6};
  std::optional<VirtioActivation> active;
  bool refuse = false;
  bool elsewhere = false;
  int notified = 0;
  int resets = 0;

 protected:
  void on_pause() override {}

 private:
  static constexpr std::array<std::uint16_t, 2> kSizes{64, 8};
};

class MmioTransportTest : public testing::Test {
 protected:
  MmioHarness guest_{
      [](EventLoop& loop, const GuestMemory& memory) { return std::make_unique<EchoDevice>(loop, memory); }};
  EchoDevice& echo_ = static_cast<EchoDevice&>(guest_.device());

  void request(std::uint16_t index = 0) {
    guest_.queue(index).add(ChainBuilder().writable(guest_.guest().allocate(8), 8));
    guest_.kick(index);
  }
};

TEST_F(MmioTransportTest, ServesAChainFromNotificationToInterrupt) {
  ASSERT_EQ(guest_.start(), kStarted);
  EXPECT_EQ(echo_.active->features,
            kVirtioFeatureVersion1 | kVirtioFeatureEventIdx | kVirtioFeatureIndirectDesc | 8);
  EXPECT_EQ(echo_.active->queues[0]->size(), 16);
  EXPECT_EQ(echo_.active->queues[1]->size(), 8);
  request();
  EXPECT_EQ(echo_.notified, 0);  // not on the vCPU's time
  guest_.pump();
  EXPECT_EQ(echo_.notified, 1);
  EXPECT_EQ(guest_.pulses(), 1U);
  EXPECT_EQ(guest_.read(kInterruptStatus), kInterruptUsed);
  guest_.write(kInterruptAck, kInterruptUsed);
  EXPECT_EQ(guest_.read(kInterruptStatus), 0U);
  EXPECT_EQ(guest_.pulses(), 1U);
  const auto used = guest_.queue(0).take_used();
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->written, 1U);
}

TEST_F(MmioTransportTest, NoInterruptIsLostBetweenStatusAndAcknowledgement) {
  ASSERT_EQ(guest_.start(), kStarted);
  request();
  guest_.pump();
  const std::uint32_t seen = guest_.read(kInterruptStatus);
  EXPECT_EQ(seen, kInterruptUsed);
  // Before the driver acknowledges what it saw, the configuration changes.
  echo_.active->interrupts->config_changed();
  const std::uint64_t pulses = guest_.pulses();
  guest_.write(kInterruptAck, seen);
  EXPECT_EQ(guest_.read(kInterruptStatus), kInterruptConfig);
  EXPECT_EQ(guest_.pulses(), pulses + 1);
  guest_.write(kInterruptAck, 0);
  EXPECT_EQ(guest_.pulses(), pulses + 2);
  guest_.write(kInterruptAck, 0xffffffff);
  EXPECT_EQ(guest_.read(kInterruptStatus), 0U);
  EXPECT_EQ(guest_.pulses(), pulses + 2);
}

TEST_F(MmioTransportTest, ConfigurationIsReadAndWrittenAtAnyWidth) {
  EXPECT_EQ(guest_.read(kConfig), 0x04030201U);
  EXPECT_EQ(guest_.read(kConfig + 4), 0x0605U);  // its end reads as zero
  std::array<std::uint8_t, 3> bytes{};
  guest_.transport().io_read(kConfig + 1, bytes);
  EXPECT_EQ(bytes, (std::array<std::uint8_t, 3>{2, 3, 4}));
  guest_.transport().io_write(kConfig + 5, std::array<std::uint8_t, 2>{9, 9});
  EXPECT_EQ(echo_.config[5], 9);
}

TEST_F(MmioTransportTest, GenerationChangesWithTheConfigurationOnly) {
  const std::uint32_t first = guest_.read(kConfigGeneration);
  EXPECT_EQ(guest_.read(kConfigGeneration), first);
  echo_.config[2] = 77;  // nobody is told: there is no driver yet
  const std::uint32_t second = guest_.read(kConfigGeneration);
  EXPECT_NE(second, first);
  EXPECT_EQ(guest_.read(kConfigGeneration), second);
  ASSERT_EQ(guest_.start(), kStarted);
  echo_.active->interrupts->config_changed();
  EXPECT_NE(guest_.read(kConfigGeneration), second);
}

TEST_F(MmioTransportTest, RefusedActivationAsksForAResetAndCanBeTriedAgain) {
  echo_.refuse = true;
  EXPECT_EQ(guest_.start(), kStarted | kVirtioStatusNeedsReset);
  EXPECT_EQ(guest_.read(kInterruptStatus), kInterruptConfig);
  EXPECT_EQ(guest_.pulses(), 1U);
  request();
  guest_.pump();
  EXPECT_EQ(echo_.notified, 0);
  EXPECT_GT(guest_.logged(), 0U);
  echo_.refuse = false;
  EXPECT_EQ(guest_.start(), kStarted);
  request();
  guest_.pump();
  EXPECT_EQ(echo_.notified, 1);
}

TEST_F(MmioTransportTest, BrokenDeviceIsToldOfOnceAndLeftAlone) {
  ASSERT_EQ(guest_.start(), kStarted);
  guest_.queue(0).publish(0xffff);
  guest_.kick(0);
  guest_.pump();
  EXPECT_TRUE(guest_.broken());
  EXPECT_EQ(guest_.pulses(), 1U);
  EXPECT_EQ(echo_.notified, 1);
  guest_.kick(1);
  guest_.pump();
  EXPECT_EQ(echo_.notified, 1);
  EXPECT_EQ(guest_.pulses(), 1U);
}

TEST_F(MmioTransportTest, FailedDriverDoesNotStartTheDevice) {
  guest_.negotiate(guest_.offered_features());
  guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk | kVirtioStatusFailed);
  EXPECT_FALSE(echo_.active.has_value());
  EXPECT_EQ(guest_.read(kStatus), kStarted | kVirtioStatusFailed);
}

TEST_F(MmioTransportTest, NotificationsBeforeDriverOkAreSeenAfterIt) {
  guest_.negotiate(guest_.offered_features());
  guest_.make_queues(8, true);
  guest_.place_queue(0, guest_.queue(0).config());
  request();
  guest_.pump();
  EXPECT_EQ(echo_.notified, 0);
  guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk);
  guest_.pump();
  EXPECT_EQ(echo_.notified, 1);
  EXPECT_FALSE(echo_.active->queues[1].has_value());
}

TEST_F(MmioTransportTest, DoorbellsStandAtQueueNotify) {
  const std::vector<IoEvent> events = guest_.transport().io_events();
  ASSERT_EQ(events.size(), 2U);
  EXPECT_EQ(events[1].offset, kQueueNotify);
  EXPECT_EQ(events[1].size, 4U);
  EXPECT_EQ(events[1].value, 1U);
  ASSERT_EQ(guest_.start(), kStarted);
  signal_eventfd(events[1].fd);
  guest_.pump();
  EXPECT_EQ(echo_.notified, 1);
}

TEST_F(MmioTransportTest, KicksHandledElsewhereAreNotTaken) {
  echo_.elsewhere = true;
  ASSERT_EQ(guest_.start(), kStarted);
  guest_.kick(1);
  guest_.pump();
  EXPECT_EQ(echo_.notified, 0);
  EXPECT_EQ(drain_eventfd(echo_.active->kick_fds[1]), 1U);
}

TEST_F(MmioTransportTest, CallFdActsAsAnInterrupt) {
  ASSERT_EQ(guest_.start(), kStarted);
  const int fd = echo_.active->interrupts->call_fd(1).value();
  EXPECT_EQ(echo_.active->interrupts->call_fd(1).value(), fd);
  signal_eventfd(fd);
  guest_.pump();
  EXPECT_EQ(guest_.read(kInterruptStatus), kInterruptUsed);
  EXPECT_EQ(guest_.pulses(), 1U);
  guest_.write(kStatus, 0);
  ASSERT_EQ(guest_.start(), kStarted);
  EXPECT_TRUE(echo_.active->interrupts->call_fd(1).has_value());
}

TEST_F(MmioTransportTest, PausedDeviceServesOnResume) {
  ASSERT_EQ(guest_.start(), kStarted);
  guest_.transport().pause();
  request();
  guest_.pump();
  EXPECT_EQ(echo_.notified, 0);
  guest_.transport().resume();
  guest_.pump();
  EXPECT_TRUE(guest_.queue(0).take_used().has_value());
}

TEST_F(MmioTransportTest, RestoredRingsGoOnAndUnacknowledgedInterruptsAreRepeated) {
  ASSERT_EQ(guest_.start(), kStarted);
  request();
  guest_.pump();
  ASSERT_TRUE(guest_.queue(0).take_used().has_value());
  guest_.transport().pause();
  request();
  const StateRecord saved = guest_.transport().save();
  const auto twin = guest_.make_twin();
  twin->pause();
  ASSERT_TRUE(twin->load(saved).has_value());
  const std::uint64_t pulses = guest_.pulses();
  twin->resume();
  EXPECT_GT(guest_.pulses(), pulses);
  guest_.pump();
  EXPECT_TRUE(guest_.queue(0).take_used().has_value());
  EXPECT_FALSE(guest_.queue(0).take_used().has_value());
}

TEST_F(MmioTransportTest, UnreadyQueueCanBePlacedAnew) {
  guest_.negotiate(guest_.offered_features());
  guest_.make_queues(8, true);
  guest_.place_queue(0, {.size = 3});
  EXPECT_EQ(guest_.read(kQueueReady), 1U);
  guest_.write(kQueueNum, 8);  // ignored while ready
  guest_.write(kQueueReady, 0);
  guest_.place_queue(0, guest_.queue(0).config());
  guest_.write(kStatus, guest_.read(kStatus) | kVirtioStatusDriverOk);
  EXPECT_EQ(guest_.read(kStatus), kStarted);
}

}  // namespace
}  // namespace wisp
