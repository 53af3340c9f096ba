#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "control/qmp_commands.h"
#include "control/qmp_test_client.h"

namespace wisp {
namespace {

using test::QmpBench;
using test::QmpClient;
using testing::HasSubstr;

std::string error_of(const Json& reply) {
  return reply.contains("error") ? reply["error"]["desc"].get<std::string>() : reply.dump();
}
std::string class_of(const Json& reply) {
  return reply.contains("error") ? reply["error"]["class"].get<std::string>() : reply.dump();
}

TEST(Qmp, GreetsLikeQemu) {
  QmpBench bench;
  QmpClient client(bench.path());
  const Json greeting = client.next();
  EXPECT_TRUE(greeting["QMP"]["version"]["qemu"]["major"].is_number());
  EXPECT_THAT(greeting["QMP"]["version"]["package"].get<std::string>(), testing::StartsWith("wisp-"));
  EXPECT_EQ(greeting["QMP"]["capabilities"], Json::array());
  EXPECT_EQ(client.execute("qmp_capabilities"), Json({{"return", Json::object()}}));
  EXPECT_EQ(client.execute("qmp_capabilities", {{"enable", Json::array()}}),
            Json({{"return", Json::object()}}));
  EXPECT_EQ(class_of(client.execute("qmp_capabilities", {{"enable", {"oob"}}})), "GenericError");
}

TEST(Qmp, SocketIsForItsOwnerOnly) {
  QmpBench bench;
  struct stat status{};
  ASSERT_EQ(::stat(bench.path().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777U, 0600U);
}

TEST(Qmp, EchoesIdsOfAnyType) {
  QmpBench bench;
  QmpClient client = bench.client();
  for (const Json& id :
       {Json(1), Json("x"), Json({{"a", 1}}), Json::array({1, "2"}), Json(nullptr), Json(true)}) {
    EXPECT_EQ(client.ask(Json{{"execute", "query-name"}, {"id", id}}.dump())["id"], id);
    EXPECT_EQ(client.ask(Json{{"execute", "nonsense"}, {"id", id}}.dump())["id"], id);
    EXPECT_EQ(client.ask(Json{{"id", id}}.dump())["id"], id);
  }
  EXPECT_FALSE(client.execute("query-name").contains("id"));
}

TEST(Qmp, RefusesMalformedRequestsInQemusWords) {
  QmpBench bench;
  QmpClient client = bench.client();
  struct Case {
    const char* request;
    const char* error_class;
    const char* text;
  };
  for (const Case& c : std::initializer_list<Case>{
           {R"({"execute": "frobnicate"})", "CommandNotFound", "The command frobnicate has not been found"},
           {R"({})", "GenericError", "QMP input lacks member 'execute'"},
           {R"({"execute": 5})", "GenericError", "QMP input member 'execute' must be a string"},
           {R"({"execute": "stop", "arguments": 5})", "GenericError",
            "QMP input member 'arguments' must be an object"},
           {R"({"execute": "stop", "foo": 5})", "GenericError", "QMP input member 'foo' is unexpected"},
           {R"({"execute": "stop", "arguments": {"a": 1}})", "GenericError", "Parameter 'a' is unexpected"},
           {R"({"execute": "balloon"})", "GenericError", "Parameter 'value' is missing"},
           {R"({"execute": "balloon", "arguments": {"value": "1"}})", "GenericError",
            "Invalid parameter type for 'value', expected: integer"},
           {R"({"execute": "balloon", "arguments": {"value": -1}})", "GenericError",
            "Parameter 'value' expects a size in bytes above 0"},
           {R"({"execute": "balloon", "arguments": {"value": 0}})", "GenericError",
            "Parameter 'value' expects a size in bytes above 0"},
           {R"([1, 2])", "GenericError", "QMP input must be a JSON object"},
           {R"({"execute": "stop", "execute": "stop"})", "GenericError",
            "JSON parse error, key 'execute' is given twice"},
           {R"({"execute": stop})", "GenericError", "JSON parse error at byte 13"},
           {R"({"a": 1e999})", "GenericError", "JSON parse error, a number is out of range"},
           {"{\"execute\": \"\xff\xfe\"}", "GenericError", "JSON parse error at byte 14"},
           {"hello\n", "GenericError", "JSON parse error, expected an object"},
           {"}\n", "GenericError", "JSON parse error, expected an object"},
           {"{\"a\": ]\n", "GenericError", "JSON parse error, found ']' where '}' is due"},
           {"{\"a\n", "GenericError", "JSON parse error, a string does not end"},
           {R"({"execute": "getfd", "arguments": {"fdname": "x"}})", "GenericError",
            "No file descriptor supplied via SCM_RIGHTS"},
           {R"({"execute": "closefd", "arguments": {"fdname": "x"}})", "GenericError",
            "File descriptor named 'x' not found"},
       }) {
    const Json reply = client.ask(c.request);
    EXPECT_EQ(class_of(reply), c.error_class) << c.request;
    EXPECT_EQ(error_of(reply), c.text) << c.request;
  }
  EXPECT_EQ(client.execute("query-status")["return"]["status"], "running");
}

TEST(Qmp, DeepNestingIsRefusedAndForgotten) {
  QmpBench bench;
  QmpClient client = bench.client();
  client.send(std::string(200'000, '[') + "\n");
  EXPECT_EQ(error_of(client.next()), "JSON parse error, nested deeper than 64 levels");
  EXPECT_EQ(client.execute("query-status")["return"]["running"], true);
}

TEST(Qmp, AMessageWithoutEndEndsTheConnection) {
  QmpBench bench;
  QmpClient client = bench.client();
  client.send("{\"execute\": \"" + std::string(3'000'000, 'x'));
  EXPECT_EQ(error_of(client.next()), "JSON parse error, a message is longer than 1048576 bytes");
  EXPECT_EQ(client.line(), "");
  EXPECT_EQ(bench.client().execute("query-status")["return"]["running"], true);
}

TEST(Qmp, TakesMessagesInAnyPieces) {
  QmpBench bench;
  QmpClient client = bench.client();
  const std::string request = R"({"execute": "query-name", "id": "a}{\"b"})";
  for (const char c : request) {
    client.send(std::string_view(&c, 1));
  }
  EXPECT_EQ(client.next()["id"], "a}{\"b");
  client.send(request + request + "\n\r\n\t " + request);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(client.next()["return"]["name"], "web-1");
  }
}

TEST(Qmp, AnswersALongPipelineInOrder) {
  QmpBench bench;
  QmpClient client = bench.client();
  std::string requests;
  for (int i = 0; i < 2000; ++i) {
    requests += Json{{"execute", "query-status"}, {"id", i}}.dump();
  }
  std::thread sender([&] { client.send(requests); });
  for (int i = 0; i < 2000; ++i) {
    ASSERT_EQ(client.next()["id"], i);
  }
  sender.join();
}

TEST(Qmp, AHalfClosedClientStillGetsItsAnswers) {
  QmpBench bench;
  QmpClient client = bench.client();
  std::string requests;
  for (int i = 0; i < 100; ++i) {
    requests += Json{{"execute", "query-version"}, {"id", i}}.dump();
  }
  client.send(requests);
  ::shutdown(client.fd(), SHUT_WR);
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(client.next()["id"], i);
  }
  EXPECT_EQ(client.line(), "");
}

TEST(Qmp, LifeCycleWithItsEventsInOrder) {
  QmpBench bench;
  QmpClient client = bench.client();
  QmpClient other = bench.client();
  QmpClient silent = bench.client();
  EXPECT_TRUE(other.execute("qmp_capabilities").contains("return"));

  client.send(R"({"execute": "stop"})");
  const Json stop = client.next();
  EXPECT_EQ(stop["event"], "STOP");
  EXPECT_GT(stop["timestamp"]["seconds"].get<std::int64_t>(), 1'600'000'000);
  EXPECT_LT(stop["timestamp"]["microseconds"].get<std::int64_t>(), 1'000'000);
  EXPECT_FALSE(stop.contains("data"));
  EXPECT_EQ(client.next(), Json({{"return", Json::object()}}));
  EXPECT_EQ(client.execute("stop"), Json({{"return", Json::object()}})) << "stopping twice is fine";
  EXPECT_EQ(client.execute("query-status")["return"]["status"], "paused");
  EXPECT_EQ(client.execute("cont")["event"], "RESUME");
  EXPECT_TRUE(client.next().contains("return"));
  EXPECT_EQ(client.execute("system_powerdown")["event"], "POWERDOWN");
  EXPECT_TRUE(client.next().contains("return"));
  EXPECT_EQ(client.execute("system_reset")["data"],
            Json({{"guest", false}, {"reason", "host-qmp-system-reset"}}));
  EXPECT_TRUE(client.next().contains("return"));
  bench.on_loop([&] { bench.machine().tell([](MachineEvents& e) { e.on_reset(true); }); });
  EXPECT_EQ(client.next()["data"], Json({{"guest", true}, {"reason", "guest-reset"}}));

  // The answer to quit comes before its event, as QEMU has it.
  client.send(R"({"execute": "quit"})");
  EXPECT_EQ(client.next(), Json({{"return", Json::object()}}));
  const Json shutdown = client.next();
  EXPECT_EQ(shutdown["event"], "SHUTDOWN");
  EXPECT_EQ(shutdown["data"], Json({{"guest", false}, {"reason", "host-qmp-quit"}}));
  EXPECT_EQ(bench.on_loop([&] { return bench.machine().quits; }), 1);

  for (const char* event : {"STOP", "RESUME", "POWERDOWN", "RESET", "RESET", "SHUTDOWN"}) {
    EXPECT_EQ(other.next()["event"], event);
  }
  // One that never sent a command saw none of it.
  EXPECT_EQ(silent.execute("query-status")["return"]["status"], "shutdown");
}

TEST(Qmp, ShutdownReasons) {
  QmpBench bench;
  QmpClient client = bench.client();
  client.execute("qmp_capabilities");
  const std::vector<std::pair<ShutdownReason, const char*>> reasons{
      {ShutdownReason::kGuestShutdown, "guest-shutdown"}, {ShutdownReason::kGuestReset, "guest-reset"},
      {ShutdownReason::kHostSignal, "host-signal"},       {ShutdownReason::kHostUi, "host-ui"},
      {ShutdownReason::kDebugExit, "guest-shutdown"},     {ShutdownReason::kError, "host-error"}};
  for (const auto& [reason, name] : reasons) {
    bench.on_loop(
        [&, why = reason] { bench.machine().tell([why](MachineEvents& e) { e.on_shutdown(true, why); }); });
    EXPECT_EQ(client.next()["data"], Json({{"guest", true}, {"reason", name}}));
  }
}

TEST(Qmp, BalloonEventsComeAtMostOnceASecondAndTheLastIsNotLost) {
  QmpBench bench;
  QmpClient client = bench.client();
  EXPECT_EQ(client.execute("query-balloon")["return"],
            Json({{"actual", 256 << 20}, {"statistics", {{"stat-free-memory", 1024}}}}));
  const auto start = std::chrono::steady_clock::now();
  bench.on_loop([&] {
    for (std::uint64_t i = 1; i <= 1000; ++i) {
      bench.server().on_balloon_change(i << 20);
    }
  });
  EXPECT_EQ(client.next()["data"]["actual"], 1 << 20);
  EXPECT_EQ(client.next()["data"]["actual"], 1000 << 20);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(900));
  bench.on_loop([&] { bench.machine().has_balloon = false; });
  EXPECT_EQ(class_of(client.execute("query-balloon")), "DeviceNotActive");
  EXPECT_EQ(class_of(client.execute("balloon", {{"value", 1}})), "DeviceNotActive");
}

TEST(Qmp, DescriptorsGoFromTheClientIntoANetwork) {
  QmpBench bench;
  QmpClient client = bench.client();
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC | O_NONBLOCK), 0);
  const UniqueFd in(pipe[0]);
  UniqueFd out(pipe[1]);
  client.send_with_fd(R"({"execute": "getfd", "arguments": {"fdname": "tap0"}})", out.get());
  EXPECT_EQ(client.next(), Json({{"return", Json::object()}}));
  out.reset();
  EXPECT_EQ(error_of(client.execute("netdev_add", {{"id", "n"}, {"type", "tap"}, {"fd", "other"}})),
            "Parameter 'fd': file descriptor named 'other' has not been found; send it with getfd");
  EXPECT_EQ(error_of(client.execute("netdev_add", {{"id", "n"}, {"type", "tap"}, {"fds", "tap0:tap0"}})),
            "Parameter 'fds': file descriptor named 'tap0' is given twice");
  EXPECT_EQ(error_of(client.execute("netdev_add", {{"id", "n"}, {"type", "tap"}, {"fds", "0"}})),
            "Parameter 'fds': file descriptor named '0' has not been found; send it with getfd");
  EXPECT_EQ(error_of(client.execute("netdev_add", {{"id", "n"}, {"type", "tap"}, {"fd", "tap0:tap1"}})),
            "Parameter 'fd': 'tap0:tap1' names more than one file descriptor");
  EXPECT_TRUE(
      client.execute("netdev_add", {{"id", "n"}, {"type", "tap"}, {"fds", "tap0"}}).contains("return"));
  bench.on_loop([&] {
    ASSERT_EQ(bench.machine().netdevs.size(), 1U);
    ASSERT_EQ(bench.machine().taken_fds.size(), 1U);
    EXPECT_EQ(::write(bench.machine().taken_fds[0].get(), "x", 1), 1);
  });
  char byte = 0;
  EXPECT_EQ(::read(in.get(), &byte, 1), 1);
  EXPECT_EQ(byte, 'x');
  // The name is used up.
  EXPECT_THAT(error_of(client.execute("netdev_add", {{"id", "m"}, {"fd", "tap0"}})),
              HasSubstr("has not been found"));
  EXPECT_TRUE(client.execute("netdev_del", {{"id", "n"}}).contains("return"));
  EXPECT_EQ(error_of(client.execute("netdev_del", {{"id", "n"}})), "netdev 'n' is not there");
}

