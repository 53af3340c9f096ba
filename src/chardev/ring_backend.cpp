#include "chardev/ring_backend.h"

namespace wisp {

std::string RingBackend::take() {
  const std::lock_guard lock(mutex_);
  std::string text(ring_.size(), '\0');
  ring_.peek(std::span(reinterpret_cast<std::uint8_t*>(text.data()), text.size()));
  ring_.clear();
  return text;
}

std::size_t RingBackend::put(std::string_view text) {
  const std::lock_guard lock(receiver_mutex_);
  std::size_t done = 0;
  while (receiver_ != nullptr && done < text.size()) {
    const std::size_t count = std::min(receiver_->can_receive(), text.size() - done);
    if (count == 0) {
      break;
    }
    receiver_->receive(std::span(reinterpret_cast<const std::uint8_t*>(text.data()) + done, count));
    done += count;
  }
  return done;
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

void RingBackend::set_receiver(CharReceiver* receiver) {
  const std::lock_guard lock(receiver_mutex_);
  receiver_ = receiver;
}

}  // namespace wisp
