// The network device (virtio 1.2, section 5.1).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/log.h"
#include "base/property.h"
#include "net/netdev.h"
#include "virtio/device.h"
#include "virtio/net_queue_pair.h"
#include "virtio/vhost.h"

namespace wisp {

using MacAddress = std::array<std::uint8_t, 6>;

struct VirtioNetOptions {
  std::string id{};                 // for messages
  std::optional<MacAddress> mac{};  // empty: a random one, locally administered
  bool mq = true;                   // offer as many queue pairs as the back end has
  std::uint16_t queue_size = 256;
  std::uint16_t host_mtu = 0;  // told to the driver; 0: not told
};

// Options of virtio-net-device. `netdev` and the iothreads are for the machine.
extern const std::span<const PropertySpec> kVirtioNetProperties;
[[nodiscard]] Result<VirtioNetOptions> parse_virtio_net_options(std::string id,
                                                                const PropertySet& properties);
// "52:54:00:12:34:56"; refuses group addresses and the zero address.
[[nodiscard]] Result<MacAddress> parse_mac(std::string_view text);

class VirtioNet final : public VirtioDevice, private NetPairOwner {
 public:
  // Takes the back end over. With netdev.vhost_fds, the kernel moves the frames.
  [[nodiscard]] static Result<std::unique_ptr<VirtioNet>> create(EventLoop& loop, const GuestMemory& memory,
                                                                 const VirtioNetOptions& options,
                                                                 Netdev netdev, EntropySource& entropy,
                                                                 Log& log, const Clock& clock);
  ~VirtioNet() override;

  [[nodiscard]] std::string_view name() const override { return "virtio-net"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 1; }
  [[nodiscard]] std::uint64_t features() const override { return features_; }
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return queue_sizes_; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] bool kicks_handled_elsewhere() const override { return !vhosts_.empty(); }
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

  // Plugs the cable in or pulls it. A link whose back end is gone stays down.
  void set_link(bool up);
  [[nodiscard]] bool link_up() const { return link_up_ && !backend_closed_; }
  [[nodiscard]] const MacAddress& mac() const { return state_.mac; }
  // Zero where the kernel moves the frames.
  [[nodiscard]] const NetCounters& counters() const { return counters_; }

 private:
  // What the driver can change by the control queue.
  struct DriverState {
    MacAddress mac{};
    std::uint16_t active_pairs = 1;
    std::uint64_t guest_offloads = 0;  // feature bits
  };

  VirtioNet(EventLoop& loop, const GuestMemory& memory, VirtioNetOptions options,
            std::unique_ptr<NetBackend> backend, Log& log, const Clock& clock);
  [[nodiscard]] Result<void> take_vhost(std::vector<UniqueFd> fds);
  void settle_features();
  void on_pause() override;
  void on_resume() override;
  void backend_closed() override;
  void queue_broken(std::uint16_t queue) override;

  [[nodiscard]] Result<void> apply_state();
  void process_control();
  [[nodiscard]] bool run_command(const DescriptorChain& chain);
  [[nodiscard]] bool set_mac_table(const DescriptorChain& chain) const;

  [[nodiscard]] Result<void> start_vhost();
  void stop_vhost();
  [[nodiscard]] Result<void> start_vhost_pair(std::uint16_t pair);

  const VirtioNetOptions options_;
  const MacAddress birth_mac_;
  const std::unique_ptr<NetBackend> backend_;
  Log& log_;
  LogGate log_gate_;
  const std::uint16_t max_pairs_;
  std::uint64_t features_ = 0;
  std::vector<std::uint16_t> queue_sizes_;
  NetCounters counters_;
  std::vector<std::unique_ptr<NetQueuePair>> pairs_;

  bool link_up_ = true;
  bool backend_closed_ = false;
  DriverState state_;
  bool state_loaded_ = false;  // by load(), for the activation that follows

  // While active.
  VirtioInterrupts* interrupts_ = nullptr;
  std::uint64_t negotiated_ = 0;
  std::uint16_t control_index_ = 2;
  std::optional<Queue> control_;
  int control_kick_ = -1;
  DescriptorChain control_chain_;

  // Where the kernel moves the frames: one per pair, and the queues while it has them.
  std::vector<std::unique_ptr<VhostKernel>> vhosts_;
  std::vector<std::optional<Queue>> vhost_queues_;
  std::vector<int> kick_fds_;
  bool vhost_running_ = false;
  UniqueFd vhost_error_;
  Watch vhost_error_watch_;
  Watch control_watch_;
};

}  // namespace wisp