// The read end sees the end of the pipe only when every copy of the write end is closed.
bool all_closed(int read_end) {
  char byte = 0;
  for (int i = 0; i < 1000; ++i) {
    if (::read(read_end, &byte, 1) == 0) {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

TEST(Qmp, DescriptorsOfAClientAreClosedWithIt) {
  QmpBench bench;
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC | O_NONBLOCK), 0);
  const UniqueFd in(pipe[0]);
  UniqueFd out(pipe[1]);
  {
    QmpClient client = bench.client();
    for (const char* name : {"a", "b", "a"}) {
      client.send_with_fd(Json{{"execute", "getfd"}, {"arguments", {{"fdname", name}}}}.dump(), out.get());
      EXPECT_TRUE(client.next().contains("return"));
    }
    // Names that could be numbers, and descriptors that nobody claims.
    client.send_with_fd(R"({"execute": "getfd", "arguments": {"fdname": "3x"}})", out.get());
    EXPECT_THAT(error_of(client.next()), HasSubstr("does not start with a digit"));
    client.send_with_fd(R"({"execute": "query-status"})", out.get());
    EXPECT_TRUE(client.next().contains("return"));
    client.send_with_fd(R"({"execute": "query-st)", out.get());
  }
  out.reset();
  EXPECT_TRUE(all_closed(in.get()));
}

TEST(Qmp, AFailedHotplugLeavesNoDescriptor) {
  QmpBench bench;
  QmpClient client = bench.client();
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC | O_NONBLOCK), 0);
  const UniqueFd in(pipe[0]);
  UniqueFd out(pipe[1]);
  client.send_with_fd(R"({"execute": "getfd", "arguments": {"fdname": "t"}})", out.get());
  EXPECT_TRUE(client.next().contains("return"));
  out.reset();
  EXPECT_EQ(error_of(client.execute("netdev_add", {{"id", "bad"}, {"fd", "t"}})),
            "netdev bad: no such interface");
  EXPECT_TRUE(all_closed(in.get()));
}

