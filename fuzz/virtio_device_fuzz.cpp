// One virtio device behind the MMIO transport; the input is a list of what a guest does: register accesses,
// writes to its memory, kicks, resets, snapshots. Built once for each device, with WISP_FUZZ_DEVICE its name
// in the hostile suite's table.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/bytes.h"
#include "input.h"
#include "virtio/hostile_devices.h"
#include "virtio/support/mmio_harness.h"

namespace {

using namespace wisp;
using fuzz::Input;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  test::Keep keep;
  const auto devices = test::hostile_devices();
  const auto device = std::ranges::find(devices, std::string_view(WISP_FUZZ_DEVICE),
                                        [](const test::HostileDevice& entry) { return entry.name; });
  if (device == devices.end()) {
    __builtin_trap();
  }
  test::MmioHarness guest(
      [&](EventLoop& loop, const GuestMemory& memory) { return device->make(loop, memory, keep); },
      test::FakeGuest::Range{test::FakeGuest::kBase, 0x40000});
  static_cast<void>(guest.start());
  const Gpa scratch = guest.guest().allocate(0x1000, 16);
  Input input(data, size);
  for (int step = 0; step < 256 && !input.empty(); ++step) {
    switch (input.get<std::uint8_t>() % 10) {
      case 0: {
        std::uint8_t bytes[8]{};
        const std::size_t width = 1 + input.get<std::uint8_t>() % 8U;
        const std::uint64_t offset = input.get<std::uint16_t>() % (kVirtioMmioSize - width + 1);
        guest.transport().io_read(offset, std::span(bytes).first(width));
        break;
      }
      case 1: {
        const std::uint64_t offset = input.get<std::uint16_t>() % (kVirtioMmioSize - 8 + 1);
        const auto bytes = input.take(1 + input.get<std::uint8_t>() % 8U);
        if (!bytes.empty()) {
          guest.transport().io_write(offset, bytes);
        }
        break;
      }
      case 2:
      case 3: {
        // A chain of up to four buffers, all in the scratch page.
        const std::uint16_t index = input.get<std::uint8_t>() % guest.queue_count();
        const std::uint8_t parts = 1 + input.get<std::uint8_t>() % 4;
        test::FakeQueue& queue = guest.queue(index);
        const std::uint16_t first = input.get<std::uint8_t>() % queue.size();
        for (std::uint8_t i = 0; i < parts; ++i) {
          const auto flags = static_cast<std::uint16_t>(input.get<std::uint8_t>() & test::kDescWrite);
          queue.set_descriptor(
              static_cast<std::uint16_t>((first + i) % queue.size()),
              {.address = scratch + input.get<std::uint16_t>() % 0x1000,
               .length = input.get<std::uint16_t>(),
               .flags = static_cast<std::uint16_t>(flags | (i + 1 < parts ? test::kDescNext : 0)),
               .next = static_cast<std::uint16_t>((first + i + 1) % queue.size())});
        }
        queue.publish(first);
        guest.kick(index);
        break;
      }
      case 4:
        guest.guest().write(scratch + input.get<std::uint8_t>(), input.take(input.get<std::uint8_t>()));
        break;
      case 5: {
        const std::uint16_t index = input.get<std::uint8_t>() % guest.queue_count();
        guest.queue(index).set_descriptor(input.get<std::uint8_t>() % guest.queue(index).size(),
                                          {.address = input.get<std::uint64_t>(),
                                           .length = input.get<std::uint32_t>(),
                                           .flags = input.get<std::uint16_t>(),
                                           .next = input.get<std::uint16_t>()});
        break;
      }
      case 6:
        guest.kick(input.get<std::uint8_t>() % guest.queue_count());
        guest.pump(1);
        break;
      case 7:
        guest.pump(4);
        break;
      case 8: {
        guest.transport().pause();
        StateRecord saved = guest.transport().save();
        const auto at = input.get<std::uint16_t>();
        const auto flip = input.get<std::uint8_t>();
        saved.bytes[at % saved.bytes.size()] ^= flip;
        static_cast<void>(guest.transport().load(saved));
        guest.transport().resume();
        break;
      }
      default:
        static_cast<void>(guest.start());
    }
  }
  guest.pump(4);
  guest.write(virtio_mmio::kStatus, 0);
  if (guest.read(virtio_mmio::kStatus) != 0 || guest.logged() > 65536) {
    __builtin_trap();
  }
  return 0;
}
