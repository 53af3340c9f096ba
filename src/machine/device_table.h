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

// All drivers of -device, and all kinds of -netdev, -chardev and -object. A drive's options are the single
// entry of drive_kinds(), named "".
[[nodiscard]] std::span<const DriverInfo> device_drivers();
[[nodiscard]] std::span<const DriverInfo> drive_kinds();
[[nodiscard]] std::span<const DriverInfo> netdev_kinds();
[[nodiscard]] std::span<const DriverInfo> chardev_kinds();
[[nodiscard]] std::span<const DriverInfo> object_kinds();
[[nodiscard]] const DriverInfo* find_driver(std::span<const DriverInfo> table, std::string_view name);

}  // namespace wisp
