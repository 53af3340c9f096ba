// A hostile driver of the user-space socket device, with programs of the host that come, talk, hang and go.
#include <vector>

#include "net_hostile_driver.h"
#include "virtio/vsock_kit.h"

namespace {

using namespace wisp;
using namespace wisp::test;

struct World {
  World() : listener(listen_unix(kit.path + "_1", 16)) {
    kit.refill = false;
    kit.activate(4, 16);
  }
  VsockKit kit{1UL << 20};
  UniqueFd listener;
  std::vector<UniqueFd> peers;
};

void send_packet(fuzz::Input& input, World& world) {
  const auto bits = input.get<std::uint8_t>();
  VsockHeader header = world.kit.packet(static_cast<VsockOp>(input.get<std::uint8_t>() % 10),
                                        input.get<std::uint8_t>() % 4, 1);
  if ((bits & 1) != 0) {  // a stream that the host began
    header.dst_port = (1U << 30) + input.get<std::uint8_t>() % 4;
  }
  if ((bits & 2) != 0) {
    header.buf_alloc = input.get<std::uint32_t>();
    header.fwd_cnt = input.get<std::uint16_t>();
  }
  if ((bits & 12) == 4) {
    header.src_cid = input.get<std::uint8_t>();
    header.type = input.get<std::uint8_t>();
    header.dst_cid = input.get<std::uint8_t>() % 4;
  }
  header.flags = bits >> 6;
  const std::size_t size = (bits & 16) != 0 ? input.get<std::uint16_t>() : input.get<std::uint8_t>();
  header.length = static_cast<std::uint32_t>(size) + ((bits & 32) != 0 ? input.get<std::uint32_t>() : 0);
  // Straight into the ring, at a place that is always free.
  DeviceHarness& harness = *world.kit.harness;
  const Gpa at = harness.guest().base() + 0x40000;
  const auto head = header.bytes();
  harness.guest().write(at, head);
  FakeQueue& ring = harness.queue(1);
  ring.set_descriptor(0, {.address = at, .length = kVsockHeaderSize, .flags = kDescNext, .next = 1});
  ring.set_descriptor(1, {.address = at + kVsockHeaderSize, .length = static_cast<std::uint32_t>(size)});
  ring.publish(0);
  harness.notify(1);
}

void step(fuzz::Input& input, World& world) {
  DeviceHarness& harness = *world.kit.harness;
  const auto choice = input.get<std::uint8_t>();
  switch (choice % 12) {
    case 0:
      fuzz_ring(input, harness, static_cast<std::uint16_t>(choice >> 4) % 3);
      break;
    case 1:
      fuzz_publish(input, harness, 0, true, 40);
      harness.notify(0);
      break;
    case 2:
    case 3:
    case 4:
      send_packet(input, world);
      break;
    case 5:
      harness.pump(4);
      break;
    case 6:  // a program of the host comes
      if (world.peers.size() < 16) {
        UniqueFd peer = connect_unix(world.kit.path);
        const auto text = (choice & 16) != 0
                              ? std::string("CONNECT 1\nhello")
                              : std::string("CONNECT ") + static_cast<char>(input.get<char>()) + "\n";
        (void)::send(peer.get(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        world.peers.push_back(std::move(peer));
      }
      break;
    case 7:  // one that the guest called answers
      if (UniqueFd peer(::accept4(world.listener.get(), nullptr, nullptr, SOCK_CLOEXEC)); peer.valid()) {
        world.peers.push_back(std::move(peer));
      }
      break;
    case 8:
      if (!world.peers.empty()) {
        const std::vector<std::uint8_t> bytes(input.get<std::uint16_t>());
        const auto which = input.get<std::uint8_t>() % world.peers.size();
        (void)::send(world.peers[which].get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      }
      break;
    case 9:
      if (!world.peers.empty()) {
        const auto which = input.get<std::uint8_t>() % world.peers.size();
        if ((choice & 16) != 0) {
          ::shutdown(world.peers[which].get(), (choice >> 5) % 3);
        } else {
          world.peers.erase(world.peers.begin() + static_cast<std::ptrdiff_t>(which));
        }
      }
      break;
    case 10:
      if ((choice & 0xf0) == 0x10) {
        world.kit.clock.shift_ns += 6'000'000'000;
      } else {
        harness.pause();
        harness.pump(2);
        harness.resume();
      }
      break;
    default:
      if ((choice & 0xf0) == 0) {
        harness.reset();
        harness.guest().clear();
        world.kit.activate(4, 16);
      }
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 2048) {
    return 0;
  }
  fuzz::Input input(data, size);
  World world;
  while (!input.empty()) {
    step(input, world);
  }
  world.kit.harness->pump(16);
  WISP_ASSERT(world.kit.device().connection_count() <= VsockMux::kMaxConnections);
  return 0;
}
