// The devices that every microVM has, at their places: serial port, clock, keyboard controller's reset line,
// power and hotplug registers, boot timer; and the debug-exit port where it is asked for.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "boot/acpi.h"
#include "chardev/char_backend.h"
#include "devices/boot_timer.h"
#include "devices/debug_exit.h"
#include "devices/device.h"
#include "devices/pc_testdev.h"
#include "devices/power.h"
#include "devices/slot_hotplug.h"
#include "hypervisor/hypervisor.h"
#include "memory/address_space.h"

namespace wisp {

// Called on vCPU threads.
struct PlatformCallbacks {
  std::function<void()> shutdown;
  std::function<void()> reset;
  std::function<void(std::uint32_t status)> debug_exit;
};

class Platform final {
 public:
  struct Parts {
    Vm& vm;
    AddressSpace& ports;
    EventLoop& loop;
    Log& log;
    const Clock& clock;
    std::uint64_t process_start_ns = 0;
    CharBackend* serial = nullptr;  // borrowed; null: COM1 drops what is sent
    // Where the devices of bare-metal tests are wanted (-device pc-testdev): the space for their memory, and
    // what they tell the guest.
    AddressSpace* test_memory = nullptr;
    MachineFacts facts = {};
  };
  [[nodiscard]] static Result<std::unique_ptr<Platform>> create(
      const Parts& parts, PlatformCallbacks callbacks, const std::optional<DebugExitOptions>& debug_exit);
  Platform(const Platform&) = delete;
  Platform& operator=(const Platform&) = delete;
  ~Platform();

  [[nodiscard]] PowerDevice& power() { return *power_; }
  [[nodiscard]] SlotHotplug& slot_hotplug() { return *slot_hotplug_; }
  // What the ACPI tables say about power and hotplug.
  [[nodiscard]] static AcpiPower acpi_power();
  [[nodiscard]] static AcpiRegister acpi_slot_hotplug();
  void reset();

 private:
  explicit Platform(const Parts& parts) : ports_(parts.ports) {}
  [[nodiscard]] Result<void> add_ports(std::shared_ptr<Device> device, std::uint16_t base,
                                       std::uint16_t count);
  [[nodiscard]] Result<void> add_region(AddressSpace& space, std::shared_ptr<Device> device,
                                        std::uint64_t base, std::uint64_t size);
  [[nodiscard]] Result<void> add_test_devices(const Parts& parts);

  struct Placed {
    AddressSpace& space;
    MemoryRegionPtr region;
  };
  AddressSpace& ports_;
  std::vector<Placed> regions_;
  std::vector<std::shared_ptr<Device>> devices_;
  std::shared_ptr<PowerDevice> power_;
  std::shared_ptr<SlotHotplug> slot_hotplug_;
};

}  // namespace wisp
