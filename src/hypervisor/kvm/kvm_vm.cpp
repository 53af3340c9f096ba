#include "hypervisor/kvm/kvm_vm.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <system_error>

#include "base/state.h"
#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_hypervisor.h"
#include "hypervisor/kvm/kvm_ioctl.h"
#include "hypervisor/kvm/kvm_vcpu.h"
#include "hypervisor/topology.h"

namespace wisp::kvm {
namespace {

constexpr std::uint32_t kPlatformVersion = 1;

constexpr std::array<std::uint32_t, 3> kChips{KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
                                              KVM_IRQCHIP_IOAPIC};

// KVM's structures go into the record as they are: they are part of the kernel's ABI and never change size.
template <typename T>
void put_struct(StateWriter& writer, const T& value) {
  writer.put_bytes(
      std::span(static_cast<const std::uint8_t*>(static_cast<const void*>(&value)), sizeof value));
}

template <typename T>
Result<T> get_struct(StateReader& reader) {
  WISP_ASSIGN(const auto bytes, reader.get_bytes(sizeof(T)));
  if (bytes.size() != sizeof(T)) {
    return fail("saved platform state has a part of {} bytes where {} are due", bytes.size(), sizeof(T));
  }
  T value{};
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

// Optional refinements; a KVM without one goes without.
bool enable(int fd, std::uint32_t capability, std::uint64_t argument) {
  kvm_enable_cap request{};
  request.cap = capability;
  request.args[0] = argument;
  return call(fd, KVM_ENABLE_CAP, &request) == 0;
}

}  // namespace

KvmVm::KvmVm(std::shared_ptr<const System> system, UniqueFd fd, const VmOptions& options)
    : system_(std::move(system)),
      fd_(std::move(fd)),
      options_(options),
      memory_(fd_.get(), system_->capabilities().memory_slots),
      ports_(fd_.get()),
      routes_(fd_.get(), system_->capabilities().irq_routes) {}

Result<std::unique_ptr<KvmVm>> KvmVm::create(std::shared_ptr<const System> system, const VmOptions& options) {
  const Capabilities& capabilities = system->capabilities();
  WISP_TRY(check_topology(options, std::min(capabilities.max_vcpus, kMaxVcpus),
                          std::min(capabilities.max_vcpu_ids, kMaxVcpus), "KVM on this host"));
  UniqueFd fd(call(system->fd(), KVM_CREATE_VM, 0UL));
  if (!fd.valid()) {
    if (errno == EBUSY) {
      return fail("KVM cannot make a VM: another hypervisor uses the processor's virtualization; stop it");
    }
    return fail_errno(errno, "KVM cannot make a VM");
  }
  std::unique_ptr<KvmVm> vm(new KvmVm(std::move(system), std::move(fd), options));
  WISP_TRY(vm->set_up());
  return vm;
}

KvmVm::~KvmVm() {
  if (pit_setter_.joinable()) {
    pit_setter_.join();
  }
}

// Ticks that the guest missed are lost, not sent in a burst: kernels have had better clocks for long, and
// counting acknowledgements keeps KVM from using the processor's interrupt acceleration. The call waits for
// two grace periods of the kernel's SRCU, 5-20 ms: too long for the way to the first instruction.
void KvmVm::guest_started() {
  if (!options_.pit || pit_setter_.joinable()) {
    return;
  }
  const auto set = [fd = fd_.get()] {
    kvm_reinject_control reinject{};
    (void)call(fd, KVM_REINJECT_CONTROL, &reinject);
  };
  try {
    pit_setter_ = std::thread(set);
  } catch (const std::system_error&) {
    set();
  }
}

Result<void> KvmVm::set_up() {
  const Capabilities& capabilities = system_->capabilities();
  // Where VMX keeps what it needs to run real mode on processors without unrestricted guests.
  std::uint64_t identity_map = kReservedStart;
  WISP_KVM_TRY(fd_.get(), KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
  WISP_KVM_TRY(fd_.get(), KVM_SET_TSS_ADDR, static_cast<unsigned long>(identity_map + kPageSize));
  context_.exception_payload =
      capabilities.exception_payload && enable(fd_.get(), KVM_CAP_EXCEPTION_PAYLOAD, 1);
  context_.triple_fault_event =
      capabilities.triple_fault_event && enable(fd_.get(), KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1);
  if (!options_.pmu && capabilities.pmu_control) {
    (void)enable(fd_.get(), KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE);
  }
  context_.host_immunities = system_->arch_capabilities();
  context_.xsave2 = capabilities.xsave2;
  // On a VM it gives the size for what this process may show its guests.
  const int xsave_size = call(fd_.get(), KVM_CHECK_EXTENSION, static_cast<unsigned long>(KVM_CAP_XSAVE2));
  context_.xsave_size = static_cast<std::size_t>(std::max(xsave_size, static_cast<int>(sizeof(kvm_xsave))));
  return {};
}

// As late as can be: it leaves a grace period of the kernel's SRCU under way (Linux 6.17 and later), which
// memory that is shown afterwards has to wait for, 6 ms.
Result<void> KvmVm::make_platform() {
  if (platform_made_) {
    return {};
  }
  WISP_KVM_TRY(fd_.get(), KVM_CREATE_IRQCHIP, 0UL);
  if (options_.pit) {
    kvm_pit_config pit{};
    pit.flags = KVM_PIT_SPEAKER_DUMMY;
    WISP_KVM_TRY(fd_.get(), KVM_CREATE_PIT2, &pit);
  }
  platform_made_ = true;
  return {};
}

Result<std::unique_ptr<Vcpu>> KvmVm::create_vcpu(std::uint32_t id) {
  if (id >= options_.max_vcpus) {
    return fail("vCPU {} is beyond the {} that this VM was made for", id, options_.max_vcpus);
  }
  WISP_TRY(make_platform());
  return KvmVcpu::create(system_, fd_.get(),
                         {.index = id,
                          .apic_id = apic_id_of(options_.topology, id),
                          .boot = id == 0,
                          .pmu = options_.pmu,
                          .topology = options_.topology,
                          .context = context_,
                          .tsc_start = &tsc_start_});
}

Result<std::unique_ptr<IrqLine>> KvmVm::irq_line(std::uint32_t gsi) {
  if (gsi >= kIoApicPins) {
    return fail("interrupt {} is beyond the {} pins of the I/O APIC", gsi, kIoApicPins);
  }
  WISP_TRY(make_platform());
  return Irqfd::create(fd_.get(), gsi, nullptr);
}

Result<std::unique_ptr<IrqLine>> KvmVm::msi_line(const MsiMessage& message) {
  WISP_TRY(make_platform());
  WISP_ASSIGN(const std::uint32_t gsi, routes_.add(message));
  auto line = Irqfd::create(fd_.get(), gsi, &routes_);
  if (!line) {
    routes_.remove(gsi);
  }
  return line;
}

Result<std::vector<std::uint8_t>> KvmVm::save_platform() {
  WISP_TRY(make_platform());
  StateWriter writer;
  writer.put(kPlatformVersion);
  for (const std::uint32_t chip : kChips) {
    kvm_irqchip state{};
    state.chip_id = chip;
    WISP_KVM_TRY(fd_.get(), KVM_GET_IRQCHIP, &state);
    put_struct(writer, state);
  }
  writer.put(options_.pit);
  if (options_.pit) {
    kvm_pit_state2 pit{};
    WISP_KVM_TRY(fd_.get(), KVM_GET_PIT2, &pit);
    put_struct(writer, pit);
  }
  kvm_clock_data clock{};
  WISP_KVM_TRY(fd_.get(), KVM_GET_CLOCK, &clock);
  writer.put(static_cast<std::uint64_t>(clock.clock));
  return writer.take();
}

Result<void> KvmVm::load_platform(std::span<const std::uint8_t> record) {
  StateReader reader(record);
  WISP_ASSIGN(const auto version, reader.get<std::uint32_t>());
  if (version != kPlatformVersion) {
    return fail("saved platform state has version {}; this engine reads version {}", version,
                kPlatformVersion);
  }
  std::vector<kvm_irqchip> chips;
  for (const std::uint32_t chip : kChips) {
    WISP_ASSIGN(chips.emplace_back(), get_struct<kvm_irqchip>(reader));
    if (chips.back().chip_id != chip) {
      return fail("saved platform state has interrupt controller {} in place of {}", chips.back().chip_id,
                  chip);
    }
  }
  WISP_ASSIGN(const bool pit_saved, reader.get<bool>());
  if (pit_saved != options_.pit) {
    return fail("saved platform state {} a PIT, this VM {}", pit_saved ? "has" : "lacks",
                options_.pit ? "has one" : "lacks it");
  }
  kvm_pit_state2 pit{};
  if (pit_saved) {
    WISP_ASSIGN(pit, get_struct<kvm_pit_state2>(reader));
  }
  kvm_clock_data clock{};
  WISP_ASSIGN(clock.clock, reader.get<std::uint64_t>());
  if (!reader.empty()) {
    return fail("saved platform state has bytes behind its end");
  }
  WISP_TRY(make_platform());
  // The clock is first: the other parts may set off interrupts.
  WISP_KVM_TRY(fd_.get(), KVM_SET_CLOCK, &clock);
  if (pit_saved) {
    WISP_KVM_TRY(fd_.get(), KVM_SET_PIT2, &pit);
  }
  for (kvm_irqchip& chip : chips) {
    WISP_KVM_TRY(fd_.get(), KVM_SET_IRQCHIP, &chip);
  }
  return {};
}

}  // namespace wisp::kvm
