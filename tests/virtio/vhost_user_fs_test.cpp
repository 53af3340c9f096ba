// The vhost-user front end and the file system device, against a back end that keeps to the protocol.
#include "virtio/vhost_user_fs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>

#include "virtio/vhost_user_kit.h"

namespace wisp::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr std::uint64_t kRing = kVirtioFeatureVersion1 | kVirtioFeatureIndirectDesc | kVirtioFeatureEventIdx;

std::vector<Request> requests(FakeVhostUserBackend& backend) {
  std::vector<Request> requests;
  for (const SeenMessage& message : backend.seen()) {
    requests.push_back(message.request);
  }
  return requests;
}

// Sends `text` through `queue` and expects it back, turned over.
void expect_echo(DeviceHarness& harness, std::uint16_t queue, std::string_view text) {
  const Bytes bytes(text.begin(), text.end());
  const Gpa in = harness.guest().allocate(bytes);
  const Gpa out = harness.guest().allocate(bytes.size());
  const auto size = static_cast<std::uint32_t>(bytes.size());
  const std::uint16_t head = harness.submit(queue, ChainBuilder().readable(in, size).writable(out, size));
  const auto used = harness.wait_used(queue);
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->head, head);
  EXPECT_EQ(used->written, size);
  Bytes expected = bytes;
  std::ranges::for_each(expected, [](std::uint8_t& byte) { byte ^= 0xff; });
  EXPECT_EQ(harness.guest().read(out, bytes.size()), expected);
}

PropertySet properties() {
  PropertySet set;
  set.set("chardev", std::string("virtio_fs"));
  set.set("tag", std::string("kataShared"));
  return set;
}

TEST(VhostUserFsOptions, ComeFromProperties) {
  auto set = properties();
  auto options = parse_vhost_user_fs_options("virtio-fs0", set).value();
  EXPECT_EQ(options.id, "virtio-fs0");
  EXPECT_EQ(options.chardev, "virtio_fs");
  EXPECT_EQ(options.tag, "kataShared");
  EXPECT_EQ(options.num_request_queues, 1);
  EXPECT_EQ(options.queue_size, 1024);
  EXPECT_EQ(options.path, "");
  set.set("num-request-queues", std::uint64_t{4});
  set.set("queue-size", std::uint64_t{128});
  options = parse_vhost_user_fs_options("virtio-fs0", set).value();
  EXPECT_EQ(options.num_request_queues, 4);
  EXPECT_EQ(options.queue_size, 128);
}

TEST(VhostUserFsOptions, RefuseWhatDoesNotFit) {
  const auto error_with = [](const char* name, const PropertyValue& value) {
    auto set = properties();
    set.set(name, value);
    const auto options = parse_vhost_user_fs_options("fs0", set);
    return options ? std::string("accepted") : options.error().message;
  };
  EXPECT_THAT(error_with("tag", std::string(36, 't')), "accepted");
  EXPECT_THAT(error_with("tag", std::string(37, 't')), HasSubstr("has 37 bytes, expected 1 to 36"));
  EXPECT_THAT(error_with("tag", std::string()), HasSubstr("device fs0: tag= has 0 bytes"));
  EXPECT_THAT(error_with("tag", std::string("a\0b", 3)), HasSubstr("zero byte"));
  EXPECT_THAT(error_with("queue-size", std::uint64_t{100}),
              HasSubstr("queue-size=100 is not a power of two"));
  EXPECT_THAT(error_with("queue-size", std::uint64_t{2048}), HasSubstr("queue-size=2048"));
  EXPECT_THAT(error_with("num-request-queues", std::uint64_t{0}), HasSubstr("num-request-queues=0"));
  EXPECT_THAT(error_with("num-request-queues", std::uint64_t{65}), HasSubstr("num-request-queues=65"));
}

