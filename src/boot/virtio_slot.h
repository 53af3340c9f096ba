// A place for a virtio-mmio transport.
#pragma once

#include <cstdint>

#include "boot/layout.h"
#include "memory/gpa.h"

namespace wisp {

struct VirtioMmioSlot {
  std::uint32_t index = 0;  // from 0; the device's _UID in ACPI and its bit in the hotplug registers
  Gpa base = 0;             // first register
  std::uint32_t gsi = 0;    // interrupt, shared with other slots, edge-triggered
  bool operator==(const VirtioMmioSlot&) const = default;
};

// The slot of that index, below layout::kVirtioMmioSlots. Slots take the shared pins in turn; on a machine
// without ACPI only those below 16.
[[nodiscard]] constexpr VirtioMmioSlot virtio_slot(std::uint32_t index, bool acpi = true) {
  const std::size_t pins = acpi ? layout::kVirtioGsis.size() : layout::kVirtioLegacyGsis;
  return {index, layout::kVirtioMmio + index * layout::kVirtioMmioStride, layout::kVirtioGsis[index % pins]};
}

}  // namespace wisp
