// The driver's side of one split virtqueue: lays the rings out in a FakeGuest, publishes chains, reads what
// the device used. Well-behaved through add(); every ring field can also be written raw for hostile tests.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "virtio/queue.h"
#include "virtio/support/fake_guest.h"

namespace wisp::test {

struct FakeDescriptor {
  Gpa address = 0;
  std::uint32_t length = 0;
  std::uint16_t flags = 0;
  std::uint16_t next = 0;
};
static_assert(sizeof(FakeDescriptor) == 16);

inline constexpr std::uint16_t kDescNext = 1;
inline constexpr std::uint16_t kDescWrite = 2;
inline constexpr std::uint16_t kDescIndirect = 4;

// The buffers of one request, in order: readable ones first for a well-behaved driver.
class ChainBuilder final {
 public:
  ChainBuilder& readable(Gpa gpa, std::uint32_t size) { return part(gpa, size, false); }
  ChainBuilder& writable(Gpa gpa, std::uint32_t size) { return part(gpa, size, true); }
  // Buffers from here on go into an indirect table, which follows the buffers so far.
  ChainBuilder& indirect() {
    indirect_from_ = parts_.size();
    return *this;
  }

 private:
  friend class FakeQueue;
  struct Part {
    Gpa gpa;
    std::uint32_t size;
    bool writable;
  };
  ChainBuilder& part(Gpa gpa, std::uint32_t size, bool writable) {
    parts_.push_back({gpa, size, writable});
    return *this;
  }
  std::vector<Part> parts_;
  std::optional<std::size_t> indirect_from_;
};

class FakeQueue final {
 public:
  struct Used {
    std::uint32_t head = 0;
    std::uint32_t written = 0;
  };

  // Allocates and zeroes the rings. `size` is a power of two.
  FakeQueue(FakeGuest& guest, std::uint16_t size, bool event_idx = false);

  // Ready, with max_size = size.
  [[nodiscard]] QueueConfig config() const;
  [[nodiscard]] std::uint16_t size() const { return size_; }
  [[nodiscard]] FakeGuest& guest() { return guest_; }

  // Takes free descriptors (aborts where too few are left), fills them, publishes the head; returns it.
  std::uint16_t add(const ChainBuilder& chain);
  // The same in two steps: the chain is in the table but not published.
  std::uint16_t build(const ChainBuilder& chain);
  void publish(std::uint16_t head);
  // Whether the device wants a notification for what was published since the last call.
  [[nodiscard]] bool take_notify_wish();

  // The next used element; its descriptors become free again.
  std::optional<Used> take_used();
  [[nodiscard]] std::uint16_t used_index() const;
  // What the driver tells about interrupts: the flag, or the event index at the present place (on) or far
  // away.
  void set_interrupts(bool on);
  void set_used_event(std::uint16_t index);

  // Raw access for hostile tests.
  void set_descriptor(std::uint16_t index, const FakeDescriptor& descriptor);
  [[nodiscard]] FakeDescriptor descriptor(std::uint16_t index) const;
  void set_available_entry(std::uint16_t slot, std::uint16_t head);
  void set_available_index(std::uint16_t index);
  void set_available_flags(std::uint16_t flags);
  [[nodiscard]] std::uint16_t available_index() const { return available_index_; }
  [[nodiscard]] std::uint16_t used_flags() const;
  [[nodiscard]] std::uint16_t available_event() const;
  [[nodiscard]] Gpa descriptor_table() const { return descriptors_; }
  [[nodiscard]] Gpa available_ring() const { return available_; }
  [[nodiscard]] Gpa used_ring() const { return used_; }
  // Zeroes the rings, as a driver does before it sets the queue up again.
  void reset();

 private:
  [[nodiscard]] std::uint16_t* field(Gpa gpa) const;
  FakeGuest& guest_;
  const std::uint16_t size_;
  const bool event_idx_;
  Gpa descriptors_ = 0;
  Gpa available_ = 0;
  Gpa used_ = 0;
  std::uint16_t available_index_ = 0;
  std::uint16_t notified_index_ = 0;
  std::uint16_t used_seen_ = 0;
  std::vector<std::uint16_t> free_;
  std::vector<std::vector<std::uint16_t>> chains_;  // by head: its descriptors
};

}  // namespace wisp::test
