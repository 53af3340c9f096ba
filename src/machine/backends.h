// The host-side parts of a machine that devices name by id: drives, network back ends, character back ends,
// sources of randomness.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "block/block_backend.h"
#include "chardev/char_backend.h"
#include "chardev/ring_backend.h"
#include "machine/config.h"
#include "net/netdev.h"

namespace wisp {

class Backends final {
 public:
  // Threads that back ends start call `worker_started` before all else. `on_quit`: the user asks from a
  // terminal for the machine's end; called on the loop's thread.
  Backends(EventLoop& loop, Log& log, const Clock& clock, std::function<Result<void>()> worker_started = {},
           std::function<void()> on_quit = {})
      : loop_(loop),
        log_(log),
        clock_(clock),
        worker_started_(std::move(worker_started)),
        on_quit_(std::move(on_quit)) {}
  Backends(const Backends&) = delete;
  Backends& operator=(const Backends&) = delete;

  // Errors name the option and id at fault. Ids are unique within a kind.
  [[nodiscard]] Result<void> add_drive(const BackendConfig& config);
  [[nodiscard]] Result<void> add_netdev(const BackendConfig& config);
  [[nodiscard]] Result<void> add_chardev(const BackendConfig& config);
  // A socket chardev that only tells a vhost-user device where its back end listens: nothing is opened.
  [[nodiscard]] Result<void> add_chardev_path(const BackendConfig& config);
  [[nodiscard]] Result<void> add_object(const BackendConfig& config);

  // From here on the system-call filter holds the process: it ends one that starts another program or opens a
  // socket other than a Unix one, so back ends that need either are refused.
  void hold_to_filter() { held_to_filter_ = true; }

  // Terminals may have another size now: devices whose terminal has are told.
  void refresh_terminal_sizes();

  // Fail where the id is unknown or a device uses the part.
  [[nodiscard]] Result<void> remove_drive(const std::string& id);
  [[nodiscard]] Result<void> remove_netdev(const std::string& id);
  [[nodiscard]] Result<void> remove_chardev(const std::string& id);

  // For a device: one user at a time. `user` is the device's id.
  [[nodiscard]] Result<BlockBackend*> use_drive(const std::string& id, const std::string& user);
  // Moves the back end into the device. The id stays known, as used up, until the netdev is removed.
  [[nodiscard]] Result<Netdev> take_netdev(const std::string& id, const std::string& user);
  [[nodiscard]] Result<CharBackend*> use_chardev(const std::string& id, const std::string& user);
  [[nodiscard]] Result<std::string> use_chardev_path(const std::string& id, const std::string& user);
  // A chardev of kind ringbuf, used or not. The pointer stays good until the chardev is removed.
  [[nodiscard]] Result<RingBackend*> ring(const std::string& id);
  // A source of its own for each device that names the object.
  [[nodiscard]] Result<std::unique_ptr<EntropySource>> open_rng(const std::string& id) const;
  // The device with this id is gone.
  void release(const std::string& user);

  struct DriveEntry {
    BackendConfig config;
    std::unique_ptr<BlockBackend> backend;
    BlockLimits limits;
    std::string user;
  };
  struct ChardevEntry {
    std::unique_ptr<CharBackend> backend;  // null: only a path
    std::string path;
    std::string user;
  };
  [[nodiscard]] const std::map<std::string, DriveEntry>& drives() const { return drives_; }
  [[nodiscard]] const std::map<std::string, ChardevEntry>& chardevs() const { return chardevs_; }

 private:
  struct NetdevEntry {
    BackendConfig config;
    std::optional<Netdev> netdev;  // empty: in a device
    std::string user;
  };
  [[nodiscard]] Result<Netdev> open(const NetdevConfig& config) const;

  EventLoop& loop_;
  Log& log_;
  const Clock& clock_;
  const std::function<Result<void>()> worker_started_;
  const std::function<void()> on_quit_;
  bool held_to_filter_ = false;
  std::map<std::string, DriveEntry> drives_;
  std::map<std::string, NetdevEntry> netdevs_;
  std::map<std::string, ChardevEntry> chardevs_;
  std::map<std::string, std::string> rng_files_;  // by id
};

}  // namespace wisp
