#include "net/netdev.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <array>
#include <string>

namespace wisp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// Parses as the command line would: text against the table of the kind.
Result<NetdevConfig> parse(std::string_view kind, std::span<const PropertySpec> specs,
                           const std::vector<std::pair<std::string, std::string>>& options) {
  PropertySet set;
  for (const auto& [name, text] : options) {
    const PropertySpec* spec = find_property(specs, name);
    if (spec == nullptr) {
      return fail("unknown option {}", name);
    }
    WISP_ASSIGN(auto value, parse_property(*spec, text));
    set.set(name, std::move(value));
  }
  return parse_netdev(kind, "n0", set);
}

TEST(NetdevConfig, TapByNameAndByDescriptors) {
  const auto named =
      parse("tap", kTapProperties, {{"ifname", "tap0"}, {"queues", "4"}, {"vhost", "on"}}).value();
  EXPECT_EQ(named.kind, NetdevKind::kTap);
  EXPECT_EQ(named.ifname, "tap0");
  EXPECT_EQ(named.queues, 4);
  EXPECT_TRUE(named.vhost);
  const auto kata = parse("tap", kTapProperties, {{"fds", "4:5"}, {"vhostfds", "6:7"}}).value();
  EXPECT_THAT(kata.fds, ElementsAre(4, 5));
  EXPECT_THAT(kata.vhost_fds, ElementsAre(6, 7));
  EXPECT_TRUE(kata.vhost) << "vhostfds= says so";
  EXPECT_EQ(kata.queues, 2);
  EXPECT_THAT(parse("tap", kTapProperties, {{"fds", "4"}}).value().fds, ElementsAre(4));
}

TEST(NetdevConfig, ErrorsNameTheNetdevAndTheOption) {
  const auto error = [](std::string_view kind, std::span<const PropertySpec> specs,
                        const std::vector<std::pair<std::string, std::string>>& options) {
    const auto result = parse(kind, specs, options);
    return result ? std::string("accepted") : result.error().message;
  };
  EXPECT_THAT(error("tap", kTapProperties, {}), StartsWith("netdev n0: give either ifname="));
  EXPECT_THAT(error("tap", kTapProperties, {{"ifname", "a"}, {"fd", "3"}}), HasSubstr("either"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fd", "3:4"}}), HasSubstr("fds="));
  EXPECT_THAT(error("tap", kTapProperties, {{"fd", "3"}, {"fds", "4"}}), HasSubstr("both"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fds", "3:3"}}), HasSubstr("twice"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fds", "3:"}}), HasSubstr("is not a list of file descriptors"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fd", "99999999999"}}),
              HasSubstr("is not a list of file descriptors"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fd", "-1"}}), HasSubstr("is not a list of file descriptors"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fds", "3:4"}, {"queues", "3"}}), HasSubstr("queues=3"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fd", "3"}, {"vhostfds", "4:5"}}), HasSubstr("2 vhost"));
  EXPECT_THAT(error("tap", kTapProperties, {{"fd", "3"}, {"vhostfd", "4"}, {"vhost", "off"}}),
              HasSubstr("vhost=on"));
  EXPECT_THAT(error("tap", kTapProperties, {{"ifname", "a"}, {"queues", "17"}}), HasSubstr("1 to 16"));
  EXPECT_THAT(error("passt", kPasstProperties, {{"hostfwd", "bad"}}), HasSubstr("hostfwd=bad"));
  EXPECT_THAT(error("passt", kPasstProperties, {{"ipv4", "off"}, {"ipv6", "off"}}), HasSubstr("ipv6=off"));
  EXPECT_THAT(error("stream", kStreamProperties, {}), HasSubstr("path="));
  EXPECT_THAT(error("dgram", kDgramProperties, {}), HasSubstr("fd="));
  EXPECT_THAT(error("bridge", {}, {}), HasSubstr("'bridge' is not one of tap, passt, user, stream, dgram"));
}

TEST(NetdevConfig, PasstTakesPortForwards) {
  const auto config =
      parse("user", kPasstProperties, {{"hostfwd", "tcp::2222-:22"}, {"mtu", "1500"}}).value();
  EXPECT_EQ(config.kind, NetdevKind::kPasst);
  ASSERT_EQ(config.passt.forwards.size(), 1U);
  EXPECT_EQ(config.passt.forwards[0].host_port, 2222);
  EXPECT_EQ(config.passt.mtu, 1500U);
}

TEST(NetdevConfig, PasstForwardsAreJoined) {
  const auto* hostfwd = find_property(kPasstProperties, "hostfwd");
  ASSERT_NE(hostfwd, nullptr);
  ASSERT_FALSE(hostfwd->joined_by.empty());
  const std::string joined = "tcp::2222-:22" + std::string(hostfwd->joined_by) + "udp:127.0.0.1:53-:5353";
  const auto config = parse("user", kPasstProperties, {{"hostfwd", joined.c_str()}}).value();
  ASSERT_EQ(config.passt.forwards.size(), 2U);
  EXPECT_EQ(config.passt.forwards[0].host_port, 2222);
  EXPECT_EQ(config.passt.forwards[1],
            (PortForward{.udp = true, .host_address = "127.0.0.1", .host_port = 53, .guest_port = 5353}));
}

TEST(OpenNetdev, TakesDescriptorsOverOnFailureToo) {
  const int fd = ::open("/dev/null", O_RDWR);
  NetdevConfig config{.kind = NetdevKind::kTap, .id = "n0", .fds = {fd}};
  const auto netdev = open_netdev(config);
  ASSERT_FALSE(netdev.has_value());
  EXPECT_THAT(netdev.error().message, StartsWith("netdev n0: fd "));
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1) << "closed";
}

TEST(OpenNetdev, OpensSocketBackends) {
  for (const auto& [kind, type] :
       {std::pair{NetdevKind::kStream, SOCK_STREAM}, {NetdevKind::kDgram, SOCK_DGRAM}}) {
    std::array<int, 2> fds{};
    ASSERT_EQ(::socketpair(AF_UNIX, type, 0, fds.data()), 0);
    const UniqueFd peer(fds[1]);
    const auto netdev = open_netdev({.kind = kind, .id = "n0", .fds = {fds[0]}});
    ASSERT_TRUE(netdev.has_value()) << netdev.error().message;
    EXPECT_FALSE(netdev->backend->has_vnet_header());
    EXPECT_TRUE(netdev->vhost_fds.empty());
  }
}

}  // namespace
}  // namespace wisp
