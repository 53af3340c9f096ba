// Clients that are slow, many, rude or dead, sockets that are taken, and the clients that Debian has.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cstdio>
#include <fstream>

#include "control/qmp_test_client.h"

namespace wisp {
namespace {

using test::Json;
using test::QmpBench;
using test::QmpClient;
using testing::HasSubstr;

TEST(QmpClients, ASlowOneHoldsUpNobodyAndIsNotReadFrom) {
  QmpBench bench;
  QmpClient slow = bench.client();
  // Ask for far more than the socket's buffers hold, and read nothing.
  ::fcntl(slow.fd(), F_SETFL, O_NONBLOCK);
  const std::string request = Json{{"execute", "query-commands"}}.dump();
  std::size_t sent = 0;
  for (int quiet = 0; quiet < 20;) {
    const ssize_t written = ::send(slow.fd(), request.data(), request.size(), MSG_NOSIGNAL);
    if (written != static_cast<ssize_t>(request.size())) {
      ASSERT_LT(written, 0) << "a cut request would spoil the count";
      ++quiet;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      continue;
    }
    quiet = 0;
    ++sent;
    ASSERT_LT(sent, 1'000'000U) << "the server reads without end";
  }
  // Others are served meanwhile.
  QmpClient other = bench.client();
  EXPECT_EQ(other.execute("query-status")["return"]["running"], true);
  // And the slow one gets every answer once it reads.
  ::fcntl(slow.fd(), F_SETFL, 0);
  for (std::size_t i = 0; i < sent; ++i) {
    ASSERT_TRUE(slow.next().contains("return")) << i << " of " << sent;
  }
}

TEST(QmpClients, OneThatLetsEventsPileUpIsCutOff) {
  QmpBench bench;
  QmpClient deaf = bench.client();
  deaf.execute("qmp_capabilities");
  QmpClient other = bench.client();
  for (int round = 0; round < 100; ++round) {
    bench.on_loop([&] {
      for (int i = 0; i < 1000; ++i) {
        bench.server().on_reset(true);
      }
    });
  }
  std::size_t lines = 0;
  while (!deaf.line().empty()) {
    ++lines;
  }
  EXPECT_LT(lines, 100'000U);
  EXPECT_EQ(other.execute("query-status")["return"]["running"], true);
}

TEST(QmpClients, ThatDieInTheMiddleLeaveNothing) {
  QmpBench bench;
  for (int i = 0; i < 200; ++i) {
    QmpClient dying(bench.path());
    switch (i % 4) {
      case 0:
        break;
      case 1:
        dying.send(R"({"execute": "query-st)");
        break;
      case 2:
        dying.send(R"({"execute": "query-status"}{"execute": "query-block"})");
        break;
      default: {
        const linger abort{.l_onoff = 1, .l_linger = 0};
        ::setsockopt(dying.fd(), SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
        dying.send("garbage");
        break;
      }
    }
  }
  EXPECT_EQ(bench.client().execute("query-status")["return"]["running"], true);
}

TEST(QmpClients, ManyAreServedAtOnceAndTooManyAreToldSo) {
  QmpBench bench;
  std::vector<QmpClient> clients;
  for (std::size_t i = 0; i < QmpServer::kMaxClients; ++i) {
    clients.push_back(bench.client());
  }
  for (QmpClient& client : clients) {
    EXPECT_EQ(client.execute("query-name")["return"]["name"], "web-1");
  }
  QmpClient late(bench.path());
  EXPECT_THAT(late.next()["error"]["desc"].get<std::string>(), HasSubstr("32 clients are connected already"));
  EXPECT_EQ(late.line(), "");
  clients.pop_back();
  // The place is free once the server has seen the other go.
  for (int tries = 0;; ++tries) {
    ASSERT_LT(tries, 100);
    QmpClient again(bench.path());
    if (again.next().contains("QMP")) {
      EXPECT_EQ(again.execute("query-name")["return"]["name"], "web-1");
      break;
    }
  }
}

TEST(QmpClients, AnIdleServerUsesNoCpuTime) {
  QmpBench bench;
  QmpClient paused = bench.client();
  // One client with unread output and one half closed: neither may make the loop spin.
  for (int i = 0; i < 200; ++i) {
    paused.send(R"({"execute": "query-commands"})");
  }
  QmpClient half = bench.client();
  half.send(R"({"execute": "query-com)");
  ::shutdown(half.fd(), SHUT_WR);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  rusage before{};
  rusage after{};
  ::getrusage(RUSAGE_SELF, &before);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  ::getrusage(RUSAGE_SELF, &after);
  const auto micros = [](const rusage& usage) {
    return usage.ru_utime.tv_sec * 1'000'000 + usage.ru_utime.tv_usec + usage.ru_stime.tv_sec * 1'000'000 +
           usage.ru_stime.tv_usec;
  };
  EXPECT_LT(micros(after) - micros(before), 100'000);
}

struct Directory {
  Directory() {
    char name[] = "/tmp/wisp-sock-XXXXXX";
    path = ::mkdtemp(name);
  }
  ~Directory() { ::rmdir(path.c_str()); }
  std::string path;
};

Result<std::unique_ptr<QmpServer>> listen_on(EventLoop& loop, const std::string& path) {
  static const SystemClock kClock;
  static Log log(2, LogLevel::kError);
  const std::vector<QmpEndpoint> endpoints{{.kind = QmpEndpoint::Kind::kUnix, .path = path, .host = {}}};
  return QmpServer::create({loop, kClock, log}, endpoints, driver_tables(), {});
}

TEST(QmpSocket, ALiveOneIsRefusedADeadOneReplacedAFileKept) {
  const Directory directory;
  const std::string path = directory.path + "/s";
  const auto loop = *EventLoop::create();
  {
    const auto first = listen_on(*loop, path);
    ASSERT_TRUE(first.has_value());
    const auto second = listen_on(*loop, path);
    ASSERT_FALSE(second.has_value());
    EXPECT_EQ(
        second.error().message,
        "-qmp: socket '" + path + "' is in use by another process; name another path or end that process");
    EXPECT_EQ(::access(path.c_str(), F_OK), 0);
  }
  EXPECT_EQ(::access(path.c_str(), F_OK), -1);
  {
    // What a killed process leaves.
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    const UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  EXPECT_EQ(::access(path.c_str(), F_OK), 0);
  {
    const auto replaced = listen_on(*loop, path);
    EXPECT_TRUE(replaced.has_value());
    // Somebody else's file in its place is left alone at the end.
    ::unlink(path.c_str());
    std::ofstream(path) << "mine";
  }
  EXPECT_EQ(::access(path.c_str(), F_OK), 0);
  const auto file = listen_on(*loop, path);
  ASSERT_FALSE(file.has_value());
  EXPECT_EQ(file.error().message, "-qmp: '" + path + "' exists and is not a socket; name another path");
  ::unlink(path.c_str());
}

TEST(QmpSocket, BadPathsAreExplained) {
  const auto loop = *EventLoop::create();
  EXPECT_EQ(listen_on(*loop, "/nonexistent/dir/s").error().message,
            "-qmp: cannot create socket '/nonexistent/dir/s': No such file or directory");
  EXPECT_THAT(listen_on(*loop, "/tmp/" + std::string(200, 'x')).error().message,
              HasSubstr("a Unix socket's path has at most 107"));
}

TEST(QmpSocket, WaitsForAClientWhereNowaitIsNotGiven) {
  const Directory directory;
  const std::string path = directory.path + "/s";
  const auto loop = *EventLoop::create();
  const SystemClock clock;
  Log log;
  test::FakeMachine machine;
  const std::vector<QmpEndpoint> endpoints{
      {.kind = QmpEndpoint::Kind::kUnix, .path = path, .host = {}, .port = 0, .wait = true}};
  const auto server = *QmpServer::create({*loop, clock, log}, endpoints, driver_tables(), {});
  ASSERT_TRUE(server->attach(machine).has_value());
  loop->run_once(0);
  EXPECT_FALSE(server->waited_clients_came());
  const QmpClient client(path);
  loop->run_once(1000);
  EXPECT_TRUE(server->waited_clients_came());
}

TEST(QmpSocket, TheLastWordReachesTheClientAtTheEnd) {
  const Directory directory;
  const std::string path = directory.path + "/s";
  const auto loop = *EventLoop::create();
  test::FakeMachine machine;
  auto server = *listen_on(*loop, path);
  ASSERT_TRUE(server->attach(machine).has_value());
  QmpClient client(path);
  loop->run_once(1000);
  client.send(R"({"execute": "quit"})");
  loop->run_once(1000);
  server->detach();
  server.reset();
  EXPECT_TRUE(client.next().contains("QMP"));
  EXPECT_TRUE(client.next().contains("return"));
  EXPECT_EQ(client.next()["event"], "SHUTDOWN");
  EXPECT_EQ(client.line(), "");
}

// The output of a shell command.
std::string output_of(const std::string& command) {
  std::string text;
  FILE* pipe = ::popen((command + " 2>&1").c_str(), "r");
  EXPECT_NE(pipe, nullptr);
  std::array<char, 4096> bytes;
  for (std::size_t got = 0; (got = std::fread(bytes.data(), 1, bytes.size(), pipe)) > 0;) {
    text.append(bytes.data(), got);
  }
  ::pclose(pipe);
  return text;
}

TEST(QmpClients, SocatOfDebian) {
  if (::access("/usr/bin/socat", X_OK) != 0) {
    GTEST_SKIP() << "socat is not installed";
  }
  QmpBench bench;
  const std::string text =
      output_of("echo '{\"execute\": \"query-status\"}' | socat -t 5 - UNIX-CONNECT:" + bench.path());
  EXPECT_THAT(text, HasSubstr("\"QMP\""));
  EXPECT_THAT(text, HasSubstr("\"running\":true"));
}

TEST(QmpClients, PythonOfDebian) {
  if (::access("/usr/bin/python3", X_OK) != 0) {
    GTEST_SKIP() << "python3 is not installed";
  }
  QmpBench bench;
  EXPECT_EQ(output_of("/usr/bin/python3 " + std::string(WISP_SOURCE_DIR) + "/tests/control/qmp_client.py " +
                      bench.path()),
            "wisp running\nSTOP\npaused\nRESUME\nThe command nonsense has not been found\n");
}

}  // namespace
}  // namespace wisp
