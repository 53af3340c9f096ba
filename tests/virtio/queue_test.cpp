#include "virtio/queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <thread>

#include "virtio/support/fake_guest.h"
#include "virtio/support/fake_queue.h"

namespace wisp {
namespace {

using test::ChainBuilder;
using test::FakeDescriptor;
using test::FakeGuest;
using test::FakeQueue;
using test::kDescIndirect;
using test::kDescNext;
using test::kDescWrite;

constexpr std::uint64_t kAll = kVirtioFeatureVersion1 | kVirtioFeatureIndirectDesc | kVirtioFeatureEventIdx;

Queue start(const FakeQueue& driver, const FakeGuest& guest, std::uint64_t features = kAll) {
  auto queue = Queue::activate(driver.config(), guest.memory(), features);
  EXPECT_TRUE(queue.has_value()) << queue.error().message;
  return *std::move(queue);
}

std::vector<std::uint8_t> bytes_of(std::string_view text) {
  return {text.begin(), text.end()};
}

TEST(QueueActivate, RefusesWhatIsNotAQueue) {
  FakeGuest guest;
  const FakeQueue driver(guest, 16);
  const QueueConfig good = driver.config();
  EXPECT_TRUE(Queue::activate(good, guest.memory(), kAll).has_value());

  for (const int size : {0, 3, 15, 17, 32, 0x8000, 0xffff}) {
    QueueConfig config = good;
    config.size = static_cast<std::uint16_t>(size);
    EXPECT_FALSE(Queue::activate(config, guest.memory(), kAll).has_value()) << size;
  }
  QueueConfig huge = good;
  huge.max_size = huge.size = 2048;
  EXPECT_FALSE(Queue::activate(huge, guest.memory(), kAll).has_value());

  const auto with = [&](auto member, Gpa gpa) {
    QueueConfig config = good;
    config.*member = gpa;
    return Queue::activate(config, guest.memory(), kAll).has_value();
  };
  // Alignment.
  EXPECT_FALSE(with(&QueueConfig::descriptor_table, good.descriptor_table + 8));
  EXPECT_FALSE(with(&QueueConfig::available_ring, good.available_ring + 1));
  EXPECT_FALSE(with(&QueueConfig::used_ring, good.used_ring + 2));
  // Ending exactly at the end of RAM, and one step beyond it.
  EXPECT_TRUE(with(&QueueConfig::descriptor_table, guest.end() - 256));
  EXPECT_FALSE(with(&QueueConfig::descriptor_table, guest.end() - 240));
  EXPECT_TRUE(with(&QueueConfig::available_ring, guest.end() - 38));
  EXPECT_FALSE(with(&QueueConfig::available_ring, guest.end() - 36));
  EXPECT_TRUE(with(&QueueConfig::used_ring, guest.end() - 136));
  EXPECT_FALSE(with(&QueueConfig::used_ring, guest.end() - 132));
  // Below RAM, across its start, and where the sum wraps.
  for (const Gpa gpa : {Gpa{0}, guest.base() - 16, Gpa{0} - 16, Gpa{1} << 63}) {
    EXPECT_FALSE(with(&QueueConfig::descriptor_table, gpa)) << gpa;
    EXPECT_FALSE(with(&QueueConfig::available_ring, gpa)) << gpa;
    EXPECT_FALSE(with(&QueueConfig::used_ring, gpa)) << gpa;
  }
}

TEST(Queue, GivesReadableThenWritableAndReturnsThem) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest, kVirtioFeatureVersion1);
  const Gpa a = guest.allocate(bytes_of("hello "));
  const Gpa b = guest.allocate(bytes_of("world"));
  const Gpa c = guest.allocate(4);
  const Gpa d = guest.allocate(6);
  const std::uint16_t head =
      driver.add(ChainBuilder().readable(a, 6).readable(b, 5).writable(c, 4).writable(d, 6));

  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  EXPECT_EQ(chain.head(), head);
  EXPECT_EQ(chain.readable_size(), 11U);
  EXPECT_EQ(chain.writable_size(), 10U);
  std::vector<std::uint8_t> text(32);
  EXPECT_EQ(chain.read(0, text), 11U);
  EXPECT_EQ(std::string(text.begin(), text.begin() + 11), "hello world");
  EXPECT_EQ(chain.read(4, std::span(text).first(3)), 3U);
  EXPECT_EQ(std::string(text.begin(), text.begin() + 3), "o w");
  EXPECT_EQ(chain.read(11, text), 0U);
  EXPECT_EQ(chain.read(SIZE_MAX, text), 0U);
  EXPECT_EQ(chain.write(2, bytes_of("0123456789")), 8U);
  EXPECT_EQ(guest.read_text(c + 2, 2), "01");
  EXPECT_EQ(guest.read_text(d, 6), "234567");
  EXPECT_EQ(queue.in_flight(), 1U);
  EXPECT_EQ(queue.pop(chain), PopResult::kEmpty);
  EXPECT_FALSE(driver.take_used().has_value());