TEST(Qmp, HotplugTakesQemusForms) {
  QmpBench bench;
  QmpClient client = bench.client();
  EXPECT_TRUE(
      client
          .execute("blockdev-add", {{"node-name", "data"},
                                    {"driver", "raw"},
                                    {"file", {{"driver", "file"}, {"filename", "/d"}, {"aio", "threads"}}},
                                    {"cache", {{"direct", true}, {"no-flush", false}}},
                                    {"read-only", true}})
          .contains("return"));
  EXPECT_TRUE(
      client.execute("blockdev-add", {{"node-name", "two"}, {"driver", "host_device"}, {"filename", "/e"}})
          .contains("return"));
  bench.on_loop([&] {
    const auto& drives = bench.machine().drives;
    ASSERT_EQ(drives.size(), 2U);
    EXPECT_EQ(drives[0].properties.get_string("file"), "/d");
    EXPECT_EQ(drives[0].properties.get_string("aio"), "threads");
    EXPECT_TRUE(drives[0].properties.get_bool("direct", false));
    EXPECT_TRUE(drives[0].properties.get_bool("readonly", false));
    EXPECT_EQ(drives[1].properties.get_string("file"), "/e");
  });
  EXPECT_TRUE(client
                  .execute("device_add", {{"driver", "virtio-blk-device"},
                                          {"id", "disk1"},
                                          {"drive", "data"},
                                          {"num-queues", 2},
                                          {"serial", "s1"}})
                  .contains("return"));
  bench.on_loop([&] {
    const auto& device = bench.machine().added_devices.at(0);
    EXPECT_EQ(device.properties.get_uint("num-queues", 0), 2U);
    EXPECT_EQ(device.properties.get_string("serial"), "s1");
  });
  client.send(R"({"execute": "device_del", "arguments": {"id": "disk1"}})");
  EXPECT_EQ(client.next()["data"], Json({{"device", "disk1"}, {"path", "/machine/peripheral/disk1"}}));
  EXPECT_TRUE(client.next().contains("return"));
  EXPECT_TRUE(client.execute("blockdev-del", {{"node-name", "data"}}).contains("return"));

  EXPECT_EQ(
      client.execute("chardev-add", {{"id", "c"}, {"backend", {{"type", "pty"}, {"data", Json::object()}}}}),
      Json({{"return", {{"pty", "/dev/pts/9"}}}}));
  EXPECT_TRUE(
      client
          .execute("chardev-add", {{"id", "s"},
                                   {"backend",
                                    {{"type", "socket"},
                                     {"data", {{"addr", {{"type", "unix"}, {"data", {{"path", "/s"}}}}}}}}}})
          .contains("return"));
  bench.on_loop([&] {
    const auto& chardev = bench.machine().added_chardevs.at(1);
    EXPECT_EQ(chardev.properties.get_string("path"), "/s");
    EXPECT_TRUE(chardev.properties.get_bool("server", false));
    EXPECT_FALSE(chardev.properties.get_bool("wait", true)) << "which would hold the machine up";
  });
  EXPECT_TRUE(client.execute("chardev-remove", {{"id", "s"}}).contains("return"));
}

