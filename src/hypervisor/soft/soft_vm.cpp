#include "hypervisor/soft/soft_vm.h"

#include <fmt/format.h>
#include <pthread.h>

#include <future>
#include <system_error>
#include <thread>

#include "hypervisor/soft/shared_code.h"
#include "hypervisor/soft/soft_irq.h"
#include "hypervisor/topology.h"

namespace wisp::soft {
namespace {

// What the caller of create_vcpu() holds.
class VcpuHandle final : public Vcpu {
 public:
  explicit VcpuHandle(SoftVcpu& vcpu) : vcpu_(vcpu) {}
  [[nodiscard]] std::uint32_t id() const override { return vcpu_.id(); }
  [[nodiscard]] Exit run() override { return vcpu_.run(); }
  void kick() override { vcpu_.kick(); }
  [[nodiscard]] Result<CpuState> save() override { return vcpu_.save(); }
  [[nodiscard]] Result<void> load(const CpuState& state) override { return vcpu_.load(state); }
  [[nodiscard]] Result<CpuRegs> regs() override { return vcpu_.regs(); }
  [[nodiscard]] Result<void> set_regs(const CpuRegs& regs) override { return vcpu_.set_regs(regs); }
  [[nodiscard]] Result<CpuSpecialRegs> special_regs() override { return vcpu_.special_regs(); }
  [[nodiscard]] Result<void> set_special_regs(const CpuSpecialRegs& sregs) override {
    return vcpu_.set_special_regs(sregs);
  }
  [[nodiscard]] Result<void> reset() override { return vcpu_.reset(); }

