// How interrupts travel between I/O APIC, MSI and the local APICs of the software CPU (Intel SDM volume 3,
// chapter 11, sections 11.6 "Issuing interprocessor interrupts" and 11.11 "Message signalled interrupts").
#pragma once

#include <cstdint>
#include <vector>

namespace wisp::soft {

enum class DeliveryMode : std::uint8_t {
  kFixed = 0,
  kLowestPriority = 1,
  kSmi = 2,
  kNmi = 4,
  kInit = 5,
  kStartUp = 6,
  kExtInt = 7,
};

struct ApicMessage {
  DeliveryMode mode = DeliveryMode::kFixed;
  std::uint8_t vector = 0;
  bool level_triggered = false;
  bool logical = false;  // destination mode
  // APIC id, or logical destination. 0xffffffff names all; 0xff names all that are in xAPIC mode.
  std::uint32_t destination = 0;
};

// The destination of a sender that has eight bits for it: 0xff, physical, means all, in whatever mode they
// are. A logical 0xff stays: to an x2APIC it is eight members of cluster 0.
[[nodiscard]] constexpr std::uint32_t widen_destination(std::uint32_t destination, bool logical) {
  return destination == 0xff && !logical ? 0xffffffff : destination;
}

class Lapic;

// Knows the local APICs of one machine. They are added before the machine runs; afterwards thread-safe.
class ApicBus final {
 public:
  void add(Lapic* lapic) { lapics_.push_back(lapic); }
  // To whoever the destination names; `source`, where given, is the sender that a broadcast must leave out
  // when `exclude_source` says so. Whether any accepted it.
  bool deliver(const ApicMessage& message, const Lapic* source = nullptr, bool exclude_source = false) const;
  // An MSI write of `data` to `address` (0xfeexxxxx). The redirection hint with a logical destination asks
  // for the one with the lowest priority.
  void deliver_msi(std::uint64_t address, std::uint32_t data) const;

 private:
  std::vector<Lapic*> lapics_;
};

}  // namespace wisp::soft
