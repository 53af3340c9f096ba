// The socket device (virtio 1.2, section 5.10) with the kernel's vhost-vsock behind it: the guest is reached
// by AF_VSOCK at its CID from anywhere on the host.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/clock.h"
#include "base/log.h"
#include "base/property.h"
#include "base/unique_fd.h"
#include "virtio/device.h"
#include "virtio/vhost.h"

namespace wisp {

struct VhostVsockOptions {
  std::string id{};  // for messages
  std::uint64_t guest_cid = 3;
  int vhost_fd = -1;  // opened /dev/vhost-vsock, taken over by create(); -1: opened there
};

// Options of vhost-vsock-device. `vhostfd` holds a descriptor number.
extern const std::span<const PropertySpec> kVhostVsockProperties;
[[nodiscard]] Result<VhostVsockOptions> parse_vhost_vsock_options(std::string id,
                                                                  const PropertySet& properties);

class VhostVsock final : public VirtioDevice {
 public:
  [[nodiscard]] static Result<std::unique_ptr<VhostVsock>> create(EventLoop& loop, const GuestMemory& memory,
                                                                  const VhostVsockOptions& options, Log& log,
                                                                  const Clock& clock);
  ~VhostVsock() override;

  [[nodiscard]] std::string_view name() const override { return "vhost-vsock"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 19; }
  [[nodiscard]] std::uint64_t features() const override;
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return kQueueSizes; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] bool kicks_handled_elsewhere() const override { return true; }
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  // As VirtioVsock: a restored driver is told that its streams are gone.
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  static constexpr std::array<std::uint16_t, 3> kQueueSizes{128, 128, 16};
  static constexpr std::uint32_t kDataQueues = 2;  // the third, for events, is served here
  static constexpr std::uint16_t kEvent = 2;

  VhostVsock(EventLoop& loop, const GuestMemory& memory, VhostVsockOptions options,
             std::unique_ptr<VhostKernel> vhost, Log& log, const Clock& clock)
      : VirtioDevice(loop, memory),
        options_(std::move(options)),
        log_(log),
        log_gate_(clock),
        vhost_(std::move(vhost)) {}
  void on_pause() override;
  void on_resume() override;
  [[nodiscard]] Result<void> start();
  void stop();
  void process_event();
  void queue_broken();

  const VhostVsockOptions options_;
  Log& log_;
  LogGate log_gate_;
  const std::unique_ptr<VhostKernel> vhost_;
  UniqueFd error_;
  bool transport_reset_ = false;

  // While active.
  VirtioInterrupts* interrupts_ = nullptr;
  std::uint64_t negotiated_ = 0;
  std::array<std::optional<Queue>, 3> queues_;
  std::array<int, 3> kick_fds_{-1, -1, -1};
  bool running_ = false;
  Watch error_watch_;
  Watch event_watch_;
};

}  // namespace wisp
