#include "machine/backends.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <algorithm>

#include "machine/device_table.h"
#include "machine/machine_kit.h"
#include "sandbox/seccomp.h"
#include "support/sanitized.h"

namespace wisp {
namespace {

using test::open_files;
using test::properties;
using test::StandardFiles;
using ::testing::HasSubstr;

class BackendsTest : public ::testing::Test {
 protected:
  static std::string error(const Result<void>& result) { return result ? "" : result.error().message; }
  template <typename T>
  static std::string error_of(const Result<T>& result) {
    return result ? "" : result.error().message;
  }
  BackendConfig drive(const std::string& id) {
    return {.kind = "",
            .id = id,
            .properties = properties({{"file", dir_.image(id + ".img", test::kMiB)}}),
            .fds = {}};
  }
  static BackendConfig null_chardev(const std::string& id) {
    return {.kind = "null", .id = id, .properties = {}, .fds = {}};
  }
  static BackendConfig dgram(const std::string& id, std::vector<int> fds) {
    return {.kind = "dgram", .id = id, .properties = {}, .fds = std::move(fds)};
  }
  static std::pair<int, int> socket_pair() {
    std::array<int, 2> fds{-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds.data()), 0);
    return {fds[0], fds[1]};
  }
  static bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

  test::TempDir dir_;
  std::unique_ptr<EventLoop> loop_ = *EventLoop::create();
  Log log_{-1};
  SystemClock clock_;
  bool filtered_ = false;
  Backends backends_{*loop_, log_, clock_,
                     [this] { return filtered_ ? install_seccomp(ThreadKind::kWorker) : Result<void>{}; }};
};

TEST_F(BackendsTest, IdsAreUniqueWithinAKind) {
  ASSERT_TRUE(backends_.add_drive(drive("one")));
  EXPECT_EQ(error(backends_.add_drive(drive("one"))), "drive one: this id is taken");
  EXPECT_TRUE(backends_.add_chardev(null_chardev("one"))) << "another kind";
  EXPECT_EQ(error(backends_.add_chardev(null_chardev("one"))), "chardev one: this id is taken");
  const BackendConfig rng{.kind = "rng-random", .id = "one", .properties = {}, .fds = {}};
  EXPECT_TRUE(backends_.add_object(rng));
  EXPECT_EQ(error(backends_.add_object(rng)), "object one: this id is taken");
  const auto [ours, theirs] = socket_pair();
  const UniqueFd peer(theirs);
  EXPECT_TRUE(backends_.add_netdev(dgram("one", {ours})));
  const auto [more, unused] = socket_pair();
  const UniqueFd other_peer(unused);
  EXPECT_EQ(error(backends_.add_netdev(dgram("one", {more}))), "netdev one: this id is taken");
  EXPECT_FALSE(is_open(more)) << "taken over on failure too";
}

TEST_F(BackendsTest, DescriptorsThatOptionsNameAreTakenOverWhateverFails) {
  const auto add = [this](const char* kind, std::initializer_list<std::string_view> options) {
    PropertySet set;
    std::vector<UniqueFd> peers;
    std::vector<int> given;
    for (const std::string_view option : options) {
      const auto [ours, peer] = socket_pair();
      peers.emplace_back(peer);
      given.push_back(ours);
      set.set(std::string(option), std::to_string(ours));
    }
    EXPECT_FALSE(backends_.add_netdev({.kind = kind, .id = "n", .properties = set, .fds = {}}));
    for (const int fd : given) {
      EXPECT_FALSE(is_open(fd)) << kind;
    }
  };
  add("tap", {"fd", "vhostfd"});  // opened, and found to be no tap
  add("tap", {"vhostfd"});        // neither ifname nor fd
  add("tap", {"fd", "fds"});      // both
  add("tap", {"fds", "vhostfds"});
  add("telegraph", {"fd"});
}

TEST_F(BackendsTest, UnknownIdsAreNamed) {
  EXPECT_EQ(error(backends_.remove_drive("x")), "there is no drive with id 'x'");
  EXPECT_EQ(error(backends_.remove_netdev("x")), "there is no netdev with id 'x'");
  EXPECT_EQ(error(backends_.remove_chardev("x")), "there is no chardev with id 'x'");
  EXPECT_EQ(error_of(backends_.use_drive("x", "d")), "there is no drive with id 'x'");
  EXPECT_EQ(error_of(backends_.take_netdev("x", "d")), "there is no netdev with id 'x'");
  EXPECT_EQ(error_of(backends_.use_chardev("x", "d")), "there is no chardev with id 'x'");
  EXPECT_EQ(error_of(backends_.open_rng("x")), "there is no object rng-random with id 'x'");
}

TEST_F(BackendsTest, WhatADeviceUsesCannotBeRemovedOrUsedTwice) {
  ASSERT_TRUE(backends_.add_drive(drive("disk")));
  ASSERT_TRUE(backends_.add_chardev(null_chardev("console")));
  ASSERT_TRUE(backends_.use_drive("disk", "vda"));
  ASSERT_TRUE(backends_.use_chardev("console", "serial"));
  EXPECT_EQ(error_of(backends_.use_drive("disk", "vdb")), "drive disk is already in use by device 'vda'");
  EXPECT_EQ(error_of(backends_.use_chardev("console", "b")),
            "chardev console is already in use by device 'serial'");
  EXPECT_EQ(error(backends_.remove_drive("disk")),
            "drive disk is in use by device 'vda': remove the device first");
  EXPECT_EQ(error(backends_.remove_chardev("console")),
            "chardev console is in use by device 'serial': remove the device first");
  EXPECT_EQ(backends_.drives().at("disk").user, "vda");

  backends_.release("vdb");  // somebody else
  EXPECT_FALSE(backends_.remove_drive("disk"));
  backends_.release("vda");
  EXPECT_TRUE(backends_.use_drive("disk", "vdb"));
  backends_.release("vdb");
  EXPECT_TRUE(backends_.remove_drive("disk"));
  EXPECT_TRUE(backends_.drives().empty());
  EXPECT_FALSE(backends_.remove_chardev("console"));
}

TEST_F(BackendsTest, ANetdevIsOpenedAgainAfterItsDevice) {
  // A switch that takes connections one after another.
  const std::string path = dir_.file("switch.sock");
  const UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_TRUE(listener.valid());
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(listener.get(), 4), 0);

