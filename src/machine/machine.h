// A running microVM: owns every part of it and its life cycle.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "boot/boot.h"
#include "hypervisor/hypervisor.h"
#include "machine/backends.h"
#include "machine/config.h"
#include "machine/device_factory.h"
#include "machine/guest_ram.h"
#include "machine/iothread.h"
#include "machine/machine_control.h"
#include "machine/platform.h"
#include "machine/vcpu_thread.h"
#include "machine/virtio_slots.h"
#include "memory/address_space.h"

namespace wisp {

// What a machine needs from its surroundings; all of it outlives the machine.
struct MachineServices {
  EventLoop& loop;  // the main loop; the machine is used on its thread only
  Log& log;
  const Clock& clock;
  EntropySource& entropy;
  std::uint64_t process_start_ns = 0;  // the clock's monotonic time at the start of main()
  bool seccomp = true;                 // filter the system calls of the threads that the machine starts
  // Called with the first vCPU and the machine's RAM before anything else is made, where the engine must be
  // judged (does it run ring 0 on hardware?). Leaves both as they were. May be empty.
  std::function<Result<void>(Vcpu&, const GuestMemory&)> judge_engine;
  // Called where that said no, with what it said: gives an engine to take in its place. Empty: the machine
  // cannot be made.
  std::function<Result<std::unique_ptr<Hypervisor>>(const Error& why)> other_engine = {};
};

class Machine final : public MachineControl, private VcpuEvents {
 public:
  // Builds the machine up to the point where start() only has to let the vCPUs go. Errors name the option at
  // fault; nothing stays behind.
  [[nodiscard]] static Result<std::unique_ptr<Machine>> create(MachineConfig config,
                                                               std::unique_ptr<Hypervisor> engine,
                                                               const MachineServices& services);
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() override;

  // Runs the vCPUs, or leaves them parked where the configuration says so.
  [[nodiscard]] Result<void> start();

  // The terminal that the program was started on may have another size now.
  void refresh_terminal_sizes() { backends_->refresh_terminal_sizes(); }

  // Once state() is kShutdown: the exit status of the process that the reason for it asks for.
  [[nodiscard]] int exit_status() const { return exit_status_; }

  void add_events(MachineEvents* events) override;
  void remove_events(MachineEvents* events) override;
  [[nodiscard]] const MachineConfig& config() const override { return config_; }
  [[nodiscard]] RunState state() const override { return state_; }
  [[nodiscard]] std::string engine_name() const override { return engine_->name(); }
  [[nodiscard]] Result<void> pause() override;
  [[nodiscard]] Result<void> resume() override;
  [[nodiscard]] Result<void> powerdown() override;
  [[nodiscard]] Result<void> reset() override;
  void quit(ShutdownReason reason) override;
  [[nodiscard]] std::vector<VcpuInfo> vcpus() const override;
  [[nodiscard]] std::vector<BlockInfo> blocks() const override;
  [[nodiscard]] std::vector<ChardevInfo> chardevs() const override;
  [[nodiscard]] std::vector<IothreadInfo> iothreads() const override;
  [[nodiscard]] Result<BalloonInfo> balloon() const override;
  [[nodiscard]] Result<void> set_balloon(std::uint64_t bytes) override;
  [[nodiscard]] Result<void> add_drive(const BackendConfig& drive) override;
  [[nodiscard]] Result<void> remove_drive(const std::string& id) override;
  [[nodiscard]] Result<void> add_netdev(const BackendConfig& netdev) override;
  [[nodiscard]] Result<void> remove_netdev(const std::string& id) override;
  [[nodiscard]] Result<void> add_chardev(const BackendConfig& chardev) override;
  [[nodiscard]] Result<void> remove_chardev(const std::string& id) override;
  [[nodiscard]] Result<std::string> read_ring(const std::string& id, std::size_t most) override;
  [[nodiscard]] Result<void> write_ring(const std::string& id, std::string_view bytes) override;
  [[nodiscard]] Result<void> add_device(const DeviceConfig& device) override;
  [[nodiscard]] Result<void> remove_device(const std::string& id) override;

 private:
  Machine(MachineConfig config, std::unique_ptr<Hypervisor> engine, const MachineServices& services);

