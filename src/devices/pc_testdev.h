// The devices that bare-metal test programs for hypervisors use (QEMU's pc-testdev, and the two facts they
// ask its firmware configuration for): a register and memory that keep what is written, and interrupt lines
// that the guest itself moves.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "devices/device.h"
#include "hypervisor/irq_line.h"

namespace wisp {

inline constexpr std::uint16_t kTestRegisterPort = 0xe0;
inline constexpr std::uint16_t kTestRegisterCount = 12;
inline constexpr std::uint16_t kTestIrqPort = 0x2000;
inline constexpr std::uint16_t kTestIrqCount = 24;
inline constexpr std::uint64_t kTestMemoryAddress = 0xff000000;
inline constexpr std::uint64_t kTestMemorySize = 0x10000;
inline constexpr std::uint16_t kFirmwareConfigPort = 0x510;
inline constexpr std::uint16_t kFirmwareConfigCount = 2;

// Ports 0xe0 to 0xe3, and again 0xe8 to 0xeb: one register of 32 bits. Ports 0xe4 to 0xe7: a write has the
// hypervisor forget how it maps the page written, which is never visible to the guest, so nothing is done.
class TestRegister final : public Device {
 public:
  [[nodiscard]] std::string_view name() const override { return "test-register"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  mutable std::mutex mutex_;
  std::array<std::uint8_t, 4> bytes_{};
};

// One port for each GSI: a byte that is not 0 raises the line, 0 lowers it. Wider writes do nothing.
class TestIrqLines final : public Device {
 public:
  // As many as there are ports.
  explicit TestIrqLines(std::vector<std::unique_ptr<IrqLine>> lines) : lines_(std::move(lines)) {}
  [[nodiscard]] std::string_view name() const override { return "test-irq-lines"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  void set(std::uint32_t levels);  // with the lock held
  mutable std::mutex mutex_;
  const std::vector<std::unique_ptr<IrqLine>> lines_;
  std::uint32_t levels_ = 0;
};

// Device memory that keeps what is written, by exits.
class TestMemory final : public Device {
 public:
  TestMemory() : bytes_(kTestMemorySize) {}
  [[nodiscard]] std::string_view name() const override { return "test-memory"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  mutable std::mutex mutex_;
  std::vector<std::uint8_t> bytes_;
};

struct MachineFacts {
  std::uint16_t cpus = 1;
  std::uint16_t max_cpus = 1;
  std::uint64_t ram_size = 0;
};

// The port interface of QEMU's fw_cfg (docs/specs/fw_cfg.rst): a word written to 0x510 selects an item, whose
// bytes come from 0x511 one after another, then zeros. The items: signature, interface, RAM size, CPUs.
class FirmwareConfig final : public Device {
 public:
  explicit FirmwareConfig(const MachineFacts& facts) : facts_(facts) {}
  [[nodiscard]] std::string_view name() const override { return "firmware-config"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  // A little-endian number of that many bytes; size 0: no such item.
  struct Item {
    std::uint64_t value = 0;
    std::uint32_t size = 0;
  };
  [[nodiscard]] Item item() const;
  const MachineFacts facts_;
  mutable std::mutex mutex_;
  std::uint16_t selected_ = 0;
  std::uint32_t position_ = 0;
};

}  // namespace wisp