  queue.push(chain, 10);
  const auto used = driver.take_used();
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->head, head);
  EXPECT_EQ(used->written, 10U);
  EXPECT_EQ(queue.in_flight(), 0U);
}

TEST(Queue, IovecsCoverPartsOfTheChain) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  const Gpa a = guest.allocate(bytes_of("abcd"));
  const Gpa b = guest.allocate(bytes_of("efgh"));
  driver.add(ChainBuilder().readable(a, 4).readable(b, 4).writable(a, 4));
  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  std::vector<iovec> iovecs;
  EXPECT_EQ(chain.readable_iovecs(1, 5, iovecs), 5U);
  ASSERT_EQ(iovecs.size(), 2U);
  EXPECT_EQ(std::memcmp(iovecs[0].iov_base, "bcd", 3), 0);
  EXPECT_EQ(iovecs[0].iov_len, 3U);
  EXPECT_EQ(std::memcmp(iovecs[1].iov_base, "ef", 2), 0);
  EXPECT_EQ(iovecs[1].iov_len, 2U);
  iovecs.clear();
  EXPECT_EQ(chain.readable_iovecs(4, SIZE_MAX, iovecs), 4U);
  EXPECT_EQ(iovecs.size(), 1U);
  EXPECT_EQ(chain.writable_iovecs(4, 1, iovecs), 0U);
  EXPECT_EQ(iovecs.size(), 1U);
}

TEST(Queue, IndirectTableMayFollowDirectBuffersAndBeLongerThanTheQueue) {
  FakeGuest guest;
  FakeQueue driver(guest, 4);
  Queue queue = start(driver, guest);
  const Gpa data = guest.allocate(4096);
  ChainBuilder builder;
  builder.readable(data, 1).indirect();
  for (int i = 0; i < 100; ++i) {
    builder.writable(data, 2);
  }
  driver.add(builder);
  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  EXPECT_EQ(chain.readable().size(), 1U);
  EXPECT_EQ(chain.writable().size(), 100U);
  EXPECT_EQ(chain.writable_size(), 200U);
}

TEST(Queue, ZeroLengthBuffersCarryNothing) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  // Address 0 is no RAM: of a buffer without bytes, that does not matter.
  driver.add(ChainBuilder().readable(0, 0).writable(0, 0));
  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  EXPECT_TRUE(chain.readable().empty());
  EXPECT_TRUE(chain.writable().empty());
  queue.push(chain, 0);
  EXPECT_TRUE(driver.take_used().has_value());
}

TEST(Queue, BuffersMayCrossFromOneBlockIntoTheNext) {
  FakeGuest guest({{0x10000, 0x10000}, {0x20000, 0x10000}, {0x40000, 0x10000}});
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  driver.add(ChainBuilder().readable(0x1f000, 0x2000));
  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  ASSERT_EQ(chain.readable().size(), 2U);
  EXPECT_EQ(chain.readable()[0].size(), 0x1000U);
  EXPECT_EQ(chain.readable()[1].gpa(), 0x20000U);
  // Into the hole behind the second block.
  driver.add(ChainBuilder().readable(0x2f000, 0x12000));
  EXPECT_EQ(queue.pop(chain), PopResult::kBroken);
}

