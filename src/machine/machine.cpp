#include "machine/machine.h"

#include <algorithm>
#include <utility>

#include "sandbox/seccomp.h"

namespace wisp {
namespace {

// No device's id: that has no '#'.
constexpr const char* kSerialUser = "serial#0";

// The slot that addr= names.
std::optional<std::uint32_t> wanted_slot(const DeviceConfig& device) {
  const auto address = device.properties.find_uint("addr");
  return address ? std::optional(static_cast<std::uint32_t>(*address)) : std::nullopt;
}

// Whether the guest is told not to look at ACPI, as Kata Containers does.
bool kernel_without_acpi(std::string_view command_line) {
  const std::string padded = fmt::format(" {} ", command_line);
  return padded.find(" acpi=off ") != std::string::npos;
}

}  // namespace

Machine::Machine(MachineConfig config, std::unique_ptr<Hypervisor> engine, const MachineServices& services)
    : config_(std::move(config)), engine_(std::move(engine)), services_(services) {
  config_.acpi = config_.acpi && !kernel_without_acpi(config_.boot.cmdline);
  for (std::size_t i = 0; i < config_.devices.size(); ++i) {
    if (DeviceConfig& device = config_.devices[i]; device.id.empty()) {
      // What a device uses is kept under its id. A user's id has no '#'.
      device.id = fmt::format("{}#{}", device.driver, i);
    }
  }
}

Result<std::unique_ptr<Machine>> Machine::create(MachineConfig config, std::unique_ptr<Hypervisor> engine,
                                                 const MachineServices& services) {
  std::unique_ptr<Machine> machine(new Machine(std::move(config), std::move(engine), services));
  WISP_TRY(machine->build());
  return machine;
}

Machine::~Machine() {
  *alive_ = false;
  // Threads first: nothing may enter a device any more. Then the guest's view of memory, which names devices.
  vcpus_.clear();
  new_vcpus_.clear();
  for (const auto& io : iothreads_) {
    io->stop();
  }
  factory_.reset();
  slots_.reset();
  platform_.reset();
  iothreads_.clear();
  backends_.reset();
  ram_.reset();
  hide_memory();
}

Result<void> Machine::build_engine() {
  WISP_TRY(build_vm());
  if (!services_.judge_engine) {
    return {};
  }
  const auto verdict = services_.judge_engine(*new_vcpus_.front(), ram_->memory());
  if (verdict || !services_.other_engine) {
    return verdict;
  }
  new_vcpus_.clear();
  hide_memory();
  vm_.reset();
  WISP_ASSIGN(engine_, services_.other_engine(verdict.error()));
  return build_vm();
}

Result<void> Machine::build_vm() {
  if (config_.cpus.max > engine_->max_vcpus()) {
    return fail("-smp: {} vCPUs are more than the {} that {} has on this host", config_.cpus.max,
                engine_->max_vcpus(), engine_->name());
  }
  if (config_.cpus.pmu && !engine_->has_pmu()) {
    services_.log.warning("-cpu pmu=on: the engine '{}' has no performance counters; the guest sees none",
                          engine_->name());
  }
  WISP_ASSIGN(
      vm_, engine_->create_vm(
               {.max_vcpus = config_.cpus.max, .topology = config_.cpus.topology, .pmu = config_.cpus.pmu}));
  if (vm_->prefers_large_pages()) {
    ram_->block().use_large_pages();
  }
  WISP_TRY(show_memory());
  for (std::uint32_t id = 0; id < config_.cpus.count; ++id) {
    WISP_ASSIGN(auto vcpu, vm_->create_vcpu(id));
    new_vcpus_.push_back(std::move(vcpu));
  }
  return {};
}

Result<void> Machine::show_memory() {
  WISP_TRY(memory_space_.add_listener(&vm_->memory_listener()));
  if (auto added = port_space_.add_listener(&vm_->port_listener()); !added) {
    memory_space_.remove_listener(&vm_->memory_listener());
    return added;
  }
  listening_ = true;
  return {};
}

void Machine::hide_memory() {
  if (std::exchange(listening_, false)) {
    memory_space_.remove_listener(&vm_->memory_listener());
    port_space_.remove_listener(&vm_->port_listener());
  }
}

Result<void> Machine::build() {
  auto ram = GuestRam::create(config_.memory, memory_space_);
  if (!ram) {
    return with_context("-m", ram.error());
  }
  ram_ = *std::move(ram);
  WISP_TRY(build_engine());
  WISP_TRY(start_vcpus());
  ram_->set_write_hook(vm_->host_write_hook());
  WISP_TRY(build_backends());
  WISP_TRY(build_platform());
  WISP_TRY(build_devices());
  WISP_ASSIGN(power_up_platform_, vm_->save_platform());
  WISP_TRY(load_boot());
  for (const auto& vcpu : vcpus_) {
    WISP_TRY(vcpu->wait_started());
  }
  ram_->block().keep_file();
  return {};
}

Result<void> Machine::build_backends() {
  const auto worker_started = [filtered = services_.seccomp] {
    return filtered ? install_seccomp(ThreadKind::kWorker) : Result<void>{};
  };
  // Later, since the terminal's own function is on the stack.
  const auto on_quit = [this] {
    services_.loop.post([this, alive = alive_] {
      if (*alive) {
        quit(ShutdownReason::kHostUi);
      }
    });
  };
  backends_ =
      std::make_unique<Backends>(services_.loop, services_.log, services_.clock, worker_started, on_quit);
  for (const BackendConfig& chardev : config_.chardevs) {
    const bool path_only = std::ranges::any_of(config_.devices, [&chardev](const DeviceConfig& device) {
      return DeviceFactory::is_vhost_user(device) && device.properties.find_string("chardev") == chardev.id;
    });
    WISP_TRY(path_only ? backends_->add_chardev_path(chardev) : backends_->add_chardev(chardev));
  }
  for (const BackendConfig& object : config_.objects) {
    WISP_TRY(backends_->add_object(object));
  }
  for (const BackendConfig& drive : config_.drives) {
    WISP_TRY(backends_->add_drive(drive));
  }
  for (const BackendConfig& netdev : config_.netdevs) {
    WISP_TRY(backends_->add_netdev(netdev));
  }
  if (config_.iothreads.size() > kMaxIothreads) {
    return fail("-object iothread: {} threads are more than {}", config_.iothreads.size(), kMaxIothreads);
  }
  for (const std::string& id : config_.iothreads) {
    WISP_ASSIGN(auto io, IoThread::start(id, [this]() -> Result<void> {
                  return services_.seccomp ? install_seccomp(ThreadKind::kIo) : Result<void>{};
                }));
    iothreads_.push_back(std::move(io));
  }
  return {};
}

Result<void> Machine::build_platform() {
  CharBackend* serial = nullptr;
  if (config_.serial) {
    WISP_ASSIGN(serial, backends_->use_chardev(*config_.serial, kSerialUser));
  }
  WISP_ASSIGN(
      platform_,
      Platform::create({.vm = *vm_,
                        .ports = port_space_,
                        .loop = services_.loop,
                        .log = services_.log,
                        .clock = vm_->guest_clock() != nullptr ? *vm_->guest_clock() : services_.clock,
                        .process_start_ns = services_.process_start_ns,
                        .serial = serial,
                        .test_memory = DeviceFactory::has_testdev(config_.devices) ? &memory_space_ : nullptr,
                        .facts = {.cpus = static_cast<std::uint16_t>(config_.cpus.count),
                                  .max_cpus = static_cast<std::uint16_t>(config_.cpus.max),
                                  .ram_size = ram_->size()}},
                       {.shutdown = [this] { request(shutdown_under_way_, &Machine::guest_shutdown); },
                        .reset = [this] { request(reset_under_way_, &Machine::guest_reset); },
                        .debug_exit =
                            [this](std::uint32_t status) {
                              debug_exit_status_ = status;
                              request(debug_exit_under_way_, &Machine::debug_exit);
                            }},
                       DeviceFactory::debug_exit_options(config_.devices)));
  return {};
}

Result<void> Machine::build_devices() {
  slots_ = std::make_unique<VirtioSlots>(*vm_, memory_space_, services_.log, services_.clock, config_.acpi);
  factory_ = std::make_unique<DeviceFactory>(DeviceFactory::Parts{
      .backends = *backends_,
      .ram = *ram_,
      .log = services_.log,
      .clock = services_.clock,
      .entropy = services_.entropy,
      .loop_for = [this](const DeviceConfig& device) { return loop_for(device); },
      .balloon_changed =
          [this](std::uint64_t actual) {
            // Told from a device's callback, under its lock: listeners may ask the device something.
            services_.loop.post([this, actual, alive = alive_] {
              if (*alive) {
                tell(&MachineEvents::on_balloon_change, actual);
              }
            });
          },
  });
  for (const DeviceConfig& device : config_.devices) {
    if (DeviceFactory::is_virtio(device)) {
      WISP_TRY(attach_device(device, false));
    }
  }
  platform_->slot_hotplug().set_initial(slots_->present());
  return {};
}

Result<EventLoop*> Machine::loop_for(const DeviceConfig& device) {
  const auto wanted = device.properties.find_string("iothread");
  if (!wanted) {
    return &services_.loop;
  }
  for (const auto& io : iothreads_) {
    if (io->id() == *wanted) {
      return &io->loop();
    }
  }
  return fail("iothread={}: there is no -object iothread with this id", *wanted);
}

Result<void> Machine::attach_device(const DeviceConfig& device, bool hotplug) {
  auto made = factory_->create(device, config_.devices);
  if (made) {
    if (auto slot = slots_->attach(device.id, *made, wanted_slot(device)); slot) {
      if (hotplug) {
        platform_->slot_hotplug().set_present(slots_->present());
      }
      return {};
    } else {
      EventLoop& loop = (*made)->strand().loop();
      destroy_beside(loop, *std::move(made));
      made = std::unexpected(std::move(slot).error());
    }
  }
  factory_->forget(device.id);
  backends_->release(device.id);
  return with_context(fmt::format("-device {},id={}", device.driver, device.id), made.error());
}

// They get ready beside what else is to be built.
Result<void> Machine::start_vcpus() {
  for (auto& vcpu : new_vcpus_) {
    vcpus_.push_back(std::make_unique<VcpuThread>(std::move(vcpu), memory_space_, port_space_,
                                                  static_cast<VcpuEvents&>(*this)));
    WISP_TRY(vcpus_.back()->start());
  }
  new_vcpus_.clear();
  return {};
}

BootDescription Machine::describe_boot() const {
  BootDescription boot{.kernel = config_.boot.kernel,
                       .initrd = config_.boot.initrd,
                       .command_line = config_.boot.cmdline,
                       .elf_entry = ElfEntry::kAuto,
                       .cpus = config_.cpus.count,
                       .topology = config_.cpus.topology,
                       .command_line_devices = {},
                       .acpi = std::nullopt,
                       .gigabyte_pages = false};
  std::vector<VirtioMmioSlot> filled;
  std::vector<VirtioMmioSlot> free;
  for (std::uint32_t i = 0; i < VirtioSlots::kCount; ++i) {
    ((slots_->present() >> i & 1) != 0 ? filled : free).push_back(virtio_slot(i, config_.acpi));
  }
  if (config_.boot.auto_cmdline) {
    boot.command_line_devices = filled;
  }
  if (config_.acpi) {
    boot.acpi = AcpiDescription{
        .cpus = config_.cpus.count,
        .max_cpus = config_.cpus.max,
        .topology = config_.cpus.topology,
        .power = Platform::acpi_power(),
        .devices = std::move(filled),
        .slot_hotplug =
            AcpiSlotHotplug{.registers = Platform::acpi_slot_hotplug(), .free_slots = std::move(free)},
    };
  }
  return boot;
}

Result<void> Machine::load_boot() {
  std::vector<RamPlacement> placements;
  for (const GuestMemoryBlock& block : ram_->memory().blocks()) {
    placements.push_back(
        {.gpa = block.gpa, .block_offset = block.fd_offset, .size = block.size, .block = &ram_->block()});
  }
  WISP_ASSIGN(const BootState boot, prepare_boot(describe_boot(), ram_->memory(), placements));
  // All of it was given back to the host before, or is mapped anew.
  for (const GuestMemoryBlock& block : ram_->memory().blocks()) {
    ram_->memory().mark_dirty(block.gpa, block.size);
  }
  // Once: a guest may restart as often as it likes.
  if (boot.devices_not_named > 0 && !std::exchange(told_of_unnamed_devices_, true)) {
    services_.log.warning(
        "{} devices do not fit on the kernel's command line: only kernels with ACPI find them",
        boot.devices_not_named);
  }
  Vcpu& boot_cpu = vcpus_.front()->vcpu();
  // What the boot protocol does not speak of stays as after power-up.
  WISP_ASSIGN(const CpuSpecialRegs power_up, boot_cpu.special_regs());
  CpuSpecialRegs sregs = boot.cpu.sregs;
  sregs.apic_base = power_up.apic_base;
  WISP_TRY(boot_cpu.set_special_regs(sregs));
  return boot_cpu.set_regs(boot.cpu.regs);
}

Result<void> Machine::start() {
  if (services_.seccomp) {
    backends_->hold_to_filter();
  }
  if (config_.start_paused) {
    state_ = RunState::kPaused;
    pause_devices();
    return {};
  }
  state_ = RunState::kRunning;
  resume_vcpus();
  return {};
}

void Machine::park_vcpus() {
  for (const auto& vcpu : vcpus_) {
    vcpu->request_park();
  }
  for (const auto& vcpu : vcpus_) {
    vcpu->wait_parked();
  }
}

void Machine::resume_vcpus() {
  for (const auto& vcpu : vcpus_) {
    vcpu->resume();
  }
  if (!std::exchange(guest_started_, true)) {
    vm_->guest_started();
  }
}

void Machine::pause_devices() {
  for (const auto& slot : slots_->occupied()) {
    slot.transport->pause();
  }
}

void Machine::resume_devices() {
  for (const auto& slot : slots_->occupied()) {
    slot.transport->resume();
  }
}

void Machine::add_events(MachineEvents* events) {
  events_.push_back(events);
}
void Machine::remove_events(MachineEvents* events) {
  std::erase(events_, events);
}

Result<void> Machine::check_started() const {
  switch (state_) {
    case RunState::kRunning:
    case RunState::kPaused:
      return {};
    case RunState::kCreated:
      return fail("the machine has not started yet");
    default:
      return fail("the machine has shut down");
  }
}

Result<void> Machine::pause() {
  if (state_ == RunState::kCreated) {
    config_.start_paused = true;
    return {};
  }
  WISP_TRY(check_started());
  if (state_ == RunState::kPaused) {
    return {};
  }
  park_vcpus();
  pause_devices();
  state_ = RunState::kPaused;
  tell(&MachineEvents::on_stop);
  return {};
}

Result<void> Machine::resume() {
  if (state_ == RunState::kCreated) {
    config_.start_paused = false;
    return {};
  }
  WISP_TRY(check_started());
  if (state_ == RunState::kRunning) {
    return {};
  }
  state_ = RunState::kRunning;
  resume_devices();
  resume_vcpus();
  tell(&MachineEvents::on_resume);
  return {};
}

Result<void> Machine::powerdown() {
  WISP_TRY(check_started());
  if (!config_.acpi) {
    return fail("the machine has no power button: it runs with acpi=off; use quit");
  }
  platform_->power().press_power_button();
  tell(&MachineEvents::on_powerdown);
  return {};
}

Result<void> Machine::reset_parts() {
  shutdown_under_way_ = false;
  reset_under_way_ = false;
  debug_exit_under_way_ = false;
  fallen_vcpu_ = -1;
  slots_->reset();
  platform_->reset();
  WISP_TRY(vm_->load_platform(power_up_platform_));
  for (const auto& vcpu : vcpus_) {
    WISP_TRY(vcpu->vcpu().reset());
  }
  WISP_TRY(ram_->clear());
  return load_boot();
}

Result<void> Machine::reset() {
  return reset_machine(false);
}

Result<void> Machine::reset_machine(bool by_guest) {
  WISP_TRY(check_started());
  park_vcpus();
  if (auto done = reset_parts(); !done) {
    services_.log.error("the machine cannot be reset: {}", done.error().message);
    quit(ShutdownReason::kError);
    return done;
  }
  tell(&MachineEvents::on_reset, by_guest);
  if (state_ == RunState::kRunning) {
    resume_vcpus();
  }
  return {};
}

void Machine::quit(ShutdownReason reason) {
  if (state_ == RunState::kShutdown) {
    return;
  }
  park_vcpus();
  state_ = RunState::kShutdown;
  switch (reason) {
    case ShutdownReason::kError:
      exit_status_ = 1;
      break;
    case ShutdownReason::kDebugExit:
      exit_status_ = static_cast<int>(debug_exit_status_ & 0xff);
      break;
    default:
      exit_status_ = 0;
      break;
  }
  const bool by_guest = reason == ShutdownReason::kGuestShutdown || reason == ShutdownReason::kGuestReset ||
                        reason == ShutdownReason::kDebugExit;
  tell(&MachineEvents::on_shutdown, by_guest, reason);
  services_.loop.stop();
}

void Machine::request(std::atomic<bool>& under_way, void (Machine::*action)()) {
  if (under_way.exchange(true)) {
    return;
  }
  services_.loop.post([this, &under_way, action, alive = alive_] {
    if (*alive && under_way.exchange(false)) {
      (this->*action)();
    }
  });
}

// What a guest asked for just before it was paused is done all the same: it does not ask twice.
void Machine::guest_shutdown() {
  if (state_ != RunState::kRunning && state_ != RunState::kPaused) {
    return;
  }
  if (!config_.no_shutdown) {
    quit(ShutdownReason::kGuestShutdown);
    return;
  }
  park_vcpus();
  shutdown_under_way_ = false;  // asked for again while the first was on its way
  pause_devices();
  const bool was_running = std::exchange(state_, RunState::kPaused) == RunState::kRunning;
  tell(&MachineEvents::on_shutdown, true, ShutdownReason::kGuestShutdown);
  if (was_running) {
    tell(&MachineEvents::on_stop);
  }
}

void Machine::guest_reset() {
  if (state_ != RunState::kRunning && state_ != RunState::kPaused) {
    return;
  }
  if (fallen_vcpu_ >= 0) {
    park_vcpus();  // its registers are about to be read
    tell_of_triple_fault();
  }
  if (config_.no_reboot) {
    quit(ShutdownReason::kGuestReset);
    return;
  }
  (void)reset_machine(true);  // an error ended the machine
}

void Machine::debug_exit() {
  quit(ShutdownReason::kDebugExit);
}

Result<void> Machine::vcpu_thread_started(std::uint32_t /*id*/) {
  return services_.seccomp ? install_seccomp(ThreadKind::kVcpu) : Result<void>{};
}

// Once: a guest may fall over as often as it likes.
void Machine::tell_of_triple_fault() {
  const std::int64_t id = fallen_vcpu_.exchange(-1);
  if (id < 0 || std::cmp_greater_equal(id, vcpus_.size()) || std::exchange(told_of_triple_fault_, true)) {
    return;
  }
  Vcpu& vcpu = vcpus_[static_cast<std::size_t>(id)]->vcpu();
  const auto regs = vcpu.regs();
  const auto sregs = vcpu.special_regs();
  if (regs && sregs) {
    services_.log.warning("vCPU {}: triple fault, rip {:#x}, rsp {:#x}, CR2 {:#x}, CR3 {:#x} (told once)", id,
                          regs->rip, regs->rsp, sregs->cr2, sregs->cr3);
  }
}

void Machine::vcpu_reset_request(std::uint32_t id, bool fell_over) {
  if (fell_over) {
    fallen_vcpu_ = id;
  }
  request(reset_under_way_, &Machine::guest_reset);
}

void Machine::vcpu_failed(std::uint32_t id, const std::string& message) {
  services_.loop.post([this, id, message, alive = alive_] {
    if (*alive && state_ != RunState::kShutdown) {
      services_.log.error("vCPU {} cannot go on: {}", id, message);
      quit(ShutdownReason::kError);
    }
  });
}

}  // namespace wisp
