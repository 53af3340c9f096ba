// What control (QMP, signals) may ask of a machine and what it hears from it. All calls are made on the main
// event loop's thread; events are told there too.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "block/block_backend.h"
#include "machine/config.h"

namespace wisp {

enum class RunState : std::uint8_t { kCreated, kRunning, kPaused, kShutdown };

enum class ShutdownReason : std::uint8_t {
  kGuestShutdown,  // the guest powered off
  kGuestReset,     // the guest asked for a reset under no_reboot, or fell over (triple fault)
  kHostQuit,       // QMP quit
  kHostSignal,     // SIGTERM, SIGINT, SIGHUP
  kHostUi,         // control-A x on the terminal
  kDebugExit,      // a debug-exit port with its own exit status
  kError,
};

struct VcpuInfo {
  std::uint32_t index = 0;
  std::int64_t thread_id = 0;
  CpuTopology topology;
  // Each counts from 0 within the one before it.
  std::uint32_t socket_id = 0, die_id = 0, cluster_id = 0, core_id = 0, thread_in_core = 0;
};

struct BlockInfo {
  std::string drive_id;
  std::string device_id;  // empty where no device uses it
  std::string file;
  std::string format;
  bool read_only = false;
  bool direct = false;
  std::uint64_t size = 0;  // bytes
  BlockLimits limits = {};
  BlockCounters counters = {};  // of the device that uses it; all 0 without one
};

struct IothreadInfo {
  std::string id;
  std::int64_t thread_id = 0;
};

struct ChardevInfo {
  std::string id;
  std::string description;  // CharBackend::description()
  bool connected = false;
};

struct BalloonInfo {
  std::uint64_t actual = 0;  // bytes the guest has
  // Guest statistics as virtio 1.2 5.5.6.3 names them, of the last time it was asked; empty where the guest
  // gave none.
  std::vector<std::pair<std::string, std::uint64_t>> statistics;
};

// Told on the main loop's thread.
class MachineEvents {
 public:
  virtual ~MachineEvents() = default;
  virtual void on_shutdown(bool by_guest, ShutdownReason reason) = 0;
  virtual void on_reset(bool by_guest) = 0;
  virtual void on_stop() = 0;
  virtual void on_resume() = 0;
  virtual void on_powerdown() = 0;
  virtual void on_balloon_change(std::uint64_t actual) = 0;
  // `path` is the device's place in the machine ("/machine/peripheral/ID").
  virtual void on_device_deleted(const std::string& id, const std::string& path) = 0;
};

class MachineControl {
 public:
  virtual ~MachineControl() = default;

  // Listeners are borrowed and told in the order in which they were added.
  virtual void add_events(MachineEvents* events) = 0;
  virtual void remove_events(MachineEvents* events) = 0;

  [[nodiscard]] virtual const MachineConfig& config() const = 0;
  [[nodiscard]] virtual RunState state() const = 0;
  // "kvm" or "soft".
  [[nodiscard]] virtual std::string engine_name() const = 0;

  // Stops all vCPUs and quiesces the devices; nothing where that is done already. A machine that has not
  // started yet will start paused. Fails where it has ended.
  [[nodiscard]] virtual Result<void> pause() = 0;
  // The opposite, in each case.
  [[nodiscard]] virtual Result<void> resume() = 0;
  // Presses the ACPI power button.
  [[nodiscard]] virtual Result<void> powerdown() = 0;
  [[nodiscard]] virtual Result<void> reset() = 0;
  // Ends the machine: on_shutdown comes, and the main loop's owner leaves.
  virtual void quit(ShutdownReason reason) = 0;

  [[nodiscard]] virtual std::vector<VcpuInfo> vcpus() const = 0;
  [[nodiscard]] virtual std::vector<BlockInfo> blocks() const = 0;
  [[nodiscard]] virtual std::vector<ChardevInfo> chardevs() const = 0;
  [[nodiscard]] virtual std::vector<IothreadInfo> iothreads() const { return {}; }
  // Also asks the guest for new statistics, for the next call.
  [[nodiscard]] virtual Result<BalloonInfo> balloon() const = 0;
  // Asks the guest to have `bytes` of memory.
  [[nodiscard]] virtual Result<void> set_balloon(std::uint64_t bytes) = 0;

  // Hotplug. Ids are unique over each kind. Removing a back end that a device uses fails.
  [[nodiscard]] virtual Result<void> add_drive(const BackendConfig& drive) = 0;
  [[nodiscard]] virtual Result<void> remove_drive(const std::string& id) = 0;
  // Takes the descriptors of `netdev` over, on failure too.
  [[nodiscard]] virtual Result<void> add_netdev(const BackendConfig& netdev) = 0;
  [[nodiscard]] virtual Result<void> remove_netdev(const std::string& id) = 0;
  [[nodiscard]] virtual Result<void> add_chardev(const BackendConfig& chardev) = 0;
  [[nodiscard]] virtual Result<void> remove_chardev(const std::string& id) = 0;
  // The ring of a chardev of kind ringbuf: takes at most `most` of its oldest bytes out, or puts bytes in at
  // its end, where they push the oldest out. Fail where there is no such chardev.
  [[nodiscard]] virtual Result<std::string> read_ring(const std::string& id, std::size_t most) = 0;
  [[nodiscard]] virtual Result<void> write_ring(const std::string& id, std::string_view bytes) = 0;
  // Takes the descriptors that the device's options name over, on failure too.
  [[nodiscard]] virtual Result<void> add_device(const DeviceConfig& device) = 0;
  // On return the device is gone, and the guest is told then: it is not asked first. on_device_deleted comes
  // afterwards, from the loop.
  [[nodiscard]] virtual Result<void> remove_device(const std::string& id) = 0;
};

}  // namespace wisp
