#include "virtio/net.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <chrono>
#include <thread>

#include "base/bytes.h"
#include "net/stream_net_backend.h"
#include "virtio/net_kit.h"

namespace wisp::test {
namespace {

using ::testing::HasSubstr;

constexpr std::uint64_t kFeatureCsum = 1ULL << 0;
constexpr std::uint64_t kFeatureGuestCsum = 1ULL << 1;
constexpr std::uint64_t kFeatureGuestTso4 = 1ULL << 7;
constexpr std::uint64_t kFeatureHostTso4 = 1ULL << 11;
constexpr std::uint64_t kFeatureHostUfo = 1ULL << 14;
constexpr std::uint64_t kFeatureCtrlVq = 1ULL << 17;
constexpr std::uint64_t kFeatureMq = 1ULL << 22;

// A kit whose fake back end stays reachable.
struct Net {
  explicit Net(bool vnet_header = true, std::uint16_t pairs = 1, VirtioNetOptions options = {},
               FakeGuest* guest = nullptr) {
    auto owned = std::make_unique<FakeNetBackend>(vnet_header, pairs);
    backend = owned.get();
    kit = std::make_unique<NetKit>(std::move(owned), std::move(options), guest);
  }
  DeviceHarness& harness() { return kit->harness; }
  FakeGuest& guest() { return kit->harness.guest(); }

  // Submits header and frame as the pieces of sizes given (the last takes the rest).
  std::uint16_t transmit(const Bytes& bytes, const std::vector<std::size_t>& pieces = {},
                         std::uint16_t queue = 1) {
    ChainBuilder chain;
    const Gpa at = guest().allocate(bytes);
    std::size_t done = 0;
    for (const std::size_t piece : pieces) {
      chain.readable(at + done, static_cast<std::uint32_t>(piece));
      done += piece;
    }
    if (done < bytes.size() || pieces.empty()) {
      chain.readable(at + done, static_cast<std::uint32_t>(bytes.size() - done));
    }
    return harness().submit(queue, chain);
  }
  // Gives a receive buffer to the device.
  Gpa offer(std::uint32_t size, std::uint16_t queue = 0) {
    const Gpa at = guest().allocate(size);
    buffers[harness().queue(queue).add(ChainBuilder().writable(at, size))] = at;
    return at;
  }
  void kick(std::uint16_t queue) {
    if (harness().queue(queue).take_notify_wish()) {
      harness().notify(queue);
    }
  }
  // Takes one received frame, over as many buffers as its header says; empty where none came.
  Bytes take_frame(std::uint16_t queue = 0) {
    Bytes frame;
    std::uint16_t count = 1;
    for (std::uint16_t i = 0; i < count; ++i) {
      const auto used = harness().queue(queue).take_used();
      if (!used) {
        EXPECT_EQ(i, 0) << "the header promised " << count << " buffers";
        return {};
      }
      const Bytes part = guest().read(buffers.at(static_cast<std::uint16_t>(used->head)), used->written);
      frame.insert(frame.end(), part.begin(), part.end());
      if (i == 0 && frame.size() >= kVnetHeaderSize) {
        count = load_le<std::uint16_t>(&frame[10]);
      }
    }
    return frame;
  }

