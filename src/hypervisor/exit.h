// Why Vcpu::run() came back.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>

#include "memory/gpa.h"

namespace wisp {

// Port and MMIO exits: for reads `data` must be filled before the vCPU runs again, for writes it holds what
// the guest wrote. The span points into the engine and is valid until then. Size is 1, 2, 4 or 8 (MMIO) and
// 1, 2 or 4 (ports). A string port instruction may come as one exit with `count` elements of `data.size() /
// count` bytes each.
struct PortReadExit {
  std::uint16_t port = 0;
  std::uint32_t count = 1;
  std::span<std::uint8_t> data;
};
struct PortWriteExit {
  std::uint16_t port = 0;
  std::uint32_t count = 1;
  std::span<const std::uint8_t> data;
};
struct MmioReadExit {
  Gpa address = 0;
  std::span<std::uint8_t> data;
};
struct MmioWriteExit {
  Gpa address = 0;
  std::span<const std::uint8_t> data;
};
struct HaltExit {};         // only from engines without a local APIC model
struct InterruptedExit {};  // a kick came, or a signal
struct ShutdownExit {};     // triple fault
struct ResetExit {};        // the guest asked the engine for a reset (KVM_SYSTEM_EVENT)
struct BreakpointExit {
  std::uint64_t rip = 0;
};
// The engine cannot go on with this vCPU: what it said, for the log.
struct EngineErrorExit {
  std::string message;
};

using Exit = std::variant<InterruptedExit, PortReadExit, PortWriteExit, MmioReadExit, MmioWriteExit, HaltExit,
                          ShutdownExit, ResetExit, BreakpointExit, EngineErrorExit>;

}  // namespace wisp
