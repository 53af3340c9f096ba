// A driver of the block device, for tests, the fuzz target and the benchmark; free of any test framework.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "virtio/blk.h"
#include "virtio/support/device_harness.h"

namespace wisp::test {

enum BlkType : std::uint32_t {
  kBlkIn = 0,
  kBlkOut = 1,
  kBlkFlush = 4,
  kBlkGetId = 8,
  kBlkGetLifetime = 10,
  kBlkDiscard = 11,
  kBlkWriteZeroes = 13,
  kBlkSecureErase = 14,
};

struct BlkSegment {
  std::uint64_t sector = 0;
  std::uint32_t sectors = 0;
  std::uint32_t flags = 0;
};
static_assert(sizeof(BlkSegment) == 16);

class BlkDriver final {
 public:
  static constexpr std::uint8_t kNoStatus = 0xaa;

  BlkDriver(BlockBackend& backend, const VirtioBlkOptions& options, FakeGuest* guest = nullptr)
      : harness(
            [&](EventLoop& loop, const GuestMemory& memory) -> std::unique_ptr<VirtioDevice> {
              return VirtioBlk::create(loop, memory, options, backend, log, clock).value();
            },
            guest) {
    log.set_fd(-1);
  }

  [[nodiscard]] VirtioBlk& device() { return harness.device_as<VirtioBlk>(); }

  // The 16 bytes in front of every request.
  Gpa header(std::uint32_t type, std::uint64_t sector) {
    std::array<std::uint8_t, 16> bytes{};
    store_le<std::uint32_t>(bytes.data(), type);
    store_le<std::uint64_t>(&bytes[8], sector);
    return harness.guest().allocate(std::span<const std::uint8_t>(bytes));
  }
  // A status byte that the device must overwrite.
  Gpa status() {
    const Gpa at = harness.guest().allocate(1);
    harness.guest().store<std::uint8_t>(at, kNoStatus);
    return at;
  }

  // One request under way.
  struct Pending {
    std::uint16_t head = 0;
    Gpa data = 0;
    Gpa status = 0;
  };
  Pending start_read(std::uint64_t sector, std::uint32_t size, std::uint16_t queue = 0) {
    Pending pending{.data = harness.guest().allocate(size + 1), .status = status()};
    ChainBuilder chain;
    chain.readable(header(kBlkIn, sector), 16);
    if (size > 0) {
      chain.writable(pending.data, size);
    }
    pending.head = harness.submit(queue, chain.writable(pending.status, 1));
    return pending;
  }
  Pending start_write(std::uint64_t sector, std::span<const std::uint8_t> data, std::uint16_t queue = 0) {
    Pending pending{.data = data.empty() ? 0 : harness.guest().allocate(data), .status = status()};
    ChainBuilder chain;
    chain.readable(header(kBlkOut, sector), 16);
    if (!data.empty()) {
      chain.readable(pending.data, static_cast<std::uint32_t>(data.size()));
    }
    pending.head = harness.submit(queue, chain.writable(pending.status, 1));
    return pending;
  }
  Pending start_flush(std::uint16_t queue = 0) {
    Pending pending{.status = status()};
    pending.head =
        harness.submit(queue, ChainBuilder().readable(header(kBlkFlush, 0), 16).writable(pending.status, 1));
    return pending;
  }
  // Any type, with data for the device to read.
  Pending start(std::uint32_t type, std::span<const std::uint8_t> data, std::uint64_t sector = 0) {
    Pending pending{.data = data.empty() ? 0 : harness.guest().allocate(data), .status = status()};
    ChainBuilder chain;
    chain.readable(header(type, sector), 16);
    if (!data.empty()) {
      chain.readable(pending.data, static_cast<std::uint32_t>(data.size()));
    }
    pending.head = harness.submit(0, chain.writable(pending.status, 1));
    return pending;
  }
  Pending start_ranges(std::uint32_t type, const std::vector<BlkSegment>& segments) {
    return start(type,
                 std::span(reinterpret_cast<const std::uint8_t*>(segments.data()), segments.size() * 16));
  }
  // The status byte once the request came back, kNoStatus where it did not.
  std::uint8_t finish(const Pending& pending, std::uint16_t queue = 0) {
    last_used = harness.wait_used(queue);
    if (!last_used || last_used->head != pending.head) {
      return kNoStatus;
    }
    return harness.guest().load<std::uint8_t>(pending.status);
  }
  // Activates anew with fresh rings, forgetting all guest memory.
  [[nodiscard]] bool restart(const DeviceHarness::Setup& setup) {
    harness.reset();
    harness.guest().clear();
    return harness.activate(setup).has_value();
  }

  Log log;
  SystemClock clock;
  DeviceHarness harness;
  std::optional<FakeQueue::Used> last_used;
};

}  // namespace wisp::test
