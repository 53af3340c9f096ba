// A hostile driver of the network device, and an outside that sends what it likes: with and without headers,
// merged buffers, several queue pairs, pauses and resets at any point.
#include <vector>

#include "net_hostile_driver.h"
#include "virtio/net_kit.h"

namespace {

using namespace wisp;
using namespace wisp::test;

constexpr std::uint64_t kGuestSize = 512UL << 10;

void step(fuzz::Input& input, NetKit& kit, FakeNetBackend& backend) {
  DeviceHarness& harness = kit.harness;
  const auto choice = input.get<std::uint8_t>();
  const auto queues = static_cast<std::uint16_t>(harness.device().queue_sizes().size());
  const auto queue = static_cast<std::uint16_t>(input.get<std::uint8_t>() % queues);
  switch (choice % 12) {
    case 0:
      fuzz_ring(input, harness, queue);
      break;
    case 1:
    case 2:
      fuzz_publish(input, harness, queue, queue % 2 == 0, 12);
      break;
    case 3:
      harness.notify(queue);
      break;
    case 4:
    case 5: {
      const auto size = (choice & 16) != 0 ? input.get<std::uint16_t>() + 12UL : input.get<std::uint8_t>();
      backend.inject(make_frame(size, choice),
                     static_cast<std::uint16_t>(input.get<std::uint8_t>() % backend.queue_pairs()));
      break;
    }
    case 6:
      harness.pump(4);
      break;
    case 7: {  // bytes that become headers and commands
      const auto bytes = input.take(16);
      harness.guest().write(harness.guest().base() + input.get<std::uint16_t>(), bytes);
      break;
    }
    case 8: {
      std::vector<std::uint8_t> data(input.get<std::uint8_t>() % 17);
      const auto offset = input.get<std::uint64_t>();
      const std::lock_guard lock(harness.device().strand().mutex());
      harness.device().read_config(offset, data);
      harness.device().write_config(offset, data);
      break;
    }
    case 9:
      harness.pause();
      harness.resume();
      break;
    case 10: {
      const std::lock_guard lock(harness.device().strand().mutex());
      kit.device().set_link((choice & 16) != 0);
      break;
    }
    default:
      if ((choice & 0xf0) == 0) {
        backend.close();
      } else if ((choice & 0xf0) == 0x10) {
        harness.pause();
        const StateRecord state = harness.device().save();
        harness.resume();
        harness.reset();
        WISP_ASSERT(harness.device().load(state).has_value());
        harness.guest().clear();
        (void)harness.activate({.queue_size = 16});
      }
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 4096) {
    return 0;
  }
  fuzz::Input input(data, size);
  const auto bits = input.get<std::uint8_t>();
  FakeGuest guest({{FakeGuest::kBase, kGuestSize}});
  const std::uint16_t pairs = (bits & 1) != 0 ? 3 : 1;
  auto owned = std::make_unique<FakeNetBackend>((bits & 2) != 0, pairs);
  FakeNetBackend& backend = *owned;
  NetKit kit(std::move(owned), {}, &guest);
  const bool active = kit.harness
                          .activate({.features = (bits & 4) != 0 ? ~0ULL : input.get<std::uint32_t>(),
                                     .event_idx = (bits & 8) != 0,
                                     .indirect = (bits & 16) != 0,
                                     .queue_size = 16})
                          .has_value();
  while (active && !input.empty()) {
    step(input, kit, backend);
  }
  kit.harness.pump(16);
  kit.harness.reset();
  return 0;
}