  FakeNetBackend* backend = nullptr;
  std::unique_ptr<NetKit> kit;
  std::map<std::uint16_t, Gpa> buffers;
};

// Whether the loop sleeps: a device that spins makes it come back at once, again and again.
bool is_idle(EventLoop& loop) {
  int wakes = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(60);
  while (std::chrono::steady_clock::now() < end) {
    loop.run_once(20);
    ++wakes;
  }
  return wakes <= 8;
}

// --- options, features, configuration ---

TEST(VirtioNetOptions, AddressesAreChecked) {
  EXPECT_EQ(parse_mac("52:54:00:12:34:fe").value(), (MacAddress{0x52, 0x54, 0, 0x12, 0x34, 0xfe}));
  for (const char* text :
       {"", "52", "52:54:00:12:34", "52:54:00:12:34:5", "52:54:00:12:34:56:78", "52-54-00-12-34-56",
        "5g:54:00:12:34:56", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00",
        "52:54:00:12:34:567", "+2:54:00:12:34:56", "52:54:00:12:34:-6"}) {
    EXPECT_FALSE(parse_mac(text).has_value()) << text;
  }
}

TEST(VirtioNetOptions, ComeFromProperties) {
  PropertySet set;
  EXPECT_EQ(parse_virtio_net_options("n", set).value().queue_size, 256);
  set.set("queue-size", std::uint64_t{512});
  set.set("mac", std::string("52:54:00:00:00:01"));
  set.set("mq", false);
  const auto options = parse_virtio_net_options("n", set).value();
  EXPECT_EQ(options.queue_size, 512);
  EXPECT_FALSE(options.mq);
  set.set("queue-size", std::uint64_t{500});
  EXPECT_THAT(parse_virtio_net_options("n", set).error().message, HasSubstr("power of two"));
}

TEST(VirtioNet, OffersWhatTheBackEndCanDo) {
  Net with_header_net(true, 4);
  const std::uint64_t features = with_header_net.harness().device().features();
  for (const int bit : {0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 22, 23}) {
    EXPECT_NE(features & (1ULL << bit), 0U) << bit;
  }
  EXPECT_EQ(features & (1ULL << 3), 0U) << "no MTU unless one is set";
  EXPECT_EQ(with_header_net.harness().device().queue_sizes().size(), 9U);

  Net plain(false);
  const std::uint64_t plain_features = plain.harness().device().features();
  for (const int bit : {0, 1, 2, 7, 8, 9, 10, 11, 12, 13, 14, 22}) {
    EXPECT_EQ(plain_features & (1ULL << bit), 0U) << bit;
  }
  EXPECT_EQ(plain.harness().device().queue_sizes().size(), 3U);

  Net single(true, 4, {.mq = false});
  EXPECT_EQ(single.harness().device().features() & kFeatureMq, 0U);
  EXPECT_EQ(single.harness().device().queue_sizes().size(), 3U);
}

TEST(VirtioNet, ConfigurationSpace) {
  Net net(true, 4, {.id = "n", .mac = MacAddress{2, 1, 2, 3, 4, 5}, .host_mtu = 9000});
  EXPECT_EQ(net.harness().read_config<std::uint32_t>(0), 0x03020102U);
  EXPECT_EQ(net.harness().read_config<std::uint16_t>(4), 0x0504U);
  EXPECT_EQ(net.harness().read_config<std::uint16_t>(6), 1) << "link up";
  EXPECT_EQ(net.harness().read_config<std::uint16_t>(8), 4);
  EXPECT_EQ(net.harness().read_config<std::uint16_t>(10), 9000);
  EXPECT_EQ(net.harness().read_config<std::uint64_t>(11), 0x23U) << "the end reads as zero";
  EXPECT_EQ(net.harness().read_config<std::uint64_t>(UINT64_MAX - 2), 0U);
  net.harness().write_config<std::uint64_t>(0, 0);
  net.harness().write_config<std::uint64_t>(UINT64_MAX, 0);
  EXPECT_EQ(net.harness().read_config<std::uint8_t>(0), 2);
  Net random_mac;
  EXPECT_EQ(random_mac.kit->device().mac(), (MacAddress{0x52, 0x54, 0, 0xab, 0xab, 0xab}));
}

// --- transmitting ---

TEST(VirtioNetTx, FramesReachTheBackEndWhole) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  const Bytes frame = make_frame(1514, 1);
  for (const std::vector<std::size_t>& pieces :
       std::vector<std::vector<std::size_t>>{{}, {12}, {1, 11}, {5, 20, 100}, {12, 1, 1, 1}, {13}, {1525}}) {
    net.transmit(with_header(frame), pieces);
    const auto used = net.harness().wait_used(1);
    ASSERT_TRUE(used.has_value());
    EXPECT_EQ(used->written, 0U);
    ASSERT_EQ(net.backend->sent.size(), 1U);
    EXPECT_EQ(net.backend->sent[0].bytes, with_header(frame));
    net.backend->sent.clear();
  }
  EXPECT_EQ(net.harness().interrupts().used(1), 7U);
  EXPECT_EQ(net.kit->device().counters().tx_frames, 7U);
  EXPECT_EQ(net.kit->device().counters().tx_bytes, 7U * 1514);
}

TEST(VirtioNetTx, WithoutHeadersTheHeaderIsStripped) {
  Net net(false);
  ASSERT_TRUE(net.harness().activate().has_value());
  const Bytes frame = make_frame(60, 3);
  net.transmit(with_header(frame), {12, 30});
  ASSERT_TRUE(net.harness().wait_used(1).has_value());
  ASSERT_EQ(net.backend->sent.size(), 1U);
  EXPECT_EQ(net.backend->sent[0].bytes, frame);
}

TEST(VirtioNetTx, LengthsAreBounded) {
  FakeGuest guest({{FakeGuest::kBase, 32ULL << 20}});
  Net net(true, 1, {}, &guest);
  ASSERT_TRUE(net.harness().activate().has_value());
  for (const std::size_t size :
       {std::size_t{1}, std::size_t{11}, std::size_t{12}, kVnetHeaderSize + kMinFrameSize - 1,
        kVnetHeaderSize + kMaxFrameSize + 1, std::size_t{1} << 20}) {
    net.transmit(Bytes(size));
    ASSERT_TRUE(net.harness().wait_used(1).has_value()) << size;
  }
  EXPECT_TRUE(net.backend->sent.empty());
  EXPECT_EQ(net.kit->device().counters().tx_dropped, 6U);
  net.transmit(with_header(make_frame(kMinFrameSize, 1)));
  net.transmit(with_header(make_frame(kMaxFrameSize, 1)));
  net.harness().pump();
  ASSERT_EQ(net.backend->sent.size(), 2U);
  EXPECT_EQ(net.backend->sent[1].bytes, with_header(make_frame(kMaxFrameSize, 1)));
  // One buffer of 4 GiB - 1 that is not RAM breaks the queue; nothing is copied.
  EXPECT_FALSE(net.harness().interrupts().broken());
}

TEST(VirtioNetTx, AFrameOfAThousandPiecesIsPutTogether) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  const Bytes bytes = with_header(make_frame(1024, 9));
  const Gpa at = net.guest().allocate(bytes);
  ChainBuilder chain;
  chain.indirect();
  chain.readable(at, 12);
  for (std::uint32_t i = 0; i < 1022; ++i) {
    chain.readable(at + 12 + i, 1);
  }
  chain.readable(at + 12 + 1022, 2);
  net.harness().submit(1, chain);
  ASSERT_TRUE(net.harness().wait_used(1).has_value());
  ASSERT_EQ(net.backend->sent.size(), 1U);
  EXPECT_EQ(net.backend->sent[0].bytes, bytes);
  EXPECT_LE(net.backend->sent[0].pieces, kMaxFrameIovecs);
}