TEST(VhostUserFs, ShowsItsConfiguration) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  VirtioDevice& device = harness->device();
  EXPECT_EQ(device.device_id(), 26U);
  EXPECT_EQ(device.features(), 0U) << "the transport adds those of the ring";
  EXPECT_THAT(device.queue_sizes(), ElementsAre(1024, 1024, 1024));
  std::array<std::uint8_t, 64> config{};
  config.fill(0xcc);
  device.read_config(0, config);
  Bytes expected(64);
  std::ranges::copy(std::string_view("share"), expected.begin());
  expected[36] = 2;
  EXPECT_EQ(Bytes(config.begin(), config.end()), expected);
  EXPECT_EQ(harness->read_config<std::uint32_t>(36), 2U);
  EXPECT_EQ(harness->read_config<std::uint32_t>(~0ULL - 1), 0U);
  harness->write_config<std::uint32_t>(36, 9);
  EXPECT_EQ(harness->read_config<std::uint32_t>(36), 2U);
}

TEST(VhostUserFs, AgreesOnFeaturesAtBirth) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->pump_until([&] { return kit.backend_.seen().size() == 5; }));
  EXPECT_THAT(requests(kit.backend_),
              ElementsAre(Request::kGetFeatures, Request::kGetProtocolFeatures, Request::kSetProtocolFeatures,
                          Request::kGetQueueNum, Request::kSetOwner));
  // Of what was offered, only what is understood.
  EXPECT_EQ(kit.backend_.seen(Request::kSetProtocolFeatures).at(0).payload,
            le_bytes(kProtocolMq | kProtocolReplyAck));
  for (const SeenMessage& message : kit.backend_.seen()) {
    EXPECT_EQ(message.flags, kVhostUserVersion) << to_string(message.request);
    EXPECT_EQ(message.fds, 0U);
  }
}

TEST(VhostUserFs, HandsMemoryAndRingsOver) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->pump_until([&] { return kit.backend_.seen().size() == 5; }));
  kit.backend_.forget_seen();
  ASSERT_TRUE(harness->activate({.event_idx = true, .queue_size = 64}).has_value());
  std::vector<Request> expected{Request::kSetFeatures, Request::kSetMemTable};
  for (int i = 0; i < 3; ++i) {
    for (const Request request :
         {Request::kSetVringNum, Request::kSetVringBase, Request::kSetVringAddr, Request::kSetVringErr,
          Request::kSetVringCall, Request::kSetVringKick, Request::kSetVringEnable}) {
      expected.push_back(request);
    }
  }
  EXPECT_EQ(requests(kit.backend_), expected);
  for (const SeenMessage& message : kit.backend_.seen()) {
    EXPECT_EQ(message.flags, kVhostUserVersion | kVhostUserNeedReply) << to_string(message.request);
  }
  EXPECT_EQ(kit.backend_.seen(Request::kSetFeatures).at(0).payload, le_bytes(kRing | kProtocolFeaturesBit));

  const SeenMessage table = kit.backend_.seen(Request::kSetMemTable).at(0);
  EXPECT_EQ(table.fds, 2U);
  ASSERT_EQ(table.payload.size(), 8U + 2 * 32);
  const auto blocks = kit.guest_.memory().blocks();
  for (std::size_t i = 0; i < 2; ++i) {
    const std::uint8_t* region = table.payload.data() + 8 + 32 * i;
    EXPECT_EQ(load_le<std::uint64_t>(region), blocks[i].gpa);
    EXPECT_EQ(load_le<std::uint64_t>(region + 8), blocks[i].size);
    EXPECT_NE(load_le<std::uint64_t>(region + 16), reinterpret_cast<std::uint64_t>(blocks[i].host))
        << "where this process has its memory is its secret";
    EXPECT_EQ(load_le<std::uint64_t>(region + 24), blocks[i].fd_offset);
  }
  for (std::uint32_t i = 0; i < 3; ++i) {
    const auto number = [&](Request request) { return kit.backend_.seen(request).at(i); };
    EXPECT_EQ(load_le<std::uint32_t>(number(Request::kSetVringNum).payload.data()), i);
    EXPECT_EQ(load_le<std::uint32_t>(number(Request::kSetVringNum).payload.data() + 4), 64U);
    EXPECT_EQ(load_le<std::uint32_t>(number(Request::kSetVringBase).payload.data() + 4), 0U);
    for (const Request request : {Request::kSetVringErr, Request::kSetVringCall, Request::kSetVringKick}) {
      EXPECT_EQ(number(request).payload, le_bytes(std::uint64_t{i}));
      EXPECT_EQ(number(request).fds, 1U);
    }
  }
}

