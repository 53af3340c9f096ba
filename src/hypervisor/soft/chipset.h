// Interrupt controllers and timers that all processors of a VM share, wired up as in a PC: GSI 0 to 23 are
// the pins of the I/O APIC, 0 to 15 also the inputs of the PIC pair; the PIT is on GSI 0.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/event_loop.h"
#include "hypervisor/soft/apic_bus.h"
#include "hypervisor/soft/ioapic.h"
#include "hypervisor/soft/kvm_clock.h"
#include "hypervisor/soft/pic.h"
#include "hypervisor/soft/pit.h"
#include "hypervisor/soft/soft_clock.h"

namespace wisp::soft {

class Chipset final {
 public:
  static constexpr std::uint32_t kPicInputs = 16;

  // `pic_wake` is called, by any thread, when the PIC has an interrupt for the processors. The PIT's edges
  // come on the loop's thread, or, without a loop (null), from poll_timer(); what is given outlives the
  // chipset.
  [[nodiscard]] static Result<std::unique_ptr<Chipset>> create(const SoftClock& clock, bool pit,
                                                               EventLoop* loop,
                                                               std::function<void()> pic_wake);
  Chipset(const Chipset&) = delete;
  Chipset& operator=(const Chipset&) = delete;

  [[nodiscard]] ApicBus& bus() { return bus_; }
  [[nodiscard]] IoApic& ioapic() { return ioapic_; }
  [[nodiscard]] PicPair& pic() { return pic_; }
  [[nodiscard]] KvmClock& clock() { return kvm_clock_; }

  // Thread-safe. A GSI from 0 to 23.
  void pulse(std::uint32_t gsi);
  void set_level(std::uint32_t gsi, bool high);

  // When the PIT raises its next edge, in guest nanoseconds (empty: never), and raising it when it is due.
  [[nodiscard]] std::optional<std::uint64_t> next_timer_ns() const;
  void poll_timer();

  // Ports of PIC and PIT: false where the port is not theirs.
  [[nodiscard]] bool port_read(std::uint16_t port, std::span<std::uint8_t> data);
  [[nodiscard]] bool port_write(std::uint16_t port, std::span<const std::uint8_t> data);

  // See Vm. The record holds PIC, I/O APIC, PIT and the paravirtual clock.
  [[nodiscard]] std::vector<std::uint8_t> save() const;
  [[nodiscard]] Result<void> load(std::span<const std::uint8_t> record);

 private:
  Chipset(const SoftClock& clock, bool pit, std::function<void()> pic_wake);
  // Sets the timer to the PIT's next edge.
  void arm_pit();
  [[nodiscard]] bool owns(std::uint16_t port) const;

  const SoftClock& time_;
  ApicBus bus_;
  IoApic ioapic_{bus_};
  PicPair pic_;
  std::optional<Pit> pit_;
  KvmClock kvm_clock_;
  bool polled_ = false;  // the PIT is, rather than having a timer
  std::mutex pit_timer_mutex_;
  Timer pit_timer_;  // ends before the PIT does
};

}  // namespace wisp::soft
