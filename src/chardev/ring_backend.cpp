#include "chardev/ring_backend.h"

namespace wisp {

std::string RingBackend::take(std::size_t most) {
  const std::lock_guard lock(mutex_);
  std::string text(std::min(most, ring_.size()), '\0');
  ring_.peek(std::span(reinterpret_cast<std::uint8_t*>(text.data()), text.size()));
  ring_.drop(text.size());
  return text;
}

std::size_t RingBackend::write(std::span<const std::uint8_t> bytes) {
  const std::lock_guard lock(mutex_);
  const auto kept = bytes.last(std::min(bytes.size(), ring_.capacity()));
  if (kept.size() > ring_.room()) {
    ring_.drop(kept.size() - ring_.room());
  }
  ring_.push(kept);
  return bytes.size();
}

}  // namespace wisp
