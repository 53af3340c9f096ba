#include "virtio/support/fake_queue.h"

namespace wisp::test {

FakeQueue::FakeQueue(FakeGuest& guest, std::uint16_t size, bool event_idx)
    : guest_(guest),
      size_(size),
      event_idx_(event_idx),
      descriptors_(guest.allocate(16ULL * size, 16)),
      available_(guest.allocate(6 + 2ULL * size, 2)),
      used_(guest.allocate(6 + 8ULL * size, 4)) {
  reset();
}

void FakeQueue::reset() {
  guest_.write(descriptors_, std::vector<std::uint8_t>(16ULL * size_));
  guest_.write(available_, std::vector<std::uint8_t>(6 + 2ULL * size_));
  guest_.write(used_, std::vector<std::uint8_t>(6 + 8ULL * size_));
  available_index_ = notified_index_ = used_seen_ = 0;
  chains_.assign(size_, {});
  free_.clear();
  for (std::uint16_t i = size_; i > 0; --i) {
    free_.push_back(static_cast<std::uint16_t>(i - 1));
  }
}

QueueConfig FakeQueue::config() const {
  return {.max_size = size_,
          .size = size_,
          .ready = true,
          .descriptor_table = descriptors_,
          .available_ring = available_,
          .used_ring = used_};
}

// Index fields are shared with the device's thread in some tests, so they are accessed as it does:
// atomically.
std::uint16_t* FakeQueue::field(Gpa gpa) const {
  return static_cast<std::uint16_t*>(guest_.memory().slice(gpa, 2).value().as_iovec().iov_base);
}

std::uint16_t FakeQueue::build(const ChainBuilder& chain) {
  const std::size_t direct = chain.indirect_from_.value_or(chain.parts_.size());
  const std::size_t needed = direct + (chain.indirect_from_ ? 1 : 0);
  WISP_ASSERT(needed > 0 && needed <= free_.size());
  std::vector<std::uint16_t> taken;
  for (std::size_t i = 0; i < needed; ++i) {
    taken.push_back(free_.back());
    free_.pop_back();
  }
  for (std::size_t i = 0; i < direct; ++i) {
    const ChainBuilder::Part& part = chain.parts_[i];
    const bool last = i + 1 == needed;
    set_descriptor(taken[i], {.address = part.gpa,
                              .length = part.size,
                              .flags = static_cast<std::uint16_t>((part.writable ? kDescWrite : 0) |
                                                                  (last ? 0 : kDescNext)),
                              .next = last ? std::uint16_t{0} : taken[i + 1]});
  }
  if (chain.indirect_from_) {
    const std::size_t count = chain.parts_.size() - direct;
    const Gpa table = guest_.allocate(16 * count, 16);
    for (std::size_t i = 0; i < count; ++i) {
      const ChainBuilder::Part& part = chain.parts_[direct + i];
      const bool last = i + 1 == count;
      guest_.store(table + 16 * i,
                   FakeDescriptor{.address = part.gpa,
                                  .length = part.size,
                                  .flags = static_cast<std::uint16_t>((part.writable ? kDescWrite : 0) |
                                                                      (last ? 0 : kDescNext)),
                                  .next = static_cast<std::uint16_t>(last ? 0 : i + 1)});
    }
    set_descriptor(taken[direct], {.address = table,
                                   .length = static_cast<std::uint32_t>(16 * count),
                                   .flags = kDescIndirect,
                                   .next = 0});
  }
  const std::uint16_t head = taken.front();
  chains_[head] = std::move(taken);
  return head;
}

void FakeQueue::publish(std::uint16_t head) {
  set_available_entry(static_cast<std::uint16_t>(available_index_ & (size_ - 1)), head);
  set_available_index(static_cast<std::uint16_t>(available_index_ + 1));
}

std::uint16_t FakeQueue::add(const ChainBuilder& chain) {
  const std::uint16_t head = build(chain);
  publish(head);
  return head;
}

bool FakeQueue::take_notify_wish() {
  const std::uint16_t before = notified_index_;
  notified_index_ = available_index_;
  if (before == available_index_) {
    return false;
  }
  if (!event_idx_) {
    return (used_flags() & 1) == 0;
  }
  return static_cast<std::uint16_t>(available_index_ - available_event() - 1) <
         static_cast<std::uint16_t>(available_index_ - before);
}

std::uint16_t FakeQueue::used_index() const {
  return __atomic_load_n(field(used_ + 2), __ATOMIC_SEQ_CST);
}

std::optional<FakeQueue::Used> FakeQueue::take_used() {
  if (used_index() == used_seen_) {
    return std::nullopt;
  }
  const Gpa element = used_ + 4 + 8ULL * (used_seen_ & (size_ - 1));
  const Used used{guest_.load<std::uint32_t>(element), guest_.load<std::uint32_t>(element + 4)};
  ++used_seen_;
  if (used.head < size_) {
    for (const std::uint16_t index : chains_[used.head]) {
      free_.push_back(index);
    }
    chains_[used.head].clear();
  }
  return used;
}

void FakeQueue::set_interrupts(bool on) {
  if (event_idx_) {
    set_used_event(static_cast<std::uint16_t>(on ? used_seen_ : used_seen_ + 0x8000));
  } else {
    set_available_flags(on ? 0 : 1);
  }
}

void FakeQueue::set_used_event(std::uint16_t index) {
  __atomic_store_n(field(available_ + 4 + 2ULL * size_), index, __ATOMIC_SEQ_CST);
}

void FakeQueue::set_descriptor(std::uint16_t index, const FakeDescriptor& descriptor) {
  guest_.store(descriptors_ + 16ULL * index, descriptor);
}

FakeDescriptor FakeQueue::descriptor(std::uint16_t index) const {
  return guest_.load<FakeDescriptor>(descriptors_ + 16ULL * index);
}

void FakeQueue::set_available_entry(std::uint16_t slot, std::uint16_t head) {
  __atomic_store_n(field(available_ + 4 + 2ULL * slot), head, __ATOMIC_RELAXED);
}

void FakeQueue::set_available_index(std::uint16_t index) {
  available_index_ = index;
  __atomic_store_n(field(available_ + 2), index, __ATOMIC_SEQ_CST);
}

void FakeQueue::set_available_flags(std::uint16_t flags) {
  __atomic_store_n(field(available_), flags, __ATOMIC_SEQ_CST);
}

std::uint16_t FakeQueue::used_flags() const {
  return __atomic_load_n(field(used_), __ATOMIC_SEQ_CST);
}

std::uint16_t FakeQueue::available_event() const {
  return __atomic_load_n(field(used_ + 4 + 8ULL * size_), __ATOMIC_SEQ_CST);
}

}  // namespace wisp::test
