// Interrupt lines over KVM's controllers. Private to this folder.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "base/unique_fd.h"
#include "hypervisor/hypervisor.h"

namespace wisp::kvm {

// Which GSI leads where: those behind the pins of the I/O APIC are messages. KVM has its own table with the
// pins; it is replaced when there are messages too.
class IrqRoutes final {
 public:
  // `vm_fd` is borrowed; `limit` is how many routes KVM takes.
  IrqRoutes(int vm_fd, std::uint32_t limit) : vm_fd_(vm_fd), limit_(limit) {}
  IrqRoutes(const IrqRoutes&) = delete;
  IrqRoutes& operator=(const IrqRoutes&) = delete;
  // Thread-safe. The GSI that now sends `message`.
  [[nodiscard]] Result<std::uint32_t> add(const MsiMessage& message);
  // Frees the number; KVM forgets the route with the next add().
  void remove(std::uint32_t gsi);

 private:
  [[nodiscard]] Result<void> write();

  const int vm_fd_;
  const std::uint32_t limit_;
  std::mutex mutex_;
  std::map<std::uint32_t, MsiMessage> messages_;  // by GSI
};

// Pulses go through an irqfd, so that any process which holds the eventfd can send them; levels by
// KVM_IRQ_LINE.
class Irqfd final : public IrqLine {
 public:
  // `routes` is set for a message's line, which gives its GSI back when it goes. Both are borrowed.
  [[nodiscard]] static Result<std::unique_ptr<Irqfd>> create(int vm_fd, std::uint32_t gsi, IrqRoutes* routes);
  ~Irqfd() override;
  void pulse() override;
  void set_level(bool high) override;
  [[nodiscard]] int event_fd() const override { return event_.get(); }

 private:
  Irqfd(int vm_fd, std::uint32_t gsi, UniqueFd event) : vm_fd_(vm_fd), gsi_(gsi), event_(std::move(event)) {}
  const int vm_fd_;
  const std::uint32_t gsi_;
  const UniqueFd event_;
  IrqRoutes* routes_ = nullptr;
};

}  // namespace wisp::kvm
