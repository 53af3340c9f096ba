// A QMP client over a real Unix socket, and a server that runs on a thread of its own beside it.
#pragma once

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <future>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "base/clock.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "control/fake_machine.h"
#include "control/qmp_server.h"
#include "machine/device_table.h"

namespace wisp::test {

using Json = nlohmann::json;

class QmpClient final {
 public:
  explicit QmpClient(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), std::min(path.size(), sizeof address.sun_path - 1));
    EXPECT_EQ(::connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    const timeval limit{.tv_sec = 10, .tv_usec = 0};
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  }

  [[nodiscard]] int fd() const { return fd_.get(); }
  void send(std::string_view text) {
    while (!text.empty()) {
      const ssize_t sent = ::send(fd_.get(), text.data(), text.size(), MSG_NOSIGNAL);
      if (sent <= 0) {
        return;
      }
      text.remove_prefix(static_cast<std::size_t>(sent));
    }
  }
  void send_with_fd(const std::string& text, int fd) {
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
    std::string copy = text;
    iovec part{.iov_base = copy.data(), .iov_len = copy.size()};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    EXPECT_EQ(::sendmsg(fd_.get(), &header, 0), static_cast<ssize_t>(copy.size()));
  }
  // The next line; empty at the end of the stream (or after ten seconds).
  std::string line() {
    std::size_t end = 0;
    while ((end = buffer_.find('\n')) == std::string::npos) {
      std::array<char, 65536> bytes;
      const ssize_t got = ::recv(fd_.get(), bytes.data(), bytes.size(), 0);
      if (got <= 0) {
        return {};
      }
      buffer_.append(bytes.data(), static_cast<std::size_t>(got));
    }
    std::string text = buffer_.substr(0, end);
    buffer_.erase(0, end + 1);
    if (text.ends_with('\r')) {
      text.pop_back();
    }
    return text;
  }
  Json next() {
    const std::string text = line();
    return text.empty() ? Json() : Json::parse(text);
  }
  Json ask(const std::string& text) {
    send(text);
    return next();
  }
  Json execute(const std::string& command, const Json& arguments = Json::object()) {
    return ask(Json{{"execute", command}, {"arguments", arguments}}.dump());
  }

 private:
  UniqueFd fd_;
  std::string buffer_;
};

// Owns a directory for sockets, a machine, and a server whose loop runs on its own thread.
class QmpBench final {
 public:
  explicit QmpBench(std::string uuid = {}) {
    char name[] = "/tmp/wisp-qmp-XXXXXX";
    directory_ = ::mkdtemp(name);
    loop_ = *EventLoop::create();
    const std::vector<QmpEndpoint> endpoints{{.kind = QmpEndpoint::Kind::kUnix, .path = path(), .host = {}}};
    auto created = QmpServer::create({*loop_, clock_, log_}, endpoints, driver_tables(), std::move(uuid));
    EXPECT_TRUE(created.has_value()) << created.error().message;
    server_ = *std::move(created);
    EXPECT_TRUE(server_->attach(machine_).has_value());
    thread_ = std::thread([this] { loop_->run(); });
  }
  ~QmpBench() {
    loop_->stop();
    thread_.join();
    server_.reset();
    EXPECT_EQ(::access(path().c_str(), F_OK), -1) << "the socket stayed behind";
    ::rmdir(directory_.c_str());
  }

  [[nodiscard]] std::string path() const { return directory_ + "/qmp.sock"; }
  // Connected, greeting read.
  QmpClient client() {
    QmpClient connected(path());
    EXPECT_TRUE(connected.next().contains("QMP"));
    return connected;
  }
  // Runs `work` on the loop's thread and waits for it.
  template <typename Work>
  auto on_loop(Work work) {
    std::packaged_task<decltype(work())()> task(std::move(work));
    auto done = task.get_future();
    loop_->post([&task] { task(); });
    return done.get();
  }
  FakeMachine& machine() { return machine_; }
  QmpServer& server() { return *server_; }

 private:
  std::string directory_;
  SystemClock clock_;
  Log log_{2, LogLevel::kError};
  FakeMachine machine_;
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<QmpServer> server_;
  std::thread thread_;
};

}  // namespace wisp::test
