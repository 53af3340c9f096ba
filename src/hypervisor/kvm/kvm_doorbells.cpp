#include "hypervisor/kvm/kvm_doorbells.h"

#include <fcntl.h>

#include <bit>

#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"

namespace wisp::kvm {

bool Doorbells::change(Gpa start, const IoEvent& event, int fd, bool add) const {
  kvm_ioeventfd request{};
  request.addr = start + event.offset;
  request.len = event.size;
  request.fd = fd;
  if (event.value) {
    request.datamatch = *event.value;
    request.flags |= 1U << kvm_ioeventfd_flag_nr_datamatch;
  }
  if (bus_ == Bus::kPorts) {
    request.flags |= 1U << kvm_ioeventfd_flag_nr_pio;
  }
  if (!add) {
    request.flags |= 1U << kvm_ioeventfd_flag_nr_deassign;
  }
  return call(vm_fd_, KVM_IOEVENTFD, &request) == 0;
}

Result<void> Doorbells::add(const FlatRange& range) {
  if (range.events.empty()) {
    return {};
  }
  std::vector<Armed> armed;
  armed.reserve(range.events.size());
  const auto arm = [&](const IoEvent& event) -> Result<void> {
    const bool good_size = event.size <= 8 && (event.size == 0 || std::has_single_bit(event.size));
    if (!good_size || (event.size == 0 && event.value)) {
      return fail("{}: a doorbell of {} bytes{} cannot be", range.name, event.size,
                  event.value ? " with a value" : "");
    }
    UniqueFd fd(::fcntl(event.fd, F_DUPFD_CLOEXEC, 0));
    if (!fd.valid()) {
      return fail_errno(errno, "{}: cannot keep the doorbell's descriptor", range.name);
    }
    if (!change(range.start, event, fd.get(), true)) {
      return fail_errno(errno, "{}: KVM refused a doorbell at {:#x}", range.name, range.start + event.offset);
    }
    armed.push_back({.event = event, .fd = std::move(fd)});
    return {};
  };
  for (const IoEvent& event : range.events) {
    if (auto done = arm(event); !done) {
      for (const Armed& one : armed) {
        (void)change(range.start, one.event, one.fd.get(), false);
      }
      return done;
    }
  }
  WISP_ASSERT(armed_.try_emplace(range.start, std::move(armed)).second);
  return {};
}

void Doorbells::remove(const FlatRange& range) {
  const auto found = armed_.find(range.start);
  if (found == armed_.end()) {
    return;
  }
  for (const Armed& one : found->second) {
    (void)change(range.start, one.event, one.fd.get(), false);
  }
  armed_.erase(found);
}

}  // namespace wisp::kvm
