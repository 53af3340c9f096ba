// The seam under every machine: an engine makes VMs, a VM has memory slots, interrupt lines and vCPUs, a vCPU
// runs until an Exit. Engines: kvm (hypervisor/kvm), soft (hypervisor/soft), fake (tests/support).
// Nothing takes snapshots yet: the dirty log, message lines and the saved state of a vCPU have no user but
// the tests, and the saved state of the platform only the reset.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "hypervisor/cpu_state.h"
#include "hypervisor/exit.h"
#include "hypervisor/irq_line.h"
#include "memory/address_space.h"
#include "memory/gpa.h"

namespace wisp {

// A message-signalled interrupt as the guest's PCI function or I/O APIC entry would send it.
struct MsiMessage {
  std::uint64_t address = 0;
  std::uint32_t data = 0;
};

class Vcpu {
 public:
  virtual ~Vcpu() = default;
  // The index: create_vcpu()'s `id`, from which apic_id_of() has the APIC id.
  [[nodiscard]] virtual std::uint32_t id() const = 0;

  // Enters the guest until there is something for the caller to do. Called by one thread only, the same each
  // time. A kick() that came since the last return makes it return InterruptedExit without running guest
  // code, after the data of the previous port or MMIO read has been taken in.
  [[nodiscard]] virtual Exit run() = 0;
  // Makes run() return soon, now or at its next call; from any thread.
  virtual void kick() = 0;

  // State, only while no thread is in run(). A pending port or MMIO exit must have been completed (one more
  // run() with a kick pending).
  [[nodiscard]] virtual Result<CpuState> save() = 0;
  [[nodiscard]] virtual Result<void> load(const CpuState& state) = 0;
  // The registers alone, cheaper.
  [[nodiscard]] virtual Result<CpuRegs> regs() = 0;
  [[nodiscard]] virtual Result<void> set_regs(const CpuRegs& regs) = 0;
  [[nodiscard]] virtual Result<CpuSpecialRegs> special_regs() = 0;
  [[nodiscard]] virtual Result<void> set_special_regs(const CpuSpecialRegs& sregs) = 0;
  // Back to the state after power-up (INIT for the registers, reset for the local APIC and MSRs).
  [[nodiscard]] virtual Result<void> reset() = 0;
};

struct CpuTopology {
  std::uint32_t sockets = 1;
  std::uint32_t dies = 1;
  std::uint32_t clusters = 1;
  std::uint32_t cores = 1;
  std::uint32_t threads = 1;
};

// The pins of the I/O APIC are GSI 0 to 23; the first 16 are also those of the PICs.
inline constexpr std::uint32_t kIoApicPins = 24;

struct VmOptions {
  std::uint32_t max_vcpus = 1;
  CpuTopology topology = {};
  bool pit = true;   // an i8254 at ports 0x40-0x43 and 0x61, on GSI 0
  bool pmu = false;  // the guest sees the host's performance counters
};

class Vm {
 public:
  virtual ~Vm() = default;

  // Vcpus are made in order of their ids, 0 first, and must not outlive the VM. The first is the boot
  // processor and starts runnable; the others wait for INIT and SIPI.
  [[nodiscard]] virtual Result<std::unique_ptr<Vcpu>> create_vcpu(std::uint32_t id) = 0;

  // What follows RAM, ROM and doorbells of the machine's memory space / port space into the engine. An engine
  // can be much quicker with RAM that it is shown before its first vCPU and interrupt line are made.
  [[nodiscard]] virtual AddressSpaceListener& memory_listener() = 0;
  [[nodiscard]] virtual AddressSpaceListener& port_listener() = 0;

  // A pin of the I/O APIC at 0xfec00000, below kIoApicPins. Lines must not outlive the VM.
  [[nodiscard]] virtual Result<std::unique_ptr<IrqLine>> irq_line(std::uint32_t gsi) = 0;
  // A line that sends a message; set_level does nothing.
  [[nodiscard]] virtual Result<std::unique_ptr<IrqLine>> msi_line(const MsiMessage& message) = 0;

  // Dirty log over all RAM of the VM, by guest writes: starts, stops, and gives the pages written since the
  // last call for the slot that starts at `gpa`, one bit per 4 KiB page.
  [[nodiscard]] virtual Result<void> set_dirty_log(bool on) = 0;
  [[nodiscard]] virtual Result<std::vector<std::uint64_t>> take_dirty_log(Gpa gpa) = 0;

  // What must be told of each write to guest RAM that no vCPU made (a device's, the boot loader's), after it;
  // from any thread. Empty where the engine need not know.
  [[nodiscard]] virtual std::function<void(Gpa, std::uint64_t)> host_write_hook() { return {}; }

  // The time that devices are to go by, where it is not the host's; null: the host's. It lives as long as the
  // VM.
  [[nodiscard]] virtual const Clock* guest_clock() const { return nullptr; }

  // Whether guest RAM does better in the host's large pages, with files read into it, than in small ones that
  // are mapped from the files: where each first touch of a page costs more than what is done with it.
  [[nodiscard]] virtual bool prefers_large_pages() const { return false; }

  // State of the interrupt controllers and timers outside the vCPUs (PIC, I/O APIC, PIT, clock), as a
  // versioned record that the same engine reads again.
  [[nodiscard]] virtual Result<std::vector<std::uint8_t>> save_platform() = 0;
  [[nodiscard]] virtual Result<void> load_platform(std::span<const std::uint8_t> record) = 0;

  // Called once, when the first vCPU was let go: the time for settings that take the engine long and that a
  // guest can do without at first. Does not wait for them.
  virtual void guest_started() {}
};

// What a host has to say about an engine.
struct EngineReport {
  bool usable = false;
  std::string summary;  // one line: what was found
  std::string advice;   // where not usable: what to do about it
};

class Hypervisor {
 public:
  virtual ~Hypervisor() = default;
  // "kvm", "soft", ...
  [[nodiscard]] virtual std::string name() const = 0;
  [[nodiscard]] virtual std::uint32_t max_vcpus() const = 0;
  // Whether VmOptions::pmu has an effect.
  [[nodiscard]] virtual bool has_pmu() const { return false; }
  [[nodiscard]] virtual Result<std::unique_ptr<Vm>> create_vm(const VmOptions& options) = 0;
};

}  // namespace wisp
