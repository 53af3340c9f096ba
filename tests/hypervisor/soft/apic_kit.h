// Local APICs on one bus with a clock that the test turns.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hypervisor/soft/apic_bus.h"
#include "hypervisor/soft/ioapic.h"
#include "hypervisor/soft/lapic.h"

namespace wisp::soft {

struct ApicKit {
  // `count` local APICs with ids first, first + 1, ..., enabled by software.
  explicit ApicKit(std::uint32_t count, std::uint32_t first = 0) {
    for (std::uint32_t i = 0; i < count; ++i) {
      cpus.push_back(std::make_unique<Lapic>(first + i, Lapic::Wiring{.bus = &bus,
                                                                      .wake = [this] { ++wakes; },
                                                                      .broadcast_eoi =
                                                                          [this](std::uint8_t vector) {
                                                                            eois.push_back(vector);
                                                                            ioapic.eoi(vector);
                                                                          },
                                                                      .now_ns = [this] { return now; },
                                                                      .read_tsc = [this] { return now * 2; },
                                                                      .tsc_khz = 2'000'000}));
      bus.add(cpus.back().get());
      cpus.back()->write(0xf0, 0x1ff);
    }
  }
  Lapic& cpu(std::size_t index) { return *cpus[index]; }
  // Takes what is pending on the processor; -1 where nothing is.
  int take(std::size_t index) {
    const auto vector = cpu(index).pending_vector();
    if (!vector) {
      return -1;
    }
    cpu(index).acknowledge(*vector);
    return *vector;
  }
  // Which processors have an interrupt pending, as a mask; takes and ends each.
  unsigned sweep() {
    unsigned mask = 0;
    for (std::size_t i = 0; i < cpus.size(); ++i) {
      if (take(i) >= 0) {
        mask |= 1U << i;
        cpu(i).eoi();
      }
    }
    return mask;
  }
  void x2apic_all() {
    for (auto& lapic : cpus) {
      (void)lapic->set_base(lapic->base() | kApicBaseX2apic);
    }
  }

  ApicBus bus;
  IoApic ioapic{bus};
  std::vector<std::unique_ptr<Lapic>> cpus;
  std::vector<std::uint8_t> eois;
  std::uint64_t now = 1000;
  int wakes = 0;
};

}  // namespace wisp::soft
