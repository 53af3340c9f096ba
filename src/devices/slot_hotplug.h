// The registers by which the guest's ACPI code learns which virtio-mmio slots hold a device (layout and use:
// boot/acpi_layout.h).
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

#include "devices/device.h"

namespace wisp {

class SlotHotplug final : public Device {
 public:
  // `notify` raises the hotplug event of the Generic Event Device; called without a lock.
  explicit SlotHotplug(std::function<void()> notify) : notify_(std::move(notify)) {}

  // One bit per slot. Before the machine runs: set_initial(), which tells nobody. Later: set_present(), which
  // marks what differs as changed and notifies.
  void set_initial(std::uint64_t present);
  void set_present(std::uint64_t present);

  [[nodiscard]] std::string_view name() const override { return "slot-hotplug"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  // The guest will read `present` afresh: nothing is changed any more.
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  const std::function<void()> notify_;
  mutable std::mutex mutex_;
  std::uint64_t present_ = 0;
  std::uint64_t changed_ = 0;
};

}  // namespace wisp