// What StratoVirt's documentation and Kata send: no drive=, a slot in addr=, and the drive goes with its
// device.
TEST(Qmp, HotplugTakesStratovirtsForms) {
  QmpBench bench;
  QmpClient client = bench.client();
  const Json add{{"node-name", "drive-0"},
                 {"file", {{"driver", "file"}, {"filename", "/b"}}},
                 {"cache", {{"direct", true}}},
                 {"read-only", false}};
  for (int round = 0; round < 2; ++round) {
    EXPECT_TRUE(client.execute("blockdev-add", add).contains("return")) << round;
    EXPECT_EQ(error_of(client.execute("blockdev-add", add)), "drive 'drive-0' is there already");
    EXPECT_TRUE(
        client.execute("device_add", {{"id", "drive-0"}, {"driver", "virtio-blk-mmio"}, {"addr", "0x1"}})
            .contains("return"));
    EXPECT_EQ(client.execute("device_del", {{"id", "drive-0"}})["event"], "DEVICE_DELETED");
    EXPECT_TRUE(client.next().contains("return"));
  }
  bench.on_loop([&] {
    EXPECT_EQ(bench.machine().added_devices.at(0).driver, "virtio-blk-device");
    EXPECT_EQ(bench.machine().added_devices.at(0).properties.get_string("drive"), "drive-0");
  });
}