TEST(VhostUserFs, MovesChainsThroughSharedMemory) {
  for (const bool event_idx : {false, true}) {
    VhostUserKit kit;
    const auto harness = kit.make_harness();
    ASSERT_TRUE(harness->activate({.event_idx = event_idx}).has_value());
    EXPECT_TRUE(harness->device().kicks_handled_elsewhere());
    for (int round = 0; round < 40; ++round) {
      expect_echo(*harness, 0, "a word on the high priority queue");
      expect_echo(*harness, 1, "one request");
      expect_echo(*harness, 2, "another");
    }
    EXPECT_TRUE(harness->pump_until([&] { return harness->interrupts().used(1) > 0; }));
    EXPECT_GT(harness->interrupts().used(2), 0U);
    EXPECT_EQ(kit.backend_.echoed(), 120U);
    EXPECT_FALSE(harness->interrupts().broken());
  }
}

TEST(VhostUserFs, TakesItsQueuesBackAtAPauseAndGoesOnWhereTheyStood) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  expect_echo(*harness, 1, "before");
  expect_echo(*harness, 1, "before too");
  (void)kit.guest_.take_dirty_pages();
  harness->pause();
  EXPECT_TRUE(kit.guest_.take_dirty_pages().at(0)) << "the back end may have written anywhere";
  ASSERT_NE(harness->device().queue(1), nullptr);
  EXPECT_EQ(harness->device().queue(1)->next_available(), 2);
  EXPECT_EQ(harness->device().queue(0)->next_available(), 0);
  const Gpa in = harness->guest().allocate(Bytes{1, 2, 3});
  const Gpa out = harness->guest().allocate(3);
  harness->submit(1, ChainBuilder().readable(in, 3).writable(out, 3));
  EXPECT_FALSE(harness->wait_used(1, 50).has_value());
  EXPECT_EQ(kit.backend_.echoed(), 2U);

  kit.backend_.forget_seen();
  harness->resume();
  EXPECT_TRUE(harness->wait_used(1).has_value()) << "a notification that came while paused is not lost";
  EXPECT_EQ(harness->guest().read(out, 3), (Bytes{0xfe, 0xfd, 0xfc}));
  const auto bases = kit.backend_.seen(Request::kSetVringBase);
  EXPECT_EQ(load_le<std::uint32_t>(bases.at(1).payload.data() + 4), 2U);
  expect_echo(*harness, 2, "after");
}

TEST(VhostUserFs, StartsAnewAfterEachReset) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(harness->activate().has_value());
    expect_echo(*harness, 1, "again");
    kit.backend_.forget_seen();
    harness->reset();
    EXPECT_THAT(requests(kit.backend_),
                ElementsAre(Request::kSetVringEnable, Request::kGetVringBase, Request::kSetVringEnable,
                            Request::kGetVringBase, Request::kSetVringEnable, Request::kGetVringBase));
    EXPECT_EQ(harness->device().queue(1), nullptr);
    harness->guest().clear();
  }
  EXPECT_FALSE(kit.backend_.hung_up());
  EXPECT_FALSE(harness->interrupts().broken());
}

TEST(VhostUserFs, LeavesQueuesOutThatTheDriverDoesNotSet) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate({.unset = {2}}).has_value());
  EXPECT_EQ(kit.backend_.seen(Request::kSetVringKick).size(), 2U);
  expect_echo(*harness, 1, "still there");
}

