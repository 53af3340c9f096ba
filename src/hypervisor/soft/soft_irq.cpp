#include "hypervisor/soft/soft_irq.h"

namespace wisp::soft {

LineEvent::~LineEvent() {
  // With the guard held the callback is not running and will not run again.
  const std::lock_guard lock(mutex_);
  watch_.stop();
}

int LineEvent::fd() {
  const std::lock_guard lock(mutex_);
  if (fd_.valid()) {
    return fd_.get();
  }
  auto made = make_eventfd();
  if (!made) {
    return -1;
  }
  const int raw = made->get();
  auto watch = loop_.watch(
      raw, EPOLLIN,
      [this, raw](std::uint32_t /*events*/) {
        if (drain_eventfd(raw) != 0) {
          pulse_();
        }
      },
      &mutex_);
  if (!watch) {
    return -1;
  }
  fd_ = *std::move(made);
  watch_ = *std::move(watch);
  return raw;
}

}  // namespace wisp::soft
