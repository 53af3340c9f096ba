// A port by which a test in the guest ends the process with a status of its own (QEMU's isa-debug-exit).
#pragma once

#include <cstdint>
#include <functional>

#include "devices/device.h"

namespace wisp {

struct DebugExitOptions {
  std::uint16_t iobase = 0x501;
  std::uint16_t iosize = 2;  // ports, at least 1
};

class DebugExit final : public Device {
 public:
  // `on_exit` gets the status, (value << 1) | 1, of which exit(2) keeps 8 bits. Called on the vCPU thread
  // that wrote, as often as the guest likes.
  explicit DebugExit(std::function<void(std::uint32_t status)> on_exit) : on_exit_(std::move(on_exit)) {}

  [[nodiscard]] std::string_view name() const override { return "debug-exit"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override {}
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  const std::function<void(std::uint32_t status)> on_exit_;
};

}  // namespace wisp
