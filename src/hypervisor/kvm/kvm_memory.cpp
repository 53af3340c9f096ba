#include "hypervisor/kvm/kvm_memory.h"

#include <algorithm>

#include "base/checked.h"
#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"

namespace wisp::kvm {
namespace {

// KVM counts a slot's pages in 31 bits.
constexpr std::uint64_t kMaxSlotPages = (1ULL << 31) - 1;

}  // namespace

bool MemoryListener::write_slot(const Slot& slot, bool present, bool log) const {
  kvm_userspace_memory_region region{};
  region.slot = slot.number;
  region.flags =
      (slot.read_only ? KVM_MEM_READONLY : 0U) | (log && !slot.read_only ? KVM_MEM_LOG_DIRTY_PAGES : 0U);
  region.guest_phys_addr = slot.gpa;
  region.memory_size = present ? slot.size : 0;
  region.userspace_addr = reinterpret_cast<std::uintptr_t>(slot.host);
  return call(vm_fd_, KVM_SET_USER_MEMORY_REGION, &region) == 0;
}

std::uint32_t MemoryListener::free_number() const {
  const auto found = std::ranges::find(used_, false);
  return static_cast<std::uint32_t>(found - used_.begin());
}

Result<void> MemoryListener::range_added(const FlatRange& range) {
  if (range.kind == RegionKind::kIo) {
    return doorbells_.add(range);
  }
  const auto first = align_up(range.start, kPageSize);
  const std::uint64_t last = range.start + (range.size - 1);
  // The end of the last whole page; a range may end with the last byte of the address space, which is left
  // out.
  const Gpa end = last == UINT64_MAX ? align_down(last, kPageSize) : align_down(last + 1, kPageSize);
  if (!first || end <= *first) {
    return {};
  }
  Slot slot{.number = 0,
            .start = range.start,
            .gpa = *first,
            .size = end - *first,
            .host = range.host + (*first - range.start),
            .read_only = range.kind == RegionKind::kRom};
  if (!is_aligned(reinterpret_cast<std::uintptr_t>(slot.host), kPageSize)) {
    return fail(
        "{}: memory at guest address {:#x} lies at host address {:#x}, which is not the same place in a page",
        range.name, slot.gpa, reinterpret_cast<std::uintptr_t>(slot.host));
  }
  if (slot.size / kPageSize > kMaxSlotPages) {
    return fail("{}: {} bytes are more than one of KVM's memory slots can hold", range.name, slot.size);
  }
  const std::scoped_lock lock(mutex_);
  slot.number = free_number();
  if (slot.number >= slots_) {
    return fail("{}: all {} memory slots of KVM are in use", range.name, slots_);
  }
  if (!write_slot(slot, true, logging_)) {
    return fail_errno(errno, "{}: KVM refused {} bytes of memory at {:#x}", range.name, slot.size, slot.gpa);
  }
  if (slot.number == used_.size()) {
    used_.push_back(true);
  } else {
    used_[slot.number] = true;
  }
  WISP_ASSERT(by_start_.try_emplace(range.start, slot).second);
  return {};
}

void MemoryListener::range_removed(const FlatRange& range) {
  if (range.kind == RegionKind::kIo) {
    doorbells_.remove(range);
    return;
  }
  const std::scoped_lock lock(mutex_);
  const auto found = by_start_.find(range.start);
  if (found == by_start_.end()) {
    return;  // it held no whole page
  }
  // Deleting a slot that exists cannot fail; if it did, the guest would keep memory that its owner frees.
  WISP_ASSERT(write_slot(found->second, false, false));
  used_[found->second.number] = false;
  by_start_.erase(found);
}

Result<void> MemoryListener::set_dirty_log(bool on) {
  const std::scoped_lock lock(mutex_);
  if (on == logging_) {
    return {};
  }
  for (auto slot = by_start_.begin(); slot != by_start_.end(); ++slot) {
    if (slot->second.read_only || write_slot(slot->second, true, on)) {
      continue;
    }
    const int error = errno;
    for (auto done = by_start_.begin(); done != slot; ++done) {
      (void)write_slot(done->second, true, !on);
    }
    return fail_errno(error, "KVM cannot {} the dirty log of the memory at {:#x}", on ? "start" : "stop",
                      slot->second.gpa);
  }
  logging_ = on;
  return {};
}

Result<std::vector<std::uint64_t>> MemoryListener::take_dirty_log(Gpa gpa) {
  const std::scoped_lock lock(mutex_);
  if (!logging_) {
    return fail("the dirty log is off");
  }
  const auto found = by_start_.find(gpa);
  if (found == by_start_.end() || found->second.read_only || found->second.gpa != gpa) {
    return fail("no RAM starts at guest address {:#x}", gpa);
  }
  std::vector<std::uint64_t> pages((found->second.size / kPageSize + 63) / 64);
  kvm_dirty_log log{};
  log.slot = found->second.number;
  log.dirty_bitmap = pages.data();
  WISP_KVM_TRY(vm_fd_, KVM_GET_DIRTY_LOG, &log);
  return pages;
}

}  // namespace wisp::kvm
