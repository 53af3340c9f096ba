// What every virtio device has that a vhost-user back end serves: its queues, and the end of the connection.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "virtio/device.h"
#include "virtio/vhost_user.h"

namespace wisp {

// A device of which this process holds only the configuration space; all its queues run in the back end.
// When the back end goes, hangs or talks nonsense, the device needs a reset that no longer helps: there is no
// second connection.
class VhostUserDevice : public VirtioDevice {
 public:
  ~VhostUserDevice() override;

  [[nodiscard]] std::uint64_t features() const final { return vhost_->features() & device_features_; }
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const final { return queue_sizes_; }
  [[nodiscard]] Result<void> activate(VirtioActivation activation) final;
  void notify(std::uint16_t queue) final;
  // Waits for the back end to stop, but not beyond VhostUserTimeouts::exchange: one that has not answered by
  // then is cut off, though nothing can keep it from the guest memory that it has mapped.
  void reset() final;
  [[nodiscard]] bool kicks_handled_elsewhere() const final { return true; }
  [[nodiscard]] const Queue* queue(std::uint16_t index) const final;
  // The state of the back end (open files, for one) is not in this process.
  [[nodiscard]] Result<void> check_saveable() const final;
  [[nodiscard]] StateRecord save() const final;
  [[nodiscard]] Result<void> load(const StateRecord& record) final;

 protected:
  // `device_features`: the device-specific bits that the driver may be offered where the back end serves
  // them.
  VhostUserDevice(EventLoop& loop, const GuestMemory& memory, std::string id, std::uint64_t device_features,
                  std::vector<std::uint16_t> queue_sizes, std::unique_ptr<VhostUser> vhost, Log& log,
                  const Clock& clock);
  // To be called once before the device is used.
  [[nodiscard]] Result<void> watch_connection();
  [[nodiscard]] const std::string& id() const { return id_; }

 private:
  class QuietConnection;
  void on_pause() final;
  void on_resume() final;
  [[nodiscard]] Result<void> start();
  void stop();
  [[nodiscard]] Result<std::vector<VhostUserQueue>> running_queues();
  void connection_ready();
  void connection_lost(const Error& reason);
  void queue_broken();
  void mark_all_dirty();

  const std::string id_;
  const std::uint64_t device_features_;
  const std::vector<std::uint16_t> queue_sizes_;
  const std::unique_ptr<VhostUser> vhost_;
  Log& log_;
  LogGate log_gate_;
  Watch connection_watch_;

  // While active.
  VirtioInterrupts* interrupts_ = nullptr;
  std::uint64_t negotiated_ = 0;
  std::vector<std::optional<Queue>> queues_;
  std::vector<int> kick_fds_;

  // While the queues are in the back end.
  bool running_ = false;
  UniqueFd error_;
  Watch error_watch_;
};

}  // namespace wisp
