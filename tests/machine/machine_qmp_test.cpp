// QMP on a real machine: what a client asks happens to the machine's parts, and is told in QEMU's words.
#include <gmock/gmock.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "control/qmp_server.h"
#include "machine/device_table.h"
#include "machine/machine_kit.h"
#include "support/sanitized.h"

namespace wisp {
namespace {

using Json = nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

class MachineQmpTest : public test::MachineKit {
 protected:
  ~MachineQmpTest() override {
    if (server_) {
      server_->detach(0);
    }
  }

  void connect() {
    const std::string path = dir_.file("qmp.sock");
    const std::vector<QmpEndpoint> endpoints{{.kind = QmpEndpoint::Kind::kUnix, .path = path, .host = {}}};
    auto server =
        QmpServer::create({.loop = *loop_, .clock = clock_, .log = log_}, endpoints, driver_tables(), {});
    ASSERT_TRUE(server) << server.error().message;
    server_ = *std::move(server);
    ASSERT_TRUE(server_->attach(machine()));
    client_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    ASSERT_EQ(::connect(client_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    ASSERT_TRUE(next().contains("QMP"));
    ASSERT_EQ(execute("qmp_capabilities"), Json({{"return", Json::object()}}));
  }

  // The next line that the server sends, with the main loop run until it comes.
  Json next() {
    std::size_t end = 0;
    const bool came = run_until([&] {
      std::array<char, 4096> bytes;
      const ssize_t got = ::recv(client_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
      if (got > 0) {
        received_.append(bytes.data(), static_cast<std::size_t>(got));
      }
      end = received_.find('\n');
      return end != std::string::npos;
    });
    if (!came) {
      ADD_FAILURE() << "no answer";
      return {};
    }
    const std::string line = received_.substr(0, end);
    received_.erase(0, end + 1);
    return Json::parse(line);
  }
  // The answer; events that come before it are kept.
  Json execute(const std::string& command, const Json& arguments = Json::object()) {
    const std::string line = Json{{"execute", command}, {"arguments", arguments}}.dump();
    EXPECT_EQ(::send(client_.get(), line.data(), line.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(line.size()));
    while (true) {
      Json message = next();
      if (!message.contains("event")) {
        return message;
      }
      kept_.push_back(std::move(message));
    }
  }
  Json next_event() {
    if (kept_.empty()) {
      return next();
    }
    Json event = kept_.front();
    kept_.erase(kept_.begin());
    return event;
  }
  std::string error(const std::string& command, const Json& arguments) {
    const Json reply = execute(command, arguments);
    return reply.contains("error") ? reply["error"]["desc"].get<std::string>() : "";
  }

 private:
  std::unique_ptr<QmpServer> server_;
  UniqueFd client_;
  std::string received_;
  std::vector<Json> kept_;
};

TEST_F(MachineQmpTest, AResetFromOutsideAndOneByTheGuestAreToldApart) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  EXPECT_EQ(execute("system_reset"), Json({{"return", Json::object()}}));
  Json event = next_event();
  EXPECT_EQ(event["event"], "RESET");
  EXPECT_EQ(event["data"], Json({{"guest", false}, {"reason", "host-qmp-system-reset"}}));
  EXPECT_EQ(vcpu().resets(), 1U);

  vcpu().script(FakeExit::shutdown());  // a triple fault
  event = next_event();
  EXPECT_EQ(event["event"], "RESET");
  EXPECT_EQ(event["data"], Json({{"guest", true}, {"reason", "guest-reset"}}));
  EXPECT_EQ(vcpu().resets(), 2U);
}

TEST_F(MachineQmpTest, StopAndContBeforeTheStartAreNotForgotten) {
  ASSERT_NO_FATAL_FAILURE(create());
  ASSERT_NO_FATAL_FAILURE(connect());
  const Json done{{"return", Json::object()}};
  EXPECT_EQ(execute("cont"), done);
  EXPECT_EQ(execute("stop"), done);
  EXPECT_EQ(execute("query-status")["return"]["status"], "prelaunch");
  ASSERT_TRUE(machine().start());
  EXPECT_EQ(execute("query-status")["return"]["status"], "paused");
  EXPECT_EQ(execute("cont"), done);
  EXPECT_EQ(execute("query-status")["return"]["status"], "running");
}

TEST_F(MachineQmpTest, ClustersAreToldWhereThereAreSome) {
  config_.cpus = {.count = 4, .max = 4, .topology = {.clusters = 2, .cores = 2}};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  std::set<Json> places;
  const Json reply = execute("query-cpus-fast");
  for (const Json& cpu : reply["return"]) {
    EXPECT_TRUE(cpu["props"].contains("cluster-id"));
    places.insert(cpu["props"]);
  }
  EXPECT_EQ(places.size(), 4U);
}

TEST_F(MachineQmpTest, OptionsThatDoNothingAreLogged) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  EXPECT_EQ(error("device_add", {{"driver", "virtio-balloon-device"}, {"id", "b"}, {"auto-balloon", true}}),
            "");
  EXPECT_THAT(logged(), HasSubstr("warning: QMP: device_add: option 'auto-balloon' is ignored: "));
}

TEST_F(MachineQmpTest, DrivesShowTheirLimitsAndCounters) {
  BackendConfig limited = drive("slow");
  limited.properties.set("throttling.iops-total", std::uint64_t{800});
  limited.properties.set("throttling.iops-total-max", std::uint64_t{90});
  limited.properties.set("throttling.bps-total", std::uint64_t{3} << 20);
  config_.drives = {limited, drive("unused")};
  config_.devices = {blk("", "slow")};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());

  const Json drives = execute("query-block")["return"];
  ASSERT_EQ(drives.size(), 2U);
  EXPECT_EQ(drives[0]["device"], "slow");
  EXPECT_EQ(drives[0]["qdev"], "/machine/peripheral-anon/device[0]");
  const Json& inserted = drives[0]["inserted"];
  EXPECT_EQ(inserted["iops"], 800);
  EXPECT_EQ(inserted["iops_max"], 90);
  EXPECT_EQ(inserted["bps"], 3 << 20);
  EXPECT_FALSE(inserted.contains("bps_max"));
  EXPECT_EQ(inserted["image"]["virtual-size"], test::kMiB);
  EXPECT_FALSE(drives[1].contains("qdev"));
  EXPECT_EQ(drives[1]["inserted"]["iops"], 0);

  const Json statistics = execute("query-blockstats")["return"];
  ASSERT_EQ(statistics.size(), 2U);
  EXPECT_EQ(statistics[0]["stats"]["rd_operations"], 0);

  // One read of sector 0, as a driver does it.
  const VirtioMmioSlot slot = virtio_slot(0);
  const auto set = [&](std::uint64_t offset, std::uint32_t value) {
    std::vector<std::uint8_t> data(4);
    store_le(data.data(), value);
    vcpu().script(FakeExit::mmio_write(slot.base + offset, data));
  };
  constexpr Gpa kRing = 0x300'0000;
  const auto descriptor = [&](int index, Gpa address, std::uint32_t size, std::uint16_t flags) {
    std::uint8_t* at = host(kRing) + index * 16;
    store_le(at, address);
    store_le(at + 8, size);
    store_le(at + 12, flags);
    store_le(at + 14, static_cast<std::uint16_t>(index + 1));
  };
  descriptor(0, kRing + 0x4000, 16, 1);       // the header: a read of sector 0, all zeroes
  descriptor(1, kRing + 0x5000, 512, 2 | 1);  // the data
  descriptor(2, kRing + 0x4100, 1, 2);        // the status
  store_le<std::uint16_t>(host(kRing + 0x1002), 1);
  *host(kRing + 0x4100) = 0xff;
  using namespace virtio_mmio;
  const std::uint32_t ready = kVirtioStatusAcknowledge | kVirtioStatusDriver | kVirtioStatusFeaturesOk;
  set(kStatus, kVirtioStatusAcknowledge | kVirtioStatusDriver);
  set(kDriverFeaturesSel, 1);
  set(kDriverFeatures, 1);  // VERSION_1
  set(kStatus, ready);
  set(kQueueSel, 0);
  set(kQueueNum, 16);
  set(kQueueDescLow, kRing);
  set(kQueueDriverLow, kRing + 0x1000);
  set(kQueueDeviceLow, kRing + 0x2000);
  set(kQueueReady, 1);
  set(kStatus, ready | kVirtioStatusDriverOk);
  set(kQueueNotify, 0);
  ASSERT_TRUE(run_until([&] { return *host(kRing + 0x4100) == 0; }));

  const Json after = execute("query-blockstats")["return"];
  EXPECT_EQ(after[0]["device"], "slow");
  EXPECT_EQ(after[0]["stats"]["rd_operations"], 1);
  EXPECT_EQ(after[0]["stats"]["rd_bytes"], 512);
  EXPECT_EQ(after[0]["stats"]["wr_operations"], 0);
  EXPECT_EQ(after[1]["stats"]["rd_operations"], 0);
}

TEST_F(MachineQmpTest, NoProgramIsStartedUnderTheFilter) {
  WISP_SKIP_IF_SANITIZED();
  seccomp_ = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  for (const char* type : {"user", "passt"}) {
    EXPECT_THAT(error("netdev_add", {{"type", type}, {"id", "net0"}, {"path", "/bin/true"}}),
                AllOf(HasSubstr("netdev net0: passt cannot be started once the machine runs"),
                      HasSubstr("on the command line"), HasSubstr("type stream with path")));
  }
  EXPECT_THAT(error("netdev_del", {{"id", "net0"}}), HasSubstr("there is no netdev with id 'net0'"));
  EXPECT_EQ(machine().state(), RunState::kRunning);
}

// Every thread that a machine starts has a filter of its own before it does anything.
TEST_F(MachineQmpTest, NoThreadIsWithoutAFilter) {
  WISP_SKIP_IF_SANITIZED();
  seccomp_ = true;
  config_.iothreads = {"one"};
  config_.drives = {drive("disk")};
  config_.drives.back().properties.set("aio", std::string("threads"));
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  std::multimap<std::string, std::string> filters;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (task.path().filename() == std::to_string(::getpid())) {
      continue;  // the test's own
    }
    std::ifstream status(task.path() / "status");
    std::string name;
    for (std::string line; std::getline(status, line);) {
      if (line.starts_with("Name:\t")) {
        name = line.substr(6);
      } else if (line.starts_with("Seccomp:\t")) {
        filters.emplace(name, line.substr(9));
      }
    }
  }
  EXPECT_TRUE(filters.contains("io-one"));
  EXPECT_TRUE(filters.contains("vcpu0"));
  EXPECT_GT(filters.count("wisp-block"), 1U);
  for (const auto& [name, mode] : filters) {
    EXPECT_EQ(mode, "2") << name;
  }
}

TEST_F(MachineQmpTest, NoInternetSocketIsOpenedUnderTheFilter) {
  const Json tcp{
      {"type", "socket"},
      {"data",
       {{"addr", {{"type", "inet"}, {"data", {{"host", "127.0.0.1"}, {"port", "9"}}}}}, {"server", false}}}};
  const Json local{{"type", "socket"},
                   {"data", {{"addr", {{"type", "unix"}, {"data", {{"path", dir_.file("chr.sock")}}}}}}}};
  WISP_SKIP_IF_SANITIZED();
  seccomp_ = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  EXPECT_THAT(error("chardev-add", {{"id", "chr"}, {"backend", tcp}}),
              AllOf(HasSubstr("chardev chr: a TCP socket cannot be opened once the machine runs"),
                    HasSubstr("on the command line"), HasSubstr("use a Unix socket")));
  EXPECT_EQ(error("chardev-add", {{"id", "chr"}, {"backend", local}}), "");
  EXPECT_EQ(machine().state(), RunState::kRunning);
}

TEST_F(MachineQmpTest, WithoutTheFilterTheProgramIsStarted) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  // It is no passt: that it ended is what the error tells.
  EXPECT_THAT(error("netdev_add", {{"type", "user"}, {"id", "net0"}, {"path", "/bin/false"}}),
              HasSubstr("netdev net0: passt ended"));
}

TEST_F(MachineQmpTest, PortForwardsAreAListOfStrings) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  const auto with = [&](const Json& forwards) {
    return error("netdev_add",
                 {{"type", "user"}, {"id", "net0"}, {"path", "/bin/false"}, {"hostfwd", forwards}});
  };
  EXPECT_THAT(with({{{"str", "tcp::2222-:22"}}, {{"str", "tcp::8080-:80"}}}), HasSubstr("passt ended"));
  EXPECT_THAT(with({{{"str", "tcp::2222-:22"}}, {{"str", "nonsense"}}}), HasSubstr("hostfwd=nonsense"));
  EXPECT_THAT(with({{{"str", "nonsense"}}, {{"str", "tcp::2222-:22"}}}), HasSubstr("hostfwd=nonsense"));
  EXPECT_THAT(with("nonsense"), HasSubstr("hostfwd=nonsense"));
  EXPECT_THAT(with({{{"string", "x"}}}), HasSubstr("Invalid parameter type for 'hostfwd'"));
  EXPECT_THAT(with({{{"str", 5}}}), HasSubstr("Invalid parameter type for 'hostfwd'"));
  EXPECT_THAT(with({5}), HasSubstr("Invalid parameter type for 'hostfwd'"));
  EXPECT_THAT(error("netdev_add",
                    {{"type", "user"}, {"id", "net0"}, {"mtu", {{{"str", "1500"}}, {{"str", "1500"}}}}}),
              HasSubstr("option 'mtu' is given twice"));
}

