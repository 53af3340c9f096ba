// The file system device (virtio 1.2, section 5.11), served by a vhost-user back end such as virtiofsd: the
// guest mounts a directory of the host by its tag.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/property.h"
#include "virtio/vhost_user_device.h"

namespace wisp {

inline constexpr std::size_t kVhostUserFsTagSize = 36;
inline constexpr std::uint16_t kVhostUserFsMaxRequestQueues = 64;

struct VhostUserFsOptions {
  std::string id{};       // for messages
  std::string chardev{};  // a socket chardev; the machine puts its path into `path`
  std::string path{};     // where the back end listens: this side connects, whatever `server` says
  std::string tag{};      // 1 to 36 bytes
  std::uint16_t num_request_queues = 1;
  std::uint16_t queue_size = kMaxQueueSize;  // of each queue, a power of two
  VhostUserTimeouts timeouts{};
};

// Options of vhost-user-fs-device.
extern const std::span<const PropertySpec> kVhostUserFsProperties;
// Leaves `path` empty.
[[nodiscard]] Result<VhostUserFsOptions> parse_vhost_user_fs_options(std::string id,
                                                                     const PropertySet& properties);

class VhostUserFs final : public VhostUserDevice {
 public:
  // Connects to the back end and agrees with it. `memory` must be shared memory throughout.
  [[nodiscard]] static Result<std::unique_ptr<VhostUserFs>> create(EventLoop& loop, const GuestMemory& memory,
                                                                   const VhostUserFsOptions& options,
                                                                   Log& log, const Clock& clock);

  [[nodiscard]] std::string_view name() const override { return "vhost-user-fs"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 26; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;

 private:
  VhostUserFs(EventLoop& loop, const GuestMemory& memory, const VhostUserFsOptions& options,
              std::unique_ptr<VhostUser> vhost, Log& log, const Clock& clock);

  // 5.11.4: the tag, filled up with zeroes, and num_request_queues.
  std::array<std::uint8_t, kVhostUserFsTagSize + 4> config_{};
};

}  // namespace wisp
