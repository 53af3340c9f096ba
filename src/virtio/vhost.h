// The kernel's vhost back ends (linux/vhost.h): the kernel moves a device's data between guest memory and a
// tap or a socket, on a thread of its own; kicks and interrupts go by eventfd.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "memory/guest_memory.h"
#include "virtio/queue.h"

namespace wisp {

// What the transports always offer, so that a back end must serve it.
inline constexpr std::uint64_t kVhostNeededFeatures =
    kVirtioFeatureVersion1 | kVirtioFeatureIndirectDesc | kVirtioFeatureEventIdx;

// One opened /dev/vhost-*. Not thread-safe: used under the device's lock.
class VhostKernel final {
 public:
  // Takes the descriptor over and makes this process its owner. `path` is for messages ("/dev/vhost-net").
  [[nodiscard]] static Result<std::unique_ptr<VhostKernel>> create(UniqueFd fd, std::string path);
  VhostKernel(const VhostKernel&) = delete;
  VhostKernel& operator=(const VhostKernel&) = delete;
  ~VhostKernel() = default;

  [[nodiscard]] int fd() const { return fd_.get(); }
  // Feature bits that the kernel serves, those of the ring included.
  [[nodiscard]] std::uint64_t features() const { return features_; }

  // Tells negotiated features and where guest memory is. Before the first queue starts. Where writes to guest
  // memory are tracked, those of the kernel are too (see collect_dirty()).
  [[nodiscard]] Result<void> configure(std::uint64_t negotiated, const GuestMemory& memory);
  // Hands one queue over, from where `queue` stands. `error_fd` is signalled when the kernel gives the queue
  // up because the driver broke the rules. All three descriptors are borrowed until stop_queue().
  [[nodiscard]] Result<void> start_queue(std::uint32_t index, const Queue& queue, int kick_fd, int call_fd,
                                         int error_fd);
  // Takes the queue back and sets where it stands. The back end must be off.
  [[nodiscard]] Result<void> stop_queue(std::uint32_t index, Queue& queue);
  // Passes on to `memory` which pages the kernel wrote since the last call. With the queues stopped.
  void collect_dirty(const GuestMemory& memory);

  // An ioctl of the back end with its argument.
  template <typename T>
  [[nodiscard]] Result<void> call(unsigned long request, T* argument, const char* what) {
    return call_raw(request, argument, what);
  }

 private:
  VhostKernel(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  [[nodiscard]] Result<void> call_raw(unsigned long request, void* argument, const char* what);

  const UniqueFd fd_;
  const std::string path_;
  std::uint64_t features_ = 0;
  bool logging_ = false;
  std::vector<std::uint64_t> log_;  // one bit per 4 KiB page from guest address 0, written by the kernel
};

}  // namespace wisp
