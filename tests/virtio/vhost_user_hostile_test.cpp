// Back ends that die, hang or lie: the process goes on, in bounded time, and says what happened.
#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <ctime>

#include "virtio/vhost_user_kit.h"

namespace wisp::test {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using Kind = Misdeed::Kind;
using std::chrono::milliseconds;

constexpr std::uint32_t kAnswer = kVhostUserVersion | kVhostUserReply;

class Stopwatch final {
 public:
  [[nodiscard]] milliseconds elapsed() const {
    return std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - start_);
  }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::size_t open_descriptors() {
  DIR* directory = ::opendir("/proc/self/fd");
  std::size_t count = 0;
  while (::readdir(directory) != nullptr) {
    ++count;
  }
  ::closedir(directory);
  return count;
}

std::uint64_t thread_cpu_ns() {
  timespec time{};
  (void)::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(time.tv_nsec);
}

std::string creation_error(BackendSetup setup) {
  VhostUserKit kit(std::move(setup));
  const auto loop = EventLoop::create().value();
  const auto device = kit.create(*loop);
  return device ? "made" : device.error().message;
}

// A dead device stays quiet, asks for a reset that fails at once, and costs nothing.
void expect_dead(DeviceHarness& harness, FakeVhostUserBackend& backend) {
  EXPECT_TRUE(harness.pump_until([&] { return harness.interrupts().broken(); }));
  EXPECT_TRUE(harness.pump_until([&] { return backend.hung_up(); })) << "the connection is dropped";
  harness.pump();
  const std::uint64_t before = thread_cpu_ns();
  for (int i = 0; i < 4; ++i) {
    harness.loop().run_once(2);
  }
  EXPECT_LT(thread_cpu_ns() - before, 5'000'000U) << "no spin";
  harness.reset();
  harness.guest().clear();
  const Stopwatch watch;
  const auto again = harness.activate();
  ASSERT_FALSE(again.has_value());
  EXPECT_THAT(again.error().message, HasSubstr("the connection to the back end is gone"));
  EXPECT_LT(watch.elapsed(), milliseconds(100));
  harness.pause();
  harness.resume();
  harness.reset();
}

TEST(VhostUserHostile, PrivateMemoryIsRefusedBeforeTheBackEndIsTold) {
  VhostUserKit kit;
  const FakeGuest guest;
  const auto loop = EventLoop::create().value();
  const auto device = VhostUserFs::create(*loop, guest.memory(), kit.options_, kit.log_, kit.clock_);
  ASSERT_FALSE(device.has_value());
  EXPECT_THAT(device.error().message, HasSubstr("device fs0: guest memory is private to this process"));
  EXPECT_THAT(device.error().message, HasSubstr("mem-share=on"));
  EXPECT_THAT(device.error().message, HasSubstr("memory-backend-memfd"));
  EXPECT_TRUE(kit.backend_.seen().empty());
}

TEST(VhostUserHostile, MemoryInTooManyPartsIsRefused) {
  std::vector<FakeGuest::Range> ranges;
  for (std::uint64_t i = 0; i < 9; ++i) {
    ranges.push_back({FakeGuest::kBase + i * 0x100000, 0x10000});
  }
  const FakeGuest guest(ranges, FakeGuest::Backing::kShared);
  const auto checked = VhostUser::check_memory(guest.memory());
  ASSERT_FALSE(checked.has_value());
  EXPECT_THAT(checked.error().message, HasSubstr("guest memory has 9 parts, vhost-user back ends take 8"));
}

TEST(VhostUserHostile, PathsThatLeadNowhere) {
  const FakeGuest guest({{FakeGuest::kBase, FakeGuest::kDefaultSize}}, FakeGuest::Backing::kShared);
  const auto loop = EventLoop::create().value();
  Log log(-1);
  const SystemClock clock;
  const auto error_at = [&](const std::string& path) {
    const Stopwatch watch;
    const auto device = VhostUserFs::create(
        *loop, guest.memory(), {.id = "fs0", .path = path, .tag = "t", .timeouts = VhostUserKit::kShort}, log,
        clock);
    EXPECT_LT(watch.elapsed(), milliseconds(2000));
    return device ? "made" : device.error().message;
  };
  EXPECT_THAT(error_at("/nonexistent/sock"),
              HasSubstr("device fs0: cannot connect to the vhost-user socket /nonexistent/sock"));
  EXPECT_THAT(error_at("/dev/null"), HasSubstr("cannot connect to the vhost-user socket /dev/null"));
  EXPECT_THAT(error_at(""), HasSubstr("has 0 bytes"));
  EXPECT_THAT(error_at(std::string(108, 'p')), HasSubstr("has 108 bytes, expected 1 to 107"));
}

TEST(VhostUserHostile, BackEndsThatDoTooLittle) {
  EXPECT_THAT(creation_error({.queues = 2}), HasSubstr("serves 2 queues, the device has 3"));
  EXPECT_THAT(creation_error({.queues = 0}), HasSubstr("serves 0 queues"));
  EXPECT_EQ(creation_error({.queues = ~0ULL}), "made");
  EXPECT_THAT(creation_error({.features = kVirtioFeatureVersion1}), HasSubstr("lacks features 0x30000000"));
  EXPECT_THAT(creation_error({.features = ~kVirtioFeatureVersion1}), HasSubstr("lacks features 0x100000000"));
}

TEST(VhostUserHostile, AListenerThatNeverAcceptsDoesNotHoldTheProcess) {
  const FakeGuest guest({{FakeGuest::kBase, FakeGuest::kDefaultSize}}, FakeGuest::Backing::kShared);
  const TempDir dir;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  dir.file("sock").copy(address.sun_path, sizeof address.sun_path - 1);
  const UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_TRUE(listener.valid());
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(listener.get(), 0), 0);
  const auto loop = EventLoop::create().value();
  Log log(-1);
  const SystemClock clock;
  // The first is taken up by the backlog, the others find it full.
  std::vector<UniqueFd> others;
  for (int i = 0; i < 3; ++i) {
    const Stopwatch watch;
    const auto device = VhostUserFs::create(
        *loop, guest.memory(),
        {.id = "fs0", .path = dir.file("sock"), .tag = "t", .timeouts = VhostUserKit::kShort}, log, clock);
    ASSERT_FALSE(device.has_value());
    EXPECT_THAT(device.error().message, AnyOf(HasSubstr("does not answer (GET_FEATURES)"),
                                              HasSubstr("cannot connect to the vhost-user socket")));
    EXPECT_LT(watch.elapsed(), milliseconds(2000));
    others.emplace_back(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    (void)::connect(others.back().get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  }
}

// Each request at which a back end may fail, and whether the device exists by then.
struct Point {
  Request request;
  bool at_birth;
};
constexpr std::array kPoints{
    Point{Request::kGetFeatures, true},   Point{Request::kGetProtocolFeatures, true},
    Point{Request::kGetQueueNum, true},   Point{Request::kSetFeatures, false},
    Point{Request::kSetMemTable, false},  Point{Request::kSetVringNum, false},
    Point{Request::kSetVringBase, false}, Point{Request::kSetVringAddr, false},
    Point{Request::kSetVringErr, false},  Point{Request::kSetVringCall, false},
    Point{Request::kSetVringKick, false}, Point{Request::kSetVringEnable, false},
};

class VhostUserPoint : public ::testing::TestWithParam<Point> {
 protected:
  // The back end does `kind` at this point; returns the error. `bytes` are what it says.
  std::string error_after(Kind kind, Bytes bytes = {}) {
    const Point point = GetParam();
    VhostUserKit kit({.misdeed = Misdeed{.request = point.request, .kind = kind, .bytes = std::move(bytes)}});
    if (kind == Kind::kHang || kind == Kind::kDrip) {
      (point.at_birth ? kit.options_.timeouts.handshake : kit.options_.timeouts.exchange) =
          point.at_birth ? VhostUserKit::kShort.handshake : VhostUserKit::kShort.exchange;
    }
    const Stopwatch watch;
    std::string error = "no error";
    if (point.at_birth) {
      const auto loop = EventLoop::create().value();
      const auto device = kit.create(*loop);
      error = device ? "made" : device.error().message;
    } else {
      const auto harness = kit.make_harness();
      const auto activated = harness->activate();
      error = activated ? "activated" : activated.error().message;
      EXPECT_TRUE(harness->interrupts().broken());
      expect_dead(*harness, kit.backend_);
    }
    EXPECT_LT(watch.elapsed(), milliseconds(3000));
    return error;
  }
};

TEST_P(VhostUserPoint, Death) {
  EXPECT_THAT(error_after(Kind::kDie), HasSubstr("the back end closed the connection"));
}

TEST_P(VhostUserPoint, Silence) {
  EXPECT_THAT(error_after(Kind::kHang), HasSubstr("the back end does not answer ("));
}

TEST_P(VhostUserPoint, AnswersThatDripGetNoMoreTime) {
  EXPECT_THAT(error_after(Kind::kDrip), HasSubstr("the back end does not answer ("));
}

TEST_P(VhostUserPoint, AnswersThatAreNone) {
  const auto request = std::to_underlying(GetParam().request);
  const Bytes number(8);
  EXPECT_THAT(error_after(Kind::kSay, vhost_user_message(request + 1, kAnswer, number)),
              HasSubstr("with message"));
  EXPECT_THAT(error_after(Kind::kSay, vhost_user_message(0xffff'ffff, kAnswer, number)),
              HasSubstr("with message"));
  EXPECT_THAT(error_after(Kind::kSay, vhost_user_message(request, kVhostUserVersion, number)),
              HasSubstr("with message"));
  for (const std::uint32_t version : {0U, 2U, 3U}) {
    EXPECT_THAT(error_after(Kind::kSay, vhost_user_message(request, version | kVhostUserReply, number)),
                HasSubstr("speaks version"));
  }
  for (const std::size_t size : {0U, 1U, 7U, 9U, 4096U, 100'000U}) {
    EXPECT_THAT(error_after(Kind::kSay, vhost_user_message(request, kAnswer, Bytes(size))),
                HasSubstr("expected 8"));
  }
  Bytes huge = vhost_user_message(request, kAnswer, number);
  store_le(huge.data() + 8, 0xffff'ffffU);
  EXPECT_THAT(error_after(Kind::kSay, huge), HasSubstr("with 4294967295 bytes, expected 8"));
  // More than one answer: what comes after is not taken for the next.
  Bytes twice = vhost_user_message(request, kAnswer, number);
  const Bytes garbage(64, 0xa5);
  twice.insert(twice.end(), garbage.begin(), garbage.end());
  if (GetParam().request != Request::kGetProtocolFeatures) {
    EXPECT_THAT(error_after(Kind::kSay, twice),
                AnyOf(HasSubstr("with message"), HasSubstr("lacks features"), HasSubstr("serves 0 queues"),
                      HasSubstr("speaks version")));
    return;
  }
  // Without protocol features nothing more is due at birth: it is found out afterwards.
  VhostUserKit kit({.misdeed = Misdeed{.request = GetParam().request, .kind = Kind::kSay, .bytes = twice}});
  const auto harness = kit.make_harness();
  EXPECT_TRUE(harness->pump_until([&] { return kit.backend_.hung_up(); }));
  EXPECT_FALSE(harness->activate().has_value());
}

INSTANTIATE_TEST_SUITE_P(All, VhostUserPoint, ::testing::ValuesIn(kPoints),
                         [](const auto& point) { return std::string(to_string(point.param.request)); });

TEST(VhostUserHostile, RefusalsAreErrors) {
  for (const Request request : {Request::kSetFeatures, Request::kSetMemTable, Request::kSetVringKick}) {
    VhostUserKit kit({.refuse = 1ULL << std::to_underlying(request)});
    const auto harness = kit.make_harness();
    const auto activated = harness->activate();
    ASSERT_FALSE(activated.has_value());
    EXPECT_THAT(activated.error().message,
                HasSubstr("the back end refused " + std::string(to_string(request))));
    expect_dead(*harness, kit.backend_);
  }
}

TEST(VhostUserHostile, DescriptorsInAnswersAreNotKept) {
  VhostUserKit kit({.misdeed = Misdeed{.request = Request::kSetMemTable, .kind = Kind::kSendFds}});
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  harness->reset();
  harness->guest().clear();
  const std::size_t before = open_descriptors();
  ASSERT_TRUE(harness->activate().has_value());
  harness->reset();
  // The back end closed what it was given, and its two went nowhere.
  EXPECT_EQ(open_descriptors(), before);

  VhostUserKit at_birth({.misdeed = Misdeed{.request = Request::kGetFeatures, .kind = Kind::kSendFds}});
  const auto second = at_birth.make_harness();
  const std::size_t with_second = open_descriptors();
  VhostUserKit plain;
  const auto third = plain.make_harness();
  const std::size_t with_third = open_descriptors();
  // Every kit holds as many, whether its back end sent some along or not.
  const std::size_t kit_size = with_third - with_second;
  EXPECT_EQ(with_second - before, kit_size);
}

TEST(VhostUserHostile, AHangAtResetIsCutOff) {
  VhostUserKit kit({.misdeed = Misdeed{.request = Request::kGetVringBase, .kind = Kind::kHang}});
  kit.options_.timeouts.exchange = VhostUserKit::kShort.exchange;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  const Stopwatch watch;
  harness->reset();
  EXPECT_GE(watch.elapsed(), VhostUserKit::kShort.exchange);
  EXPECT_LT(watch.elapsed(), milliseconds(2000));
  expect_dead(*harness, kit.backend_);
}

TEST(VhostUserHostile, AHangAtAPauseIsToldAtTheResume) {
  VhostUserKit kit({.misdeed = Misdeed{.request = Request::kGetVringBase, .kind = Kind::kHang}});
  kit.options_.timeouts.exchange = VhostUserKit::kShort.exchange;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  harness->pause();
  harness->pump();
  EXPECT_FALSE(harness->interrupts().broken()) << "no interrupts while paused";
  harness->resume();
  EXPECT_TRUE(harness->interrupts().broken());
  expect_dead(*harness, kit.backend_);
}

TEST(VhostUserHostile, PlacesOutOfRangeAreNotTaken) {
  const auto state = [](std::uint32_t index, std::uint32_t base) {
    Bytes bytes(8);
    store_le(bytes.data(), index);
    store_le(bytes.data() + 4, base);
    return vhost_user_message(std::to_underlying(Request::kGetVringBase), kAnswer, bytes);
  };
  for (const Bytes& answer : {state(0, 0x10000), state(0, 0xffff'ffff), state(1, 0), state(0xffff'ffff, 0)}) {
    VhostUserKit kit(
        {.misdeed = Misdeed{.request = Request::kGetVringBase, .kind = Kind::kSay, .bytes = answer}});
    const auto harness = kit.make_harness();
    ASSERT_TRUE(harness->activate().has_value());
    harness->reset();
    expect_dead(*harness, kit.backend_);
  }
}

TEST(VhostUserHostile, DeathWhileIdle) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  kit.backend_.end();
  harness->pump();
  EXPECT_FALSE(harness->interrupts().broken()) << "there is no driver to tell yet";
  EXPECT_FALSE(harness->activate().has_value());
  EXPECT_TRUE(harness->interrupts().broken());
}

TEST(VhostUserHostile, DeathWhileRequestsAreUnderWay) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  kit.backend_.end();
  const Gpa in = harness->guest().allocate(Bytes{1});
  harness->submit(1, ChainBuilder().readable(in, 1));
  EXPECT_TRUE(harness->pump_until([&] { return harness->interrupts().broken(); }));
  const Stopwatch watch;
  harness->reset();
  EXPECT_LT(watch.elapsed(), milliseconds(200)) << "nobody is waited for";
  harness->guest().clear();
  EXPECT_FALSE(harness->activate().has_value());
}

TEST(VhostUserHostile, UnaskedMessagesEndIt) {
  for (const bool active : {false, true}) {
    VhostUserKit kit;
    const auto harness = kit.make_harness();
    if (active) {
      ASSERT_TRUE(harness->activate().has_value());
    }
    kit.backend_.say_unasked(Bytes(100'000, 0x11));
    EXPECT_TRUE(harness->pump_until([&] { return kit.backend_.hung_up(); }));
    EXPECT_EQ(harness->interrupts().broken(), active);
  }
}

TEST(VhostUserHostile, ADriverThatBreaksARingNeedsAReset) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  harness->queue(1).set_available_index(5000);
  harness->notify(1);
  EXPECT_TRUE(harness->pump_until([&] { return harness->interrupts().broken(); }));
  // That is no fault of the back end: after a reset all is well.
  harness->reset();
  harness->guest().clear();
  harness->interrupts().clear();
  ASSERT_TRUE(harness->activate().has_value());
  const Gpa in = harness->guest().allocate(Bytes{1});
  harness->submit(1, ChainBuilder().readable(in, 1));
  EXPECT_TRUE(harness->wait_used(1).has_value());
  EXPECT_FALSE(harness->interrupts().broken());
}

TEST(VhostUserHostile, ItsEndIsLoggedOnce) {
  VhostUserKit kit;
  const auto harness = kit.make_harness();
  ASSERT_TRUE(harness->activate().has_value());
  kit.backend_.end();
  EXPECT_TRUE(harness->pump_until([&] { return harness->interrupts().broken(); }));
  for (int i = 0; i < 100; ++i) {
    harness->reset();
    harness->guest().clear();
    EXPECT_FALSE(harness->activate().has_value());
  }
  std::array<char, 4096> text{};
  const ssize_t size = ::pread(kit.log_fd_.get(), text.data(), text.size(), 0);
  ASSERT_GT(size, 0);
  const std::string log(text.data(), static_cast<std::size_t>(size));
  EXPECT_THAT(log, HasSubstr("device fs0: "));
  EXPECT_THAT(log, HasSubstr("the back end closed the connection"));
  EXPECT_EQ(std::ranges::count(log, '\n'), 1);
}

TEST(VhostUserHostile, DestroyedAtAnyTime) {
  for (const Request request : {Request::kSetMemTable, Request::kSetVringKick, Request::kGetVringBase}) {
    VhostUserKit kit({.misdeed = Misdeed{.request = request, .kind = Kind::kHang}});
    kit.options_.timeouts.exchange = VhostUserKit::kShort.exchange;
    FakeInterrupts interrupts(3);
    const auto loop = EventLoop::create().value();
    auto device = kit.create(*loop).value();
    std::vector<UniqueFd> kicks;
    VirtioActivation activation;
    activation.features = kVirtioFeatureVersion1;
    activation.interrupts = &interrupts;
    for (int i = 0; i < 3; ++i) {
      kicks.push_back(make_eventfd().value());
      activation.kick_fds.push_back(kicks.back().get());
      FakeQueue queue(kit.guest_, 16);
      activation.queues.emplace_back(
          Queue::activate(queue.config(), kit.guest_.memory(), kVirtioFeatureVersion1).value());
    }
    {
      const std::lock_guard lock(device->strand().mutex());
      (void)device->activate(std::move(activation));
    }
    const Stopwatch watch;
    device.reset();
    EXPECT_LT(watch.elapsed(), milliseconds(1500));
  }
}

}  // namespace
}  // namespace wisp::test
