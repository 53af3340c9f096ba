// The machine's RAM: one host mapping, shown below the 3 GiB hole and, where it is larger, again from 4 GiB.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "base/error.h"
#include "memory/address_space.h"
#include "memory/guest_memory.h"
#include "memory/ram.h"

namespace wisp {

class GuestRam final {
 public:
  // Maps the memory and adds it to `space`.
  [[nodiscard]] static Result<std::unique_ptr<GuestRam>> create(const RamOptions& options,
                                                                AddressSpace& space);
  GuestRam(const GuestRam&) = delete;
  GuestRam& operator=(const GuestRam&) = delete;
  ~GuestRam();

  [[nodiscard]] const GuestMemory& memory() const { return memory_; }
  // See GuestMemory::set_write_hook.
  void set_write_hook(std::function<void(Gpa, std::uint64_t)> hook) {
    memory_.set_write_hook(std::move(hook));
  }
  [[nodiscard]] RamBlock& block() { return *block_; }
  [[nodiscard]] std::uint64_t size() const { return block_->size(); }
  // Bytes below the hole and from 4 GiB.
  [[nodiscard]] std::uint64_t low_size() const { return low_size_; }
  [[nodiscard]] std::uint64_t high_size() const { return size() - low_size_; }

  // All zero again, as after power-up.
  [[nodiscard]] Result<void> clear();
  // Gives guest pages back to the host (RamBlock::release()); what is not RAM is ignored.
  void discard(Gpa gpa, std::uint64_t size);

 private:
  GuestRam(std::unique_ptr<RamBlock> block, AddressSpace& space);
  std::unique_ptr<RamBlock> block_;
  AddressSpace& space_;
  const std::uint64_t low_size_;
  GuestMemory memory_;
  std::vector<MemoryRegionPtr> regions_;
};

}  // namespace wisp
