#include <array>

#include "boot/acpi.h"
#include "boot/acpi_layout.h"
#include "boot/aml.h"
#include "boot/layout.h"

namespace wisp {
namespace {

using aml::Bytes;
using aml::Sharing;
using aml::Trigger;

constexpr std::uint8_t kDevicePresent = 0x0F;  // _STA: present, enabled, shown, functioning
constexpr std::uint8_t kNotifyDeviceCheck = 1;
constexpr std::uint8_t kNotifyButtonPressed = 0x80;

// A letter or two and a number in hexadecimal, as one NameSeg.
std::string numbered(std::string_view prefix, std::uint32_t number) {
  return fmt::format("{}{:0{}X}", prefix, number, 4 - prefix.size());
}

Bytes bit_of_slot(std::uint32_t index) {
  return aml::integer(1ULL << (index % 32));
}

std::string_view word_of_slot(std::uint32_t index, std::string_view low, std::string_view high) {
  return index < 32 ? low : high;
}

Bytes cpu_device(std::uint32_t cpu, bool present) {
  Bytes body = aml::join({aml::name("_HID", aml::string("ACPI0007")), aml::name("_UID", aml::integer(cpu))});
  if (!present) {
    aml::detail::append(body, aml::name("_STA", aml::integer(0)));
  }
  return aml::device(numbered("C", cpu), body);
}

Bytes virtio_device(const VirtioMmioSlot& slot) {
  const Bytes resources = aml::resource_template(
      {aml::memory32_fixed(static_cast<std::uint32_t>(slot.base), layout::kVirtioMmioSize),
       aml::interrupt(slot.gsi, Trigger::kEdge, Sharing::kShared)});
  return aml::device(
      numbered("VR", slot.index),
      aml::join({aml::name("_HID", aml::string("LNRO0005")), aml::name("_UID", aml::integer(slot.index)),
                 aml::name("_CCA", aml::integer(1)), aml::name("_CRS", resources)}));
}

// An empty slot: a container that exists once the slot's bit says so.
Bytes hotplug_slot(const VirtioMmioSlot& slot) {
  const Bytes present =
      aml::bit_and(aml::path(word_of_slot(slot.index, "PRS0", "PRS1")), bit_of_slot(slot.index));
  const Bytes status =
      aml::method("_STA", 0, false,
                  aml::join({aml::if_then(present, aml::return_value(aml::integer(kDevicePresent))),
                             aml::return_value(aml::integer(0))}));
  return aml::device(numbered("VC", slot.index),
                     aml::join({aml::name("_HID", aml::string("ACPI0004")),
                                aml::name("_UID", aml::integer(slot.index)), status, virtio_device(slot)}));
}

// Field names PRS0, PRS1, CHG0, CHG1 as in SlotHotplugRegisters, and VSCN, which tells of what changed.
Bytes slot_hotplug(const AcpiSlotHotplug& hotplug) {
  Bytes body =
      aml::join({aml::region("VHPR", static_cast<std::uint8_t>(hotplug.registers.space),
                             hotplug.registers.address, SlotHotplugRegisters::kSize),
                 aml::dword_field("VHPR", {{"PRS0", 32}, {"PRS1", 32}, {"CHG0", 32}, {"CHG1", 32}})});
  Bytes scan;
  for (const std::string_view word : {"CHG0", "CHG1"}) {
    Bytes notifications;
    for (const VirtioMmioSlot& slot : hotplug.free_slots) {
      if (word_of_slot(slot.index, "CHG0", "CHG1") == word) {
        aml::detail::append(notifications,
                            aml::if_then(aml::bit_and(aml::local(0), bit_of_slot(slot.index)),
                                         aml::notify(numbered("VC", slot.index), kNotifyDeviceCheck)));
      }
    }
    if (!notifications.empty()) {
      aml::detail::append(scan, aml::join({aml::store(aml::path(word), aml::local(0)),
                                           aml::store(aml::local(0), aml::path(word)), notifications}));
    }
  }
  for (const VirtioMmioSlot& slot : hotplug.free_slots) {
    aml::detail::append(body, hotplug_slot(slot));
  }
  aml::detail::append(body, aml::method("VSCN", 0, true, scan));
  return body;
}

Bytes event_device(const AcpiDescription& machine) {
  const AcpiPower& power = machine.power;
  Bytes handler = aml::store(aml::path("ESEL"), aml::local(0));
  const auto on_event = [&handler](std::uint32_t bits, const Bytes& action) {
    if (bits != 0) {
      aml::detail::append(handler, aml::if_then(aml::bit_and(aml::local(0), aml::integer(bits)), action));
    }
  };
  on_event(power.power_button, aml::notify("PWRB", kNotifyButtonPressed));
  on_event(power.sleep_button, aml::notify("SLPB", kNotifyButtonPressed));
  if (machine.slot_hotplug) {
    on_event(power.slot_hotplug, aml::path("VSCN"));
  }
  return aml::device(
      "GED",
      aml::join({aml::name("_HID", aml::string("ACPI0013")), aml::name("_UID", aml::integer(0)),
                 aml::name("_CRS", aml::resource_template({aml::interrupt(
                                       power.gsi, power.level_triggered ? Trigger::kLevel : Trigger::kEdge,
                                       Sharing::kExclusive)})),
                 aml::region("EREG", static_cast<std::uint8_t>(power.event_selector.space),
                             power.event_selector.address, 4),
                 aml::dword_field("EREG", {{"ESEL", 32}}), aml::method("_EVT", 1, true, handler)}));
}

Bytes button(std::string_view name, std::string_view id) {
  return aml::device(name,
                     aml::join({aml::name("_HID", aml::eisa_id(id)), aml::name("_UID", aml::integer(0))}));
}

}  // namespace

std::vector<std::uint8_t> build_dsdt_body(const AcpiDescription& machine) {
  Bytes bus;
  for (std::uint32_t cpu = 0; cpu < machine.max_cpus; ++cpu) {
    aml::detail::append(bus, cpu_device(cpu, cpu < machine.cpus));
  }
  if (machine.serial) {
    aml::detail::append(
        bus,
        aml::device("COM1",
                    aml::join({aml::name("_HID", aml::eisa_id("PNP0501")), aml::name("_UID", aml::integer(1)),
                               aml::name("_CRS", aml::resource_template(
                                                     {aml::io_ports(layout::kSerialPort, 8),
                                                      aml::interrupt(layout::kSerialGsi, Trigger::kEdge,
                                                                     Sharing::kExclusive)}))})));
  }
  if (machine.rtc) {
    aml::detail::append(
        bus,
        aml::device("RTC", aml::join({aml::name("_HID", aml::eisa_id("PNP0B00")),
                                      aml::name("_CRS", aml::resource_template(
                                                            {aml::io_ports(layout::kRtcPort, 2),
                                                             aml::interrupt(layout::kRtcGsi, Trigger::kEdge,
                                                                            Sharing::kExclusive)}))})));
  }
  if (machine.power.power_button != 0) {
    aml::detail::append(bus, button("PWRB", "PNP0C0C"));
  }
  if (machine.power.sleep_button != 0) {
    aml::detail::append(bus, button("SLPB", "PNP0C0E"));
  }
  for (const VirtioMmioSlot& slot : machine.devices) {
    aml::detail::append(bus, virtio_device(slot));
  }
  if (machine.slot_hotplug) {
    aml::detail::append(bus, slot_hotplug(*machine.slot_hotplug));
  }
  const bool slots_change = machine.slot_hotplug && machine.power.slot_hotplug != 0;
  if (machine.power.power_button != 0 || machine.power.sleep_button != 0 || slots_change) {
    aml::detail::append(bus, event_device(machine));
  }

  const Bytes soft_off = aml::name(
      "_S5", aml::package({aml::integer(machine.power.sleep_type_s5),
                           aml::integer(machine.power.sleep_type_s5), aml::integer(0), aml::integer(0)}));
  return aml::join({aml::scope("\\_SB", bus), soft_off});
}

}  // namespace wisp