TEST_F(MachineQmpTest, WhatTheGuestWritesToARingIsReadByQmp) {
  config_.chardevs = {{.kind = "ringbuf", .id = "ring", .properties = {}, .fds = {}},
                      {.kind = "null", .id = "none", .properties = {}, .fds = {}}};
  config_.serial = "ring";
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_NO_FATAL_FAILURE(connect());
  for (const char c : std::string("hello")) {
    vcpu().script(FakeExit::port_write(0x3f8, {static_cast<std::uint8_t>(c)}));
  }
  std::string text;
  EXPECT_TRUE(run_until([&] {
    text += execute("ringbuf-read", {{"device", "ring"}, {"size", 2}})["return"].get<std::string>();
    return text == "hello";
  })) << text;
  EXPECT_EQ(execute("ringbuf-write", {{"device", "ring"}, {"data", "and more"}}),
            Json({{"return", Json::object()}}));
  EXPECT_EQ(execute("ringbuf-read", {{"device", "ring"}, {"size", 100}}), Json({{"return", "and more"}}));
  EXPECT_EQ(error("ringbuf-read", {{"device", "none"}, {"size", 1}}), "chardev none is not of kind ringbuf");
  EXPECT_EQ(error("ringbuf-write", {{"device", "nope"}, {"data", ""}}), "there is no chardev with id 'nope'");
}

}  // namespace
}  // namespace wisp