TEST(VirtioNetTx, HeadersUseOnlyWhatWasNegotiated) {
  const auto sent_with = [](std::uint64_t features, VirtioNetHeader header) {
    Net net;
    EXPECT_TRUE(net.harness().activate({.features = features}).has_value());
    net.transmit(with_header(make_frame(100, 1), header));
    EXPECT_TRUE(net.harness().wait_used(1).has_value());
    return net.backend->sent.size() == 1;
  };
  const VirtioNetHeader checksum{.flags = 1, .checksum_start = 34, .checksum_offset = 16};
  EXPECT_TRUE(sent_with(kFeatureCsum, checksum));
  EXPECT_FALSE(sent_with(0, checksum));
  const VirtioNetHeader tso{.flags = 1, .gso_type = kNetGsoTcp4, .header_length = 54, .gso_size = 1448};
  EXPECT_TRUE(sent_with(kFeatureCsum | kFeatureHostTso4, tso));
  EXPECT_FALSE(sent_with(kFeatureCsum, tso));
  EXPECT_FALSE(sent_with(kFeatureHostTso4, tso)) << "segmentation without checksums";
  EXPECT_FALSE(
      sent_with(kFeatureCsum | kFeatureHostTso4, {.flags = 1, .gso_type = kNetGsoTcp4 | kNetGsoEcn}));
  EXPECT_FALSE(sent_with(kFeatureCsum | kFeatureHostTso4, {.flags = 1, .gso_type = kNetGsoTcp6}));
  EXPECT_TRUE(sent_with(kFeatureCsum | kFeatureHostUfo, {.flags = 1, .gso_type = kNetGsoUdp}));
  EXPECT_FALSE(sent_with(~0ULL, {.gso_type = 0x55}));
}

TEST(VirtioNetTx, AGuestThatSendsForEverLeavesTurnsToOthers) {
  Net net;
  ASSERT_TRUE(net.harness().activate({.queue_size = 256}).has_value());
  const Gpa at = net.guest().allocate(with_header(make_frame(60, 1)));
  for (int i = 0; i < 256; ++i) {
    net.harness().queue(1).add(ChainBuilder().readable(at, 72));
  }
  net.harness().notify(1);
  EXPECT_LT(net.backend->sent.size(), 256U) << "one call is bounded";
  EXPECT_TRUE(net.harness().pump_until([&] { return net.backend->sent.size() == 256; }));
}

// --- receiving ---

TEST(VirtioNetRx, OneFrameOneBuffer) {
  for (const bool header : {true, false}) {
    Net net(header);
    ASSERT_TRUE(net.harness().activate({.features = 0}).has_value());
    for (int i = 0; i < 4; ++i) {
      net.offer(1600);
    }
    net.kick(0);
    const Bytes frame = make_frame(1514, 7);
    net.backend->inject(header ? with_header(frame) : frame);
    net.harness().pump();
    Bytes got = net.take_frame();
    ASSERT_EQ(got.size(), 12U + 1514);
    EXPECT_EQ(load_le<std::uint16_t>(&got[10]), 1) << "buffer count is 1 without merging, too";
    store_le(&got[10], std::uint16_t{0});
    EXPECT_EQ(got, with_header(frame));
    EXPECT_EQ(net.harness().interrupts().used(0), 1U);
    EXPECT_TRUE(net.take_frame().empty());
  }
}

TEST(VirtioNetRx, LongFramesSpreadOverMergedBuffers) {
  for (const bool header : {true, false}) {
    FakeGuest guest({{FakeGuest::kBase, 16ULL << 20}});
    Net net(header, 1, {}, &guest);
    ASSERT_TRUE(net.harness().activate({.queue_size = 256}).has_value());
    for (int i = 0; i < 250; ++i) {
      net.offer(1526);
    }
    net.kick(0);
    // The second long frame goes straight to the buffers, the first is copied in part.
    for (const std::size_t size : {kMaxFrameSize, kMaxFrameSize, std::size_t{60}, std::size_t{3000}}) {
      const Bytes frame = make_frame(size, 1);
      net.backend->inject(header ? with_header(frame) : frame);
      net.harness().pump();
      Bytes got = net.take_frame();
      ASSERT_EQ(got.size(), size + 12);
      store_le(&got[10], std::uint16_t{0});
      EXPECT_TRUE(got == with_header(frame));
    }
    EXPECT_EQ(net.kit->device().counters().rx_frames, 4U);
  }
}

