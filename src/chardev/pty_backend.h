// A new pseudo-terminal: whoever opens its slave side is the peer.
#pragma once

#include "chardev/char_config.h"
#include "chardev/stream_backend.h"

namespace wisp {

class PtyBackend final : public StreamBackend {
 public:
  [[nodiscard]] static Result<std::unique_ptr<PtyBackend>> create(const CharConfig& config, EventLoop& loop,
                                                                  Log& log);
  ~PtyBackend() override;

  [[nodiscard]] std::string description() const override { return "pty:" + path_; }
  [[nodiscard]] std::pair<std::uint16_t, std::uint16_t> size() const override;
  // The slave's path.
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  PtyBackend(EventLoop& loop, Log& log, const CharConfig& config) : StreamBackend(loop, log, config.id) {}
  [[nodiscard]] Result<void> open();
  [[nodiscard]] Result<void> notice_openings();
  void look_for_peer();
  void peer_gone() override;

  UniqueFd master_;
  std::string path_;
  // The kernel tells of no opening of the slave on the master, but inotify sees it. Where that cannot be had,
  // a timer looks.
  UniqueFd inotify_;
  Watch opened_;
  Timer look_again_;
};

}  // namespace wisp
