#include "hypervisor/kvm/kvm_vcpu.h"

#include <sys/mman.h>

#include <algorithm>

#include "base/bytes.h"
#include "hypervisor/cpuid_fit.h"
#include "hypervisor/kvm/kvm_cpuid.h"
#include "hypervisor/kvm/kvm_ioctl.h"
#include "hypervisor/kvm/kvm_msrs.h"
#include "hypervisor/power_up.h"

namespace wisp::kvm {
namespace {

// Leaf 1 EBX holds the initial APIC id in its high byte.
Result<std::uint32_t> apic_id_in(std::span<const CpuidEntry> cpuid) {
  const auto leaf = std::ranges::find(cpuid, 1U, &CpuidEntry::leaf);
  if (leaf == cpuid.end()) {
    return fail("saved CPU state has a CPUID without leaf 1");
  }
  return leaf->ebx >> 24;
}

}  // namespace

Result<RunPage> RunPage::map(int vcpu_fd, std::size_t size) {
  void* address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
  if (address == MAP_FAILED) {
    return fail_errno(errno, "cannot map the {} bytes shared with KVM for a vCPU", size);
  }
  return RunPage(static_cast<kvm_run*>(address), size);
}

RunPage::~RunPage() {
  if (run_ != nullptr) {
    ::munmap(run_, size_);
  }
}

KvmVcpu::KvmVcpu(std::shared_ptr<const System> system, UniqueFd fd, RunPage run, const VcpuConfig& config)
    : system_(std::move(system)),
      fd_(std::move(fd)),
      run_(std::move(run)),
      config_(config),
      kicker_(&run_.get()->immediate_exit) {}

Result<std::unique_ptr<KvmVcpu>> KvmVcpu::create(std::shared_ptr<const System> system, int vm_fd,
                                                 const VcpuConfig& config) {
  UniqueFd fd(call(vm_fd, KVM_CREATE_VCPU, config.apic_id));
  if (!fd.valid()) {
    return fail_errno(errno, "KVM cannot make vCPU {} (APIC id {})", config.index, config.apic_id);
  }
  WISP_ASSIGN(RunPage run, RunPage::map(fd.get(), system->run_size()));
  std::unique_ptr<KvmVcpu> vcpu(new KvmVcpu(std::move(system), std::move(fd), std::move(run), config));
  if (auto done = vcpu->set_up(); !done) {
    return with_context(fmt::format("vCPU {}", config.index), done.error());
  }
  return vcpu;
}

// The guest learns of the host's immunities. Some KVMs know them and let no guest have them (on AMD's
// processors): the guest must not be told to look there then.
Result<void> KvmVcpu::set_up_immunities() {
  const CpuMsr immunities{.index = msr::kArchCapabilities, .value = system_->arch_capabilities()};
  if (immunities.value == 0 || write_msrs(fd_.get(), std::span(&immunities, 1))) {
    return {};
  }
  constexpr std::uint32_t kHasArchCapabilities = 1U << 29;  // CPUID 7.0 EDX
  for (CpuidEntry& entry : cpuid_) {
    if (entry.leaf == 7 && entry.subleaf == 0) {
      entry.edx &= ~kHasArchCapabilities;
    }
  }
  return write_cpuid(fd_.get(), cpuid_);
}

Result<void> KvmVcpu::set_up() {
  const int khz = call(fd_.get(), KVM_GET_TSC_KHZ);
  cpuid_ = guest_cpuid(system_->supported_cpuid(), {.topology = config_.topology,
                                                    .index = config_.index,
                                                    .tsc_khz = khz > 0 ? static_cast<std::uint32_t>(khz) : 0,
                                                    .tsc_deadline = system_->capabilities().tsc_deadline,
                                                    .pmu = config_.pmu});
  WISP_TRY(write_cpuid(fd_.get(), cpuid_));
  WISP_TRY(set_up_immunities());

  msrs_ = system_->state_msrs();
  WISP_ASSIGN(power_up_msrs_, read_msrs(fd_.get(), msrs_));
  std::vector<CpuMsr> changed;
  for (CpuMsr& entry : power_up_msrs_) {
    const std::uint64_t before = entry.value;
    switch (entry.index) {
      case msr::kMiscEnable:
        entry.value |= 1;  // fast string operations, which firmware switches on
        break;
      case msr::kMtrrDefType:
        entry.value = 0x806;  // MTRRs on, write-back where no range says else: no firmware sets it
        break;
      default:
        break;
    }
    if (entry.value != before) {
      changed.push_back(entry);
    }
  }
  // A reset leaves the counters of all vCPUs running, and so in step.
  std::erase_if(power_up_msrs_, [](const CpuMsr& entry) { return entry.index == msr::kTsc; });
  WISP_TRY(write_msrs(fd_.get(), changed));
  if (config_.boot) {
    kvm_lapic_state lapic{};
    WISP_KVM_TRY(fd_.get(), KVM_GET_LAPIC, &lapic);
    const CpuState fresh = power_up_state(config_.apic_id, true, 0, 0);
    for (const std::size_t pin : {lapic::kLvtLint0, lapic::kLvtLint1}) {
      std::copy_n(fresh.lapic.regs.data() + pin, 4, lapic.regs + pin);
    }
    WISP_KVM_TRY(fd_.get(), KVM_SET_LAPIC, &lapic);
  }
  return {};
}

Exit KvmVcpu::run() {
  kicker_.enter();
  int result = 0;
  int error = 0;
  do {
    // EAGAIN: a vCPU that waited for INIT and SIPI was woken.
    result = ::ioctl(fd_.get(), KVM_RUN, 0);
    error = result < 0 ? errno : 0;
  } while (error == EAGAIN);
  kicker_.leave();
  access_pending_ = false;
  if (result >= 0) [[likely]] {
    if (run_.get()->exit_reason == KVM_EXIT_IO) {
      return port_exit();
    }
    if (run_.get()->exit_reason == KVM_EXIT_MMIO) {
      return mmio_exit();
    }
  }
  kicker_.forget_thread();
  if (error == EINTR) {
    kicker_.take();
    return InterruptedExit{};
  }
  if (result < 0) {
    return EngineErrorExit{fmt::format("KVM_RUN of vCPU {} failed: {}", config_.index, errno_text(error))};
  }
  return other_exit();
}

Exit KvmVcpu::port_exit() {
  const auto& io = run_.get()->io;
  const std::span<std::uint8_t> data(run_.at(io.data_offset), std::size_t{io.size} * io.count);
  access_pending_ = true;
  if (io.direction == KVM_EXIT_IO_IN) {
    return PortReadExit{.port = io.port, .count = io.count, .data = data};
  }
  return PortWriteExit{.port = io.port, .count = io.count, .data = data};
}

Exit KvmVcpu::mmio_exit() {
  auto& mmio = run_.get()->mmio;
  const std::span<std::uint8_t> data(mmio.data, std::min<std::size_t>(mmio.len, sizeof mmio.data));
  access_pending_ = true;
  if (mmio.is_write == 0) {
    return MmioReadExit{.address = mmio.phys_addr, .data = data};
  }
  return MmioWriteExit{.address = mmio.phys_addr, .data = data};
}

Exit KvmVcpu::other_exit() {
  const kvm_run& run = *run_.get();
  switch (run.exit_reason) {
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
      kicker_.take();
      return InterruptedExit{};
    case KVM_EXIT_HLT:
      return HaltExit{};
    case KVM_EXIT_SHUTDOWN:
      return ShutdownExit{};
    case KVM_EXIT_SYSTEM_EVENT:
      switch (run.system_event.type) {
        case KVM_SYSTEM_EVENT_SHUTDOWN:
          return ShutdownExit{};
        case KVM_SYSTEM_EVENT_RESET:
          return ResetExit{};
        case KVM_SYSTEM_EVENT_CRASH:
          return EngineErrorExit{fmt::format("the guest on vCPU {} reported that it crashed", config_.index)};
        default:
          return EngineErrorExit{
              fmt::format("vCPU {}: unknown system event {} from KVM", config_.index, run.system_event.type)};
      }
    case KVM_EXIT_DEBUG:
      return BreakpointExit{.rip = run.debug.arch.pc};
    case KVM_EXIT_FAIL_ENTRY:
      return EngineErrorExit{
          fmt::format("vCPU {}: the processor refused to enter the guest (reason {:#x}): its register state "
                      "is not one that "
                      "it can run",
                      config_.index, run.fail_entry.hardware_entry_failure_reason)};
    case KVM_EXIT_INTERNAL_ERROR:
      return EngineErrorExit{internal_error_text()};
    case KVM_EXIT_UNKNOWN:
      return EngineErrorExit{fmt::format("vCPU {}: KVM does not know the hardware exit reason {:#x}",
                                         config_.index, run.hw.hardware_exit_reason)};
    default:
      return EngineErrorExit{
          fmt::format("vCPU {}: unexpected exit {} from KVM", config_.index, run.exit_reason)};
  }
}

std::string KvmVcpu::internal_error_text() {
  const auto& internal = run_.get()->internal;
  std::string text = fmt::format("vCPU {}: KVM internal error", config_.index);
  switch (internal.suberror) {
    case KVM_INTERNAL_ERROR_EMULATION:
      text += ", an instruction that it cannot emulate";
      break;
    case KVM_INTERNAL_ERROR_SIMUL_EX:
      text += ", two exceptions at once";
      break;
    case KVM_INTERNAL_ERROR_DELIVERY_EV:
      text += ", an event that it could not deliver";
      break;
    case KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON:
      text += ", an unexpected exit";
      break;
    default:
      break;
  }
  text += fmt::format(" (suberror {})", internal.suberror);
  if (const auto now = read_regs(fd_.get())) {
    text += fmt::format(" at rip {:#x}", now->rip);
  }
  // The instruction's bytes, where KVM gives them.
  const auto& failure = run_.get()->emulation_failure;
  if (internal.suberror == KVM_INTERNAL_ERROR_EMULATION && failure.ndata >= 3 &&
      (failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0) {
    text += ", bytes";
    const std::size_t count = std::min<std::size_t>(failure.insn_size, sizeof failure.insn_bytes);
    for (std::size_t i = 0; i < count; ++i) {
      text += fmt::format(" {:02x}", failure.insn_bytes[i]);
    }
  } else {
    for (std::uint32_t i = 0; i < std::min<std::uint32_t>(internal.ndata, 4); ++i) {
      text += fmt::format("{} {:#x}", i == 0 ? ", data" : "", internal.data[i]);
    }
  }
  return text;
}

Result<void> KvmVcpu::check_no_access_pending() const {
  if (access_pending_) {
    return fail("vCPU {} waits for a port or MMIO access to be completed; kick it and run it once more",
                config_.index);
  }
  return {};
}

Result<CpuState> KvmVcpu::save() {
  WISP_TRY(check_no_access_pending());
  WISP_ASSIGN(CpuState state, read_state(fd_.get(), config_.context, msrs_));
  state.cpuid = cpuid_;
  return state;
}

Result<void> KvmVcpu::load(const CpuState& state) {
  WISP_TRY(check_no_access_pending());
  if (!state.cpuid.empty() && state.cpuid != cpuid_) {
    WISP_ASSIGN(const std::uint32_t apic_id, apic_id_in(state.cpuid));
    if (apic_id != config_.apic_id) {
      return fail("saved CPU state belongs to the CPU with APIC id {}, not to vCPU {} with APIC id {}",
                  apic_id, config_.index, config_.apic_id);
    }
    WISP_TRY(check_cpuid_fits(state.cpuid, cpuid_));
    if (auto written = write_cpuid(fd_.get(), state.cpuid); !written) {
      return fail("{}; the saved CPUID differs from this vCPU's and can be loaded only before it first runs",
                  written.error().message);
    }
    cpuid_ = state.cpuid;
  }
  // KVM takes a value written to the time-stamp counter within a second of what another vCPU's shows for an
  // attempt to bring the two in step, and lets the counter run on as it does; before Linux 6.8 also where
  // that is its start at 0. A guest saved in its first second would find its clock set back. So the first
  // state that a VM loads steps far away first, and the other vCPUs then come into step with it.
  const std::scoped_lock lock(config_.tsc_start->mutex);
  const auto counter = std::ranges::find(state.msrs, msr::kTsc, &CpuMsr::index);
  if (!config_.tsc_start->loaded && counter != state.msrs.end() && counter->value != 0) {
    const CpuMsr far_away{.index = msr::kTsc, .value = counter->value ^ (1ULL << 62)};
    WISP_TRY(write_msrs(fd_.get(), std::span(&far_away, 1)));
    config_.tsc_start->loaded = true;
  }
  WISP_TRY(write_state(fd_.get(), config_.context, state, msrs_));
  // Tells a guest with kvmclock that it stood still, so that its watchdogs do not bark. Without kvmclock this
  // fails, and that is all right.
  (void)call(fd_.get(), KVM_KVMCLOCK_CTRL);
  return {};
}

Result<CpuRegs> KvmVcpu::regs() {
  return read_regs(fd_.get());
}

Result<void> KvmVcpu::set_regs(const CpuRegs& regs) {
  return write_regs(fd_.get(), regs);
}

Result<CpuSpecialRegs> KvmVcpu::special_regs() {
  return read_special_regs(fd_.get());
}

Result<void> KvmVcpu::set_special_regs(const CpuSpecialRegs& sregs) {
  return write_special_regs(fd_.get(), sregs);
}

Result<void> KvmVcpu::reset() {
  WISP_TRY(check_no_access_pending());
  kvm_lapic_state lapic{};
  WISP_KVM_TRY(fd_.get(), KVM_GET_LAPIC, &lapic);
  const auto version = load_le<std::uint32_t>(lapic.regs + lapic::kVersion);
  const auto leaf = std::ranges::find(cpuid_, 1U, &CpuidEntry::leaf);
  CpuState state =
      power_up_state(config_.apic_id, config_.boot, version, leaf != cpuid_.end() ? leaf->eax : 0);
  state.msrs = power_up_msrs_;
  return write_state(fd_.get(), config_.context, state, msrs_);
}

}  // namespace wisp::kvm
