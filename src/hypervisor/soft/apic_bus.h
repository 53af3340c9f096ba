// How interrupts travel between I/O APIC, MSI and the local APICs of the software CPU (Intel SDM volume 3, chapter 11,
// sections 11.6 "Issuing interprocessor interrupts" and 11.11 "Message signalled interrupts").
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
  bool logical = false;          // destination mode
  std::uint32_t destination = 0; // APIC id, or logical destination; 0xff / 0xffffffff: all
};

class Lapic;

// Knows the local APICs of one machine. They are added before the machine runs; afterwards thread-safe.
class ApicBus final {
 public:
  void add(Lapic* lapic) { lapics_.push_back(lapic); }
  // To whoever the destination names; `source`, where given, is the sender that a broadcast must leave out when
  // `exclude_source` says so.
  void deliver(const ApicMessage& message, const Lapic* source = nullptr, bool exclude_source = false) const;
  // An MSI write of `data` to `address` (0xfeexxxxx).
  void deliver_msi(std::uint64_t address, std::uint32_t data) const;

 private:
  std::vector<Lapic*> lapics_;
};

}  // namespace wisp::soft
