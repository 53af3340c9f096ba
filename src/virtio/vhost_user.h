// The front end of vhost-user (docs/interop/vhost-user.rst of QEMU): another process moves a device's data
// between shared guest memory and wherever it wants; kicks and interrupts go by eventfd.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/error.h"
#include "memory/guest_memory.h"
#include "virtio/queue.h"
#include "virtio/vhost_user_channel.h"

namespace wisp {

// The longest that a back end may keep this process waiting.
struct VhostUserTimeouts {
  std::chrono::milliseconds connect{1000};    // for one that is still starting to listen
  std::chrono::milliseconds handshake{5000};  // from the connection to its last answer
  std::chrono::milliseconds exchange{2000};   // for start() or stop() as a whole
};

// One queue that runs in the back end. The descriptors are borrowed: the back end gets duplicates.
struct VhostUserQueue {
  std::uint32_t index = 0;
  Queue* queue = nullptr;
  int kick_fd = -1;
  int call_fd = -1;
  int error_fd = -1;  // signalled when the back end gives the queue up because the driver broke the rules
};

// A connection from the handshake to its end; there is no second one. Any error ends it: what the back end
// then still does to guest memory is out of this process's hands. Not thread-safe.
class VhostUser final {
 public:
  // Connects to the socket at `path` and agrees on features. `queues` is how many the device has. Fails where
  // the back end serves fewer, or lacks what the transports always offer (VERSION_1, EVENT_IDX,
  // INDIRECT_DESC).
  [[nodiscard]] static Result<std::unique_ptr<VhostUser>> connect(const std::string& path,
                                                                  std::uint32_t queues,
                                                                  const VhostUserTimeouts& timeouts);
  // The same over a connected socket.
  [[nodiscard]] static Result<std::unique_ptr<VhostUser>> handshake(VhostUserChannel channel,
                                                                    std::uint32_t queues,
                                                                    const VhostUserTimeouts& timeouts);
  // Whether a back end could map all of `memory`; else the error says which option is missing.
  [[nodiscard]] static Result<void> check_memory(const GuestMemory& memory);

  VhostUser(const VhostUser&) = delete;
  VhostUser& operator=(const VhostUser&) = delete;
  ~VhostUser() = default;

  // Virtio features that the back end serves, those of the ring included.
  [[nodiscard]] std::uint64_t features() const { return features_; }
  // See VhostUserChannel.
  [[nodiscard]] int fd() const { return channel_.fd(); }
  [[nodiscard]] bool usable() const { return channel_.usable(); }
  [[nodiscard]] Result<void> check_alive() { return channel_.check_alive(); }
  void close() { channel_.close(); }

  // Tells features and guest memory, and hands the queues over from where they stand. The caller then signals
  // each kick_fd: what came before is not noticed otherwise.
  [[nodiscard]] Result<void> start(std::uint64_t negotiated, const GuestMemory& memory,
                                   std::span<const VhostUserQueue> queues);
  // Takes the queues back and sets where they stand. Nothing is in flight in them afterwards.
  [[nodiscard]] Result<void> stop(std::span<const VhostUserQueue> queues);

 private:
  using Request = VhostUserRequest;
  VhostUser(VhostUserChannel channel, const VhostUserTimeouts& timeouts)
      : channel_(std::move(channel)), timeouts_(timeouts) {}
  [[nodiscard]] Result<void> agree(std::uint32_t queues);
  [[nodiscard]] Result<void> start_all(std::uint64_t negotiated, const GuestMemory& memory,
                                       std::span<const VhostUserQueue> queues);
  [[nodiscard]] Result<void> stop_all(std::span<const VhostUserQueue> queues);
  [[nodiscard]] Result<void> start_queue(const VhostUserQueue& queue);
  [[nodiscard]] Result<void> stop_queue(const VhostUserQueue& queue);
  [[nodiscard]] Result<void> set_memory(const GuestMemory& memory);
  // A message without an answer of its own: acknowledged where the back end can.
  [[nodiscard]] Result<void> set(Request request, std::span<const std::uint8_t> payload,
                                 std::span<const int> fds = {});
  [[nodiscard]] Result<void> set_number(Request request, std::uint64_t number);
  [[nodiscard]] Result<void> set_vring(Request request, std::uint32_t index, std::uint32_t number);
  [[nodiscard]] Result<void> set_vring_fd(Request request, std::uint32_t index, int fd);
  [[nodiscard]] Result<std::uint64_t> get_number(Request request);

  VhostUserChannel channel_;
  const VhostUserTimeouts timeouts_;
  VhostUserChannel::Deadline deadline_;  // of the exchange under way
  std::uint64_t features_ = 0;
  bool has_protocol_features_ = false;
  std::uint64_t protocol_features_ = 0;  // agreed
};

}  // namespace wisp
