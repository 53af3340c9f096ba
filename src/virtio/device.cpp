#include "virtio/device.h"

#include <algorithm>

namespace wisp {

void VirtioDevice::on_resume() {
  for (std::uint16_t i = 0; std::size_t{i} < queue_sizes().size(); ++i) {
    if (queue(i) != nullptr) {
      notify(i);
    }
  }
}

void read_config_bytes(std::span<const std::uint8_t> config, std::uint64_t offset,
                       std::span<std::uint8_t> data) {
  std::ranges::fill(data, std::uint8_t{0});
  if (offset >= config.size()) {
    return;
  }
  const auto there = config.subspan(static_cast<std::size_t>(offset));
  std::ranges::copy(there.first(std::min(there.size(), data.size())), data.begin());
}

}  // namespace wisp
