// What a hostile driver does to any device's queues, chosen by fuzzer input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "input.h"
#include "virtio/support/device_harness.h"

namespace wisp::test {

// An address in the first 64 KiB of RAM, around its end, or anywhere.
inline Gpa fuzz_address(fuzz::Input& input, const FakeGuest& guest) {
  const auto choice = input.get<std::uint8_t>();
  const auto offset = input.get<std::uint16_t>();
  switch (choice % 16) {
    case 0:
      return guest.end() - offset % 256;
    case 1:
      return input.get<std::uint64_t>();
    default:
      return guest.base() + offset;
  }
}

// One step on the ring: a descriptor, an entry or an index written raw.
inline void fuzz_ring(fuzz::Input& input, DeviceHarness& harness, std::uint16_t queue) {
  FakeQueue& ring = harness.queue(queue);
  const auto bits = input.get<std::uint8_t>();
  const auto slot = static_cast<std::uint16_t>(input.get<std::uint8_t>() % ring.size());
  switch (bits % 4) {
    case 0:
      ring.set_available_index(
          static_cast<std::uint16_t>(ring.available_index() + input.get<std::uint8_t>() % 4));
      break;
    case 1:
      ring.set_available_entry(slot, input.get<std::uint8_t>() % 20);
      break;
    case 2:
      ring.set_available_index(input.get<std::uint16_t>());
      break;
    default:
      ring.set_descriptor(
          slot, {.address = fuzz_address(input, harness.guest()),
                 .length = (bits & 4) != 0 ? input.get<std::uint32_t>() : input.get<std::uint16_t>(),
                 .flags = static_cast<std::uint16_t>(bits >> 4),
                 .next = static_cast<std::uint16_t>(input.get<std::uint8_t>() % 20)});
      break;
  }
}

// Publishes a chain of buffers wherever they are, through free descriptors chosen by position.
inline void fuzz_publish(fuzz::Input& input, DeviceHarness& harness, std::uint16_t queue, bool writable,
                         std::uint32_t least) {
  FakeQueue& ring = harness.queue(queue);
  const std::uint16_t count = 1 + input.get<std::uint8_t>() % 3;
  const std::uint16_t first = input.get<std::uint8_t>() % ring.size();
  for (std::uint16_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::uint16_t>((first + i) % ring.size());
    ring.set_descriptor(at, {.address = harness.guest().base() + input.get<std::uint16_t>(),
                             .length = least + input.get<std::uint8_t>() * 8U,
                             .flags = static_cast<std::uint16_t>((writable ? kDescWrite : 0) |
                                                                 (i + 1 < count ? kDescNext : 0)),
                             .next = static_cast<std::uint16_t>((at + 1U) % ring.size())});
  }
  ring.publish(first);
}

}  // namespace wisp::test
