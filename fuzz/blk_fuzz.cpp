// A hostile driver of the block device: rings, headers and buffers as it likes, completions, errors, pauses
// and resets at any point. The disk in memory aborts where the device lets a bad range through.
#include <algorithm>
#include <array>
#include <memory>

#include "block/support/memory_backend.h"
#include "input.h"
#include "virtio/blk_kit.h"

namespace wisp {
namespace {

using fuzz::Input;
using test::BlkDriver;
using test::DeviceHarness;
using test::FakeGuest;
using test::MemoryBackend;

constexpr std::uint64_t kGuestSize = 128UL << 10;
constexpr std::uint64_t kDisk = 64UL << 10;
constexpr std::uint16_t kQueueSize = 16;

// An address that is in RAM, at its end, or anywhere.
Gpa address(Input& input) {
  const auto choice = input.get<std::uint8_t>();
  const auto offset = input.get<std::uint16_t>();
  switch (choice % 8) {
    case 0:
      return FakeGuest::kBase + kGuestSize - offset % 1024;
    case 1:
      return input.get<std::uint64_t>();
    default:
      return FakeGuest::kBase + offset;
  }
}

std::uint32_t length(Input& input) {
  static constexpr std::array<std::uint32_t, 12> kLengths{0,   1,   15,   16,   17,   512,
                                                          513, 528, 1024, 4096, 4097, 0xffffffff};
  const auto choice = input.get<std::uint8_t>();
  return choice < kLengths.size() ? kLengths.at(choice) : input.get<std::uint16_t>();
}

DeviceHarness::Setup setup(std::uint8_t bits) {
  return {.features = (bits & 1) != 0 ? ~0ULL : 0,
          .event_idx = (bits & 2) != 0,
          .indirect = (bits & 4) != 0,
          .queue_size = kQueueSize,
          .unset = (bits & 8) != 0 ? std::vector<std::uint16_t>{1} : std::vector<std::uint16_t>{}};
}

// A whole request, most of it well-formed.
void add_request(Input& input, BlkDriver& driver, std::uint16_t queue) {
  static constexpr std::array<std::uint32_t, 8> kTypes{0, 1, 4, 8, 11, 13, 5, 0xffff};
  FakeGuest& guest = driver.harness.guest();
  test::FakeQueue& ring = driver.harness.queue(queue);
  const auto bits = input.get<std::uint8_t>();
  const Gpa header = FakeGuest::kBase + 0x4000 + 64UL * input.get<std::uint8_t>();
  guest.store<std::uint64_t>(header, kTypes.at(bits % 8));
  guest.store<std::uint64_t>(header + 8,
                             (bits & 8) != 0 ? input.get<std::uint64_t>() : input.get<std::uint8_t>());
  guest.store(header + 16, test::BlkSegment{input.get<std::uint8_t>(), input.get<std::uint8_t>(),
                                            input.get<std::uint8_t>()});
  const auto base = static_cast<std::uint16_t>(input.get<std::uint8_t>() % (kQueueSize - 3));
  const std::uint16_t write = (bits & 16) != 0 ? test::kDescWrite : 0;
  ring.set_descriptor(
      base, {header, (bits & 32) != 0 ? 16U : 32U, test::kDescNext, static_cast<std::uint16_t>(base + 1)});
  ring.set_descriptor(static_cast<std::uint16_t>(base + 1),
                      {address(input), length(input), static_cast<std::uint16_t>(test::kDescNext | write),
                       static_cast<std::uint16_t>(base + 2)});
  ring.set_descriptor(static_cast<std::uint16_t>(base + 2), {address(input), 1, test::kDescWrite, 0});
  ring.publish(base);
}

void run(Input input) {
  static FakeGuest guest({{FakeGuest::kBase, kGuestSize}});
  guest.clear();
  const auto bits = input.get<std::uint8_t>();
  MemoryBackend disk(kDisk, (bits & 16) != 0 ? MemoryBackend::Mode::kAtKick : MemoryBackend::Mode::kManual);
  disk.geometry_for_change().read_only = (bits & 32) != 0;
  disk.geometry_for_change().discard = (bits & 96) == 64;
  int error = 0;
  disk.inject = [&](const BlockRequest&) { return error; };
  BlkDriver driver(disk, {.id = "b", .drive = "d", .serial = "S", .num_queues = 2, .queue_size = kQueueSize},
                   &guest);
  DeviceHarness& harness = driver.harness;
  WISP_ASSERT(harness.activate(setup(bits)).has_value());
  for (int step = 0; step < 200 && !input.empty(); ++step) {
    const auto action = input.get<std::uint8_t>();
    const std::uint16_t queue = action >> 7;
    test::FakeQueue& ring = harness.queue(queue);
    switch (action % 16) {
      case 0:
        ring.set_descriptor(
            input.get<std::uint8_t>() % kQueueSize,
            {address(input), length(input), input.get<std::uint8_t>(), input.get<std::uint8_t>()});
        break;
      case 1:
        ring.publish(input.get<std::uint8_t>() % (kQueueSize + 1));
        break;
      case 2:
        ring.set_available_index(input.get<std::uint16_t>());
        break;
      case 3:
        guest.store(FakeGuest::kBase + input.get<std::uint16_t>(), input.get<std::uint64_t>());
        break;
      case 4:
        harness.notify(queue);
        break;
      case 5:
        if (!disk.begun().empty()) {
          disk.complete(input.get<std::uint8_t>() % disk.begun().size());
        }
        break;
      case 6:
        error = input.get<std::uint8_t>() % 8 == 0 ? EIO : 0;
        break;
      case 7:
        harness.pump(4);
        break;
      case 8:
        harness.write_config(input.get<std::uint8_t>(), input.get<std::uint64_t>());
        break;
      case 9:
        static_cast<void>(harness.read_config<std::uint64_t>(input.get<std::uint64_t>() % 80));
        break;
      case 10:
        harness.pause();
        break;
      case 11:
        harness.resume();
        break;
      case 12: {
        harness.reset();
        WISP_ASSERT(disk.in_flight() == 0);
        guest.clear();
        WISP_ASSERT(harness.activate(setup(input.get<std::uint8_t>())).has_value());
        break;
      }
      default:
        add_request(input, driver, queue);
        if ((action & 64) != 0) {
          harness.notify(queue);
        }
        break;
    }
  }
  harness.resume();
  harness.pause();
  WISP_ASSERT(disk.in_flight() == 0);
  for (std::uint16_t i = 0; i < 2; ++i) {
    const Queue* const queue = harness.device().queue(i);
    WISP_ASSERT(queue == nullptr || queue->in_flight() == 0);
  }
  harness.reset();
}

}  // namespace
}  // namespace wisp

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  wisp::run(wisp::Input(data, size));
  return 0;
}
