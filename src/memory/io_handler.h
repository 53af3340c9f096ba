// What answers a guest's access to registers, behind port I/O or MMIO.
#pragma once

#include <cstdint>
#include <span>

namespace wisp {

// Called on vCPU threads, by several at once: implementations take their own lock. `offset` counts from the
// start of the handler's region and `offset + data.size()` never passes its end. Sizes are 1, 2, 4 or 8 bytes
// in practice, but any size from 1 to 8 must be answered. An access that means nothing reads as all ones or
// zero, as the hardware does, and is never an error of the process.
class IoHandler {
 public:
  virtual ~IoHandler() = default;
  virtual void io_read(std::uint64_t offset, std::span<std::uint8_t> data) = 0;
  virtual void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) = 0;
};

}  // namespace wisp