TEST(VhostUserFs, AForwardedNotificationArrives) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  const Gpa in = harness->guest().allocate(Bytes{1});
  harness->queue(1).add(ChainBuilder().readable(in, 1));
  {
    const std::lock_guard lock(harness->device().strand().mutex());
    harness->device().notify(1);
    harness->device().notify(77);
  }
  EXPECT_TRUE(harness->wait_used(1).has_value());
}

TEST(VhostUserFs, WorksWithABackEndThatHasLess) {
  // Without acknowledgements; without protocol features at all.
  for (const std::uint64_t features : {kRing | kProtocolFeaturesBit, kRing}) {
    VhostUserKit kit({.features = features, .protocol_features = 0});
    const auto harness = kit.make_harness();
    for (int round = 0; round < 2; ++round) {
      ASSERT_TRUE(harness->activate().has_value());
      expect_echo(*harness, 1, "plain");
      harness->reset();
      harness->guest().clear();
    }
    for (const SeenMessage& message : kit.backend_.seen()) {
      EXPECT_EQ(message.flags, kVhostUserVersion) << to_string(message.request);
    }
    const bool enables = (features & kProtocolFeaturesBit) != 0;
    EXPECT_EQ(kit.backend_.seen(Request::kSetVringEnable).size(), enables ? 12U : 0U);
    EXPECT_TRUE(kit.backend_.seen(Request::kGetQueueNum).empty());
  }
}

TEST(VhostUserFs, WaitsForABackEndThatStartsAtTheSameTime) {
  FakeGuest guest({{FakeGuest::kBase, FakeGuest::kDefaultSize}}, FakeGuest::Backing::kShared);
  const TempDir dir;
  std::unique_ptr<FakeVhostUserBackend> backend;
  std::thread starter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    backend = std::make_unique<FakeVhostUserBackend>(dir.file("sock"), BackendSetup());
  });
  const auto loop = EventLoop::create().value();
  Log log(-1);
  const SystemClock clock;
  const auto device = VhostUserFs::create(*loop, guest.memory(),
                                          {.id = "fs0", .path = dir.file("sock"), .tag = "t"}, log, clock);
  starter.join();
  EXPECT_TRUE(device.has_value()) << device.error().message;
}

TEST(VhostUserFs, RefusesToBeSavedOrRestored) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  const auto saveable = harness->device().check_saveable();
  ASSERT_FALSE(saveable.has_value());
  EXPECT_THAT(saveable.error().message, HasSubstr("device fs0: a snapshot cannot hold"));
  const auto loaded = harness->device().load(harness->device().save());
  ASSERT_FALSE(loaded.has_value());
  EXPECT_THAT(loaded.error().message, HasSubstr("device fs0"));
}

// --- against a real virtiofsd, where one is installed ---

class Virtiofsd final {
 public:
  explicit Virtiofsd(const TempDir& dir) {
    const std::string socket = "--socket-path=" + dir.file("sock");
    const std::string source = "source=" + dir.path();
    for (const char* program : {"/usr/lib/qemu/virtiofsd"}) {
      if (::access(program, X_OK) != 0) {
        continue;
      }
      std::vector<std::string> words{program, socket, "-f", "-o", source, "-o", "sandbox=chroot"};
      std::vector<char*> argv;
      for (std::string& word : words) {
        argv.push_back(word.data());
      }
      argv.push_back(nullptr);
      posix_spawn_file_actions_t actions;
      ::posix_spawn_file_actions_init(&actions);
      ::posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
      if (::posix_spawn(&pid_, program, &actions, nullptr, argv.data(), environ) != 0) {
        pid_ = -1;
      }
      ::posix_spawn_file_actions_destroy(&actions);
      return;
    }
  }
  Virtiofsd(const Virtiofsd&) = delete;
  Virtiofsd& operator=(const Virtiofsd&) = delete;
  ~Virtiofsd() { kill(); }
  void kill() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(std::exchange(pid_, -1), nullptr, 0);
    }
  }
  [[nodiscard]] bool started() const { return pid_ > 0; }

 private:
  pid_t pid_ = -1;
};

