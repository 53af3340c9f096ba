// A tap interface of the host (Linux tuntap.rst): frames with virtio-net headers, so that checksums and
// segmentation are left to whoever can do them best.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "net/net_backend.h"

namespace wisp {

// Most queue pairs of one interface here.
inline constexpr std::uint16_t kMaxTapQueues = 16;

class TapBackend final : public NetBackend {
 public:
  // Attaches to the interface `name`, or creates it where it does not exist and the process may (it then goes
  // away with this object, and is brought up here). `queues` is 1..kMaxTapQueues.
  [[nodiscard]] static Result<std::unique_ptr<TapBackend>> open(const std::string& name,
                                                                std::uint16_t queues);
  // Takes over descriptors of one tap or macvtap interface, one per queue pair.
  [[nodiscard]] static Result<std::unique_ptr<TapBackend>> from_fds(std::vector<UniqueFd> fds);

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] std::uint16_t queue_pairs() const override { return static_cast<std::uint16_t>(fds_.size()); }
  [[nodiscard]] bool has_vnet_header() const override { return vnet_header_; }
  [[nodiscard]] NetOffloads offloads() const override { return offloads_; }
  [[nodiscard]] Result<void> set_offloads(const NetOffloads& offloads) override;
  [[nodiscard]] Result<void> set_active_pairs(std::uint16_t pairs) override;
  [[nodiscard]] NetIo send(std::uint16_t pair, std::span<const iovec> frame) override;
  [[nodiscard]] NetReceived receive(std::uint16_t pair, std::span<const iovec> buffers) override;
  [[nodiscard]] int poll_fd(std::uint16_t pair) const override { return fds_[pair].get(); }
  [[nodiscard]] int vhost_backend_fd(std::uint16_t pair) const override { return fds_[pair].get(); }
  [[nodiscard]] std::string description() const override { return "tap " + name_; }
  [[nodiscard]] std::string failure() override { return "the interface " + name_ + " was removed"; }

 private:
  TapBackend(std::vector<UniqueFd> fds, std::string name, bool vnet_header, bool multi_queue);
  // Sets the header size, and finds out which offloads the kernel takes.
  [[nodiscard]] Result<void> prepare();

  const std::vector<UniqueFd> fds_;
  const std::string name_;
  const bool vnet_header_;
  const bool multi_queue_;
  NetOffloads offloads_;
  std::uint16_t active_pairs_;
};

}  // namespace wisp