// Each case writes one broken ring; the queue must say so at once and stay broken.
struct HostileCase {
  const char* name;
  void (*set_up)(FakeGuest& guest, FakeQueue& driver);
};

class HostileQueue : public testing::TestWithParam<HostileCase> {};

TEST_P(HostileQueue, BreaksTheQueueOnly) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  GetParam().set_up(guest, driver);
  DescriptorChain chain;
  EXPECT_EQ(queue.pop(chain), PopResult::kBroken);
  EXPECT_TRUE(queue.broken());
  EXPECT_EQ(queue.in_flight(), 0U);
  driver.reset();
  driver.add(ChainBuilder().readable(guest.allocate(8), 8));
  EXPECT_EQ(queue.pop(chain), PopResult::kBroken);
}

void one(FakeQueue& driver, const FakeDescriptor& descriptor) {
  driver.set_descriptor(0, descriptor);
  driver.publish(0);
}

INSTANTIATE_TEST_SUITE_P(
    Rings, HostileQueue,
    testing::Values(
        HostileCase{"index_jump", [](FakeGuest&, FakeQueue& q) { q.set_available_index(9); }},
        HostileCase{"index_behind", [](FakeGuest&, FakeQueue& q) { q.set_available_index(0xffff); }},
        HostileCase{"head_out_of_table", [](FakeGuest&, FakeQueue& q) { q.publish(8); }},
        HostileCase{"head_ffff", [](FakeGuest&, FakeQueue& q) { q.publish(0xffff); }},
        HostileCase{"next_out_of_table",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.base(), 8, kDescNext, 8}); }},
        HostileCase{"next_to_itself",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.base(), 8, kDescNext, 0}); }},
        HostileCase{"zero_length_cycle",
                    [](FakeGuest&, FakeQueue& q) {
                      q.set_descriptor(1, {0, 0, kDescNext, 0});
                      one(q, {0, 0, kDescNext, 1});
                    }},
        HostileCase{"readable_behind_writable",
                    [](FakeGuest& g, FakeQueue& q) {
                      q.set_descriptor(1, {g.base(), 8, 0, 0});
                      one(q, {g.base(), 8, kDescNext | kDescWrite, 1});
                    }},
        HostileCase{"buffer_below_ram", [](FakeGuest& g, FakeQueue& q) { one(q, {g.base() - 1, 8, 0, 0}); }},
        HostileCase{"buffer_across_the_end",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.end() - 7, 8, 0, 0}); }},
        HostileCase{"buffer_at_the_end", [](FakeGuest& g, FakeQueue& q) { one(q, {g.end(), 1, 0, 0}); }},
        HostileCase{"buffer_on_registers",
                    [](FakeGuest&, FakeQueue& q) { one(q, {0xfeb00000, 4, kDescWrite, 0}); }},
        HostileCase{"buffer_wraps",
                    [](FakeGuest& g, FakeQueue& q) {
                      one(q, {UINT64_MAX - 7, static_cast<std::uint32_t>(g.base() + 16), 0, 0});
                    }},
        HostileCase{"length_ffffffff",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.base(), UINT32_MAX, 0, 0}); }},
        HostileCase{"indirect_with_next",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.base(), 16, kDescIndirect | kDescNext, 1}); }},
        HostileCase{"indirect_empty",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.base(), 0, kDescIndirect, 0}); }},
        HostileCase{"indirect_odd_length",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.base(), 17, kDescIndirect, 0}); }},
        HostileCase{"indirect_not_ram",
                    [](FakeGuest& g, FakeQueue& q) { one(q, {g.end() - 8, 16, kDescIndirect, 0}); }},
        HostileCase{"indirect_nested",
                    [](FakeGuest& g, FakeQueue& q) {
                      const Gpa table = g.allocate(16);
                      g.store(table, FakeDescriptor{table, 16, kDescIndirect, 0});
                      one(q, {table, 16, kDescIndirect, 0});
                    }},
        HostileCase{"indirect_cycle",
                    [](FakeGuest& g, FakeQueue& q) {
                      const Gpa table = g.allocate(32);
                      g.store(table, FakeDescriptor{table, 1, kDescNext, 1});
                      g.store(table + 16, FakeDescriptor{table, 1, kDescNext, 0});
                      one(q, {table, 32, kDescIndirect, 0});
                    }},
        HostileCase{"indirect_next_out_of_table",
                    [](FakeGuest& g, FakeQueue& q) {
                      const Gpa table = g.allocate(16);
                      g.store(table, FakeDescriptor{table, 1, kDescNext, 1});
                      one(q, {table, 16, kDescIndirect, 0});
                    }},
        HostileCase{"indirect_too_long",
                    [](FakeGuest& g, FakeQueue& q) {
                      const Gpa table = g.allocate(16 * (kMaxChainLength + 1));
                      for (std::uint16_t i = 0; i <= kMaxChainLength; ++i) {
                        const bool last = i == kMaxChainLength;
                        g.store(table + 16ULL * i,
                                FakeDescriptor{table, 1, last ? std::uint16_t{0} : kDescNext,
                                               static_cast<std::uint16_t>(i + 1)});
                      }
                      one(q, {table, 16 * (kMaxChainLength + 1), kDescIndirect, 0});
                    }},
        HostileCase{"indirect_behind_a_full_direct_part",
                    [](FakeGuest& g, FakeQueue& q) {
                      const Gpa table = g.allocate(16ULL * kMaxChainLength);
                      for (std::uint16_t i = 0; i < kMaxChainLength; ++i) {
                        const bool last = i + 1 == kMaxChainLength;
                        g.store(table + 16ULL * i,
                                FakeDescriptor{table, 1, last ? std::uint16_t{0} : kDescNext,
                                               static_cast<std::uint16_t>(i + 1)});
                      }
                      q.set_descriptor(1, {table, 16 * kMaxChainLength, kDescIndirect, 0});
                      one(q, {table, 1, kDescNext, 1});
                    }}),
    [](const auto& test) { return std::string(test.param.name); });

