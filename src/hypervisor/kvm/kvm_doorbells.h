// Doorbells: writes that signal an eventfd inside the kernel, in place of an exit. Private to this folder.
#pragma once

#include <map>
#include <vector>

#include "base/unique_fd.h"
#include "memory/address_space.h"

namespace wisp::kvm {

// Those of one address space. Called by the one thread that changes it.
class Doorbells final {
 public:
  enum class Bus : std::uint8_t { kMemory, kPorts };
  // `vm_fd` is borrowed.
  Doorbells(int vm_fd, Bus bus) : vm_fd_(vm_fd), bus_(bus) {}
  Doorbells(const Doorbells&) = delete;
  Doorbells& operator=(const Doorbells&) = delete;

  // All events of the range, or none. Errors: a size that is not 0, 1, 2, 4 or 8, a value to match without a
  // size, one that is there already, KVM's own limits.
  [[nodiscard]] Result<void> add(const FlatRange& range);
  void remove(const FlatRange& range);

 private:
  // Each keeps a descriptor of its own: KVM takes a doorbell off only for one that names the same eventfd,
  // and the device may have closed its own by then.
  struct Armed {
    IoEvent event;
    UniqueFd fd;
  };
  [[nodiscard]] bool change(Gpa start, const IoEvent& event, int fd, bool add) const;

  const int vm_fd_;
  const Bus bus_;
  std::map<Gpa, std::vector<Armed>> armed_;  // by start of the range
};

// The port space: nothing in it but doorbells concerns KVM.
class PortListener final : public AddressSpaceListener {
 public:
  explicit PortListener(int vm_fd) : doorbells_(vm_fd, Doorbells::Bus::kPorts) {}
  [[nodiscard]] Result<void> range_added(const FlatRange& range) override { return doorbells_.add(range); }
  void range_removed(const FlatRange& range) override { doorbells_.remove(range); }

 private:
  Doorbells doorbells_;
};

}  // namespace wisp::kvm
