// What a machine is made from, as plain data. Command line, QMP and tests fill it; nothing here reads text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/property.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/soft/execution.h"
#include "memory/ram.h"

namespace wisp {

// APIC ids have 8 bits, all ones is broadcast, and the I/O APIC has one in the MP table.
inline constexpr std::uint32_t kMaxVcpus = 254;
inline constexpr std::size_t kMaxIothreads = 8;

enum class Accel : std::uint8_t { kAuto, kKvm, kSoft };

// One -device: a driver from the table of devices (device_table.h) with options checked against its
// PropertySpecs.
struct DeviceConfig {
  std::string driver;
  std::string id;
  PropertySet properties;
};

// One -drive, -netdev, -chardev or -object: a host-side part that devices name by id. `kind` is the word that
// chooses its property table ("raw" drives have none: "", netdev "tap", chardev "socket", object
// "rng-random").
struct BackendConfig {
  std::string kind;
  std::string id;
  PropertySet properties;
  // Descriptors received by QMP getfd or named by fd= and fds=, to be taken over.
  std::vector<int> fds;
};

struct CpuConfig {
  std::uint32_t count = 1;
  std::uint32_t max = 1;  // kept for hotplug; at least `count`
  CpuTopology topology;
  bool pmu = false;  // as VmOptions::pmu
};

struct BootConfig {
  std::string kernel;   // path; required
  std::string initrd;   // path or empty
  std::string cmdline;  // as given by -append
  // Append virtio_mmio.device= for each device, for kernels that do not read ACPI.
  bool auto_cmdline = true;
};

struct MachineConfig {
  std::string name;
  Accel accel = Accel::kAuto;
  // Measure whether KVM runs guests' kernels on the processor before it is taken. Without, it is trusted.
  bool probe_kvm = true;
  soft::ExecutionOptions execution;  // where the software CPU runs the machine
  CpuConfig cpus;
  RamOptions memory{.size = 256ULL << 20};
  BootConfig boot;
  std::vector<BackendConfig> drives;
  std::vector<BackendConfig> netdevs;
  std::vector<BackendConfig> chardevs;
  std::vector<BackendConfig>
      objects;  // rng-random; memory-backend-* and iothread are folded into their own fields
  std::vector<std::string> iothreads;  // ids, at most 8
  std::optional<std::string> serial;   // id of the chardev behind COM1
  std::vector<DeviceConfig> devices;
  bool acpi = true;
  bool start_paused = false;
  bool no_reboot = false;    // a guest reset ends the machine
  bool no_shutdown = false;  // a guest shutdown pauses the machine instead of ending it
};

}  // namespace wisp