TEST(VirtioNetRx, EveryFrameSizeAndBufferSizeComesWhole) {
  for (const bool header : {true, false}) {
    for (const std::uint32_t buffer : {12U, 13U, 64U, 333U}) {
      FakeGuest guest({{FakeGuest::kBase, 16ULL << 20}});
      Net net(header, 1, {.queue_size = 1024}, &guest);
      ASSERT_TRUE(net.harness().activate({.queue_size = 1024}).has_value());
      for (int i = 0; i < 1000; ++i) {
        net.offer(buffer);
      }
      net.kick(0);
      for (std::size_t size = 14; size < 400; size += 23) {
        const Bytes frame = make_frame(size, static_cast<std::uint8_t>(size));
        net.backend->inject(header ? with_header(frame) : frame);
        net.harness().pump();
        Bytes got = net.take_frame();
        ASSERT_EQ(got.size(), size + 12) << buffer;
        store_le(&got[10], std::uint16_t{0});
        ASSERT_EQ(got, with_header(frame)) << buffer;
      }
    }
  }
}

TEST(VirtioNetRx, FramesThatDoNotFitOrAreNoneAreDropped) {
  Net net;
  ASSERT_TRUE(net.harness().activate({.features = 0}).has_value());
  net.offer(200);
  net.kick(0);
  net.backend->inject(with_header(make_frame(189, 1)));  // one too long
  net.backend->inject(Bytes(5));
  net.backend->inject(with_header(make_frame(13, 1)));
  net.harness().pump();
  EXPECT_EQ(net.harness().queue(0).used_index(), 0);
  EXPECT_EQ(net.kit->device().counters().rx_dropped, 3U);
  net.backend->inject(with_header(make_frame(188, 1)));
  net.harness().pump();
  EXPECT_EQ(net.take_frame().size(), 200U);
}

TEST(VirtioNetRx, WithoutBuffersFramesWaitOutsideAndNothingSpins) {
  for (const bool event_idx : {false, true}) {
    Net net;
    ASSERT_TRUE(net.harness().activate({.event_idx = event_idx}).has_value());
    for (int i = 0; i < 5; ++i) {
      net.backend->inject(with_header(make_frame(60, static_cast<std::uint8_t>(i))));
    }
    net.harness().pump();
    EXPECT_TRUE(is_idle(net.harness().loop()));
    EXPECT_EQ(net.backend->waiting(), 5U);
    EXPECT_EQ(net.backend->receive_calls, 0);
    for (int i = 0; i < 3; ++i) {
      net.offer(100);
    }
    net.kick(0);
    net.harness().pump();
    EXPECT_EQ(net.backend->waiting(), 2U);
    EXPECT_TRUE(is_idle(net.harness().loop()));
    net.offer(100);
    net.offer(100);
    net.kick(0);
    net.harness().pump();
    for (std::uint8_t i = 0; i < 5; ++i) {
      const Bytes got = net.take_frame();
      ASSERT_EQ(got.size(), 72U);
      EXPECT_EQ(got[12], i) << "in order";
    }
  }
}

TEST(VirtioNetRx, ALongFrameWaitsForEnoughBuffers) {
  for (const bool header : {true, false}) {
    Net net(header);
    ASSERT_TRUE(net.harness().activate({.queue_size = 16}).has_value());
    net.offer(1000);
    net.offer(1000);
    net.kick(0);
    const Bytes frame = make_frame(5000, 4);
    net.backend->inject(header ? with_header(frame) : frame);
    net.harness().pump();
    EXPECT_EQ(net.harness().queue(0).used_index(), 0);
    EXPECT_TRUE(is_idle(net.harness().loop()));
    // The guest scribbles over buffers it gave away: its own loss, nothing else.
    for (int i = 0; i < 5; ++i) {
      net.offer(1000);
    }
    net.kick(0);
    net.harness().pump();
    Bytes got = net.take_frame();
    ASSERT_EQ(got.size(), 5012U);
    store_le(&got[10], std::uint16_t{0});
    EXPECT_EQ(got, with_header(frame));
  }
}

TEST(VirtioNetRx, ALongFrameIsDeliveredAsSoonAsTheDriverAddedWhatItLacks) {
  for (const bool event_idx : {false, true}) {
    Net net;
    ASSERT_TRUE(net.harness().activate({.event_idx = event_idx, .queue_size = 16}).has_value());
    FakeQueue& rx = net.harness().queue(0);
    const auto offer = [&] {
      net.offer(1000);
      net.kick(0);
      net.harness().pump();
    };
    offer();
    offer();
    net.backend->inject(with_header(make_frame(5000, 4)));
    net.harness().pump();
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(rx.used_index(), 0);
      offer();
    }
    EXPECT_EQ(net.take_frame().size(), 5012U);
    EXPECT_EQ(net.kit->device().counters().rx_dropped, 0U);
  }
}

