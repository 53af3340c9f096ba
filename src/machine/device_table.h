// The table of devices and back ends: what a command line or QMP may name, with the options of each.
#pragma once

#include <span>
#include <string_view>

#include "base/property.h"

namespace wisp {

struct DriverInfo {
  std::string_view name;                     // "virtio-blk-device"
  std::string_view help;                     // one line
  std::span<const PropertySpec> properties;  // without `id`, which every device has
  bool hotpluggable = false;
};

// All drivers of -device, and all kinds of -netdev, -chardev and -object.
struct DriverTables {
  std::span<const DriverInfo> devices;
  std::span<const DriverInfo> drives;  // one entry, named ""
  std::span<const DriverInfo> netdevs;
  std::span<const DriverInfo> chardevs;
  std::span<const DriverInfo> objects;
};
[[nodiscard]] DriverTables driver_tables();

// The entry with exactly this name; null where there is none.
[[nodiscard]] inline const DriverInfo* find_driver(std::span<const DriverInfo> table, std::string_view name) {
  for (const DriverInfo& driver : table) {
    if (driver.name == name) {
      return &driver;
    }
  }
  return nullptr;
}

}  // namespace wisp
