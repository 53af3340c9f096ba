#include "hypervisor/kvm/kvm_irq.h"

#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"

namespace wisp::kvm {
namespace {

constexpr std::uint32_t kPicPins = 16;

kvm_irq_routing_entry pin_route(std::uint32_t gsi, std::uint32_t chip, std::uint32_t pin) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_IRQCHIP;
  entry.u.irqchip.irqchip = chip;
  entry.u.irqchip.pin = pin;
  return entry;
}

}  // namespace

Result<std::uint32_t> IrqRoutes::add(const MsiMessage& message) {
  const std::scoped_lock lock(mutex_);
  std::uint32_t gsi = kIoApicPins;
  for (const auto& [taken, other] : messages_) {
    if (taken != gsi) {
      break;
    }
    ++gsi;
  }
  if (gsi + kPicPins >= limit_) {
    return fail("all {} interrupt routes of KVM are in use", limit_);
  }
  messages_.emplace(gsi, message);
  if (auto written = write(); !written) {
    messages_.erase(gsi);
    return std::unexpected(written.error());
  }
  return gsi;
}

void IrqRoutes::remove(std::uint32_t gsi) {
  const std::scoped_lock lock(mutex_);
  messages_.erase(gsi);
}

Result<void> IrqRoutes::write() {
  const std::size_t count = kPicPins + kIoApicPins + messages_.size();
  FlexArray<kvm_irq_routing, kvm_irq_routing_entry> table(count);
  table.header()->nr = static_cast<std::uint32_t>(count);
  auto entry = table.entries().begin();
  for (std::uint32_t pin = 0; pin < kPicPins; ++pin) {
    *entry++ = pin_route(pin, pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin % 8);
  }
  for (std::uint32_t pin = 0; pin < kIoApicPins; ++pin) {
    *entry++ = pin_route(pin, KVM_IRQCHIP_IOAPIC, pin);
  }
  for (const auto& [gsi, message] : messages_) {
    entry->gsi = gsi;
    entry->type = KVM_IRQ_ROUTING_MSI;
    entry->u.msi.address_lo = static_cast<std::uint32_t>(message.address);
    entry->u.msi.address_hi = static_cast<std::uint32_t>(message.address >> 32);
    entry->u.msi.data = message.data;
    ++entry;
  }
  WISP_KVM_TRY(vm_fd_, KVM_SET_GSI_ROUTING, table.header());
  return {};
}

Result<std::unique_ptr<Irqfd>> Irqfd::create(int vm_fd, std::uint32_t gsi, IrqRoutes* routes) {
  WISP_ASSIGN(UniqueFd event, make_eventfd());
  kvm_irqfd request{};
  request.fd = static_cast<std::uint32_t>(event.get());
  request.gsi = gsi;
  if (call(vm_fd, KVM_IRQFD, &request) < 0) {
    return fail_errno(errno, "KVM refused an eventfd for interrupt {}", gsi);
  }
  std::unique_ptr<Irqfd> line(new Irqfd(vm_fd, gsi, std::move(event)));
  line->routes_ = routes;
  return line;
}

Irqfd::~Irqfd() {
  kvm_irqfd request{};
  request.fd = static_cast<std::uint32_t>(event_.get());
  request.gsi = gsi_;
  request.flags = KVM_IRQFD_FLAG_DEASSIGN;
  (void)call(vm_fd_, KVM_IRQFD, &request);
  if (routes_ != nullptr) {
    routes_->remove(gsi_);
  }
}

void Irqfd::pulse() {
  signal_eventfd(event_.get());
}

void Irqfd::set_level(bool high) {
  if (routes_ != nullptr) {
    return;  // a message has no level
  }
  kvm_irq_level level{};
  level.irq = gsi_;
  level.level = high ? 1 : 0;
  (void)call(vm_fd_, KVM_IRQ_LINE, &level);
}

}  // namespace wisp::kvm