TEST(VirtioNetRx, ALongFrameDoesNotBlockARingThatIsTooSmallForIt) {
  Net net;
  ASSERT_TRUE(net.harness().activate({.queue_size = 16}).has_value());
  for (int i = 0; i < 16; ++i) {
    net.offer(100);
  }
  net.kick(0);
  net.backend->inject(with_header(make_frame(5000, 1)));
  net.backend->inject(with_header(make_frame(60, 2)));
  net.harness().pump();
  EXPECT_EQ(net.take_frame().size(), 72U);
  EXPECT_EQ(net.kit->device().counters().rx_dropped, 1U);
}

TEST(VirtioNetRx, ALongFrameIsGivenUpWhenTheDriverNeverAddsBuffers) {
  Net net;
  ASSERT_TRUE(net.harness().activate({.queue_size = 16}).has_value());
  net.offer(100);
  net.kick(0);
  net.backend->inject(with_header(make_frame(5000, 1)));
  net.backend->inject(with_header(make_frame(60, 2)));
  EXPECT_TRUE(net.harness().pump_until([&] { return net.harness().queue(0).used_index() == 1; }));
  EXPECT_EQ(net.take_frame()[12], 2);
}

TEST(VirtioNetRx, BuffersTooSmallForAHeaderGoBackEmpty) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  net.offer(100);
  for (int i = 0; i < 5; ++i) {
    net.offer(static_cast<std::uint32_t>(2 * i + 1));
  }
  net.harness().queue(0).add(ChainBuilder().readable(net.guest().allocate(64), 64));
  net.offer(100);
  net.kick(0);
  net.backend->inject(with_header(make_frame(60, 1)));
  net.backend->inject(with_header(make_frame(60, 2)));
  net.harness().pump();
  EXPECT_EQ(net.take_frame().size(), 72U);
  for (int i = 0; i < 6; ++i) {
    const auto used = net.harness().queue(0).take_used();
    ASSERT_TRUE(used.has_value());
    EXPECT_EQ(used->written, 0U);
  }
  EXPECT_EQ(net.take_frame()[12], 2);
}

TEST(VirtioNetRx, DirtyPagesAreMarked) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  (void)net.guest().allocate(1, 4096);
  const Gpa at = net.guest().allocate(4096, 4096);
  net.harness().queue(0).add(ChainBuilder().writable(at, 4096));
  net.kick(0);
  (void)net.guest().take_dirty_pages();
  net.backend->inject(with_header(make_frame(60, 1)));
  net.harness().pump();
  EXPECT_TRUE(net.guest().take_dirty_pages()[(at - net.guest().base()) / 4096]);
}

// --- control queue ---

struct Control : Net {
  explicit Control(std::uint16_t pairs = 4, std::uint64_t features = ~0ULL)
      : Net(true, pairs),
        index((features & kFeatureMq) != 0 && pairs > 1 ? static_cast<std::uint16_t>(2 * pairs)
                                                        : std::uint16_t{2}) {
    EXPECT_TRUE(harness().activate({.features = features}).has_value());
  }
  // The status byte, or -1 where none was written.
  int run(const Bytes& command) {
    const Gpa at = guest().allocate(command.empty() ? Bytes(1) : command);
    const Gpa status = guest().allocate(Bytes{0x77});
    ChainBuilder chain;
    if (!command.empty()) {
      // Split after the class: the parts may come in any pieces.
      chain.readable(at, 1);
      if (command.size() > 1) {
        chain.readable(at + 1, static_cast<std::uint32_t>(command.size() - 1));
      }
    }
    chain.writable(status, 1);
    harness().submit(index, chain);
    const auto used = harness().wait_used(index);
    EXPECT_TRUE(used && used->written == 1);
    return guest().read(status, 1)[0];
  }
  const std::uint16_t index;
};

TEST(VirtioNetControl, SetsTheAddress) {
  Control net;
  EXPECT_EQ(net.run({1, 1, 2, 3, 4, 5, 6, 7}), 0);
  EXPECT_EQ(net.harness().read_config<std::uint32_t>(0), 0x05040302U);
  EXPECT_EQ(net.run({1, 1, 3, 3, 4, 5, 6, 7}), 1) << "a group address";
  EXPECT_EQ(net.run({1, 1, 2, 3, 4}), 1);
  net.harness().reset();
  EXPECT_EQ(net.kit->device().mac(), (MacAddress{0x52, 0x54, 0, 0xab, 0xab, 0xab})) << "back at a reset";
}

TEST(VirtioNetControl, TakesFiltersAndChecksTheirLengths) {
  Control net;
  EXPECT_EQ(net.run({0, 0, 1}), 0);
  EXPECT_EQ(net.run({0, 1, 1}), 0);
  EXPECT_EQ(net.run({0, 2, 1}), 1) << "needs CTRL_RX_EXTRA";
  EXPECT_EQ(net.run({0, 0}), 1);
  EXPECT_EQ(net.run({1, 0, 0, 0, 0, 0, 0, 0, 0, 0}), 0);
  EXPECT_EQ(net.run({1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0}), 0);
  EXPECT_EQ(net.run({1, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0}), 1);
  EXPECT_EQ(net.run({1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}), 1);
  EXPECT_EQ(net.run({1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}), 1);
  EXPECT_EQ(net.run({1, 0, 0, 0}), 1);
}

