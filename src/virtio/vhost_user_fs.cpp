#include "virtio/vhost_user_fs.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "base/bytes.h"

namespace wisp {
namespace {

constexpr std::uint32_t kFirstRequestQueue = 1;  // 5.11.2: before it, the one for high priority

constexpr std::array kSpecs{
    PropertySpec{
        .name = "chardev", .help = "socket chardev with the path where virtiofsd listens", .required = true},
    PropertySpec{.name = "tag",
                 .help = "name by which the guest mounts it, 1 to 36 bytes",
                 .required = true,
                 .maximum = kVhostUserFsTagSize},
    PropertySpec{.name = "num-request-queues",
                 .kind = PropertyKind::kUint,
                 .help = "queues for requests, as far as the back end serves them",
                 .default_text = "1",
                 .minimum = 1,
                 .maximum = kVhostUserFsMaxRequestQueues},
    PropertySpec{.name = "queue-size",
                 .kind = PropertyKind::kUint,
                 .help = "entries of each queue, a power of two",
                 .default_text = "1024",
                 .minimum = 2,
                 .maximum = kMaxQueueSize},
};

Result<void> check(const VhostUserFsOptions& options) {
  if (options.tag.empty() || options.tag.size() > kVhostUserFsTagSize) {
    return fail("tag={} has {} bytes, expected 1 to {}", options.tag, options.tag.size(),
                kVhostUserFsTagSize);
  }
  // A zero byte would end the tag early for the driver.
  if (options.tag.find('\0') != std::string::npos) {
    return fail("tag holds a zero byte");
  }
  if (!std::has_single_bit(options.queue_size) || options.queue_size > kMaxQueueSize) {
    return fail("queue-size={} is not a power of two up to {}", options.queue_size, kMaxQueueSize);
  }
  if (options.num_request_queues < 1 || options.num_request_queues > kVhostUserFsMaxRequestQueues) {
    return fail("num-request-queues={} is not between 1 and {}", options.num_request_queues,
                kVhostUserFsMaxRequestQueues);
  }
  return {};
}

}  // namespace

constinit const std::span<const PropertySpec> kVhostUserFsProperties = kSpecs;

Result<VhostUserFsOptions> parse_vhost_user_fs_options(std::string id, const PropertySet& properties) {
  VhostUserFsOptions options;
  options.id = std::move(id);
  options.chardev = properties.get_string("chardev");
  options.tag = properties.get_string("tag");
  options.num_request_queues =
      static_cast<std::uint16_t>(properties.get_uint("num-request-queues", options.num_request_queues));
  options.queue_size = static_cast<std::uint16_t>(properties.get_uint("queue-size", options.queue_size));
  if (const Result<void> checked = check(options); !checked) {
    return with_context("device " + options.id, checked.error());
  }
  return options;
}

VhostUserFs::VhostUserFs(EventLoop& loop, const GuestMemory& memory, const VhostUserFsOptions& options,
                         std::unique_ptr<VhostUser> vhost, Log& log, const Clock& clock)
    // No device-specific feature: notifications from the back end (5.11.3) are not served.
    : VhostUserDevice(
          loop, memory, options.id, 0,
          std::vector<std::uint16_t>(kFirstRequestQueue + options.num_request_queues, options.queue_size),
          std::move(vhost), log, clock) {
  std::ranges::copy(options.tag, config_.begin());
  store_le(config_.data() + kVhostUserFsTagSize, std::uint32_t{options.num_request_queues});
}

Result<std::unique_ptr<VhostUserFs>> VhostUserFs::create(EventLoop& loop, const GuestMemory& memory,
                                                         const VhostUserFsOptions& options, Log& log,
                                                         const Clock& clock) {
  const std::string context = "device " + options.id;
  Result<void> possible = check(options);
  if (possible) {
    possible = VhostUser::check_memory(memory);
  }
  if (!possible) {
    return with_context(context, possible.error());
  }
  auto vhost =
      VhostUser::connect(options.path, kFirstRequestQueue + options.num_request_queues, options.timeouts);
  if (!vhost) {
    return with_context(context, vhost.error());
  }
  std::unique_ptr<VhostUserFs> device(new VhostUserFs(loop, memory, options, *std::move(vhost), log, clock));
  WISP_TRY(device->watch_connection());
  return device;
}

void VhostUserFs::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  read_config_bytes(config_, offset, data);
}

void VhostUserFs::write_config(std::uint64_t /*offset*/, std::span<const std::uint8_t> /*data*/) {}

}  // namespace wisp