 private:
  SoftVcpu& vcpu_;
};

}  // namespace

Result<std::unique_ptr<ServiceThread>> ServiceThread::start(const std::function<Result<void>()>& started) {
  WISP_ASSIGN(auto loop, EventLoop::create());
  std::unique_ptr<ServiceThread> service(new ServiceThread(std::move(loop)));
  std::promise<Result<void>> ready;
  try {
    service->thread_ = std::thread([&ready, &started, loop = service->loop_.get()] {
      ::pthread_setname_np(::pthread_self(), "engine");
      Result<void> result = started ? started() : Result<void>{};
      const bool good = result.has_value();
      ready.set_value(std::move(result));
      if (good) {
        loop->run();
      }
    });
  } catch (const std::system_error& error) {
    return fail("cannot start the engine's thread: {}", error.code().message());
  }
  WISP_TRY(ready.get_future().get());
  return service;
}

void ServiceThread::stop() {
  if (thread_.joinable()) {
    loop_->stop();
    thread_.join();
  }
}

SoftVm::SoftVm(const SoftOptions& soft, const VmOptions& options)
    : options_(options),
      host_clock_(soft.execution.virtual_clock ? nullptr : std::make_unique<const HostClock>()),
      virtual_clock_(soft.execution.virtual_clock ? std::make_unique<VirtualClock>() : nullptr),
      clock_(virtual_clock_ ? static_cast<const SoftClock&>(*virtual_clock_) : *host_clock_),
      tsc_offset_(-clock_.tsc()),
      note_(soft.note),
      notes_(note_) {}

SoftVm::~SoftVm() {
  // Past `notes_`, which a guest can fill.
  if (note_ && virtual_clock_ && vcpus_.size() == 1) {
    const std::uint64_t retired = vcpus_.front()->retired();
    note_(fmt::format("virtual clock: {} instructions, {:.6f} s", retired,
                      static_cast<double>(vcpus_.front()->virtual_ns()) / 1e9));
  }
  if (note_ && code_ && code_->options().statistics) {
    for (const auto& vcpu : vcpus_) {
      note_(fmt::format("vCPU {}: {}", vcpu->id(), vcpu->describe_work()));
    }
  }
  if (service_) {
    service_->stop();
  }
}

Result<std::unique_ptr<SoftVm>> SoftVm::create(const SoftOptions& soft, const VmOptions& options) {
  WISP_TRY(check_topology(options, SoftHypervisor::kMaxVcpus, SoftHypervisor::kMaxVcpus, "the software CPU"));
  if (soft.execution.virtual_clock && options.max_vcpus != 1) {
    return fail("-accel soft,clock=virtual counts the instructions of one vCPU, and there are {}; use -smp 1",
                options.max_vcpus);
  }
  std::unique_ptr<SoftVm> vm(new SoftVm(soft, options));
  WISP_TRY(vm->set_up(soft));
  return vm;
}

Result<void> SoftVm::set_up(const SoftOptions& soft) {
  WISP_ASSIGN(service_, ServiceThread::start(soft.thread_started));
  WISP_ASSIGN(chipset_,
              Chipset::create(clock_, options_.pit, virtual_clock_ ? nullptr : &service_->loop(), [this] {
                for (const auto& vcpu : vcpus_) {
                  vcpu->pic_changed();
                }
              }));
  memory_.set_change_hook([this] { requests_.shoot_down(kFlushMemory, nullptr); });
  ExecutionOptions execution = soft.execution;
  execution.native_tsc = host_clock_ && host_clock_->native_tsc();
  WISP_ASSIGN(
      code_,
      make_shared_code(
          memory_,
          {.flush_inline = [this](Cpu* self) { requests_.shoot_down(kFlushInline, self); },
           .revoke_writes = [this](Cpu* self) { requests_.shoot_down(kRevokeWrites, self); },
           .wait_a_turn = [this](Cpu* self, std::uint32_t& turns) { requests_.wait_a_turn(self, turns); }},
          execution));
  if (!execution.state_log.empty()) {
    WISP_ASSIGN(state_log_,
                StateLog::create(execution.state_log, execution.state_log_every, execution.state_log_from));
  }
  vcpus_.reserve(options_.max_vcpus);
  return {};
}

Result<std::unique_ptr<Vcpu>> SoftVm::create_vcpu(std::uint32_t id) {
  if (id >= options_.max_vcpus) {
    return fail("vCPU {} is beyond the {} that this VM was made for", id, options_.max_vcpus);
  }
  if (id != vcpus_.size()) {
    return fail("vCPU {} cannot be made now: {} is next", id, vcpus_.size());
  }
  WISP_ASSIGN(
      auto vcpu,
      SoftVcpu::create(
          {.clock = clock_,
           .virtual_clock = virtual_clock_.get(),
           .chipset = *chipset_,
           .memory = memory_,
           .requests = requests_,
           .loop = service_->loop(),
           .notes = notes_,
           .tsc_step = tsc_step_,
           .code = code_,
           .state_log = state_log_.get(),
           .seed = code_->options().seed,
           .halt_poll = std::thread::hardware_concurrency() > options_.max_vcpus,
           .pause_every = virtual_clock_ ? code_->options().pause_every : 0,
           .tsc_offset = tsc_offset_},
          {.index = id, .apic_id = apic_id_of(options_.topology, id), .topology = options_.topology}));
  vcpus_.push_back(std::move(vcpu));
  return std::make_unique<VcpuHandle>(*vcpus_.back());
}

Result<std::unique_ptr<IrqLine>> SoftVm::irq_line(std::uint32_t gsi) {
  if (gsi >= kIoApicPins) {
    return fail("interrupt {} is beyond the {} pins of the I/O APIC", gsi, kIoApicPins);
  }
  return std::make_unique<PinLine>(service_->loop(), *chipset_, gsi);
}

Result<std::unique_ptr<IrqLine>> SoftVm::msi_line(const MsiMessage& message) {
  return std::make_unique<MessageLine>(service_->loop(), *chipset_, message);
}

Result<void> SoftVm::set_dirty_log(bool on) {
  memory_.set_dirty_log(on);
  return {};
}

Result<std::vector<std::uint64_t>> SoftVm::take_dirty_log(Gpa gpa) {
  if (!memory_.dirty_log()) {
    return fail("the dirty log is off");
  }
  if (!listener_.is_ram(gpa)) {
    return fail("no RAM starts at guest address {:#x}", gpa);
  }
  return memory_.take_dirty_log(gpa);
}

Result<std::vector<std::uint8_t>> SoftVm::save_platform() {
  return chipset_->save();
}

Result<void> SoftVm::load_platform(std::span<const std::uint8_t> record) {
  return chipset_->load(record);
}

}  // namespace wisp::soft
