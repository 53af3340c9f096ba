#include "machine/virtio_slots.h"

#include <bit>

namespace wisp {
VirtioSlots::~VirtioSlots() {
  for (Slot& slot : slots_) {
    if (slot.region != nullptr) {
      (void)space_.remove(slot.region);
    }
  }
}

Result<VirtioMmioSlot> VirtioSlots::attach(std::string id, std::unique_ptr<VirtioDevice>& device,
                                           std::optional<std::uint32_t> wanted) {
  if (wanted && *wanted >= kCount) {
    return fail("slot {} does not exist, expected 0 to {}", *wanted, kCount - 1);
  }
  if (find(id)) {
    return fail("there is a device '{}' already", id);
  }
  if (wanted && slots_[*wanted].transport != nullptr) {
    return fail("slot {} is taken by device '{}'", *wanted, slots_[*wanted].id);
  }
  const std::uint64_t taken = present();
  const std::uint32_t fresh = static_cast<std::uint32_t>(std::countr_one(taken | ever_used_));
  const std::uint32_t index =
      wanted.value_or(fresh < kCount ? fresh : static_cast<std::uint32_t>(std::countr_one(taken)));
  if (index >= kCount) {
    return fail("all {} device slots of the machine are taken", kCount);
  }
  const VirtioMmioSlot at = virtio_slot(index, acpi_);
  WISP_ASSIGN(auto irq, vm_.irq_line(at.gsi));
  WISP_ASSIGN(auto transport, MmioTransport::create(std::move(device), std::move(irq), log_, clock_));
  auto region = MemoryRegion::io("virtio-mmio:" + id, transport, kVirtioMmioSize, transport->io_events());
  if (auto added = space_.add(region, at.base); !added) {
    device = transport->give_back();
    return std::unexpected(std::move(added).error());
  }
  ever_used_ |= 1ULL << index;
  slots_[index] = {.id = std::move(id), .transport = std::move(transport), .region = std::move(region)};
  return at;
}

Result<std::shared_ptr<MmioTransport>> VirtioSlots::detach(const std::string& id) {
  for (Slot& slot : slots_) {
    if (slot.transport != nullptr && slot.id == id) {
      WISP_TRY(space_.remove(slot.region));
      slot.transport->reset();
      auto transport = std::move(slot.transport);
      slot = {};
      return transport;
    }
  }
  return fail("no device '{}'", id);
}

std::vector<VirtioSlots::Occupied> VirtioSlots::occupied() const {
  std::vector<Occupied> result;
  for (std::uint32_t i = 0; i < kCount; ++i) {
    if (slots_[i].transport != nullptr) {
      result.push_back(
          {.id = slots_[i].id, .place = virtio_slot(i, acpi_), .transport = slots_[i].transport.get()});
    }
  }
  return result;
}

std::optional<VirtioSlots::Occupied> VirtioSlots::find(const std::string& id) const {
  for (const Occupied& slot : occupied()) {
    if (slot.id == id) {
      return slot;
    }
  }
  return std::nullopt;
}

std::uint64_t VirtioSlots::present() const {
  std::uint64_t bits = 0;
  for (const Occupied& slot : occupied()) {
    bits |= 1ULL << slot.place.index;
  }
  return bits;
}

void VirtioSlots::reset() {
  ever_used_ = present();
  for (const Slot& slot : slots_) {
    if (slot.transport != nullptr) {
      slot.transport->reset();
    }
  }
}

}  // namespace wisp