TEST(VirtioNetControl, ChoosesQueuePairs) {
  Control net;
  EXPECT_EQ(net.backend->active_pairs, 1);
  EXPECT_EQ(net.run({4, 0, 3, 0}), 0);
  EXPECT_EQ(net.backend->active_pairs, 3);
  for (const std::uint8_t bad : std::array<std::uint8_t, 3>{0, 5, 255}) {
    EXPECT_EQ(net.run({4, 0, bad, 0}), 1);
  }
  EXPECT_EQ(net.run({4, 0, 1}), 1);
  EXPECT_EQ(net.run({4, 1, 1, 0}), 1);
  EXPECT_EQ(net.backend->active_pairs, 3);
  // Frames of the third pair come, those of the fourth wait.
  net.offer(100, 4);
  net.offer(100, 6);
  net.kick(4);
  net.kick(6);
  net.backend->inject(with_header(make_frame(60, 1)), 2);
  net.backend->inject(with_header(make_frame(60, 1)), 3);
  net.harness().pump();
  EXPECT_EQ(net.harness().queue(4).used_index(), 1);
  EXPECT_EQ(net.harness().queue(6).used_index(), 0);
  EXPECT_TRUE(is_idle(net.harness().loop()));
  EXPECT_EQ(net.run({4, 0, 4, 0}), 0);
  net.harness().pump();
  EXPECT_EQ(net.harness().queue(6).used_index(), 1);
}

TEST(VirtioNetControl, IsQueueTwoWithoutMultiQueue) {
  Control net(4, ~0ULL & ~kFeatureMq);
  EXPECT_EQ(net.index, 2);
  EXPECT_EQ(net.run({0, 0, 1}), 0);
  EXPECT_EQ(net.run({4, 0, 2, 0}), 1);
  EXPECT_EQ(net.backend->active_pairs, 1);
}

TEST(VirtioNetControl, SwitchesGuestOffloads) {
  Control net(1, kFeatureCtrlVq | kFeatureGuestCsum | kFeatureGuestTso4 | (1ULL << 2));
  EXPECT_EQ(net.backend->guest_offloads, (NetOffloads{.checksum = true, .tso4 = true}));
  EXPECT_EQ(net.run({5, 0, 2, 0, 0, 0, 0, 0, 0, 0}), 0);
  EXPECT_EQ(net.backend->guest_offloads, NetOffloads{.checksum = true});
  EXPECT_EQ(net.run({5, 0, 0, 1, 0, 0, 0, 0, 0, 0}), 1) << "TSO6 was not negotiated";
  EXPECT_EQ(net.run({5, 0, 2, 0, 0, 0, 0, 0, 0, 0x80}), 1);
  EXPECT_EQ(net.run({5, 0, 2}), 1);
  EXPECT_EQ(net.backend->guest_offloads, NetOffloads{.checksum = true});
}

TEST(VirtioNetControl, RefusesWhatItDoesNotKnow) {
  Control net;
  for (int klass = 0; klass < 256; ++klass) {
    EXPECT_EQ(net.run({static_cast<std::uint8_t>(klass), 0xee, 0, 0, 0, 0, 0, 0, 0, 0, 0}), 1);
  }
  EXPECT_EQ(net.run({0}), 1);
  EXPECT_EQ(net.run({}), 1);
  // No room for the status.
  net.harness().submit(net.index, ChainBuilder().readable(net.guest().allocate(Bytes{0, 0, 1}), 3));
  const auto used = net.harness().wait_used(net.index);
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->written, 0U);
}

// --- life cycle ---

TEST(VirtioNet, ABrokenQueueAsksForAReset) {
  for (const std::uint16_t queue : std::array<std::uint16_t, 3>{0, 1, 2}) {
    Net net;
    ASSERT_TRUE(net.harness().activate().has_value());
    net.harness().queue(queue).set_available_index(1000);
    net.harness().notify(queue);
    net.backend->inject(with_header(make_frame(60, 1)));
    net.harness().pump();
    EXPECT_TRUE(net.harness().interrupts().broken()) << queue;
    EXPECT_TRUE(is_idle(net.harness().loop()));
    net.harness().reset();
    ASSERT_TRUE(net.harness().activate().has_value());
    net.offer(100);
    net.kick(0);
    net.harness().pump();
    EXPECT_EQ(net.take_frame().size(), 72U) << "works again after the reset";
  }
}

TEST(VirtioNet, DriversMayLeaveQueuesOut) {
  Net net;
  ASSERT_TRUE(net.harness().activate({.unset = {0, 2}}).has_value());
  net.harness().notify(0);
  net.harness().notify(2);
  net.transmit(with_header(make_frame(60, 1)));
  net.backend->inject(with_header(make_frame(60, 1)));
  net.harness().pump();
  EXPECT_EQ(net.backend->sent.size(), 1U);
  EXPECT_TRUE(is_idle(net.harness().loop()));
  net.harness().reset();
  ASSERT_TRUE(net.harness().activate({.unset = {0, 1, 2}}).has_value());
  for (const std::uint16_t queue : std::array<std::uint16_t, 3>{0, 1, 2}) {
    net.harness().notify(queue);
  }
}

