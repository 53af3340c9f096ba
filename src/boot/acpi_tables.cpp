#include <algorithm>
#include <bitset>
#include <numeric>
#include <span>

#include "base/bytes.h"
#include "base/checked.h"
#include "boot/acpi.h"
#include "boot/layout.h"

namespace wisp {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kHeaderSize = 36;
constexpr std::size_t kChecksumAt = 9;
constexpr std::uint32_t kMaxCpus = 4096;  // three hexadecimal digits in a name

void append_text(Bytes& to, std::string_view text) {
  for (const char c : text) {
    to.push_back(static_cast<std::uint8_t>(c));
  }
}

void append_le(Bytes& to, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    to.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
  }
}

std::uint8_t checksum(std::span<const std::uint8_t> bytes) {
  return static_cast<std::uint8_t>(0x100 - (std::accumulate(bytes.begin(), bytes.end(), 0U) & 0xFF));
}

// A system description table (5.2.6) around `body`.
Bytes table(std::string_view signature, std::uint8_t revision, std::span<const std::uint8_t> body) {
  Bytes out;
  out.reserve(kHeaderSize + body.size());
  append_text(out, signature);
  append_le(out, kHeaderSize + body.size(), 4);
  out.push_back(revision);
  out.push_back(0);
  append_text(out, "WISP  MICROVM ");  // OEM id and OEM table id
  append_le(out, 1, 4);
  append_text(out, "WISP");
  append_le(out, 1, 4);
  out.insert(out.end(), body.begin(), body.end());
  out[kChecksumAt] = checksum(out);
  return out;
}

// Offsets into the FADT (5.2.9), from the start of the table.
namespace fadt {
constexpr std::size_t kSize = 276;
constexpr std::size_t kIaPcBootArch = 109;
constexpr std::size_t kFlags = 112;
constexpr std::size_t kResetRegister = 116;
constexpr std::size_t kResetValue = 128;
constexpr std::size_t kMinorVersion = 131;
constexpr std::size_t kXDsdt = 140;
constexpr std::size_t kSleepControl = 244;
constexpr std::size_t kSleepStatus = 256;
constexpr std::size_t kHypervisor = 268;

constexpr std::uint8_t kRevision = 6;
constexpr std::uint16_t kBootLegacyDevices = 1U << 0;
constexpr std::uint16_t kBoot8042 = 1U << 1;
constexpr std::uint16_t kBootNoVga = 1U << 2;
constexpr std::uint16_t kBootNoCmosRtc = 1U << 5;
constexpr std::uint32_t kWbinvd = 1U << 0;
constexpr std::uint32_t kPowerButtonIsDevice = 1U << 4;
constexpr std::uint32_t kSleepButtonIsDevice = 1U << 5;
constexpr std::uint32_t kResetSupported = 1U << 10;
constexpr std::uint32_t kHardwareReduced = 1U << 20;
}  // namespace fadt

// A Generic Address Structure of an 8-bit register at `offset` of a table without its header.
void put_register(Bytes& body, std::size_t offset, const AcpiRegister& value) {
  std::uint8_t* at = &body[offset - kHeaderSize];
  at[0] = static_cast<std::uint8_t>(value.space);
  at[1] = 8;  // bits
  at[2] = 0;
  at[3] = 1;  // byte access
  store_le<std::uint64_t>(at + 4, value.address);
}

Bytes build_fadt(const AcpiDescription& machine, Gpa dsdt) {
  using namespace fadt;
  Bytes body(kSize - kHeaderSize);
  const auto at = [&body](std::size_t offset) { return &body[offset - kHeaderSize]; };
  std::uint32_t boot_arch = kBootNoVga;
  boot_arch |= machine.serial ? kBootLegacyDevices : 0U;
  boot_arch |= machine.i8042 ? kBoot8042 : 0U;
  boot_arch |= machine.rtc ? 0U : kBootNoCmosRtc;
  store_le(at(kIaPcBootArch), static_cast<std::uint16_t>(boot_arch));
  store_le(at(kFlags),
           kWbinvd | kPowerButtonIsDevice | kSleepButtonIsDevice | kResetSupported | kHardwareReduced);
  put_register(body, kResetRegister, machine.power.reset);
  *at(kResetValue) = machine.power.reset_value;
  *at(kMinorVersion) = 5;
  store_le<std::uint64_t>(at(kXDsdt), dsdt);
  put_register(body, kSleepControl, machine.power.sleep_control);
  put_register(body, kSleepStatus, machine.power.sleep_status);
  std::ranges::copy(std::string_view("WISP"), at(kHypervisor));
  return table("FACP", kRevision, body);
}

