// A machine around the processor that has nothing of its own.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "hypervisor/soft/processor.h"

namespace wisp::soft {

class BareEnvironment : public Environment {
 public:
  std::uint64_t read_tsc() override { return ++tsc_; }
  CpuidEntry cpuid(std::uint32_t leaf, std::uint32_t subleaf) override {
    return {.leaf = leaf, .subleaf = subleaf};
  }
  std::optional<std::uint64_t> read_msr(std::uint32_t /*index*/) override { return std::nullopt; }
  MsrWrite write_msr(std::uint32_t /*index*/, std::uint64_t /*value*/) override { return MsrWrite::kUnknown; }
  std::uint64_t read_cr8() override { return 0; }
  void write_cr8(std::uint64_t /*value*/) override {}
  bool port_read(std::uint16_t /*port*/, std::span<std::uint8_t> /*data*/) override { return false; }
  bool port_write(std::uint16_t /*port*/, std::span<const std::uint8_t> /*data*/) override { return false; }
  std::uint64_t hypercall(std::uint64_t /*number*/,
                          std::span<const std::uint64_t, 4> /*arguments*/) override {
    return 0;
  }
  std::uint64_t random() override { return 4; }
  void pause() override { ++pauses; }
  void note(const std::string& /*what*/) override {}
  int pauses = 0;

 private:
  std::uint64_t tsc_ = 0;
};

class BareMmio final : public EngineMmio {
 public:
  bool mmio_read(std::uint64_t /*gpa*/, std::span<std::uint8_t> /*data*/) override { return false; }
  bool mmio_write(std::uint64_t /*gpa*/, std::span<const std::uint8_t> /*data*/) override { return false; }
};

}  // namespace wisp::soft