TEST(Qmp, HotplugErrors) {
  QmpBench bench;
  QmpClient client = bench.client();
  struct Case {
    const char* command;
    Json arguments;
    const char* text;
  };
  const Json nested{{"driver", "file"}, {"filename", "/d"}};
  for (const Case& c : std::vector<Case>{
           {"device_add", {{"id", "x"}}, "Parameter 'driver' is missing"},
           {"device_add", {{"driver", "virtio-blk-device"}}, "Parameter 'id' is missing"},
           {"device_add",
            {{"driver", "nope"}, {"id", "x"}},
            "device_add: unknown device 'nope'; known: virtio-blk-device, virtio-net-device, "
            "virtio-rng-device, virtio-balloon-device, virtio-vsock-device, vhost-vsock-device, "
            "vhost-user-fs-device, virtio-serial-device, virtconsole, virtserialport, isa-debug-exit, "
            "pc-testdev"},
           {"device_add",
            {{"driver", "virtio-blk-pci"}, {"id", "x"}},
            "device_add: 'virtio-blk-pci' needs a standard machine with PCI; on a microVM use "
            "'virtio-blk-device'"},
           {"device_add",
            {{"driver", "virtio-serial-device"}, {"id", "x"}},
            "Device 'virtio-serial-device' can not be hotplugged; give it on the command line"},
           {"chardev-add",
            {{"id", "c"}, {"backend", {{"type", "stdio"}, {"data", Json::object()}}}},
            "Character device 'stdio' can not be added later; give it on the command line"},
           {"device_add",
            {{"driver", "virtio-blk-device"}, {"id", "x"}},
            "device_add: option 'drive' is missing (id of the -drive behind it)"},
           {"device_add",
            {{"driver", "virtio-blk-device"}, {"id", "x"}, {"drive", {1}}},
            "Invalid parameter type for 'drive', expected: string, number, boolean, or a list of {\"str\": "
            "...}"},
           {"device_add",
            {{"driver", "virtio-blk-device"}, {"id", "x"}, {"drive", "d"}, {"num-queues", 17}},
            "device_add: option 'num-queues': '17' is out of range, expected 1 to 16"},
           {"device_add",
            {{"driver", "virtio-blk-device"}, {"id", "x"}, {"drive", "d"}, {"num-queues", -1}},
            "device_add: option 'num-queues': '-1' is not a number"},
           {"device_add",
            {{"driver", "virtio-blk-device"}, {"id", "x"}, {"drive", "d"}, {"bus", "pci.0"}},
            "device_add: option 'bus': a microVM has no PCI bus; leave it out"},
           {"device_add",
            {{"driver", "virtio-blk-device"}, {"id", "a b"}, {"drive", "d"}},
            "device_add: id 'a b' is not usable, expected 1 to 127 letters, digits, '-', '_', '.' or ':'"},
           {"device_del", {{"id", "nope"}}, "device 'nope' is not there"},
           {"blockdev-add", {{"node-name", "d"}}, "Parameter 'file' is missing"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", "node"}},
            "Parameter 'file' must be an object with driver and filename; nodes are not stacked here"},
           {"blockdev-add", {{"node-name", "d"}, {"driver", "file"}}, "Parameter 'filename' is missing"},
           {"blockdev-add",
            {{"node-name", "d"}, {"driver", "qcow2"}, {"file", nested}},
            "blockdev-add: option 'format': 'qcow2' is not supported, expected raw; convert the image with: "
            "qemu-img convert -O raw OLD NEW"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", {{"driver", "nbd"}, {"filename", "/d"}}}},
            "Parameter 'file.driver' does not accept value '\"nbd\"', expected file or host_device"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", {{"driver", 5}, {"filename", "/d"}}}},
            "Parameter 'file.driver' does not accept value '5', expected file or host_device"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", {{"driver", "file"}, {"path", "/d"}}}},
            "Parameter 'file.path' is unexpected"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", nested}, {"cache", {{"no-flush", true}}}},
            "Parameter 'cache.no-flush': a drive always keeps what the guest flushed; use false"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", nested}, {"cache", {{"direct", "on"}}}},
            "Parameter 'cache.direct' is unexpected, expected direct and no-flush as booleans"},
           {"blockdev-add",
            {{"node-name", "d"}, {"file", nested}, {"colour", "red"}},
            "blockdev-add: unknown option 'colour'; known: file, format, readonly, direct, aio, discard, "
            "detect-zeroes, throttling.iops-total, throttling.iops-total-max, throttling.bps-total, "
            "throttling.bps-total-max, media, if, l2-cache-size, refcount-cache-size"},
           {"blockdev-del", {{"node-name", "d"}}, "drive 'd' is not there"},
           {"netdev_add",
            {{"id", "n"}, {"type", "slirp"}},
            "netdev_add: unknown network 'slirp'; known: tap, user, passt, stream, dgram"},
           {"chardev-add", {{"id", "c"}, {"backend", {{"type", 5}}}}, "Parameter 'backend.type' is missing"},
           {"chardev-add",
            {{"id", "c"}, {"backend", {{"type", "socket"}, {"data", {{"addr", {{"type", 5}}}}}}}},
            "Parameter 'addr.type' must be unix or inet"},
           {"chardev-add",
            {{"id", "c"}, {"backend", {{"type", "socket"}, {"data", {{"path", "/s"}, {"wait", true}}}}}},
            "Parameter 'wait' must be false: a machine that runs cannot be held up for a client"},
           {"chardev-add",
            {{"id", "c"}, {"backend", {{"type", "socket"}, {"data", 5}}}},
            "Invalid parameter type for 'backend.data', expected: object"},
           {"chardev-add",
            {{"id", "c"}, {"backend", {{"type", "socket"}, {"data", {{"path", "/s"}, {"nowait", false}}}}}},
            "Parameter 'wait' must be false: a machine that runs cannot be held up for a client"},
           {"device-list-properties", {{"typename", "nope"}}, "Device 'nope' not found"},
           {"query-command-line-options", {{"option", "nope"}}, "invalid option name: nope"},
       }) {
    EXPECT_EQ(error_of(client.execute(c.command, c.arguments)), c.text) << c.command << c.arguments;
  }
}