// 5.2.12. CPUs whose APIC id does not fit 8 bits get the x2APIC form.
Bytes build_madt(const AcpiDescription& machine) {
  constexpr std::uint32_t kEnabled = 1;
  constexpr std::uint32_t kOnlineCapable = 2;
  Bytes body;
  append_le(body, layout::kLocalApic, 4);
  append_le(body, 0, 4);  // no dual 8259 that an operating system would have to mask
  for (std::uint32_t cpu = 0; cpu < machine.max_cpus; ++cpu) {
    const std::uint32_t flags = cpu < machine.cpus ? kEnabled : kOnlineCapable;
    const std::uint32_t apic_id = apic_id_of(machine.topology, cpu);
    if (apic_id < 0xFF) {
      append_le(body, 0x0800, 2);  // type 0, 8 bytes
      append_le(body, cpu, 1);
      append_le(body, apic_id, 1);
      append_le(body, flags, 4);
    } else {
      append_le(body, 0x1009, 2);  // type 9, 16 bytes
      append_le(body, 0, 2);
      append_le(body, apic_id, 4);
      append_le(body, flags, 4);
      append_le(body, cpu, 4);
    }
  }
  append_le(body, 0x0C01, 2);  // I/O APIC, 12 bytes: id 0, interrupts from GSI 0
  append_le(body, 0, 2);
  append_le(body, layout::kIoApic, 4);
  append_le(body, 0, 4);
  append_le(body, 0x0604, 2);  // NMI on LINT1 of all CPUs
  append_le(body, 0xFF, 1);
  append_le(body, 0, 2);
  append_le(body, 1, 1);
  return table("APIC", 5, body);
}

Bytes build_xsdt(std::initializer_list<Gpa> tables) {
  Bytes body;
  for (const Gpa gpa : tables) {
    append_le(body, gpa, 8);
  }
  return table("XSDT", 1, body);
}

// 5.2.5.3, revision 2.
Bytes build_rsdp(Gpa xsdt) {
  Bytes out;
  append_text(out, "RSD PTR ");
  out.push_back(0);
  append_text(out, "WISP  ");
  out.push_back(2);
  append_le(out, 0, 4);  // no RSDT
  append_le(out, 36, 4);
  append_le(out, xsdt, 8);
  append_le(out, 0, 4);
  out[8] = checksum(std::span(out).first(20));
  out[32] = checksum(out);
  return out;
}

Result<void> check(const AcpiDescription& machine) {
  if (machine.cpus == 0 || machine.cpus > machine.max_cpus || machine.max_cpus > kMaxCpus) {
    return fail("ACPI cannot describe {} of at most {} CPUs (the limit is {})", machine.cpus,
                machine.max_cpus, kMaxCpus);
  }
  std::bitset<layout::kVirtioMmioSlots> used;
  const auto take = [&used](const VirtioMmioSlot& slot) -> Result<void> {
    if (slot.index >= used.size() || used[slot.index]) {
      return fail("virtio-mmio slot {} is {}", slot.index,
                  slot.index >= used.size() ? "beyond the last one" : "used twice");
    }
    if (!range_within(slot.base, layout::kVirtioMmioSize, layout::kHighRamStart)) {
      return fail("virtio-mmio slot {} at {:#x} does not lie below 4 GiB", slot.index, slot.base);
    }
    used.set(slot.index);
    return {};
  };
  for (const VirtioMmioSlot& slot : machine.devices) {
    WISP_TRY(take(slot));
  }
  if (machine.slot_hotplug) {
    for (const VirtioMmioSlot& slot : machine.slot_hotplug->free_slots) {
      WISP_TRY(take(slot));
    }
    if (machine.power.slot_hotplug == 0) {
      return fail("slots that are filled later need a bit in the event register");
    }
  }
  return {};
}

}  // namespace

Result<AcpiTables> build_acpi(const AcpiDescription& machine, Gpa gpa, std::uint64_t space) {
  WISP_TRY(check(machine));
  WISP_ASSERT(is_aligned(gpa, 16));
  constexpr std::uint64_t kAlignment = 16;
  constexpr std::size_t kRsdpSize = 36;

  AcpiTables result;
  result.rsdp = gpa;
  Gpa at = align_down(gpa + kRsdpSize + kAlignment - 1, kAlignment);
  const auto place = [&](std::string_view signature, Bytes bytes) {
    const Gpa here = at;
    at = align_down(at + bytes.size() + kAlignment - 1, kAlignment);
    result.tables.push_back({here, signature, std::move(bytes)});
    return here;
  };
  const Gpa dsdt = place("DSDT", table("DSDT", 2, build_dsdt_body(machine)));
  const Gpa facp = place("FACP", build_fadt(machine, dsdt));
  const Gpa madt = place("APIC", build_madt(machine));
  const Gpa xsdt = place("XSDT", build_xsdt({facp, madt}));
  result.tables.push_back({gpa, "RSD PTR ", build_rsdp(xsdt)});
  if (at - gpa > space) {
    return fail("ACPI tables for {} CPUs and {} virtio devices take {} bytes, there is room for {}",
                machine.max_cpus,
                machine.devices.size() + (machine.slot_hotplug ? machine.slot_hotplug->free_slots.size() : 0),
                at - gpa, space);
  }
  return result;
}

}  // namespace wisp
