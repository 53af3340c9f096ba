// What instructions ask of the machine around the processor: CPUID, MSRs that are no plain state, the ports
// and registers of interrupt controllers and timers.
#include <sched.h>
#include <sys/random.h>

#include <cstring>

#include "base/bytes.h"
#include "base/unique_fd.h"
#include "hypervisor/soft/lapic_regs.h"
#include "hypervisor/soft/soft_cpuid.h"
#include "hypervisor/soft/soft_state.h"
#include "hypervisor/soft/soft_vcpu.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kLapicPage = 0x1000;
constexpr std::uint64_t kMicrocode = 1ULL << 32;  // the revision is in the upper half

// Results of KVM's hypercalls (Documentation/virt/kvm/x86/hypercalls.rst).
constexpr std::int64_t kNoSuchCall = -1000;
constexpr std::int64_t kNotPermitted = -1;

// Device registers of 32 bits at multiples of 16 take accesses inside their first four bytes.
bool in_register(std::uint64_t offset, std::size_t size) {
  return (offset & 0xf) + size <= 4;
}

}  // namespace

std::uint64_t SoftVcpu::read_tsc() {
  return parts_.clock.tsc();
}

CpuidEntry SoftVcpu::cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  return cpuid_answer(cpuid_, leaf, subleaf, cpu().cr4, cpu().xcr0);
}

std::optional<std::uint64_t> SoftVcpu::read_msr(std::uint32_t index) {
  const Cpu::Msrs& msrs = cpu().msr;
  switch (index) {
    case msr::kApicBase:
      return lapic_->base();
    case msr::kTscDeadline:
      return lapic_->tsc_deadline();
    case msr::kArchCapabilities:
      return kSoftArchCapabilities;
    case msr::kMicrocodeRevision:
      return kMicrocode;
    case msr::kMachineCheckCap:  // no banks
    case msr::kMachineCheckStatus:
    // Linux asks for these on every processor and does without: no line in the log for each boot.
    case msr::kSmiCount:
    case msr::kAmdDecodeConfig:
    // Debian's drivers of the energy counters look here on every processor; one that stands at 0 is left
    // alone.
    case msr::kEnergyUnits:
    case msr::kPackageEnergy:
    case msr::kMemoryEnergy:
    case msr::kCoresEnergy:
    case msr::kGraphicsEnergy:
    case msr::kPlatformEnergy:
      return 0;
    case msr::kKvmWallClock:
    case msr::kKvmWallClockOld:
      return msrs.kvm_wall_clock;
    case msr::kKvmSystemTime:
    case msr::kKvmSystemTimeOld:
      return msrs.kvm_system_time;
    default:
      break;
  }
  return index >= msr::kX2apicFirst && index <= msr::kX2apicLast ? lapic_->read_msr(index) : std::nullopt;
}

Environment::MsrWrite SoftVcpu::write_msr(std::uint32_t index, std::uint64_t value) {
  const auto judged = [](bool good) { return good ? MsrWrite::kDone : MsrWrite::kBadValue; };
  Mmu& mmu = processor_->core().mmu;
  const KvmClock::Write write = [&mmu](std::uint64_t gpa, const void* bytes, std::uint32_t size) {
    return mmu.write_physical(gpa, bytes, size);
  };
  switch (index) {
    case msr::kApicBase: {
      const bool good = lapic_->set_base(value);
      look_for_interrupt();
      return judged(good);
    }
    case msr::kTscDeadline:
      lapic_->set_tsc_deadline(value);
      arm_timer();
      return MsrWrite::kDone;
    case msr::kPredCmd:
      return judged((value & ~1ULL) == 0);  // IBPB: nothing is predicted across guest contexts by name
    case msr::kMicrocodeRevision:
      return MsrWrite::kDone;  // written before it is read, by convention
    case msr::kMachineCheckStatus:
      return judged(value == 0);
    case msr::kKvmWallClock:
    case msr::kKvmWallClockOld:
      cpu().msr.kvm_wall_clock = value;
      (void)parts_.chipset.clock().publish_wall_clock(value, write);
      return MsrWrite::kDone;
    case msr::kKvmSystemTime:
    case msr::kKvmSystemTimeOld:
      cpu().msr.kvm_system_time = value;
      publish_clock(false);
      return MsrWrite::kDone;
    default:
      break;
  }
  if (index < msr::kX2apicFirst || index > msr::kX2apicLast || !lapic_->x2apic()) {
    return MsrWrite::kUnknown;
  }
  const bool good = lapic_->write_msr(index, value);
  arm_timer();
  look_for_interrupt();
  return judged(good);
}

