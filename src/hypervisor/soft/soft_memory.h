// What the machine's memory space tells the software CPU, checked and made to last. Private to this folder.
#pragma once

#include <map>
#include <vector>

#include "base/unique_fd.h"
#include "hypervisor/soft/physical_memory.h"
#include "memory/address_space.h"

namespace wisp::soft {

// Hands ranges on to PhysicalMemory. Doorbells keep descriptors of their own, since a device may close its
// own before its region goes, and the number would then be somebody else's.
class MemoryListener final : public AddressSpaceListener {
 public:
  explicit MemoryListener(PhysicalMemory& memory) : memory_(memory) {}
  // Errors: memory that overlaps what is there, or lies at different places in host and guest pages;
  // doorbells that no write could match, or that are there already.
  [[nodiscard]] Result<void> range_added(const FlatRange& range) override;
  void range_removed(const FlatRange& range) override;
  // Whether RAM, not ROM, starts there.
  [[nodiscard]] bool is_ram(Gpa gpa) const;

 private:
  struct Known {
    FlatRange range;  // events name the descriptors below
    std::vector<UniqueFd> bells;
  };
  [[nodiscard]] Result<void> check_memory(const FlatRange& range) const;
  [[nodiscard]] static Result<Known> with_own_bells(const FlatRange& range);

  PhysicalMemory& memory_;
  std::map<Gpa, Known> known_;  // by start
};

}  // namespace wisp::soft
