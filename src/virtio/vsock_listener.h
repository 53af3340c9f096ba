// The Unix socket at which programs of the host ask for a port of the guest: "CONNECT <port>\n".
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/unique_fd.h"

namespace wisp {

// Called under the strand's lock.
class VsockListenerOwner {
 public:
  virtual ~VsockListenerOwner() = default;
  // A program asked for this port. Nothing behind its line was read yet.
  virtual void host_connected(UniqueFd socket, std::uint32_t guest_port) = 0;
  // tick() must be called from now on, now and then, until it says that it need not.
  virtual void tick_wanted() = 0;
};

class VsockListener final {
 public:
  // The longest path, so that "PATH_PORT" is a socket address for every port.
  static constexpr std::size_t kMaxPathSize = 96;
  // How long a program may take to say where to.
  static constexpr std::uint64_t kTimeoutNs = 5'000'000'000;

  // Binds the path, which is removed again with this object. A socket there that nobody serves any more is
  // replaced.
  [[nodiscard]] static Result<std::unique_ptr<VsockListener>> create(Strand& strand, const Clock& clock,
                                                                     const std::string& path,
                                                                     VsockListenerOwner& owner);
  VsockListener(const VsockListener&) = delete;
  VsockListener& operator=(const VsockListener&) = delete;
  ~VsockListener();

  // Serves at most `room` programs that have not said where to yet; with `serve` false, none for now. Those
  // that connect meanwhile wait in the kernel.
  void update(bool serve, std::size_t room);
  // Cuts off those that have not said where to.
  void drop_all() { handshakes_.clear(); }
  [[nodiscard]] std::size_t handshake_count() const { return handshakes_.size(); }
  // Cuts off those that took too long; whether it must be called again.
  [[nodiscard]] bool tick();

 private:
  struct Handshake {
    UniqueFd socket;
    std::string text;
    std::uint64_t deadline_ns = 0;
    Watch watch;
  };
  VsockListener(Strand& strand, const Clock& clock, std::string path, VsockListenerOwner& owner)
      : strand_(strand), clock_(clock), path_(std::move(path)), owner_(owner) {}
  [[nodiscard]] Result<void> listen();
  void update_watch();
  void accept_some();
  void watch_handshake(std::uint64_t id, Handshake& handshake);
  void on_handshake(std::uint64_t id);

  Strand& strand_;
  const Clock& clock_;
  const std::string path_;
  VsockListenerOwner& owner_;
  UniqueFd socket_;
  std::uint64_t inode_ = 0;
  Watch watch_;
  bool serving_ = false;
  std::size_t room_ = 0;
  bool out_of_descriptors_ = false;  // until the next tick
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, Handshake> handshakes_;
};

}  // namespace wisp
