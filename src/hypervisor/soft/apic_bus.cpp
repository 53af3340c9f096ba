#include "hypervisor/soft/apic_bus.h"

#include "hypervisor/soft/lapic.h"

namespace wisp::soft {

bool ApicBus::deliver(const ApicMessage& message, const Lapic* source, bool exclude_source) const {
  Lapic* chosen = nullptr;
  bool accepted = false;
  for (Lapic* lapic : lapics_) {
    if ((exclude_source && lapic == source) || !lapic->matches(message)) {
      continue;
    }
    if (message.mode != DeliveryMode::kLowestPriority) {
      accepted = lapic->accept(message) || accepted;
    } else if (lapic->accepts_fixed() &&
               (chosen == nullptr || lapic->arbitration_priority() < chosen->arbitration_priority())) {
      chosen = lapic;
    }
  }
  return chosen != nullptr ? chosen->accept(message) : accepted;
}

void ApicBus::deliver_msi(std::uint64_t address, std::uint32_t data) const {
  // SDM 11.11: destination in bits 19:12, redirection hint bit 3, destination mode bit 2. Bits 11:5 carry
  // destination bits 14:8 where the hypervisor offers the extended destination id
  // (KVM_FEATURE_MSI_EXT_DEST_ID).
  const auto destination =
      static_cast<std::uint32_t>(((address >> 12) & 0xff) | ((address >> 5) & 0x7f) << 8);
  const bool logical = (address & 4) != 0;
  auto mode = static_cast<DeliveryMode>((data >> 8) & 7);
  if (mode == DeliveryMode::kFixed && logical && (address & 8) != 0) {
    mode = DeliveryMode::kLowestPriority;
  }
  deliver({.mode = mode,
           .vector = static_cast<std::uint8_t>(data),
           .level_triggered = (data & (1U << 15)) != 0,
           .logical = logical,
           .destination = widen_destination(destination, logical)});
}

}  // namespace wisp::soft
