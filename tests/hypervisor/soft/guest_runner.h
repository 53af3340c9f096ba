// Runs the cases of the differential test on the software CPU: ring 3 of 64-bit mode, with the same linear
// addresses as on the host, and a kernel of 256 HLT instructions that exceptions end in.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <thread>

#include "hypervisor/soft/bare_environment.h"
#include "hypervisor/soft/native_case.h"
#include "hypervisor/soft/processor.h"
#include "memory/address_space.h"

namespace wisp::soft {

class GuestRunner final {
 public:
  explicit GuestRunner(const ExecutionOptions& options);
  ~GuestRunner();
  GuestRunner(const GuestRunner&) = delete;
  GuestRunner& operator=(const GuestRunner&) = delete;

  // End::kHang where the processor had to be stopped, or stopped for another reason than an exception.
  void run(const Case& one, const CaseData& data, std::uint64_t fs_base, CaseResult& result);
  // What the processor noted of instructions that it does not have.
  [[nodiscard]] const std::set<std::string>& notes() const;

 private:
  class Noting;
  void make_tables();
  void reset_state(const Case& one, std::uint64_t fs_base);
  template <typename T>
  void put(std::uint64_t gpa, T value);
  void write_code(const Case& one, bool in);

  std::uint8_t* ram_ = nullptr;
  AddressSpace space_{"memory", 0};
  PhysicalMemory memory_;
  std::unique_ptr<Noting> environment_;
  std::unique_ptr<BareMmio> mmio_;
  std::shared_ptr<SharedCode> code_;
  std::unique_ptr<Processor> processor_;
  std::atomic<std::uint64_t> progress_ = 0;  // odd while a case runs
  std::atomic<std::uint64_t> case_rip_ = 0;
  std::jthread watchdog_;
};

}  // namespace wisp::soft
