#include "virtio/vhost_user.h"

#include <array>
#include <limits>
#include <utility>

#include "base/bytes.h"
#include "virtio/vhost.h"

namespace wisp {
namespace {

constexpr std::uint64_t kProtocolFeaturesBit = 1ULL << 30;  // VHOST_USER_F_PROTOCOL_FEATURES
constexpr std::uint64_t kProtocolMq = 1ULL << 0;
constexpr std::uint64_t kProtocolReplyAck = 1ULL << 3;
constexpr std::uint64_t kNoFd = 1ULL << 8;  // in the number of a message about a ring's descriptor
constexpr std::uint32_t kMaxQueues = 256;   // that number has 8 bits for the ring
constexpr std::size_t kRegionSize = 32;

using Clock = std::chrono::steady_clock;

}  // namespace

Result<std::unique_ptr<VhostUser>> VhostUser::connect(const std::string& path, std::uint32_t queues,
                                                      const VhostUserTimeouts& timeouts) {
  WISP_ASSIGN(VhostUserChannel channel, VhostUserChannel::connect(path, Clock::now() + timeouts.connect));
  return handshake(std::move(channel), queues, timeouts);
}

Result<std::unique_ptr<VhostUser>> VhostUser::handshake(VhostUserChannel channel, std::uint32_t queues,
                                                        const VhostUserTimeouts& timeouts) {
  WISP_ASSERT(queues <= kMaxQueues);
  std::unique_ptr<VhostUser> vhost(new VhostUser(std::move(channel), timeouts));
  vhost->deadline_ = Clock::now() + timeouts.handshake;
  WISP_TRY(vhost->agree(queues));
  return vhost;
}

Result<void> VhostUser::agree(std::uint32_t queues) {
  WISP_ASSIGN(const std::uint64_t features, get_number(Request::kGetFeatures));
  has_protocol_features_ = (features & kProtocolFeaturesBit) != 0;
  features_ = features & ~kProtocolFeaturesBit;
  if ((features_ & kVhostNeededFeatures) != kVhostNeededFeatures) {
    return fail("{}: the back end lacks features {:#x} of virtio 1", channel_.peer(),
                kVhostNeededFeatures & ~features_);
  }
  if (has_protocol_features_) {
    WISP_ASSIGN(const std::uint64_t offered, get_number(Request::kGetProtocolFeatures));
    const std::uint64_t taken = offered & (kProtocolMq | kProtocolReplyAck);
    WISP_TRY(set_number(Request::kSetProtocolFeatures, taken));
    protocol_features_ = taken;
  }
  if ((protocol_features_ & kProtocolMq) != 0) {
    WISP_ASSIGN(const std::uint64_t served, get_number(Request::kGetQueueNum));
    if (served < queues) {
      return fail("{}: the back end serves {} queues, the device has {}", channel_.peer(), served, queues);
    }
  }
  return channel_.send(Request::kSetOwner, 0, {}, {}, deadline_);
}

Result<void> VhostUser::check_memory(const GuestMemory& memory) {
  for (const GuestMemoryBlock& block : memory.blocks()) {
    if (block.fd < 0) {
      return fail(
          "guest memory is private to this process, so a vhost-user back end cannot see it: add mem-share=on "
          "to -machine, or use -object memory-backend-memfd with share=on");
    }
  }
  if (memory.blocks().size() > kVhostUserMaxFds) {
    return fail("guest memory has {} parts, vhost-user back ends take {}", memory.blocks().size(),
                kVhostUserMaxFds);
  }
  return {};
}

Result<std::uint64_t> VhostUser::get_number(Request request) {
  std::array<std::uint8_t, sizeof(std::uint64_t)> payload{};
  WISP_TRY(channel_.send(request, 0, {}, {}, deadline_));
  WISP_TRY(channel_.receive(request, payload, deadline_));
  return load_le<std::uint64_t>(payload.data());
}

Result<void> VhostUser::set(Request request, std::span<const std::uint8_t> payload,
                            std::span<const int> fds) {
  const bool acknowledged = (protocol_features_ & kProtocolReplyAck) != 0;
  WISP_TRY(channel_.send(request, acknowledged ? kVhostUserNeedReply : 0, payload, fds, deadline_));
  if (!acknowledged) {
    return {};
  }
  std::array<std::uint8_t, sizeof(std::uint64_t)> answer{};
  WISP_TRY(channel_.receive(request, answer, deadline_));
  if (const auto error = load_le<std::uint64_t>(answer.data()); error != 0) {
    return fail("{}: the back end refused {} (error {})", channel_.peer(), to_string(request), error);
  }
  return {};
}

Result<void> VhostUser::set_number(Request request, std::uint64_t number) {
  std::array<std::uint8_t, sizeof number> payload{};
  store_le(payload.data(), number);
  return set(request, payload);
}

Result<void> VhostUser::set_vring(Request request, std::uint32_t index, std::uint32_t number) {
  std::array<std::uint8_t, 8> payload{};
  store_le(payload.data(), index);
  store_le(payload.data() + 4, number);
  return set(request, payload);
}

Result<void> VhostUser::set_vring_fd(Request request, std::uint32_t index, int fd) {
  std::array<std::uint8_t, sizeof(std::uint64_t)> payload{};
  store_le(payload.data(), std::uint64_t{index} | (fd < 0 ? kNoFd : 0));
  return set(request, payload, fd < 0 ? std::span<const int>() : std::span<const int>(&fd, 1));
}

Result<void> VhostUser::set_memory(const GuestMemory& memory) {
  WISP_TRY(check_memory(memory));
  const auto blocks = memory.blocks();
  std::array<std::uint8_t, 8 + kRegionSize * kVhostUserMaxFds> payload{};
  std::array<int, kVhostUserMaxFds> fds{};
  store_le(payload.data(), static_cast<std::uint32_t>(blocks.size()));  // then 4 bytes of padding
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    std::uint8_t* region = payload.data() + 8 + kRegionSize * i;
    store_le(region, blocks[i].gpa);
    store_le(region + 8, blocks[i].size);
    // "User addresses" only tie the rings' addresses to the table; those of this process stay its secret.
    store_le(region + 16, blocks[i].gpa);
    store_le(region + 24, blocks[i].fd_offset);
    fds.at(i) = blocks[i].fd;
  }
  return set(Request::kSetMemTable, std::span(payload).first(8 + kRegionSize * blocks.size()),
             std::span(fds).first(blocks.size()));
}

