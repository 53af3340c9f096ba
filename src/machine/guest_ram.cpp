#include "machine/guest_ram.h"

#include <algorithm>
#include <array>
#include <vector>

#include "boot/layout.h"

namespace wisp {

GuestRam::GuestRam(std::unique_ptr<RamBlock> block, AddressSpace& space)
    : block_(std::move(block)), space_(space), low_size_(std::min(block_->size(), layout::kLowRamEnd)) {}

GuestRam::~GuestRam() {
  for (const MemoryRegionPtr& region : regions_) {
    // Removing what was added cannot fail.
    (void)space_.remove(region);
  }
}

Result<std::unique_ptr<GuestRam>> GuestRam::create(const RamOptions& options, AddressSpace& space) {
  WISP_ASSIGN(auto block, RamBlock::create(options));
  std::unique_ptr<GuestRam> ram(new GuestRam(std::move(block), space));
  std::vector<GuestMemoryBlock> blocks;
  const auto add = [&](const char* name, Gpa gpa, std::uint64_t offset, std::uint64_t size) -> Result<void> {
    auto region = MemoryRegion::ram(name, ram->block_->host() + offset, size);
    WISP_TRY(space.add(region, gpa));
    ram->regions_.push_back(std::move(region));
    blocks.push_back({.gpa = gpa,
                      .size = size,
                      .host = ram->block_->host() + offset,
                      .fd = ram->block_->shared() ? ram->block_->fd() : -1,
                      .fd_offset = offset,
                      .dirty = nullptr});
    return {};
  };
  WISP_TRY(add("ram-low", 0, 0, ram->low_size_));
  if (ram->high_size() > 0) {
    WISP_TRY(add("ram-high", layout::kHighRamStart, ram->low_size_, ram->high_size()));
  }
  ram->memory_.set_blocks(std::move(blocks));
  return ram;
}

Result<void> GuestRam::clear() {
  return block_->clear();
}

void GuestRam::discard(Gpa gpa, std::uint64_t size) {
  for (const GuestMemoryBlock& block : memory_.blocks()) {
    const Gpa start = std::max(gpa, block.gpa);
    const Gpa end = std::min(gpa + size, block.gpa + block.size);
    if (gpa + size > gpa && start < end) {
      (void)block_->release(block.fd_offset + (start - block.gpa), end - start);
    }
  }
}

}  // namespace wisp