  ASSERT_TRUE(backends_.add_netdev(
      {.kind = "stream", .id = "net", .properties = properties({{"path", path}}), .fds = {}}));
  for (int round = 0; round < 3; ++round) {
    auto taken = backends_.take_netdev("net", "eth0");
    ASSERT_TRUE(taken) << taken.error().message;
    EXPECT_NE(taken->backend, nullptr);
    const UniqueFd accepted(::accept(listener.get(), nullptr, nullptr));
    EXPECT_TRUE(accepted.valid());
    EXPECT_EQ(error_of(backends_.take_netdev("net", "eth1")),
              "netdev net is already in use by device 'eth0'");
    EXPECT_FALSE(backends_.remove_netdev("net"));
    backends_.release("eth0");
  }
  // The peer is gone for good: the error names it, and the id is not left in use.
  ::unlink(path.c_str());
  EXPECT_THAT(error_of(backends_.take_netdev("net", "eth0")), HasSubstr("netdev net"));
  EXPECT_TRUE(backends_.remove_netdev("net"));
}

TEST_F(BackendsTest, DescriptorsAreNotTakenForOthersWithTheSameNumber) {
  const auto [ours, theirs] = socket_pair();
  const UniqueFd peer(theirs);
  ASSERT_TRUE(backends_.add_netdev(dgram("net", {ours})));
  backends_.take_netdev("net", "eth0")->backend.reset();
  backends_.release("eth0");
  ASSERT_FALSE(is_open(ours));
  // Something else gets the number.
  const auto [other, end] = socket_pair();
  const UniqueFd other_end(end);
  ASSERT_EQ(::dup2(other, ours), ours);
  const UniqueFd copy(ours == other ? -1 : other);
  EXPECT_THAT(error_of(backends_.take_netdev("net", "eth0")),
              HasSubstr("netdev net: the descriptors it was given were closed"));
  EXPECT_TRUE(is_open(ours));
  ::close(ours);
  EXPECT_TRUE(backends_.remove_netdev("net"));
}

