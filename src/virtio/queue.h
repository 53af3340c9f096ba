// The split virtqueue (virtio 1.2, section 2.7) from the device's side.
//
// What the driver writes before DRIVER_OK is a QueueConfig. Activating consumes it and gives a Queue, whose
// place and size can no longer change. Everything in the rings is hostile: each descriptor is copied in once
// and then judged, chains are bounded by the queue size, a head is given out once until it is returned.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/state.h"
#include "memory/guest_memory.h"

namespace wisp {

inline constexpr std::uint16_t kMaxQueueSize = 1024;
// Buffers in one chain, those of an indirect table included; what readv and io_uring take at once (IOV_MAX).
// Linux builds indirect chains longer than the queue, so the queue's size is no bound for them.
inline constexpr std::uint32_t kMaxChainLength = 1024;

inline constexpr std::uint64_t kVirtioFeatureIndirectDesc = 1ULL << 28;
inline constexpr std::uint64_t kVirtioFeatureEventIdx = 1ULL << 29;
inline constexpr std::uint64_t kVirtioFeatureVersion1 = 1ULL << 32;

// The queue's registers as the driver left them.
struct QueueConfig {
  std::uint16_t max_size = 0;
  std::uint16_t size = 0;
  bool ready = false;
  Gpa descriptor_table = 0;
  Gpa available_ring = 0;
  Gpa used_ring = 0;
};

// One request: first the buffers the device reads, then those it writes (2.7.4.2). Reused from request to
// request, so that the steady state allocates nothing.
class DescriptorChain final {
 public:
  [[nodiscard]] std::uint16_t head() const { return head_; }
  [[nodiscard]] std::span<const GuestSlice> readable() const {
    return std::span(buffers_).first(readable_count_);
  }
  [[nodiscard]] std::span<const GuestSlice> writable() const {
    return std::span(buffers_).subspan(readable_count_);
  }
  // Sums of buffer lengths, in bytes; each fits 32 bits, or the chain would not have been given out.
  [[nodiscard]] std::uint32_t readable_size() const { return readable_size_; }
  [[nodiscard]] std::uint32_t writable_size() const { return writable_size_; }

  // Copies out of the readable part from byte `offset`; returns how many bytes were there.
  std::size_t read(std::size_t offset, std::span<std::uint8_t> out) const;
  // Copies into the writable part from byte `offset` and marks that as dirty; returns how many fitted.
  std::size_t write(std::size_t offset, std::span<const std::uint8_t> in) const;
  // Appends the part [offset, offset + size) of the readable or writable buffers to `out`, for readv and
  // writev. Returns the bytes covered (less than `size` where the chain ends). What is written through iovecs
  // becomes dirty by push(), as far as its `written` says.
  std::size_t readable_iovecs(std::size_t offset, std::size_t size, std::vector<iovec>& out) const;
  std::size_t writable_iovecs(std::size_t offset, std::size_t size, std::vector<iovec>& out) const;

 private:
  friend class Queue;
  const GuestMemory* memory_ = nullptr;
  std::uint16_t head_ = 0;
  std::size_t readable_count_ = 0;
  std::uint32_t readable_size_ = 0;
  std::uint32_t writable_size_ = 0;
  std::vector<GuestSlice> buffers_;
};

enum class PopResult : std::uint8_t {
  kChain,   // a chain was given out; return it with push() exactly once
  kEmpty,   // nothing available
  kBroken,  // the driver broke the rules: mark the device NEEDS_RESET; the queue gives out nothing more
};

class Queue final {
 public:
  // Checks size (a power of two, at most max_size and kMaxQueueSize), alignment (16, 2, 4) and that each of
  // the three rings lies in one block of RAM. `features` are the negotiated ones.
  [[nodiscard]] static Result<Queue> activate(const QueueConfig& config, const GuestMemory& memory,
                                              std::uint64_t features);
  Queue(Queue&&) noexcept = default;
  Queue& operator=(Queue&&) noexcept = default;

  [[nodiscard]] std::uint16_t size() const { return size_; }
  [[nodiscard]] const QueueConfig& config() const { return config_; }
  [[nodiscard]] const GuestMemory& memory() const { return *memory_; }

  // Takes the next available chain into `chain`. Never more chains per ring position than the driver
  // published.
  [[nodiscard]] PopResult pop(DescriptorChain& chain);
  // Gives the last popped chain back to the available side, as if it had not been popped (only the latest
  // one; after it, the one popped before it is the latest, unless it was returned).
  void undo_pop(const DescriptorChain& chain);
  // Returns a chain of which the first `written` bytes of the writable part were written (marked dirty here;
  // at most writable_size()). Chains may come back in any order; returning one that is not in flight is a
  // broken invariant of the device and aborts.
  void push(const DescriptorChain& chain, std::uint32_t written);
  // push() in two steps, for what the driver must find as a whole: it sees the chains that were staged, in
  // their order, once they are published.
  void stage(const DescriptorChain& chain, std::uint32_t written);
  void publish();

  // Whether the driver wants an interrupt for what was pushed since the last call (2.7.7, 2.7.10).
  [[nodiscard]] bool take_interrupt_wish();
  // Whether buffers wait to be popped (or the queue is broken, which pop() will tell).
  [[nodiscard]] bool has_available();
  // Asks the driver to notify (or not to) when it adds buffers. A device enables before it waits for the next
  // notification, or none may come (2.7.10). After enabling, look for buffers once more: true says that some
  // came in between.
  void disable_notifications();
  [[nodiscard]] bool enable_notifications();
  // The same for a device that popped all there was, found it too little and took it back with undo_pop():
  // asks for a notification of what comes behind that. enable_notifications() would ask for chains that are
  // there already, and with the event index a driver tells of each only once.
  [[nodiscard]] bool enable_notifications_of_more();

  [[nodiscard]] bool broken() const { return broken_; }
  // Chains given out and not yet returned.
  [[nodiscard]] std::uint32_t in_flight() const { return in_flight_count_; }

  // The running indices, for snapshots: only with nothing in flight.
  void save(StateWriter& writer) const;
  [[nodiscard]] Result<void> load(StateReader& reader);
  // For vhost: where the kernel takes up, and where it left off.
  [[nodiscard]] std::uint16_t next_available() const { return next_available_; }
  // Both indices, with nothing in flight: the next to pop and the next to push.
  void set_next_available(std::uint16_t index);

 private:
  Queue() = default;
  struct Descriptor;
  [[nodiscard]] bool walk(std::uint16_t head, DescriptorChain& chain) const;
  [[nodiscard]] bool append(const Descriptor& descriptor, DescriptorChain& chain) const;
  [[nodiscard]] PopResult break_queue();
  [[nodiscard]] bool listen_from(std::uint16_t index);
  void stage_head(std::uint16_t head, std::uint32_t written);
  void mark_used_ring(std::uint64_t offset, std::uint64_t size) const;
  const GuestMemory* memory_ = nullptr;
  QueueConfig config_;
  std::uint16_t size_ = 0;
  bool event_idx_ = false;
  bool indirect_ = false;
  bool broken_ = false;
  GuestSlice descriptors_;
  GuestSlice available_;
  GuestSlice used_;
  std::uint16_t next_available_ = 0;
  std::uint16_t seen_available_ = 0;  // the driver's index when last looked at
  std::uint16_t next_used_ = 0;
  std::uint32_t unsignalled_ = 0;      // pushes since the last take_interrupt_wish()
  bool signalled_used_valid_ = false;  // whether the driver's event index can be compared with that
  std::uint32_t in_flight_count_ = 0;
  std::vector<bool> in_flight_;  // by head
};

}  // namespace wisp