TEST(Queue, SumOfLengthsBeyond32BitsBreaksIt) {
  // 8 buffers of 1 GiB in each direction: each is RAM, their sum is not a length.
  FakeGuest guest({{1ULL << 30, 1ULL << 30}});
  FakeQueue driver(guest, 8);
  ChainBuilder builder;
  for (int i = 0; i < 4; ++i) {
    builder.readable(1ULL << 30, 1U << 30);
  }
  driver.add(builder);
  Queue queue = start(driver, guest);
  DescriptorChain chain;
  EXPECT_EQ(queue.pop(chain), PopResult::kBroken);
}

TEST(Queue, IndirectWithoutTheFeatureBreaksIt) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest, kVirtioFeatureVersion1);
  driver.add(ChainBuilder().indirect().readable(guest.base(), 8));
  DescriptorChain chain;
  EXPECT_EQ(queue.pop(chain), PopResult::kBroken);
}

TEST(Queue, SameHeadTwiceIsRefusedWhileInFlightAndFineAfterwards) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  DescriptorChain first;
  DescriptorChain second;
  one(driver, {guest.base(), 8, 0, 0});
  ASSERT_EQ(queue.pop(first), PopResult::kChain);
  queue.push(first, 0);
  driver.publish(0);
  ASSERT_EQ(queue.pop(first), PopResult::kChain);
  driver.publish(0);
  EXPECT_EQ(queue.pop(second), PopResult::kBroken);
  // What was given out before can still be returned.
  queue.push(first, 0);
  EXPECT_EQ(queue.in_flight(), 0U);
}