// linux/fuse.h: the headers of requests and answers, and FUSE_INIT, FUSE_LOOKUP.
constexpr std::size_t kFuseInHeader = 40;
constexpr std::size_t kFuseOutHeader = 16;

Bytes fuse_request(std::uint32_t opcode, std::uint64_t node, const Bytes& body) {
  Bytes request(kFuseInHeader);
  store_le(request.data(), static_cast<std::uint32_t>(kFuseInHeader + body.size()));
  store_le(request.data() + 4, opcode);
  store_le(request.data() + 8, std::uint64_t{4711});  // unique
  store_le(request.data() + 16, node);
  request.insert(request.end(), body.begin(), body.end());
  return request;
}

Bytes fuse_call(DeviceHarness& harness, const Bytes& request, std::uint32_t answer_size) {
  const Gpa in = harness.guest().allocate(request);
  const Gpa out = harness.guest().allocate(kFuseOutHeader + answer_size);
  harness.submit(1, ChainBuilder()
                        .readable(in, static_cast<std::uint32_t>(request.size()))
                        .writable(out, kFuseOutHeader)
                        .writable(out + kFuseOutHeader, answer_size));
  const auto used = harness.wait_used(1);
  return used ? harness.guest().read(out, used->written) : Bytes();
}

TEST(VhostUserFs, ARealVirtiofsdServesADirectory) {
  FakeGuest guest({{0, 16U << 20}, {1ULL << 32, 4U << 20}}, FakeGuest::Backing::kShared);
  (void)guest.allocate(kPageSize);
  const TempDir dir;
  const int file = ::open(dir.file("file").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  ASSERT_EQ(::write(file, "hello", 5), 5);
  ::close(file);
  Virtiofsd daemon(dir);
  if (!daemon.started()) {
    GTEST_SKIP() << "no virtiofsd here";
  }
  Log log(-1);
  const SystemClock clock;
  DeviceHarness harness(
      [&](EventLoop& loop, const GuestMemory& memory) {
        return VhostUserFs::create(loop, memory,
                                   {.id = "fs0",
                                    .path = dir.file("sock"),
                                    .tag = "t",
                                    .timeouts = {.connect = std::chrono::milliseconds(10'000)}},
                                   log, clock)
            .value();
      },
      &guest);
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(harness.activate({.event_idx = true, .queue_size = 128}).has_value());
    Bytes init(16);
    store_le(init.data(), 7U);
    store_le(init.data() + 4, 31U);
    store_le(init.data() + 8, 65536U);
    Bytes answer = fuse_call(harness, fuse_request(26, 0, init), 64);
    ASSERT_EQ(answer.size(), kFuseOutHeader + 64);
    EXPECT_EQ(load_le<std::int32_t>(answer.data() + 4), 0) << "error";
    EXPECT_EQ(load_le<std::uint64_t>(answer.data() + 8), 4711U);
    EXPECT_EQ(load_le<std::uint32_t>(answer.data() + kFuseOutHeader), 7U) << "major version";

    answer = fuse_call(harness, fuse_request(1, 1, Bytes{'f', 'i', 'l', 'e', 0}), 128);
    ASSERT_EQ(answer.size(), kFuseOutHeader + 128);
    EXPECT_EQ(load_le<std::int32_t>(answer.data() + 4), 0) << "error";
    EXPECT_EQ(load_le<std::uint64_t>(answer.data() + kFuseOutHeader + 40 + 8), 5U) << "size of the file";

    harness.pause();
    harness.resume();
    answer = fuse_call(harness, fuse_request(1, 1, Bytes{'n', 'o', 'n', 'e', 0}), 128);
    ASSERT_EQ(answer.size(), kFuseOutHeader);
    EXPECT_EQ(load_le<std::int32_t>(answer.data() + 4), -ENOENT);
    EXPECT_FALSE(harness.interrupts().broken());
    harness.reset();
  }
  ASSERT_TRUE(harness.activate().has_value());
  daemon.kill();
  EXPECT_TRUE(harness.pump_until([&] { return harness.interrupts().broken(); }));
}

}  // namespace
}  // namespace wisp::test
