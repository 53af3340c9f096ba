// One QMP client: its bytes in, its lines out, its descriptors. Inside this room only.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "control/qmp_commands.h"
#include "control/qmp_json.h"

namespace wisp {

// Never blocks. A client that does not read its answers is not read from either; one that lets events pile
// up is cut off.
class QmpSession final {
 public:
  // With this much unsent, no further command is taken.
  static constexpr std::size_t kOutputPause = 64U << 10;
  // With this much unsent, the client is cut off.
  static constexpr std::size_t kOutputMax = 4U << 20;
  static constexpr int kCommandsPerTurn = 32;

  // What a session needs from its server.
  struct Host {
    // Gives the answer to a request, and what is to be done behind it.
    std::function<QmpReply(QmpFds& fds, const Json& request, std::function<void()>& after_reply)> run;
  };

  QmpSession(UniqueFd fd, Host host) : fd_(std::move(fd)), host_(std::move(host)) {}

  [[nodiscard]] int fd() const { return fd_.get(); }
  void set_watch(Watch watch) { watch_ = std::move(watch); }

  // Handles what epoll told.
  void on_events(std::uint32_t events);
  // Takes commands that wait in the buffer, a bounded number; then sets what to wait for.
  void work();
  // Sends a line as far as the socket takes it, and keeps the rest.
  void send(const std::string& line);
  // Writes what is left without waiting.
  void flush();
  // Stops waiting for anything but the end of the output.
  void finish_input() { input_done_ = true; }

  // Whether work() stopped with commands still to take.
  [[nodiscard]] bool has_more_work() const { return more_work_ && !closed_; }
  [[nodiscard]] bool closed() const { return closed_; }
  // Whether events go to this client: its first command has come.
  [[nodiscard]] bool negotiated() const { return negotiated_; }
  [[nodiscard]] std::size_t unsent() const { return out_.size() - sent_; }
  // Why it was cut off; empty where the client left.
  [[nodiscard]] const std::string& reason() const { return reason_; }

 private:
  void receive();
  void answer(const Result<std::string>& message);
  void update_watch();
  void close(std::string reason);

  UniqueFd fd_;
  Watch watch_;
  const Host host_;
  JsonFramer framer_;
  QmpFds fds_;
  std::string out_;
  std::size_t sent_ = 0;
  std::uint32_t waiting_for_ = EPOLLIN;
  bool negotiated_ = false;
  bool input_done_ = false;
  bool more_work_ = false;
  bool closed_ = false;
  std::string reason_;
};

}  // namespace wisp
