#include "virtio/hostile_devices.h"

#include <utility>

#include "base/clock.h"
#include "base/entropy.h"
#include "base/log.h"
#include "virtio/rng.h"

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

}  // namespace

std::vector<HostileDevice> hostile_devices() {
  return {
      {"rng", make_rng},
      {"limited_rng", make_limited_rng},
  };
}

}  // namespace wisp::test