TEST_F(BackendsTest, FailuresNameWhatIsAtFaultAndLeaveNothingOpen) {
  const auto before = open_files();
  EXPECT_THAT(
      error(backends_.add_drive(
          {.kind = "", .id = "disk", .properties = properties({{"file", dir_.file("missing")}}), .fds = {}})),
      ::testing::AllOf(HasSubstr("disk"), HasSubstr(dir_.file("missing"))));
  EXPECT_THAT(
      error(backends_.add_chardev(
          {.kind = "socket",
           .id = "chr",
           .properties = properties({{"path", dir_.file("none/x.sock")}, {"server", true}, {"wait", false}}),
           .fds = {}})),
      ::testing::AllOf(HasSubstr("chr"), HasSubstr("none/x.sock")));
  EXPECT_THAT(error(backends_.add_chardev({.kind = "telegraph", .id = "chr", .properties = {}, .fds = {}})),
              HasSubstr("telegraph"));
  EXPECT_THAT(error(backends_.add_netdev({.kind = "stream",
                                          .id = "net",
                                          .properties = properties({{"path", dir_.file("nobody.sock")}}),
                                          .fds = {}})),
              HasSubstr("netdev net"));
  // Refused while the options are read, and when the socket is looked at.
  const auto [one, two] = socket_pair();
  EXPECT_THAT(error(backends_.add_netdev(dgram("net", {one, two}))), HasSubstr("netdev net"));
  const int file = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  EXPECT_THAT(error(backends_.add_netdev(dgram("net", {file}))), HasSubstr("netdev net"));
  EXPECT_EQ(open_files(), before);
  EXPECT_FALSE(backends_.remove_netdev("net")) << "the id was not kept";
  EXPECT_FALSE(backends_.remove_drive("disk"));
}

