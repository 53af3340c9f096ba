#include "machine/platform.h"

#include <utility>

#include "boot/acpi_layout.h"
#include "boot/layout.h"
#include "devices/i8042.h"
#include "devices/rtc.h"
#include "devices/serial.h"
#include "hypervisor/kvm/kvm_hypervisor.h"
#include "hypervisor/soft/ioapic.h"
#include "hypervisor/soft/lapic.h"
#include "virtio/mmio_transport.h"

namespace wisp {

// What rooms that do not know the layout have at fixed places too.
static_assert(layout::kVirtioMmioSize == kVirtioMmioSize);
static_assert(layout::kIoApic == soft::kIoApicAddress && layout::kLocalApic == soft::kApicBaseDefault);
static_assert(layout::kEnginePages == kvm::kReservedStart &&
              layout::kEnginePagesEnd == kvm::kReservedStart + kvm::kReservedSize);

Platform::~Platform() {
  for (const Placed& placed : regions_) {
    (void)placed.space.remove(placed.region);
  }
}

Result<void> Platform::add_region(AddressSpace& space, std::shared_ptr<Device> device, std::uint64_t base,
                                  std::uint64_t size) {
  auto region = MemoryRegion::io(std::string(device->name()), device, size);
  WISP_TRY(space.add(region, base));
  regions_.push_back({space, std::move(region)});
  devices_.push_back(std::move(device));
  return {};
}

Result<void> Platform::add_ports(std::shared_ptr<Device> device, std::uint16_t base, std::uint16_t count) {
  return add_region(ports_, std::move(device), base, count);
}

Result<void> Platform::add_test_devices(const Parts& parts) {
  std::vector<std::unique_ptr<IrqLine>> lines;
  for (std::uint32_t gsi = 0; gsi < kTestIrqCount; ++gsi) {
    WISP_ASSIGN(auto line, parts.vm.irq_line(gsi));
    lines.push_back(std::move(line));
  }
  WISP_TRY(add_ports(std::make_shared<TestRegister>(), kTestRegisterPort, kTestRegisterCount));
  WISP_TRY(add_ports(std::make_shared<TestIrqLines>(std::move(lines)), kTestIrqPort, kTestIrqCount));
  WISP_TRY(
      add_ports(std::make_shared<FirmwareConfig>(parts.facts), kFirmwareConfigPort, kFirmwareConfigCount));
  return add_region(*parts.test_memory, std::make_shared<TestMemory>(), kTestMemoryAddress, kTestMemorySize);
}

Result<std::unique_ptr<Platform>> Platform::create(const Parts& parts, PlatformCallbacks callbacks,
                                                   const std::optional<DebugExitOptions>& debug_exit) {
  std::unique_ptr<Platform> platform(new Platform(parts));

  WISP_ASSIGN(auto serial_irq, parts.vm.irq_line(layout::kSerialGsi));
  WISP_TRY(platform->add_ports(std::make_shared<Serial>(std::move(serial_irq), parts.serial),
                               layout::kSerialPort, kSerialPortCount));

  WISP_ASSIGN(auto rtc_irq, parts.vm.irq_line(layout::kRtcGsi));
  WISP_ASSIGN(auto rtc, Rtc::create(parts.loop, parts.clock, std::move(rtc_irq)));
  WISP_TRY(platform->add_ports(std::move(rtc), layout::kRtcPort, kRtcPortCount));

  WISP_TRY(platform->add_ports(std::make_shared<I8042>(callbacks.reset), kI8042PortBase, kI8042PortCount));
  WISP_TRY(platform->add_ports(std::make_shared<BootTimer>(parts.clock, parts.process_start_ns, parts.log),
                               kBootTimerPort, kBootTimerPortCount));
  if (debug_exit) {
    WISP_TRY(platform->add_ports(std::make_shared<DebugExit>(std::move(callbacks.debug_exit)),
                                 debug_exit->iobase, debug_exit->iosize));
  }

  if (parts.test_memory != nullptr) {
    WISP_TRY(platform->add_test_devices(parts));
  }

  WISP_ASSIGN(auto power_irq, parts.vm.irq_line(layout::kGedGsi));
  platform->power_ = std::make_shared<PowerDevice>(
      std::move(power_irq),
      PowerCallbacks{.shutdown = std::move(callbacks.shutdown), .reset = std::move(callbacks.reset)});
  WISP_TRY(platform->add_ports(platform->power_, layout::kPowerPort, kPowerPortCount));

  platform->slot_hotplug_ =
      std::make_shared<SlotHotplug>([power = platform->power_.get()] { power->raise(kPowerEventSlotScan); });
  WISP_TRY(
      platform->add_ports(platform->slot_hotplug_, layout::kSlotHotplugPort, SlotHotplugRegisters::kSize));
  return platform;
}

AcpiPower Platform::acpi_power() {
  const auto port = [](std::uint16_t offset) {
    return AcpiRegister{.space = AcpiSpace::kIo, .address = layout::kPowerPort + std::uint64_t{offset}};
  };
  return {.event_selector = port(kPowerEventSelector),
          .gsi = layout::kGedGsi,
          .level_triggered = true,
          .power_button = kPowerEventPowerButton,
          .sleep_button = kPowerEventSleepButton,
          .slot_hotplug = kPowerEventSlotScan,
          .sleep_control = port(kPowerSleepControl),
          .sleep_status = port(kPowerSleepStatus),
          .sleep_type_s5 = kPowerSleepTypeS5,
          .reset = port(kPowerReset),
          .reset_value = kPowerResetValue};
}

AcpiRegister Platform::acpi_slot_hotplug() {
  return {.space = AcpiSpace::kIo, .address = layout::kSlotHotplugPort};
}

void Platform::reset() {
  for (const auto& device : devices_) {
    device->reset();
  }
}

}  // namespace wisp
