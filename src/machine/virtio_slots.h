// The machine's virtio-mmio slots: which device sits where, with which interrupt.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "boot/virtio_slot.h"
#include "hypervisor/hypervisor.h"
#include "memory/address_space.h"
#include "virtio/mmio_transport.h"

namespace wisp {

class VirtioSlots final {
 public:
  // Slots on one machine; the ACPI tables describe all of them.
  static constexpr std::uint32_t kCount = layout::kVirtioMmioSlots;

  // Without ACPI, devices have only the interrupts that such a kernel can use.
  VirtioSlots(Vm& vm, AddressSpace& space, Log& log, const Clock& clock, bool acpi = true)
      : vm_(vm), space_(space), log_(log), clock_(clock), acpi_(acpi) {}
  VirtioSlots(const VirtioSlots&) = delete;
  VirtioSlots& operator=(const VirtioSlots&) = delete;
  ~VirtioSlots();

  // Puts a device into slot `wanted`, or the first free one that has been free since the machine's last reset
  // (the guest may hold on to what it saw in another), or else any free one. Fails where none is free; the
  // device stays with the caller then, who knows where to destroy it.
  [[nodiscard]] Result<VirtioMmioSlot> attach(std::string id, std::unique_ptr<VirtioDevice>& device,
                                              std::optional<std::uint32_t> wanted = std::nullopt);
  // Takes the device out of the guest's sight and resets it. With no vCPU inside its registers, what this
  // gives is all that is left of it: to be destroyed while the device's event loop stands still.
  [[nodiscard]] Result<std::shared_ptr<MmioTransport>> detach(const std::string& id);

  struct Occupied {
    std::string id;
    VirtioMmioSlot place;
    MmioTransport* transport = nullptr;
  };
  // In slot order.
  [[nodiscard]] std::vector<Occupied> occupied() const;
  [[nodiscard]] std::optional<Occupied> find(const std::string& id) const;
  // One bit per slot that holds a device.
  [[nodiscard]] std::uint64_t present() const;
  // Every transport and device to its power-up state.
  void reset();

 private:
  struct Slot {
    std::string id;
    std::shared_ptr<MmioTransport> transport;
    MemoryRegionPtr region;
  };
  Vm& vm_;
  AddressSpace& space_;
  Log& log_;
  const Clock& clock_;
  const bool acpi_;
  std::array<Slot, kCount> slots_;
  std::uint64_t ever_used_ = 0;  // since the last reset, one bit per slot
};

}  // namespace wisp