TEST_F(BackendsTest, TheFilterLetsThroughWhatMayBeAddedLater) {
  WISP_SKIP_IF_SANITIZED();
  const auto [ours, theirs] = socket_pair();
  const UniqueFd peer(theirs);
  const std::string listener = dir_.file("switch.sock");
  const UniqueFd net_switch(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_TRUE(net_switch.valid());
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  listener.copy(address.sun_path, sizeof address.sun_path - 1);
  ASSERT_EQ(::bind(net_switch.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(net_switch.get(), 4), 0);
  const auto with = [](const char* kind, PropertySet set, std::vector<int> fds = {}) {
    return BackendConfig{.kind = kind, .id = "x", .properties = std::move(set), .fds = std::move(fds)};
  };
  const std::vector<BackendConfig> chardevs{
      with("pty", {}),
      with("null", {}),
      with("ringbuf", {}),
      with("file", properties({{"path", dir_.file("chr.log")}})),
      with("socket", properties({{"path", dir_.file("chr.sock")}, {"server", true}, {"wait", false}})),
      with("socket", properties({{"path", listener}}))};
  for (const DriverInfo& kind : driver_tables().chardevs) {
    const bool tried = std::ranges::any_of(chardevs, [&](const auto& one) { return one.kind == kind.name; });
    EXPECT_EQ(tried, kind.hotpluggable) << kind.name;
  }
  // No tap of this test is left behind: what it creates goes with the descriptor.
  const std::string tap = fmt::format("wb{}", ::getpid() % 100000);
  const std::vector<BackendConfig> netdevs{with("stream", properties({{"path", listener}})),
                                           with("dgram", {}, {ours}),
                                           with("tap", properties({{"ifname", tap}}))};
  dir_.image("x.img", test::kMiB);
  const pid_t child = ::fork();
  if (child == 0) {
    // A call that is not listed ends the child by SIGSYS.
    filtered_ = true;
    if (!install_seccomp(ThreadKind::kMain)) {
      ::_exit(100);
    }
    for (std::size_t i = 0; i < chardevs.size(); ++i) {
      if (!backends_.add_chardev(chardevs[i]) || !backends_.remove_chardev("x")) {
        ::_exit(static_cast<int>(1 + i));
      }
    }
    for (std::size_t i = 0; i < netdevs.size(); ++i) {
      const auto added = backends_.add_netdev(netdevs[i]);
      // Who may not create interfaces has been told so, and not ended.
      if ((!added && netdevs[i].kind != "tap") || (added && !backends_.remove_netdev("x"))) {
        ::_exit(static_cast<int>(20 + i));
      }
    }
    for (const char* aio : {"threads", "io_uring"}) {
      BackendConfig disk{.kind = "",
                         .id = "x",
                         .properties = properties({{"file", dir_.file("x.img")}, {"aio", aio}}),
                         .fds = {}};
      // A host may have no io_uring.
      if (!backends_.add_drive(disk) && std::string_view(aio) == "threads") {
        ::_exit(40);
      }
      (void)backends_.remove_drive("x");
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_FALSE(WIFSIGNALED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  ::close(ours);
}

struct SizeReceiver final : CharReceiver {
  std::size_t can_receive() override { return 0; }
  void receive(std::span<const std::uint8_t> /*bytes*/) override {}
  void resized(std::uint16_t columns, std::uint16_t rows) override { size = {columns, rows}; }
  std::pair<std::uint16_t, std::uint16_t> size;
};

TEST_F(BackendsTest, ATerminalsNewSizeIsTold) {
  int master = -1;
  int slave = -1;
  winsize size{.ws_row = 24, .ws_col = 80, .ws_xpixel = 0, .ws_ypixel = 0};
  ASSERT_EQ(::openpty(&master, &slave, nullptr, nullptr, &size), 0);
  const UniqueFd master_fd(master);
  const UniqueFd slave_fd(slave);
  SizeReceiver receiver;
  const auto run_until_size = [&](std::pair<std::uint16_t, std::uint16_t> wanted) {
    for (int i = 0; i < 500 && receiver.size != wanted; ++i) {
      loop_->run_once(10);
    }
    return receiver.size == wanted;
  };
  bool first = false;
  bool second = false;
  {
    const StandardFiles standard(slave, slave);
    ASSERT_TRUE(backends_.add_chardev({.kind = "stdio", .id = "tty", .properties = {}, .fds = {}}));
    CharBackend* terminal = *backends_.use_chardev("tty", "serial");
    terminal->set_receiver(&receiver);
    first = run_until_size({80, 24});
    size = {.ws_row = 50, .ws_col = 132, .ws_xpixel = 0, .ws_ypixel = 0};
    ::ioctl(master, TIOCSWINSZ, &size);
    backends_.refresh_terminal_sizes();
    second = run_until_size({132, 50});
    terminal->set_receiver(nullptr);
    backends_.release("serial");
    (void)backends_.remove_chardev("tty");
  }
  EXPECT_TRUE(first);
  EXPECT_TRUE(second);
}

TEST_F(BackendsTest, EachDeviceHasASourceOfItsOwn) {
  ASSERT_TRUE(backends_.add_object({.kind = "rng-random",
                                    .id = "file",
                                    .properties = properties({{"filename", dir_.write("bytes", "abcdef")}}),
                                    .fds = {}}));
  ASSERT_TRUE(backends_.add_object({.kind = "rng-random", .id = "system", .properties = {}, .fds = {}}));
  ASSERT_TRUE(backends_.add_object({.kind = "rng-random",
                                    .id = "missing",
                                    .properties = properties({{"filename", dir_.file("nothing")}}),
                                    .fds = {}}));
  std::array<std::uint8_t, 3> bytes{};
  for (int i = 0; i < 2; ++i) {
    auto source = backends_.open_rng("file");
    ASSERT_TRUE(source) << source.error().message;
    ASSERT_TRUE((*source)->fill(bytes));
    EXPECT_EQ(std::string(bytes.begin(), bytes.end()), "abc");
  }
  EXPECT_TRUE((*backends_.open_rng("system"))->fill(bytes));
  EXPECT_THAT(error_of(backends_.open_rng("missing")), HasSubstr(dir_.file("nothing")));
}

}  // namespace
}  // namespace wisp