TEST(Qmp, RingsAreReadAndWritten) {
  QmpBench bench;
  QmpClient client = bench.client();
  const auto write = [&](const Json& data, const char* format) {
    return client.execute("ringbuf-write", {{"device", "log0"}, {"data", data}, {"format", format}});
  };
  const auto read = [&](std::uint64_t size, const char* format) {
    return client.execute("ringbuf-read", {{"device", "log0"}, {"size", size}, {"format", format}})["return"];
  };
  for (const auto& [bytes, base64] :
       std::vector<std::pair<std::string, std::string>>{{"", ""},
                                                        {"f", "Zg=="},
                                                        {"fo", "Zm8="},
                                                        {"foo", "Zm9v"},
                                                        {"foob", "Zm9vYg=="},
                                                        {"fooba", "Zm9vYmE="},
                                                        {"foobar", "Zm9vYmFy"}}) {
    EXPECT_EQ(write(bytes, "utf8"), Json({{"return", Json::object()}}));
    EXPECT_EQ(read(100, "base64"), base64);
    EXPECT_EQ(write(base64, "base64"), Json({{"return", Json::object()}}));
    EXPECT_EQ(read(100, "utf8"), bytes);
  }
  write("/+8A", "base64");
  EXPECT_EQ(read(1, "utf8"), "\xef\xbf\xbd") << "a byte that is no UTF-8";
  EXPECT_EQ(read(UINT64_MAX, "base64"), "7wA=");
  EXPECT_EQ(client.execute("ringbuf-write", {{"device", "log0"}, {"data", "gr\xc3\xbc\xc3\x9f"}}),
            Json({{"return", Json::object()}}));
  EXPECT_EQ(client.execute("ringbuf-read", {{"device", "log0"}, {"size", 4}})["return"], "gr\xc3\xbc");
  for (const char* bad : {"Zg", "Zg=", "Z===", "====", "Z@==", "Zg==Zg=="}) {
    EXPECT_EQ(error_of(write(bad, "base64")), "Parameter 'data' is not base64") << bad;
  }
  EXPECT_EQ(error_of(write("a", "hex")),
            "Parameter 'format' does not accept that value, expected utf8 or base64");
  for (const int size : {0, -1}) {
    EXPECT_EQ(error_of(client.execute("ringbuf-read", {{"device", "log0"}, {"size", size}})),
              "Parameter 'size' must be greater than zero");
  }
  EXPECT_EQ(error_of(client.execute("ringbuf-read", {{"device", "x"}, {"size", 1}})),
            "there is no chardev with id 'x'");
}