TEST(QueueDeathTest, ReturningAChainTwiceAborts) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  driver.add(ChainBuilder().readable(guest.base(), 8));
  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  queue.push(chain, 0);
  EXPECT_DEATH(queue.push(chain, 0), "in_flight_");
}

TEST(Queue, UndoneChainsComeAgainInOrder) {
  FakeGuest guest;
  FakeQueue driver(guest, 8);
  Queue queue = start(driver, guest);
  const std::uint16_t a = driver.add(ChainBuilder().readable(guest.base(), 1));
  const std::uint16_t b = driver.add(ChainBuilder().readable(guest.base(), 2));
  DescriptorChain first;
  DescriptorChain second;
  ASSERT_EQ(queue.pop(first), PopResult::kChain);
  ASSERT_EQ(queue.pop(second), PopResult::kChain);
  queue.undo_pop(second);
  queue.undo_pop(first);
  EXPECT_EQ(queue.in_flight(), 0U);
  ASSERT_EQ(queue.pop(first), PopResult::kChain);
  EXPECT_EQ(first.head(), a);
  ASSERT_EQ(queue.pop(first), PopResult::kChain);
  EXPECT_EQ(first.head(), b);
}

TEST(Queue, TurnsRoundManyTimesWithCompletionsOutOfOrder) {
  FakeGuest guest;
  FakeQueue driver(guest, 4);
  Queue queue = start(driver, guest);
  DescriptorChain first;
  DescriptorChain second;
  // More than 65536 chains, so that every index wraps.
  for (int i = 0; i < 40000; ++i) {
    const std::uint16_t a = driver.add(ChainBuilder().writable(guest.base(), 4));
    const std::uint16_t b = driver.add(ChainBuilder().writable(guest.base(), 4));
    ASSERT_EQ(queue.pop(first), PopResult::kChain);
    ASSERT_EQ(queue.pop(second), PopResult::kChain);
    queue.push(second, 2);
    queue.push(first, 1);
    const auto used_b = driver.take_used();
    const auto used_a = driver.take_used();
    ASSERT_TRUE(used_a && used_b);
    ASSERT_EQ(used_b->head, b);
    ASSERT_EQ(used_b->written, 2U);
    ASSERT_EQ(used_a->head, a);
    ASSERT_EQ(used_a->written, 1U);
  }
}

TEST(Queue, InterruptFlagIsObeyed) {
  FakeGuest guest;
  FakeQueue driver(guest, 4);
  Queue queue = start(driver, guest, kVirtioFeatureVersion1);
  DescriptorChain chain;
  const auto serve = [&] {
    driver.add(ChainBuilder().writable(guest.base(), 4));
    ASSERT_EQ(queue.pop(chain), PopResult::kChain);
    queue.push(chain, 0);
    driver.take_used();
  };
  EXPECT_FALSE(queue.take_interrupt_wish());
  serve();
  EXPECT_TRUE(queue.take_interrupt_wish());
  EXPECT_FALSE(queue.take_interrupt_wish());  // nothing new
  driver.set_interrupts(false);
  serve();
  EXPECT_FALSE(queue.take_interrupt_wish());
  driver.set_interrupts(true);
  EXPECT_FALSE(queue.take_interrupt_wish());
  serve();
  EXPECT_TRUE(queue.take_interrupt_wish());
}

