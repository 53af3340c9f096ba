#include "virtio/hostile_devices.h"

#include <utility>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/log.h"
#include "block/support/memory_backend.h"
#include "virtio/balloon.h"
#include "virtio/blk.h"
#include "virtio/console.h"
#include "virtio/net_kit.h"
#include "virtio/rng.h"
#include "virtio/support/fake_char_backend.h"
#include "virtio/vsock_kit.h"

namespace wisp::test {
namespace {

// Puts a T behind Keep and gives a reference to it.
template <typename T, typename... Args>
T& keep_new(Keep& keep, Args&&... args) {
  auto kept = std::make_shared<T>(std::forward<Args>(args)...);
  T& reference = *kept;
  keep.push_back(std::move(kept));
  return reference;
}

Log& quiet_log(Keep& keep) {
  return keep_new<Log>(keep, -1);
}

std::unique_ptr<VirtioDevice> make_rng(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  return VirtioRng::create(loop, memory, {.id = "rng0", .rng = "source"}, std::make_unique<SystemEntropy>(),
                           quiet_log(keep), keep_new<SystemClock>(keep))
      .value();
}

std::unique_ptr<VirtioDevice> make_limited_rng(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  return VirtioRng::create(loop, memory, {.id = "rng0", .rng = "source", .max_bytes = 64, .period_ms = 1},
                           std::make_unique<SystemEntropy>(), quiet_log(keep), keep_new<SystemClock>(keep))
      .value();
}

struct DeafBalloonHost final : BalloonHost {
  [[nodiscard]] Result<void> discard(Gpa, std::uint64_t) override { return {}; }
  void balloon_changed(std::uint64_t) override {}
};

std::unique_ptr<VirtioDevice> make_balloon(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  return VirtioBalloon::create(loop, memory,
                               {.id = "balloon0", .deflate_on_oom = true, .free_page_reporting = true},
                               keep_new<DeafBalloonHost>(keep), quiet_log(keep), keep_new<SystemClock>(keep))
      .value();
}

std::unique_ptr<VirtioDevice> make_console(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  // A console that takes everything, a port that takes a little, and a hole between them.
  std::vector<VirtioConsolePort> ports;
  ports.push_back(
      {{.id = "hvc", .chardev = "a", .nr = 0, .console = true}, &keep_new<FakeCharBackend>(keep)});
  ports.push_back({{.id = "vport", .chardev = "b", .nr = 2, .name = "org.example"},
                   &keep_new<FakeCharBackend>(keep, 100U)});
  return VirtioConsole::create(loop, memory, {.id = "serial0"}, std::move(ports), quiet_log(keep),
                               keep_new<SystemClock>(keep))
      .value();
}

std::unique_ptr<VirtioDevice> make_blk(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  return VirtioBlk::create(loop, memory, {.id = "blk0", .drive = "disk", .serial = "S", .num_queues = 2},
                           keep_new<MemoryBackend>(keep, 1UL << 20), quiet_log(keep),
                           keep_new<SystemClock>(keep))
      .value();
}

// With all offloads and three queue pairs.
std::unique_ptr<VirtioDevice> make_net(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  Netdev netdev;
  netdev.backend = std::make_unique<FakeNetBackend>(true, 3);
  return VirtioNet::create(loop, memory, {.id = "net0"}, std::move(netdev), keep_new<FixedEntropy>(keep),
                           quiet_log(keep), keep_new<SystemClock>(keep))
      .value();
}

// Without headers, and with frames that wait to be received.
std::unique_ptr<VirtioDevice> make_plain_net(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  auto backend = std::make_unique<FakeNetBackend>(false, 1);
  for (std::size_t i = 0; i < 64; ++i) {
    backend->inject(make_frame(14 + 1024 * i, static_cast<std::uint8_t>(i)));
  }
  Netdev netdev;
  netdev.backend = std::move(backend);
  return VirtioNet::create(loop, memory, {.id = "net0"}, std::move(netdev), keep_new<FixedEntropy>(keep),
                           quiet_log(keep), keep_new<SystemClock>(keep))
      .value();
}

std::unique_ptr<VirtioDevice> make_vsock(EventLoop& loop, const GuestMemory& memory, Keep& keep) {
  return VirtioVsock::create(loop, memory,
                             {.id = "vsock0", .guest_cid = 42, .path = keep_new<TempDir>(keep).file("v")},
                             quiet_log(keep), keep_new<SystemClock>(keep))
      .value();
}

}  // namespace

std::vector<HostileDevice> hostile_devices() {
  return {
      {"rng", make_rng},
      {"limited_rng", make_limited_rng},
      {"balloon", make_balloon},
      {"console", make_console},
      {"blk", make_blk},
      {"net", make_net},
      {"plain_net", make_plain_net},
      {"vsock", make_vsock},
  };
}

}  // namespace wisp::test
