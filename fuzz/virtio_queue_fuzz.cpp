// The split virtqueue over rings that hold the fuzzer's bytes.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "virtio/queue.h"
#include "virtio/support/fake_queue.h"

namespace {

constexpr std::uint64_t kRam = 0x8000;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace wisp;
  static test::FakeGuest guest({{test::FakeGuest::kBase, kRam}});
  guest.clear();
  if (size < 4) {
    return 0;
  }
  const std::uint8_t shape = data[0];
  const auto ring_size = static_cast<std::uint16_t>(1U << (shape & 7));
  const std::uint64_t features = kVirtioFeatureVersion1 |
                                 ((shape & 8) != 0 ? kVirtioFeatureIndirectDesc : 0) |
                                 ((shape & 16) != 0 ? kVirtioFeatureEventIdx : 0);
  std::span<const std::uint8_t> input(data + 1, size - 1);
  const Gpa base = guest.base();
  const Gpa table = base + 0x200;
  const QueueConfig config{.max_size = 128,
                           .size = ring_size,
                           .ready = true,
                           .descriptor_table = table,
                           .available_ring = base,
                           .used_ring = base + 0x7000};
  // The first bytes are the available ring, the next six bytes a descriptor each (mostly inside RAM), the
  // rest lies raw where indirect tables may be, and where the first descriptors are for shapes that want wild
  // ones.
  const auto take = [&](std::size_t count) {
    const auto taken = input.first(std::min(count, input.size()));
    input = input.subspan(taken.size());
    return taken;
  };
  guest.write(base, take(6 + 2ULL * ring_size));
  for (std::uint16_t i = 0; i < ring_size && !input.empty(); ++i) {
    std::uint8_t bytes[6]{};
    std::ranges::copy(take(sizeof bytes), bytes);
    guest.store(table + 16ULL * i, test::FakeDescriptor{.address = base + load_le<std::uint16_t>(bytes),
                                                        .length = load_le<std::uint16_t>(bytes + 2) & 0xfffU,
                                                        .flags = bytes[4],
                                                        .next = bytes[5]});
  }
  const Gpa raw = (shape & 32) != 0 ? table : base + 0x1000;
  guest.write(raw, input.first(std::min<std::size_t>(input.size(), 0x5000)));
  Result<Queue> queue = Queue::activate(config, guest.memory(), features);
  if (!queue) {
    __builtin_trap();
  }
  std::vector<DescriptorChain> held(8);
  std::size_t count = 0;
  std::vector<iovec> iovecs;
  std::vector<std::uint8_t> bytes(64);
  for (int i = 0; i < 1024; ++i) {
    DescriptorChain& chain = held[count];
    if (queue->pop(chain) != PopResult::kChain) {
      break;
    }
    iovecs.clear();
    std::size_t covered = chain.readable_iovecs(data[1], 100, iovecs);
    covered += chain.writable_iovecs(data[2], 100, iovecs);
    for (const iovec& part : iovecs) {
      // Every byte of every buffer is RAM: touching its ends would crash otherwise.
      const auto* at = static_cast<const volatile std::uint8_t*>(part.iov_base);
      static_cast<void>(at[0]);
      static_cast<void>(at[part.iov_len - 1]);
      covered -= part.iov_len;
    }
    if (covered != 0) {
      __builtin_trap();
    }
    static_cast<void>(chain.read(data[3], bytes));
    const std::size_t written = chain.write(0, std::span(bytes).first(8));
    if (++count == held.size()) {
      while (count > 0) {
        --count;
        queue->push(held[count], count + 1 == held.size() ? static_cast<std::uint32_t>(written) : 0);
      }
      static_cast<void>(queue->take_interrupt_wish());
      static_cast<void>(queue->enable_notifications());
    }
  }
  while (count > 0) {
    queue->undo_pop(held[--count]);
  }
  if (queue->in_flight() != 0) {
    __builtin_trap();
  }
  return 0;
}
