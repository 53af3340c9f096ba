// A Unix or TCP stream socket with one peer at a time.
#pragma once

#include <sys/stat.h>

#include "chardev/char_config.h"
#include "chardev/stream_backend.h"

namespace wisp {

// A server that listens again when its peer has gone (others wait in the backlog meanwhile), or a client with
// one connection.
class SocketBackend final : public StreamBackend {
 public:
  [[nodiscard]] static Result<std::unique_ptr<SocketBackend>> create(const CharConfig& config,
                                                                     EventLoop& loop, Log& log);
  ~SocketBackend() override;

  [[nodiscard]] std::string description() const override { return description_; }

 private:
  SocketBackend(EventLoop& loop, Log& log, const CharConfig& config) : StreamBackend(loop, log, config.id) {}

  [[nodiscard]] Result<void> adopt(int fd);
  [[nodiscard]] Result<void> listen_unix(const std::string& path);
  [[nodiscard]] Result<void> open_tcp(const CharConfig& config);
  [[nodiscard]] Result<UniqueFd> connect_unix(const std::string& path);
  [[nodiscard]] Result<void> serve(bool wait);
  [[nodiscard]] Result<void> attach_peer(UniqueFd peer);
  void accept_peer();
  void peer_gone() override;

  UniqueFd listener_;
  Watch incoming_;
  Timer accept_timer_;
  std::string description_;
  std::string unlink_path_;  // ours to remove, as long as it is still the socket that we bound
  struct stat bound_{};
};

}  // namespace wisp
