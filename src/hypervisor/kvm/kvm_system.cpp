#include "hypervisor/kvm/kvm_system.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <string_view>

#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_cpuid.h"
#include "hypervisor/kvm/kvm_ioctl.h"
#include "hypervisor/kvm/kvm_msrs.h"

namespace wisp::kvm {
namespace {

// The group's name from /etc/group, read here because the C library's own look-up cannot be linked
// statically; its number where the file has no name for it.
std::string group_name(gid_t gid) {
  std::ifstream file("/etc/group");
  const std::string number = std::to_string(gid);
  for (std::string line; std::getline(file, line);) {
    const std::size_t name_end = line.find(':');
    const std::size_t id_start = name_end == std::string::npos ? name_end : line.find(':', name_end + 1);
    if (id_start != std::string::npos &&
        std::string_view(line).substr(id_start + 1).starts_with(number + ":")) {
      return line.substr(0, name_end);
    }
  }
  return number;
}

Result<UniqueFd> open_device(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (fd.valid()) {
    return fd;
  }
  const int error = errno;
  if (error == ENOENT || error == ENXIO || error == ENODEV) {
    return fail(
        "no KVM on this host: {} {}; load the module kvm-intel or kvm-amd, and switch virtualization on in "
        "the firmware or, in a virtual machine, nested virtualization on its host",
        path, error == ENOENT ? "does not exist" : "has no device behind it");
  }
  struct stat status{};
  if (error == EACCES && ::stat(path.c_str(), &status) == 0) {
    if ((status.st_mode & S_IRGRP) != 0 && (status.st_mode & S_IWGRP) != 0) {
      const std::string group = group_name(status.st_gid);
      return fail(
          "no permission to open {}: it belongs to group {}; add the user to it (usermod -aG {} USER, then "
          "log "
          "in again)",
          path, group, group);
    }
    return fail("no permission to open {}: its mode is {:04o}; give its group read and write access", path,
                static_cast<unsigned>(status.st_mode & 07777U));
  }
  return fail_errno(error, "cannot open {}", path);
}

struct Needed {
  unsigned long number;
  std::string_view name;
};

// Each of these is in every KVM since Linux 4.12.
constexpr std::array kNeeded{
    Needed{KVM_CAP_IRQCHIP, "an interrupt controller in the kernel"},
    Needed{KVM_CAP_USER_MEMORY, "guest memory from user space"},
    Needed{KVM_CAP_SET_TSS_ADDR, "KVM_SET_TSS_ADDR"},
    Needed{KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR"},
    Needed{KVM_CAP_EXT_CPUID, "KVM_SET_CPUID2"},
    Needed{KVM_CAP_MP_STATE, "KVM_GET_MP_STATE"},
    Needed{KVM_CAP_IRQ_ROUTING, "interrupt routing"},
    Needed{KVM_CAP_IRQFD, "irqfd"},
    Needed{KVM_CAP_IOEVENTFD, "ioeventfd"},
    Needed{KVM_CAP_IOEVENTFD_ANY_LENGTH, "ioeventfd of any length"},
    Needed{KVM_CAP_READONLY_MEM, "read-only memory slots"},
    Needed{KVM_CAP_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS"},
    Needed{KVM_CAP_DEBUGREGS, "KVM_GET_DEBUGREGS"},
    Needed{KVM_CAP_XSAVE, "KVM_GET_XSAVE"},
    Needed{KVM_CAP_XCRS, "KVM_GET_XCRS"},
    Needed{KVM_CAP_GET_TSC_KHZ, "KVM_GET_TSC_KHZ"},
    Needed{KVM_CAP_PIT2, "KVM_CREATE_PIT2"},
    Needed{KVM_CAP_PIT_STATE2, "KVM_GET_PIT2"},
    Needed{KVM_CAP_ADJUST_CLOCK, "KVM_GET_CLOCK"},
    Needed{KVM_CAP_IMMEDIATE_EXIT, "immediate_exit"},
};

std::uint32_t extension(int fd, unsigned long number) {
  return static_cast<std::uint32_t>(std::max(call(fd, KVM_CHECK_EXTENSION, number), 0));
}

Result<Capabilities> capabilities_of(int fd) {
  for (const Needed& needed : kNeeded) {
    if (extension(fd, needed.number) == 0) {
      return fail("KVM on this host lacks {} (capability {}); use Linux 4.12 or later", needed.name,
                  needed.number);
    }
  }
  Capabilities found;
  found.max_vcpus = std::max(extension(fd, KVM_CAP_MAX_VCPUS), 1U);
  found.max_vcpu_ids = std::max(extension(fd, KVM_CAP_MAX_VCPU_ID), found.max_vcpus);
  found.memory_slots = std::max(extension(fd, KVM_CAP_NR_MEMSLOTS), 32U);
  found.irq_routes = extension(fd, KVM_CAP_IRQ_ROUTING);
  found.tsc_deadline = extension(fd, KVM_CAP_TSC_DEADLINE_TIMER) != 0;
  found.exception_payload = extension(fd, KVM_CAP_EXCEPTION_PAYLOAD) != 0;
  found.triple_fault_event = extension(fd, KVM_CAP_X86_TRIPLE_FAULT_EVENT) != 0;
  found.pmu_control = (extension(fd, KVM_CAP_PMU_CAPABILITY) & KVM_PMU_CAP_DISABLE) != 0;
  found.x2apic_ids = (extension(fd, KVM_CAP_X2APIC_API) & KVM_X2APIC_API_USE_32BIT_IDS) != 0;
  found.xsave2 = extension(fd, KVM_CAP_XSAVE2) != 0;
  return found;
}

Result<std::vector<std::uint32_t>> msr_index_list(int fd) {
  constexpr std::size_t kMost = 4096;
  for (std::size_t room = 512; room <= kMost; room *= 2) {
    FlexArray<kvm_msr_list, std::uint32_t> list(room);
    list.header()->nmsrs = static_cast<std::uint32_t>(room);
    if (call(fd, KVM_GET_MSR_INDEX_LIST, list.header()) == 0) {
      const auto found = list.entries().first(std::min<std::size_t>(list.header()->nmsrs, room));
      return std::vector<std::uint32_t>(found.begin(), found.end());
    }
    if (errno != E2BIG) {
      return fail_errno(errno, "KVM refused KVM_GET_MSR_INDEX_LIST");
    }
  }
  return fail("KVM lists more than {} MSRs", kMost);
}

std::uint64_t feature_msr(int fd, std::uint32_t index) {
  FlexArray<kvm_msrs, kvm_msr_entry> msrs(1);
  msrs.header()->nmsrs = 1;
  msrs.entries()[0].index = index;
  return call(fd, KVM_GET_MSRS, msrs.header()) == 1 ? msrs.entries()[0].data : 0;
}

}  // namespace

Result<std::shared_ptr<const System>> System::open(const std::string& path) {
  WISP_ASSIGN(UniqueFd fd, open_device(path));
  const int version = call(fd.get(), KVM_GET_API_VERSION);
  if (version < 0) {
    return fail_errno(errno, "{} is not KVM", path);
  }
  if (version != KVM_API_VERSION) {
    return fail("{} speaks version {} of the KVM interface; Wisp needs version {}", path, version,
                KVM_API_VERSION);
  }
  std::shared_ptr<System> system(new System);
  WISP_ASSIGN(system->capabilities_, capabilities_of(fd.get()));
  const int run_size = call(fd.get(), KVM_GET_VCPU_MMAP_SIZE);
  if (run_size < static_cast<int>(sizeof(kvm_run))) {
    return fail("KVM_GET_VCPU_MMAP_SIZE gives {} bytes, less than struct kvm_run", run_size);
  }
  system->run_size_ = static_cast<std::size_t>(run_size);
  WISP_ASSIGN(system->supported_cpuid_, read_supported_cpuid(fd.get()));
  WISP_ASSIGN(const auto indices, msr_index_list(fd.get()));
  system->state_msrs_ = kvm::state_msrs(indices);
  system->arch_capabilities_ = feature_msr(fd.get(), msr::kArchCapabilities);
  system->fd_ = std::move(fd);
  return system;
}

}  // namespace wisp::kvm
