// The kernel command line.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "boot/virtio_slot.h"

namespace wisp {

struct KernelCommandLine {
  std::string text;
  std::uint32_t devices = 0;  // how many of the devices it names
};

// `base` followed by " virtio_mmio.device=512@<base>:<gsi>" for each device (Linux,
// drivers/virtio/virtio_mmio.c), put in front of a lone "--", since what follows that belongs to init. Where
// not all fit in `max` bytes, as many as do are named. Errors where `base` itself does not fit or has a zero
// byte in it.
[[nodiscard]] Result<KernelCommandLine> build_command_line(std::string_view base,
                                                           std::span<const VirtioMmioSlot> devices,
                                                           std::uint32_t max);

}  // namespace wisp