TEST(VirtioNet, NothingComesAfterAReset) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  net.offer(100);
  net.kick(0);
  net.backend->inject(with_header(make_frame(5000, 1)));
  net.harness().pump();
  net.harness().reset();
  (void)net.guest().take_dirty_pages();
  net.backend->inject(with_header(make_frame(60, 1)));
  net.harness().pump();
  EXPECT_TRUE(is_idle(net.harness().loop()));
  for (const bool page : net.guest().take_dirty_pages()) {
    EXPECT_FALSE(page);
  }
}

TEST(VirtioNet, ADeadBackEndIsALinkDown) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  net.offer(100);
  net.kick(0);
  net.backend->close();
  net.harness().pump();
  EXPECT_EQ(net.harness().read_config<std::uint16_t>(6), 0);
  EXPECT_EQ(net.harness().interrupts().config(), 1U);
  EXPECT_TRUE(is_idle(net.harness().loop()));
  net.transmit(with_header(make_frame(60, 1)));
  EXPECT_TRUE(net.harness().wait_used(1).has_value()) << "the driver gets its buffers back";
  net.harness().reset();
  ASSERT_TRUE(net.harness().activate().has_value());
  EXPECT_TRUE(is_idle(net.harness().loop()));
}

TEST(VirtioNet, TheLinkCanBePulled) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  net.offer(100);
  net.kick(0);
  const auto set_link = [&](bool up) {
    const std::lock_guard lock(net.harness().device().strand().mutex());
    net.kit->device().set_link(up);
  };
  set_link(false);
  EXPECT_EQ(net.harness().read_config<std::uint16_t>(6), 0);
  net.backend->inject(with_header(make_frame(60, 1)));
  net.transmit(with_header(make_frame(60, 1)));
  net.harness().pump();
  EXPECT_TRUE(net.backend->sent.empty());
  EXPECT_EQ(net.harness().queue(0).used_index(), 0);
  EXPECT_TRUE(is_idle(net.harness().loop()));
  set_link(true);
  net.harness().pump();
  EXPECT_EQ(net.harness().queue(0).used_index(), 1);
  EXPECT_EQ(net.harness().interrupts().config(), 2U);
}

TEST(VirtioNet, APauseHoldsEverything) {
  Net net;
  ASSERT_TRUE(net.harness().activate().has_value());
  net.offer(100);
  net.kick(0);
  net.harness().pump();
  net.harness().pause();
  EXPECT_EQ(net.harness().device().queue(0)->in_flight(), 0U);
  net.backend->inject(with_header(make_frame(60, 1)));
  net.transmit(with_header(make_frame(60, 1)));
  net.harness().pump();
  EXPECT_EQ(net.harness().queue(0).used_index(), 0);
  EXPECT_TRUE(net.backend->sent.empty());
  EXPECT_TRUE(is_idle(net.harness().loop()));
  net.harness().resume();
  net.harness().pump();
  EXPECT_EQ(net.harness().queue(0).used_index(), 1);
  EXPECT_EQ(net.backend->sent.size(), 1U);
}

TEST(VirtioNet, StateIsKeptAndHostileStateRefused) {
  Control net;
  ASSERT_EQ(net.run({4, 0, 3, 0}), 0);
  ASSERT_EQ(net.run({1, 1, 2, 3, 4, 5, 6, 7}), 0);
  ASSERT_EQ(net.run({5, 0, 2, 0, 0, 0, 0, 0, 0, 0}), 0);
  net.harness().pause();
  const StateRecord record = net.harness().device().save();

  Net other(true, 4);
  ASSERT_TRUE(other.harness().device().load(record).has_value());
  ASSERT_TRUE(other.harness().activate().has_value());
  EXPECT_EQ(other.backend->active_pairs, 3);
  EXPECT_EQ(other.backend->guest_offloads, NetOffloads{.checksum = true});
  EXPECT_EQ(other.harness().read_config<std::uint32_t>(0), 0x05040302U);
  EXPECT_EQ(other.harness().device().save().bytes, record.bytes);

  Net fewer(true, 2);
  EXPECT_FALSE(fewer.harness().device().load(record).has_value()) << "3 of 2 pairs";
  Net plain(false, 4);
  EXPECT_FALSE(plain.harness().device().load(record).has_value()) << "offloads that are not there";
  StateRecord damaged = record;
  damaged.version = 2;
  EXPECT_FALSE(other.harness().device().load(damaged).has_value());
  for (std::size_t size = 0; size < record.bytes.size(); ++size) {
    damaged = record;
    damaged.bytes.resize(size);
    EXPECT_FALSE(other.harness().device().load(damaged).has_value());
  }
  damaged = record;
  damaged.bytes[6] = damaged.bytes[7] = 0;
  EXPECT_FALSE(other.harness().device().load(damaged).has_value());
}

// --- with a real back end ---

struct StreamNet {
  StreamNet() {
    std::array<int, 2> fds{};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds.data()), 0);
    peer = UniqueFd(fds[1]);
    kit = std::make_unique<NetKit>(StreamNetBackend::create(UniqueFd(fds[0]), "test").value(),
                                   VirtioNetOptions{}, &guest);
  }
  FakeGuest guest{{{FakeGuest::kBase, 32ULL << 20}}};
  UniqueFd peer;
  std::unique_ptr<NetKit> kit;
};