TEST(Qmp, QueriesHaveQemusFields) {
  QmpBench bench("550e8400-e29b-41d4-a716-446655440000");
  QmpClient client = bench.client();
  const auto query = [&](const char* name) { return client.execute(name)["return"]; };
  EXPECT_EQ(query("query-status"), Json({{"status", "running"}, {"running", true}, {"singlestep", false}}));
  EXPECT_EQ(query("query-uuid"), Json({{"UUID", "550e8400-e29b-41d4-a716-446655440000"}}));
  EXPECT_EQ(query("query-target"), Json({{"arch", "x86_64"}}));
  EXPECT_EQ(query("query-kvm")["enabled"], true);
  EXPECT_EQ(query("query-iothreads")[0]["thread-id"], 77);
  EXPECT_EQ(query("query-memory-size-summary")["base-memory"], 256 << 20);
  const Json fast = query("query-cpus-fast");
  ASSERT_EQ(fast.size(), 2U);
  EXPECT_EQ(fast[1]["cpu-index"], 1);
  EXPECT_EQ(fast[1]["thread-id"], 1001);
  EXPECT_EQ(fast[1]["target"], "x86_64");
  EXPECT_EQ(fast[1]["props"]["core-id"], 1);
  EXPECT_EQ(query("query-cpus")[0]["thread_id"], 1000);
  EXPECT_EQ(query("query-hotpluggable-cpus").size(), 2U);
  const Json block = query("query-block");
  ASSERT_EQ(block.size(), 1U);
  EXPECT_EQ(block[0]["device"], "rootfs");
  EXPECT_EQ(block[0]["qdev"], "/machine/peripheral/blk0");
  EXPECT_EQ(block[0]["inserted"]["file"], "/srv/rootfs.img");
  EXPECT_EQ(block[0]["inserted"]["drv"], "raw");
  EXPECT_EQ(block[0]["inserted"]["cache"]["direct"], true);
  EXPECT_EQ(block[0]["inserted"]["image"]["virtual-size"], 1 << 30);
  EXPECT_EQ(block[0]["inserted"]["iops"], 500);
  EXPECT_EQ(block[0]["inserted"]["iops_max"], 50);
  EXPECT_EQ(block[0]["inserted"]["iops_rd"], 0);
  EXPECT_EQ(block[0]["inserted"]["bps"], 1 << 20);
  EXPECT_FALSE(block[0]["inserted"].contains("bps_max"));
  const Json statistics = query("query-blockstats")[0];
  EXPECT_EQ(statistics["qdev"], "/machine/peripheral/blk0");
  EXPECT_EQ(statistics["stats"]["rd_bytes"], 4096);
  EXPECT_EQ(statistics["stats"]["rd_operations"], 2);
  EXPECT_EQ(statistics["stats"]["wr_bytes"], 512);
  EXPECT_EQ(statistics["stats"]["failed_wr_operations"], 3);
  EXPECT_EQ(statistics["stats"]["wr_highest_offset"], 9728);
  EXPECT_EQ(statistics["stats"]["flush_operations"], 0);
  EXPECT_EQ(query("query-chardev")[0],
            Json({{"label", "serial0"}, {"filename", "stdio"}, {"frontend-open", true}}));
  EXPECT_EQ(query("query-commands").size(), qmp_commands().size());
  EXPECT_EQ(query("query-events").size(), qmp_events().size());
  EXPECT_EQ(query("qom-list-types").size(), driver_tables().devices.size());
  EXPECT_EQ(
      client.execute("device-list-properties", {{"typename", "virtio-net-device"}})["return"][1]["name"],
      "mac");
  EXPECT_EQ(class_of(client.execute("device-list-properties", {{"typename", "x"}})), "DeviceNotFound");
  const auto human = [&](const char* line) {
    return client.execute("human-monitor-command", {{"command-line", line}})["return"].get<std::string>();
  };
  EXPECT_EQ(human("info status"), "VM status: running\r\n");
  EXPECT_EQ(human("info name"), "web-1\r\n");
  EXPECT_EQ(human("format c:"), "unknown command: 'format c:'\r\n");
  EXPECT_THAT(human("help"), HasSubstr("info block\r\n"));
  EXPECT_THAT(human("info block"), HasSubstr("Attached to:      /machine/peripheral/blk0"));
  for (const auto& [state, name] :
       {std::pair{RunState::kCreated, "prelaunch"}, {RunState::kShutdown, "shutdown"}}) {
    bench.on_loop([&, now = state] { bench.machine().set_state(now); });
    EXPECT_EQ(query("query-status")["status"], name);
    EXPECT_EQ(query("query-status")["running"], false);
  }
}

TEST(Qmp, TheCommandsPageIsUpToDate) {
  QmpBench bench;
  QmpClient client = bench.client();
  const std::string page = qmp_markdown([&](const std::string& request) {
    if (request.find("getfd") != std::string::npos) {
      client.send_with_fd(request, client.fd());
    } else {
      client.send(request);
    }
    std::string answer = client.line();
    while (answer.starts_with("{\"data\"") || answer.starts_with("{\"event\"")) {
      answer = client.line();
    }
    if (const std::size_t at = answer.find("\"present\":false"); at != std::string::npos) {
      answer.replace(at, 15, "\"present\":true");  // of the host that runs the test
    }
    EXPECT_FALSE(answer.starts_with("{\"error\"")) << request << answer;
    return answer;
  });
  const std::string path = std::string(WISP_SOURCE_DIR) + "/docs/qmp.md";
  if (std::getenv("WISP_UPDATE_DOCS") != nullptr) {
    std::ofstream(path) << page;
  }
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(text.str() == page)
      << "docs/qmp.md differs from the table; run WISP_UPDATE_DOCS=1 test_control";
}

}  // namespace
}  // namespace wisp
