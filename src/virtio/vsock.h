// The socket device (virtio 1.2, section 5.10), served in user space to Unix sockets of the host; for hosts
// without vhost-vsock, and for those who want no CID shared by the whole host. See vsock_mux.h for what
// programs of the host do to talk with the guest.
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
#include "virtio/device.h"
#include "virtio/vsock_mux.h"

namespace wisp {

struct VirtioVsockOptions {
  std::string id{};  // for messages
  std::uint64_t guest_cid = kVsockMinGuestCid;
  std::string path{};  // the Unix socket for programs of the host
};

// Options of virtio-vsock-device.
extern const std::span<const PropertySpec> kVirtioVsockProperties;
[[nodiscard]] Result<VirtioVsockOptions> parse_virtio_vsock_options(std::string id,
                                                                    const PropertySet& properties);

class VirtioVsock final : public VirtioDevice {
 public:
  // Binds the Unix socket, which goes away with the device.
  [[nodiscard]] static Result<std::unique_ptr<VirtioVsock>> create(EventLoop& loop, const GuestMemory& memory,
                                                                   const VirtioVsockOptions& options,
                                                                   Log& log, const Clock& clock);
  ~VirtioVsock() override;

  [[nodiscard]] std::string_view name() const override { return "virtio-vsock"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 19; }
  [[nodiscard]] std::uint64_t features() const override { return 0; }
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return kQueueSizes; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  // Streams do not outlive a snapshot: a restored driver is told to drop its own, and to read its CID anew.
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

  [[nodiscard]] std::size_t connection_count() const { return mux_->connection_count(); }

 private:
  static constexpr std::array<std::uint16_t, 3> kQueueSizes{256, 256, 16};
  static constexpr std::uint16_t kRx = 0;
  static constexpr std::uint16_t kTx = 1;
  static constexpr std::uint16_t kEvent = 2;

  VirtioVsock(EventLoop& loop, const GuestMemory& memory, VirtioVsockOptions options, Log& log,
              const Clock& clock)
      : VirtioDevice(loop, memory), options_(std::move(options)), log_(log), log_gate_(clock) {}
  void on_pause() override;
  void on_resume() override;
  void process_rx();
  void process_tx();
  void process_event();
  void queue_broken(std::uint16_t index);
  void interrupt(std::uint16_t index);

  const VirtioVsockOptions options_;
  Log& log_;
  LogGate log_gate_;
  std::unique_ptr<VsockMux> mux_;
  bool transport_reset_ = false;  // the driver must hear that its streams are gone

  // While active.
  VirtioInterrupts* interrupts_ = nullptr;
  std::array<std::optional<Queue>, 3> queues_;
  std::array<int, 3> kick_fds_{-1, -1, -1};
  bool rx_stalled_ = false;
  bool tx_stalled_ = false;
  DescriptorChain chain_;
  DescriptorChain rx_chain_;
};

}  // namespace wisp