void SoftVcpu::publish_clock(bool stopped) {
  clock_unpublished_ = false;
  Mmu& mmu = processor_->core().mmu;
  (void)parts_.chipset.clock().publish(cpu().msr.kvm_system_time, cpu().tsc_offset, stopped,
                                       [&mmu](std::uint64_t gpa, const void* bytes, std::uint32_t size) {
                                         return mmu.write_physical(gpa, bytes, size);
                                       });
}

std::uint64_t SoftVcpu::read_cr8() {
  return lapic_->cr8();
}

void SoftVcpu::write_cr8(std::uint64_t value) {
  lapic_->set_cr8(static_cast<std::uint8_t>(value));
  look_for_interrupt();
}

bool SoftVcpu::port_read(std::uint16_t port, std::span<std::uint8_t> data) {
  return parts_.chipset.port_read(port, data);
}

bool SoftVcpu::port_write(std::uint16_t port, std::span<const std::uint8_t> data) {
  const bool done = parts_.chipset.port_write(port, data);
  if (done && parts_.virtual_clock != nullptr) {
    arm_timer();  // the PIT may have been set
  }
  return done;
}

std::uint64_t SoftVcpu::hypercall(std::uint64_t /*number*/, std::span<const std::uint64_t, 4> /*arguments*/) {
  // None is offered by CPUID leaf 0x40000001.
  return static_cast<std::uint64_t>(cpu().cpl == 0 ? kNoSuchCall : kNotPermitted);
}

std::uint64_t SoftVcpu::random() {
  if (parts_.virtual_clock != nullptr) {
    // SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
    seeded_ += 0x9e3779b97f4a7c15;
    std::uint64_t value = seeded_;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
  }
  if (random_left_ == 0) {
    // Blocks only before the host's own generator is ready, and then fills such a small buffer whole.
    if (::getrandom(random_.data(), sizeof random_, 0) != static_cast<ssize_t>(sizeof random_)) {
      panic(__FILE__, __LINE__, "getrandom() failed");
    }
    random_left_ = random_.size();
  }
  std::uint64_t& slot = random_[--random_left_];
  const std::uint64_t value = slot;
  slot = 0;
  return value;
}

void SoftVcpu::pause() {
  // Where the guest has more processors than the host has free ones, whom it waits for may be waiting in turn
  // for this very host processor.
  ::sched_yield();
}

void SoftVcpu::note(const std::string& what) {
  parts_.notes.add(fmt::format("vCPU {}: {}", config_.index, what));
}

bool SoftVcpu::in_lapic(std::uint64_t gpa, std::size_t size) const {
  const std::uint64_t page = lapic_->base() & ~0xfffULL;
  return lapic_->enabled() && !lapic_->x2apic() && gpa >= page && gpa - page < kLapicPage &&
         size <= kLapicPage - (gpa - page);
}

bool SoftVcpu::mmio_read(std::uint64_t gpa, std::span<std::uint8_t> data) {
  if (in_lapic(gpa, data.size())) {
    const auto offset = static_cast<std::uint32_t>(gpa & 0xfff);
    std::uint64_t value = 0;
    if (in_register(offset, data.size())) {
      value = lapic_->read(offset & ~0xfU) >> (8 * (offset & 0xf));
    }
    u64_to_bytes(value, data);
    return true;
  }
  if (gpa >= kIoApicAddress && gpa - kIoApicAddress < kIoApicSize &&
      data.size() <= kIoApicSize - (gpa - kIoApicAddress)) {
    parts_.chipset.ioapic().io_read(gpa - kIoApicAddress, data);
    return true;
  }
  return false;
}

bool SoftVcpu::mmio_write(std::uint64_t gpa, std::span<const std::uint8_t> data) {
  if (in_lapic(gpa, data.size())) {
    const auto offset = static_cast<std::uint32_t>(gpa & 0xfff);
    // Registers are written by whole aligned words (SDM volume 3, 11.4.1); other accesses do nothing.
    if ((offset & 0xf) == 0 && data.size() == 4) {
      lapic_->write(offset, load_le<std::uint32_t>(data.data()));
      arm_timer();
      look_for_interrupt();
    }
    return true;
  }
  if (gpa >= kIoApicAddress && gpa - kIoApicAddress < kIoApicSize &&
      data.size() <= kIoApicSize - (gpa - kIoApicAddress)) {
    parts_.chipset.ioapic().io_write(gpa - kIoApicAddress, data);
    return true;
  }
  if (const int bell = parts_.memory.doorbell(gpa, data); bell >= 0) {
    signal_eventfd(bell);
    return true;
  }
  return false;
}

}  // namespace wisp::soft