Result<void> VhostUser::start_queue(const VhostUserQueue& queue) {
  const QueueConfig& config = queue.queue->config();
  WISP_TRY(set_vring(Request::kSetVringNum, queue.index, config.size));
  WISP_TRY(set_vring(Request::kSetVringBase, queue.index, queue.queue->next_available()));
  // Index, flags, then the addresses of descriptors, used ring, available ring and log.
  std::array<std::uint8_t, 40> address{};
  store_le(address.data(), queue.index);
  store_le(address.data() + 8, config.descriptor_table);
  store_le(address.data() + 16, config.used_ring);
  store_le(address.data() + 24, config.available_ring);
  WISP_TRY(set(Request::kSetVringAddr, address));
  WISP_TRY(set_vring_fd(Request::kSetVringErr, queue.index, queue.error_fd));
  WISP_TRY(set_vring_fd(Request::kSetVringCall, queue.index, queue.call_fd));
  WISP_TRY(set_vring_fd(Request::kSetVringKick, queue.index, queue.kick_fd));
  // Rings of a back end without protocol features are on from the start.
  return has_protocol_features_ ? set_vring(Request::kSetVringEnable, queue.index, 1) : Result<void>();
}

Result<void> VhostUser::start(std::uint64_t negotiated, const GuestMemory& memory,
                              std::span<const VhostUserQueue> queues) {
  deadline_ = Clock::now() + timeouts_.exchange;
  Result<void> started = start_all(negotiated, memory, queues);
  if (!started) {
    channel_.shut_down();
  }
  return started;
}

Result<void> VhostUser::stop(std::span<const VhostUserQueue> queues) {
  deadline_ = Clock::now() + timeouts_.exchange;
  Result<void> stopped = stop_all(queues);
  if (!stopped) {
    channel_.shut_down();
  }
  return stopped;
}

Result<void> VhostUser::start_all(std::uint64_t negotiated, const GuestMemory& memory,
                                  std::span<const VhostUserQueue> queues) {
  WISP_TRY(set_number(Request::kSetFeatures,
                      (negotiated & features_) | (has_protocol_features_ ? kProtocolFeaturesBit : 0)));
  WISP_TRY(set_memory(memory));
  for (const VhostUserQueue& queue : queues) {
    WISP_TRY(start_queue(queue));
  }
  return {};
}

Result<void> VhostUser::stop_queue(const VhostUserQueue& queue) {
  std::array<std::uint8_t, 8> state{};
  store_le(state.data(), queue.index);
  WISP_TRY(channel_.send(Request::kGetVringBase, 0, state, {}, deadline_));
  WISP_TRY(channel_.receive(Request::kGetVringBase, state, deadline_));
  const auto index = load_le<std::uint32_t>(state.data());
  const auto base = load_le<std::uint32_t>(state.data() + 4);
  if (index != queue.index || base > std::numeric_limits<std::uint16_t>::max()) {
    return fail("{}: the back end gave place {} of queue {} where it was asked for queue {}", channel_.peer(),
                base, index, queue.index);
  }
  queue.queue->set_next_available(static_cast<std::uint16_t>(base));
  return {};
}

Result<void> VhostUser::stop_all(std::span<const VhostUserQueue> queues) {
  for (const VhostUserQueue& queue : queues) {
    if (has_protocol_features_) {
      WISP_TRY(set_vring(Request::kSetVringEnable, queue.index, 0));
    }
    WISP_TRY(stop_queue(queue));
  }
  return {};
}

}  // namespace wisp
