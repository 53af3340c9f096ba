// The devices that the hostile suite runs over: one entry in hostile_devices.cpp for each.
#pragma once

#include <functional>
#include <memory>
#include <ostream>
#include <vector>

#include "base/event_loop.h"
#include "virtio/device.h"

namespace wisp::test {

// What a device needs beside itself (back ends): kept until after the device is gone.
using Keep = std::vector<std::shared_ptr<void>>;

struct HostileDevice {
  const char* name;
  std::function<std::unique_ptr<VirtioDevice>(EventLoop& loop, const GuestMemory& memory, Keep& keep)> make;
};

inline void PrintTo(const HostileDevice& device, std::ostream* out) {
  *out << device.name;
}

[[nodiscard]] std::vector<HostileDevice> hostile_devices();

}  // namespace wisp::test