TEST(Queue, EventIndexDecidesAboutInterrupts) {
  FakeGuest guest;
  FakeQueue driver(guest, 4, true);
  Queue queue = start(driver, guest);
  DescriptorChain chain;
  const auto serve = [&](int count) {
    for (int i = 0; i < count; ++i) {
      driver.add(ChainBuilder().writable(guest.base(), 4));
      ASSERT_EQ(queue.pop(chain), PopResult::kChain);
      queue.push(chain, 0);
      driver.take_used();
    }
  };
  serve(1);
  EXPECT_TRUE(queue.take_interrupt_wish());  // index 0 passed
  driver.set_used_event(3);                  // wants one when element 3 is used
  serve(2);
  EXPECT_FALSE(queue.take_interrupt_wish());
  serve(1);
  EXPECT_TRUE(queue.take_interrupt_wish());
  serve(1);
  EXPECT_FALSE(queue.take_interrupt_wish());
  // A driver that asks for an event far away still hears after 2^16 buffers at the latest.
  driver.set_used_event(4);
  serve(70000);
  EXPECT_TRUE(queue.take_interrupt_wish());
}

TEST(Queue, NotificationsAreAskedForWithoutAndWithEventIndex) {
  for (const bool event_idx : {false, true}) {
    FakeGuest guest;
    FakeQueue driver(guest, 4, event_idx);
    Queue queue = start(driver, guest, event_idx ? kAll : kVirtioFeatureVersion1);
    DescriptorChain chain;
    driver.add(ChainBuilder().writable(guest.base(), 4));
    EXPECT_TRUE(driver.take_notify_wish());
    queue.disable_notifications();
    ASSERT_EQ(queue.pop(chain), PopResult::kChain);
    queue.push(chain, 0);
    driver.add(ChainBuilder().writable(guest.base(), 4));
    EXPECT_FALSE(driver.take_notify_wish());
    EXPECT_TRUE(queue.has_available());
    EXPECT_TRUE(queue.enable_notifications());  // one came in between
    ASSERT_EQ(queue.pop(chain), PopResult::kChain);
    queue.push(chain, 0);
    EXPECT_FALSE(queue.enable_notifications());
    EXPECT_FALSE(queue.has_available());
    driver.add(ChainBuilder().writable(guest.base(), 4));
    EXPECT_TRUE(driver.take_notify_wish());
  }
}

TEST(Queue, StagedChainsAppearTogether) {
  FakeGuest guest;
  FakeQueue driver(guest, 4);
  Queue queue = start(driver, guest);
  std::array<DescriptorChain, 2> chains;
  for (DescriptorChain& chain : chains) {
    driver.add(ChainBuilder().writable(guest.base(), 4));
    ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  }
  queue.stage(chains[0], 4);
  queue.stage(chains[1], 3);
  EXPECT_EQ(driver.used_index(), 0);
  queue.publish();
  EXPECT_EQ(driver.used_index(), 2);
  EXPECT_EQ(driver.take_used()->written, 4U);
  EXPECT_EQ(driver.take_used()->written, 3U);
  EXPECT_TRUE(queue.take_interrupt_wish());
}

TEST(Queue, ADeviceThatTookTooFewChainsBackIsToldOfTheNextOne) {
  for (const bool event_idx : {false, true}) {
    FakeGuest guest;
    FakeQueue driver(guest, 4, event_idx);
    Queue queue = start(driver, guest, event_idx ? kAll : kVirtioFeatureVersion1);
    DescriptorChain first;
    DescriptorChain second;
    driver.add(ChainBuilder().writable(guest.base(), 4));
    EXPECT_TRUE(driver.take_notify_wish());
    queue.disable_notifications();
    ASSERT_EQ(queue.pop(first), PopResult::kChain);
    ASSERT_EQ(queue.pop(second), PopResult::kEmpty);
    queue.undo_pop(first);
    EXPECT_FALSE(queue.enable_notifications_of_more());
    driver.add(ChainBuilder().writable(guest.base(), 4));
    EXPECT_TRUE(driver.take_notify_wish());
    // Too few still, and one more comes before the device asks again.
    ASSERT_EQ(queue.pop(first), PopResult::kChain);
    ASSERT_EQ(queue.pop(second), PopResult::kChain);
    queue.undo_pop(second);
    queue.undo_pop(first);
    driver.add(ChainBuilder().writable(guest.base(), 4));
    EXPECT_TRUE(queue.enable_notifications_of_more());
  }
}