  [[nodiscard]] Result<void> build();
  [[nodiscard]] Result<void> build_engine();
  [[nodiscard]] Result<void> build_vm();
  [[nodiscard]] Result<void> build_backends();
  [[nodiscard]] Result<void> build_platform();
  [[nodiscard]] Result<void> build_devices();
  [[nodiscard]] Result<void> show_memory();
  void hide_memory();
  [[nodiscard]] Result<void> start_vcpus();
  [[nodiscard]] Result<void> attach_device(const DeviceConfig& device, bool hotplug);
  [[nodiscard]] Result<EventLoop*> loop_for(const DeviceConfig& device);
  // Destroys `part` of a device here while the thread of the device's event loop stands still: the end of
  // a back end (its socket's path, passt, an irqfd) takes calls that only this thread's filter has.
  void destroy_beside(EventLoop& loop, std::shared_ptr<void> part);
  // Loads the kernel and puts vCPU 0 at its entry. With all vCPUs parked and RAM all zero.
  [[nodiscard]] Result<void> load_boot();
  [[nodiscard]] BootDescription describe_boot() const;

  // For what only a machine that was started, and has not ended, can do.
  [[nodiscard]] Result<void> check_started() const;
  void park_vcpus();
  void resume_vcpus();
  void pause_devices();
  void resume_devices();
  [[nodiscard]] Result<void> reset_parts();
  [[nodiscard]] Result<void> reset_machine(bool by_guest);

  // What vCPU threads note, and the main loop acts on.
  [[nodiscard]] Result<void> vcpu_thread_started(std::uint32_t id) override;
  void vcpu_reset_request(std::uint32_t id, bool fell_over) override;
  void tell_of_triple_fault();
  void vcpu_failed(std::uint32_t id, const std::string& message) override;
  // Where the guest has a time of its own, so that a run ends at the same instruction each time.
  [[nodiscard]] bool guest_run_ends() const override {
    return vm_->guest_clock() != nullptr && (shutdown_under_way_.load(std::memory_order_relaxed) ||
                                             reset_under_way_.load(std::memory_order_relaxed) ||
                                             debug_exit_under_way_.load(std::memory_order_relaxed));
  }
  // Each kind of request is under way once at most, so that a guest cannot fill the loop's queue. A reset of
  // the machine forgets what the guest asked for before it.
  void request(std::atomic<bool>& under_way, void (Machine::*action)());
  void guest_shutdown();
  void guest_reset();
  void debug_exit();
  template <typename... Args>
  void tell(void (MachineEvents::*event)(Args...), const std::type_identity_t<Args>&... args) {
    // A listener may leave while it is told.
    const std::vector<MachineEvents*> listeners = events_;
    for (MachineEvents* listener : listeners) {
      if (std::ranges::find(events_, listener) != events_.end()) {
        (listener->*event)(args...);
      }
    }
  }

  MachineConfig config_;
  std::unique_ptr<Hypervisor> engine_;
  MachineServices services_;
  RunState state_ = RunState::kCreated;
  int exit_status_ = 0;
  std::vector<MachineEvents*> events_;
  std::atomic<bool> shutdown_under_way_ = false;
  std::atomic<bool> reset_under_way_ = false;
  std::atomic<std::int64_t> fallen_vcpu_ = -1;  // which fell over, and is to be told of
  std::atomic<bool> debug_exit_under_way_ = false;
  std::atomic<std::uint32_t> debug_exit_status_ = 0;
  // Tasks posted to the main loop may outlive the machine: they look here first.
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);

  // Destroyed from the last to the first: threads, then devices, then what devices use.
  std::unique_ptr<Vm> vm_;
  AddressSpace memory_space_{"memory", 0};
  AddressSpace port_space_{"ports", 0x10000};
  bool listening_ = false;
  bool guest_started_ = false;
  bool told_of_unnamed_devices_ = false;
  bool told_of_triple_fault_ = false;
  std::unique_ptr<GuestRam> ram_;
  std::unique_ptr<Backends> backends_;
  std::vector<std::unique_ptr<IoThread>> iothreads_;
  std::unique_ptr<Platform> platform_;
  std::unique_ptr<VirtioSlots> slots_;
  std::unique_ptr<DeviceFactory> factory_;
  std::vector<std::uint8_t> power_up_platform_;   // of the engine's interrupt controllers
  std::vector<std::unique_ptr<Vcpu>> new_vcpus_;  // until their threads are made
  std::vector<std::unique_ptr<VcpuThread>> vcpus_;
};

}  // namespace wisp
