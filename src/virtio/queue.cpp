#include "virtio/queue.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "base/bytes.h"
#include "base/checked.h"

namespace wisp {
namespace {

// 2.7.5
constexpr std::uint16_t kDescriptorNext = 1;
constexpr std::uint16_t kDescriptorWrite = 2;
constexpr std::uint16_t kDescriptorIndirect = 4;
constexpr std::uint64_t kDescriptorSize = 16;
// 2.7.6: flags, idx, ring[size], used_event
constexpr std::uint16_t kAvailableNoInterrupt = 1;
constexpr std::uint64_t kAvailableIndex = 2;
constexpr std::uint64_t kAvailableRing = 4;
// 2.7.8: flags, idx, ring[size] of {id, len}, avail_event
constexpr std::uint16_t kUsedNoNotify = 1;
constexpr std::uint64_t kUsedIndex = 2;
constexpr std::uint64_t kUsedRing = 4;
constexpr std::uint64_t kUsedElementSize = 8;

// The ring fields that driver and device exchange without a lock. Their place was checked at activation:
// inside the slice and, by the rings' alignment, naturally aligned.
template <typename T>
T* ring_field(const GuestSlice& ring, std::uint64_t offset) {
  return static_cast<T*>(static_cast<void*>(static_cast<std::uint8_t*>(ring.as_iovec().iov_base) + offset));
}

std::uint16_t load_u16(const GuestSlice& ring, std::uint64_t offset, int order) {
  return __atomic_load_n(ring_field<std::uint16_t>(ring, offset), order);
}

void store_u16(const GuestSlice& ring, std::uint64_t offset, std::uint16_t value, int order) {
  __atomic_store_n(ring_field<std::uint16_t>(ring, offset), value, order);
}

std::size_t gather_iovecs(std::span<const GuestSlice> buffers, std::size_t offset, std::size_t size,
                          std::vector<iovec>& out) {
  std::size_t covered = 0;
  for (const GuestSlice& buffer : buffers) {
    if (covered == size) {
      break;
    }
    if (offset >= buffer.size()) {
      offset -= buffer.size();
      continue;
    }
    const std::size_t count = std::min(buffer.size() - offset, size - covered);
    const iovec whole = buffer.as_iovec();
    out.push_back({static_cast<std::uint8_t*>(whole.iov_base) + offset, count});
    covered += count;
    offset = 0;
  }
  return covered;
}

}  // namespace

struct Queue::Descriptor {
  std::uint64_t address = 0;
  std::uint32_t length = 0;
  std::uint16_t flags = 0;
  std::uint16_t next = 0;
};

std::size_t DescriptorChain::read(std::size_t offset, std::span<std::uint8_t> out) const {
  std::size_t done = 0;
  for (const GuestSlice& buffer : readable()) {
    if (done == out.size()) {
      break;
    }
    if (offset >= buffer.size()) {
      offset -= buffer.size();
      continue;
    }
    done += buffer.read(offset, out.subspan(done));
    offset = 0;
  }
  return done;
}

std::size_t DescriptorChain::write(std::size_t offset, std::span<const std::uint8_t> in) const {
  std::size_t done = 0;
  for (const GuestSlice& buffer : writable()) {
    if (done == in.size()) {
      break;
    }
    if (offset >= buffer.size()) {
      offset -= buffer.size();
      continue;
    }
    const std::size_t count = buffer.write(offset, in.subspan(done));
    memory_->mark_dirty(buffer.gpa() + offset, count);
    done += count;
    offset = 0;
  }
  return done;
}

std::size_t DescriptorChain::readable_iovecs(std::size_t offset, std::size_t size,
                                             std::vector<iovec>& out) const {
  return gather_iovecs(readable(), offset, size, out);
}

std::size_t DescriptorChain::writable_iovecs(std::size_t offset, std::size_t size,
                                             std::vector<iovec>& out) const {
  return gather_iovecs(writable(), offset, size, out);
}

Result<Queue> Queue::activate(const QueueConfig& config, const GuestMemory& memory, std::uint64_t features) {
  if (!std::has_single_bit(config.size) || config.size > config.max_size || config.size > kMaxQueueSize) {
    return fail("queue size {} is not a power of two of at most {}", config.size,
                std::min(config.max_size, kMaxQueueSize));
  }
  const auto place = [&](const char* what, Gpa gpa, std::uint64_t size,
                         std::uint64_t alignment) -> Result<GuestSlice> {
    if (!is_aligned(gpa, alignment)) {
      return fail("{} at {:#x} is not aligned to {} bytes", what, gpa, alignment);
    }
    const std::optional<GuestSlice> slice = memory.slice(gpa, size);
    if (!slice) {
      return fail("{} at {:#x} with {} bytes is not in RAM", what, gpa, size);
    }
    return *slice;
  };
  const std::uint64_t size = config.size;
  Queue queue;
  // The event index fields are there whether or not they were negotiated (2.7.6, 2.7.8).
  WISP_ASSIGN(queue.descriptors_,
              place("the descriptor table", config.descriptor_table, kDescriptorSize * size, 16));
  WISP_ASSIGN(queue.available_, place("the available ring", config.available_ring, 6 + 2 * size, 2));
  WISP_ASSIGN(queue.used_, place("the used ring", config.used_ring, 6 + kUsedElementSize * size, 4));
  queue.memory_ = &memory;
  queue.config_ = config;
  queue.size_ = config.size;
  queue.event_idx_ = (features & kVirtioFeatureEventIdx) != 0;
  queue.indirect_ = (features & kVirtioFeatureIndirectDesc) != 0;
  queue.in_flight_.resize(config.size);
  return queue;
}

PopResult Queue::break_queue() {
  broken_ = true;
  return PopResult::kBroken;
}

PopResult Queue::pop(DescriptorChain& chain) {
  if (broken_) [[unlikely]] {
    return PopResult::kBroken;
  }
  if (next_available_ == seen_available_) {
    // Pairs with the driver's barrier between filling the ring and moving the index.
    const std::uint16_t index = load_u16(available_, kAvailableIndex, __ATOMIC_ACQUIRE);
    if (static_cast<std::uint16_t>(index - next_available_) > size_) [[unlikely]] {
      return break_queue();
    }
    seen_available_ = index;
    if (index == next_available_) {
      return PopResult::kEmpty;
    }
  }
  const std::uint64_t slot = next_available_ & (size_ - 1U);
  const std::uint16_t head = load_u16(available_, kAvailableRing + 2 * slot, __ATOMIC_RELAXED);
  if (head >= size_ || in_flight_[head] || !walk(head, chain)) [[unlikely]] {
    return break_queue();
  }
  in_flight_[head] = true;
  ++in_flight_count_;
  ++next_available_;
  return PopResult::kChain;
}

bool Queue::walk(std::uint16_t head, DescriptorChain& chain) const {
  chain.memory_ = memory_;
  chain.head_ = head;
  chain.buffers_.clear();
  chain.readable_count_ = 0;
  chain.readable_size_ = 0;
  chain.writable_size_ = 0;

  GuestSlice table = descriptors_;
  std::uint32_t table_size = size_;
  std::uint32_t index = head;
  bool in_indirect = false;
  // A chain that takes more steps than its table has entries goes in circles.
  std::uint32_t steps_left = std::min<std::uint32_t>(table_size, kMaxChainLength);
  while (true) {
    if (index >= table_size || steps_left == 0) {
      return false;
    }
    --steps_left;
    Descriptor descriptor;
    static_assert(sizeof descriptor == kDescriptorSize);
    std::memcpy(&descriptor, ring_field<std::uint8_t>(table, kDescriptorSize * index), kDescriptorSize);
    if ((descriptor.flags & kDescriptorIndirect) != 0) {
      if (!indirect_ || in_indirect || (descriptor.flags & kDescriptorNext) != 0 || descriptor.length == 0 ||
          descriptor.length % kDescriptorSize != 0) {
        return false;
      }
      const std::optional<GuestSlice> indirect = memory_->slice(descriptor.address, descriptor.length);
      if (!indirect) {
        return false;
      }
      table = *indirect;
      table_size = static_cast<std::uint32_t>(descriptor.length / kDescriptorSize);
      steps_left = std::min(table_size, kMaxChainLength);
      index = 0;
      in_indirect = true;
      continue;
    }
    if (!append(descriptor, chain)) {
      return false;
    }
    if ((descriptor.flags & kDescriptorNext) == 0) {
      return true;
    }
    index = descriptor.next;
  }
}

bool Queue::append(const Descriptor& descriptor, DescriptorChain& chain) const {
  const bool writable = (descriptor.flags & kDescriptorWrite) != 0;
  if (!writable && chain.readable_count_ != chain.buffers_.size()) {
    return false;  // a readable buffer behind a writable one (2.7.4.2)
  }
  if (descriptor.length > 0 && !checked_add<std::uint64_t>(descriptor.address, descriptor.length - 1U)) {
    return false;
  }
  std::uint32_t& total = writable ? chain.writable_size_ : chain.readable_size_;
  const std::optional<std::uint32_t> sum = checked_add(total, descriptor.length);
  if (!sum) {
    return false;
  }
  total = *sum;
  // A buffer is one slice, unless it goes on from one block of RAM into the next.
  Gpa address = descriptor.address;
  std::uint64_t left = descriptor.length;
  while (left > 0) {
    std::uint64_t size = left;
    std::optional<GuestSlice> slice = memory_->slice(address, size);
    if (!slice) [[unlikely]] {
      const auto blocks = memory_->blocks();
      const auto next = std::ranges::upper_bound(blocks, address, {}, &GuestMemoryBlock::gpa);
      if (next == blocks.begin() || address - (next - 1)->gpa >= (next - 1)->size) {
        return false;
      }
      size = (next - 1)->size - (address - (next - 1)->gpa);
      if (size >= left) {
        return false;  // the table of blocks changed in between
      }
      slice = memory_->slice(address, size);
      if (!slice) {
        return false;
      }
    }
    if (chain.buffers_.size() == kMaxChainLength) {
      return false;
    }
    chain.buffers_.push_back(*slice);
    chain.readable_count_ += writable ? 0 : 1;
    left -= size;
    address += size;
  }
  return true;
}

void Queue::undo_pop(const DescriptorChain& chain) {
  WISP_ASSERT(chain.head_ < size_ && in_flight_[chain.head_]);
  in_flight_[chain.head_] = false;
  --in_flight_count_;
  --next_available_;
}

void Queue::push(const DescriptorChain& chain, std::uint32_t written) {
  stage(chain, written);
  publish();
}

void Queue::stage(const DescriptorChain& chain, std::uint32_t written) {
  WISP_ASSERT(written <= chain.writable_size_);
  std::uint64_t left = written;
  for (const GuestSlice& buffer : chain.writable()) {
    if (left == 0) {
      break;
    }
    const std::uint64_t count = std::min<std::uint64_t>(left, buffer.size());
    memory_->mark_dirty(buffer.gpa(), count);
    left -= count;
  }
  stage_head(chain.head_, written);
}

void Queue::stage_head(std::uint16_t head, std::uint32_t written) {
  WISP_ASSERT(head < size_ && in_flight_[head]);
  in_flight_[head] = false;
  --in_flight_count_;
  const std::uint64_t element = kUsedRing + kUsedElementSize * (next_used_ & (size_ - 1U));
  __atomic_store_n(ring_field<std::uint32_t>(used_, element), head, __ATOMIC_RELAXED);
  __atomic_store_n(ring_field<std::uint32_t>(used_, element + 4), written, __ATOMIC_RELAXED);
  ++next_used_;
  if (unsignalled_ < std::numeric_limits<std::uint32_t>::max()) {
    ++unsignalled_;
  }
  mark_used_ring(element, kUsedElementSize);
}

void Queue::publish() {
  store_u16(used_, kUsedIndex, next_used_, __ATOMIC_RELEASE);
  mark_used_ring(kUsedIndex, sizeof(std::uint16_t));
}

void Queue::mark_used_ring(std::uint64_t offset, std::uint64_t size) const {
  memory_->mark_dirty(config_.used_ring + offset, size);
}

bool Queue::take_interrupt_wish() {
  if (unsignalled_ == 0) {
    return false;
  }
  const std::uint32_t pushed = unsignalled_;
  const bool comparable = signalled_used_valid_ && pushed <= std::numeric_limits<std::uint16_t>::max();
  unsignalled_ = 0;
  signalled_used_valid_ = true;
  // The index again, now ordered before the load that follows: a driver that asks for an interrupt and then
  // looks at the index must not miss both.
  store_u16(used_, kUsedIndex, next_used_, __ATOMIC_SEQ_CST);
  if (!event_idx_) {
    return (load_u16(available_, 0, __ATOMIC_SEQ_CST) & kAvailableNoInterrupt) == 0;
  }
  const std::uint16_t event = load_u16(available_, kAvailableRing + 2ULL * size_, __ATOMIC_SEQ_CST);
  if (!comparable) {
    return true;
  }
  return static_cast<std::uint16_t>(next_used_ - event - 1) < pushed;
}

bool Queue::has_available() {
  return broken_ || next_available_ != seen_available_ ||
         load_u16(available_, kAvailableIndex, __ATOMIC_ACQUIRE) != next_available_;
}

void Queue::disable_notifications() {
  if (event_idx_) {
    return;  // the event index stays behind: the driver passes it again only after a whole turn
  }
  store_u16(used_, 0, kUsedNoNotify, __ATOMIC_RELAXED);
  mark_used_ring(0, sizeof(std::uint16_t));
}

bool Queue::enable_notifications() {
  return listen_from(next_available_);
}

bool Queue::enable_notifications_of_more() {
  return listen_from(seen_available_);
}

// Asks for a notification when the driver's index moves beyond `index`; whether it already has.
bool Queue::listen_from(std::uint16_t index) {
  // The store is ordered before the load of the driver's index, as in take_interrupt_wish().
  if (event_idx_) {
    const std::uint64_t event = kUsedRing + kUsedElementSize * size_;
    store_u16(used_, event, index, __ATOMIC_SEQ_CST);
    mark_used_ring(event, sizeof(std::uint16_t));
  } else {
    store_u16(used_, 0, 0, __ATOMIC_SEQ_CST);
    mark_used_ring(0, sizeof(std::uint16_t));
  }
  if (broken_) {
    return false;
  }
  return load_u16(available_, kAvailableIndex, __ATOMIC_SEQ_CST) != index;
}

void Queue::save(StateWriter& writer) const {
  WISP_ASSERT(in_flight_count_ == 0);
  writer.put(next_available_);
  writer.put(next_used_);
}

Result<void> Queue::load(StateReader& reader) {
  WISP_ASSERT(in_flight_count_ == 0);
  WISP_ASSIGN(next_available_, reader.get<std::uint16_t>());
  WISP_ASSIGN(next_used_, reader.get<std::uint16_t>());
  seen_available_ = next_available_;
  unsignalled_ = 0;
  // What was pushed before the save may not have been told yet: the next push interrupts in any case.
  signalled_used_valid_ = false;
  return {};
}

void Queue::set_next_available(std::uint16_t index) {
  WISP_ASSERT(in_flight_count_ == 0);
  next_available_ = index;
  seen_available_ = index;
  next_used_ = index;
  signalled_used_valid_ = false;
}

}  // namespace wisp