TEST(Queue, SavedIndicesContinue) {
  FakeGuest guest;
  FakeQueue driver(guest, 4);
  Queue queue = start(driver, guest);
  DescriptorChain chain;
  for (int i = 0; i < 3; ++i) {
    driver.add(ChainBuilder().writable(guest.base(), 4));
  }
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  queue.push(chain, 0);
  StateWriter writer;
  queue.save(writer);

  Queue restored = start(driver, guest);
  StateReader reader(writer.bytes());
  ASSERT_TRUE(restored.load(reader).has_value());
  EXPECT_EQ(restored.next_available(), 1U);
  ASSERT_EQ(restored.pop(chain), PopResult::kChain);
  restored.push(chain, 0);
  EXPECT_TRUE(restored.take_interrupt_wish());
  ASSERT_EQ(restored.pop(chain), PopResult::kChain);
  EXPECT_EQ(restored.pop(chain), PopResult::kEmpty);
  EXPECT_EQ(driver.used_index(), 2U);

  Queue cut = start(driver, guest);
  StateReader short_reader(std::span(writer.bytes()).first(3));
  EXPECT_FALSE(cut.load(short_reader).has_value());
}

TEST(Queue, MarksDirtyExactlyWhatWasWritten) {
  FakeGuest guest;
  FakeQueue driver(guest, 4);
  Queue queue = start(driver, guest);
  const Gpa data = guest.allocate(4 * kPageSize, kPageSize);
  driver.add(ChainBuilder().writable(data, 4 * kPageSize));
  static_cast<void>(guest.take_dirty_pages());
  DescriptorChain chain;
  ASSERT_EQ(queue.pop(chain), PopResult::kChain);
  chain.write(3 * kPageSize, std::vector<std::uint8_t>{1});  // a status byte behind untouched data
  queue.push(chain, kPageSize);
  const std::vector<bool> dirty = guest.take_dirty_pages();
  const auto page = [&](Gpa gpa) { return dirty.at((gpa - guest.base()) / kPageSize); };
  EXPECT_TRUE(page(data));
  EXPECT_FALSE(page(data + kPageSize));
  EXPECT_FALSE(page(data + 2 * kPageSize));
  EXPECT_TRUE(page(data + 3 * kPageSize));
  EXPECT_TRUE(page(driver.used_ring()));
}

// Driver and device on two threads, each sleeping only when the other promised to wake it: a lost wake-up
// hangs.
TEST(Queue, NoWakeUpIsLostBetweenThreads) {
  constexpr int kRequests = 20000;
  FakeGuest guest;
  FakeQueue driver(guest, 16, true);
  Queue queue = start(driver, guest);
  std::atomic<int> kicked = 0;
  std::atomic<int> interrupted = 0;
  std::thread device([&] {
    DescriptorChain chain;
    for (int done = 0; done < kRequests;) {
      if (queue.pop(chain) == PopResult::kChain) {
        queue.push(chain, 0);
        ++done;
        if (queue.take_interrupt_wish()) {
          interrupted.store(1);
          interrupted.notify_one();
        }
        continue;
      }
      ASSERT_FALSE(queue.broken());
      if (!queue.enable_notifications()) {
        kicked.wait(0);
        kicked.store(0);
      }
    }
  });
  int sent = 0;
  int received = 0;
  while (received < kRequests) {
    while (sent < kRequests && sent - received < 16) {
      driver.add(ChainBuilder().writable(guest.base(), 4));
      ++sent;
      if (driver.take_notify_wish()) {
        kicked.store(1);
        kicked.notify_one();
      }
    }
    while (driver.take_used()) {
      ++received;
    }
    driver.set_interrupts(true);
    if (received < sent && driver.used_index() == static_cast<std::uint16_t>(received)) {
      interrupted.wait(0);
      interrupted.store(0);
    }
  }
  device.join();
  EXPECT_EQ(received, kRequests);
}

}  // namespace
}  // namespace wisp
