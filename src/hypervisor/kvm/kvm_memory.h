// Guest RAM and ROM as KVM's memory slots, and the log of what the guest writes. Private to this folder.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "hypervisor/kvm/kvm_doorbells.h"
#include "memory/address_space.h"

namespace wisp::kvm {

// Each range of RAM or ROM has a slot of its own, of the whole pages inside it: what is left over at its
// edges is reached by exits. ROM is a read-only slot, so that writes come as MMIO exits.
class MemoryListener final : public AddressSpaceListener {
 public:
  // `vm_fd` is borrowed; `slots` is how many KVM has.
  MemoryListener(int vm_fd, std::uint32_t slots)
      : vm_fd_(vm_fd), slots_(slots), doorbells_(vm_fd, Doorbells::Bus::kMemory) {}

  [[nodiscard]] Result<void> range_added(const FlatRange& range) override;
  void range_removed(const FlatRange& range) override;

  // Thread-safe against one another and against changes. See Vm.
  [[nodiscard]] Result<void> set_dirty_log(bool on);
  [[nodiscard]] Result<std::vector<std::uint64_t>> take_dirty_log(Gpa gpa);

 private:
  struct Slot {
    std::uint32_t number = 0;
    Gpa start = 0;  // of the range; `gpa` is that of the first whole page
    Gpa gpa = 0;
    std::uint64_t size = 0;
    std::uint8_t* host = nullptr;
    bool read_only = false;
  };
  [[nodiscard]] bool write_slot(const Slot& slot, bool present, bool log) const;
  [[nodiscard]] std::uint32_t free_number() const;

  const int vm_fd_;
  const std::uint32_t slots_;
  Doorbells doorbells_;
  std::mutex mutex_;
  std::map<Gpa, Slot> by_start_;  // of the range
  std::vector<bool> used_;
  bool logging_ = false;
};

}  // namespace wisp::kvm