TEST(VirtioNetStream, ASlowPeerHoldsTheDriverBackWithoutLoss) {
  StreamNet net;
  DeviceHarness& harness = net.kit->harness;
  ASSERT_TRUE(harness.activate({.queue_size = 64}).has_value());
  const Bytes bytes = with_header(make_frame(60000, 1));
  const Gpa at = net.guest.allocate(bytes);
  for (int i = 0; i < 64; ++i) {
    harness.queue(1).add(ChainBuilder().readable(at, static_cast<std::uint32_t>(bytes.size())));
  }
  harness.notify(1);
  harness.pump();
  const std::uint16_t before = harness.queue(1).used_index();
  EXPECT_LT(before, 64) << "the socket is full";
  EXPECT_TRUE(is_idle(harness.loop()));
  std::size_t got = 0;
  Bytes chunk(1 << 16);
  EXPECT_TRUE(harness.pump_until([&] {
    const ssize_t size = ::recv(net.peer.get(), chunk.data(), chunk.size(), MSG_DONTWAIT);
    got += size > 0 ? static_cast<std::size_t>(size) : 0;
    return got == 64UL * (4 + 60000);
  }));
  EXPECT_EQ(harness.queue(1).used_index(), 64);
}

TEST(VirtioNetStream, APeerThatDiesWithFramesUnsentLeavesTheDriverItsBuffers) {
  StreamNet net;
  DeviceHarness& harness = net.kit->harness;
  ASSERT_TRUE(harness.activate({.queue_size = 64}).has_value());
  const Gpa at = net.guest.allocate(with_header(make_frame(60000, 1)));
  for (int i = 0; i < 64; ++i) {
    harness.queue(1).add(ChainBuilder().readable(at, 60012));
  }
  harness.notify(1);
  harness.pump();
  ASSERT_LT(harness.queue(1).used_index(), 64);
  net.peer.reset();
  EXPECT_TRUE(harness.pump_until([&] { return harness.queue(1).used_index() == 64; }));
  EXPECT_EQ(harness.read_config<std::uint16_t>(6), 0);
  EXPECT_TRUE(is_idle(harness.loop()));
}

// The event loop, the driver and the peer on threads of their own.
TEST(VirtioNetStream, EchoAcrossThreads) {
  StreamNet net;
  DeviceHarness& harness = net.kit->harness;
  ASSERT_TRUE(harness.activate({.queue_size = 64}).has_value());
  std::thread echo([&] {
    Bytes chunk(1 << 16);
    while (true) {
      const ssize_t size = ::recv(net.peer.get(), chunk.data(), chunk.size(), 0);
      if (size <= 0) {
        return;
      }
      for (ssize_t done = 0; done < size;) {
        const ssize_t sent =
            ::send(net.peer.get(), chunk.data() + done, static_cast<std::size_t>(size - done), MSG_NOSIGNAL);
        if (sent <= 0) {
          return;
        }
        done += sent;
      }
    }
  });
  std::thread loop([&] { harness.loop().run(); });

  constexpr int kFrames = 2000;
  std::vector<Gpa> rx_at(64);
  std::map<std::uint32_t, Gpa> rx_buffers;
  for (int i = 0; i < 32; ++i) {
    const Gpa at = net.guest.allocate(2048);
    rx_buffers[harness.queue(0).add(ChainBuilder().writable(at, 2048))] = at;
  }
  std::vector<Gpa> tx_at;
  tx_at.reserve(32);
  for (int i = 0; i < 32; ++i) {
    tx_at.push_back(net.guest.allocate(2048));
  }
  harness.notify(0);
  int sent = 0;
  int received = 0;
  int in_flight = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (received < kFrames && std::chrono::steady_clock::now() < deadline) {
    while (harness.queue(1).take_used()) {
      --in_flight;
    }
    while (sent < kFrames && in_flight < 32 && sent - received < 32) {
      const Gpa at = tx_at[static_cast<std::size_t>(sent % 32)];
      Bytes frame = make_frame(60 + static_cast<std::size_t>(sent % 1400), 0);
      store_le(&frame[14], sent);
      const Bytes bytes = with_header(frame);
      net.guest.write(at, bytes);
      harness.queue(1).add(ChainBuilder().readable(at, static_cast<std::uint32_t>(bytes.size())));
      ++sent;
      ++in_flight;
    }
    harness.notify(1);
    while (const auto used = harness.queue(0).take_used()) {
      const Gpa at = rx_buffers.at(used->head);
      ASSERT_EQ(used->written, 72U + static_cast<std::uint32_t>(received % 1400));
      ASSERT_EQ(net.guest.load<int>(at + 12 + 14), received) << "in order";
      ++received;
      rx_buffers[harness.queue(0).add(ChainBuilder().writable(at, 2048))] = at;
      harness.notify(0);
    }
  }
  EXPECT_EQ(received, kFrames);
  harness.loop().stop();
  loop.join();
  harness.reset();
  ::shutdown(net.peer.get(), SHUT_RDWR);
  echo.join();
}

}  // namespace
}  // namespace wisp::test
