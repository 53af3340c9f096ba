#include "hypervisor/soft/apic_bus.h"

#include "hypervisor/soft/lapic.h"

namespace wisp::soft {

void ApicBus::deliver(const ApicMessage& message, const Lapic* source, bool exclude_source) const {
  Lapic* chosen = nullptr;
  for (Lapic* lapic : lapics_) {
    if ((exclude_source && lapic == source) || !lapic->matches(message)) {
      continue;
    }
    if (message.mode != DeliveryMode::kLowestPriority) {
      lapic->accept(message);
    } else if (lapic->enabled() &&
               (chosen == nullptr || lapic->arbitration_priority() < chosen->arbitration_priority())) {
      chosen = lapic;
    }
  }
  if (chosen != nullptr) {
    chosen->accept(message);
  }
}

void ApicBus::deliver_msi(std::uint64_t address, std::uint32_t data) const {
  // SDM 11.11: destination in bits 19:12, redirection hint bit 3, destination mode bit 2. Bits 11:5 carry destination
  // bits 14:8 where the hypervisor offers the extended destination id (KVM_FEATURE_MSI_EXT_DEST_ID).
  const auto destination = static_cast<std::uint32_t>(((address >> 12) & 0xff) | ((address >> 5) & 0x7f) << 8);
  deliver({.mode = static_cast<DeliveryMode>((data >> 8) & 7),
           .vector = static_cast<std::uint8_t>(data),
           .level_triggered = (data & (1U << 15)) != 0,
           .logical = (address & 4) != 0,
           .destination = destination});
}

}  // namespace wisp::soft
