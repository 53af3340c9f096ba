#include "virtio/console_port.h"

#include <algorithm>
#include <mutex>

namespace wisp {
namespace {

// Buffers without room that are handed back at once before the port waits for the next notification.
constexpr int kEmptyBuffers = 8;

}  // namespace

void VirtioConsole::Port::resume_input() {
  if (input_stopped) {
    input_stopped = false;
    backend.resume_input();
  }
}

void VirtioConsole::Port::forget() {
  ready = guest_open = false;
  pending = 0;
  output_blocked = transmit_held = receive_held = false;
  transmit_offset = 0;
}

// Has a chain with room in receive_chain, if there is one.
bool VirtioConsole::Port::take_receive_chain() {
  if (receive_held) {
    return true;
  }
  Queue* queue = owner.usable_queue(receive_queue());
  if (queue == nullptr || !open()) {
    return false;
  }
  for (int i = 0; i < kEmptyBuffers && owner.pop(receive_queue(), receive_chain); ++i) {
    if (receive_chain.writable_size() > 0) {
      receive_held = true;
      return true;
    }
    queue->push(receive_chain, 0);
    owner.interrupt(receive_queue());
  }
  return false;
}

std::size_t VirtioConsole::Port::can_receive() {
  const std::lock_guard lock(owner.strand().mutex());
  if (owner.paused() || !take_receive_chain()) {
    input_stopped = true;
    return 0;
  }
  return receive_chain.writable_size();
}

void VirtioConsole::Port::receive(std::span<const std::uint8_t> bytes) {
  const std::lock_guard lock(owner.strand().mutex());
  // More than can_receive() said, or a device that was reset since: the rest is lost, as on a real line.
  while (!bytes.empty() && !owner.paused() && take_receive_chain()) {
    const std::size_t count = receive_chain.write(0, bytes);
    owner.usable_queue(receive_queue())->push(receive_chain, static_cast<std::uint32_t>(count));
    receive_held = false;
    owner.interrupt(receive_queue());
    bytes = bytes.subspan(count);
  }
}

void VirtioConsole::Port::writable() {
  const std::lock_guard lock(owner.strand().mutex());
  output_blocked = false;
  owner.transmit(*this);
}

void VirtioConsole::Port::peer_changed() {
  const std::lock_guard lock(owner.strand().mutex());
  tell(kTellOpen);
}

void VirtioConsole::Port::resized(std::uint16_t new_columns, std::uint16_t new_rows) {
  const std::lock_guard lock(owner.strand().mutex());
  if (columns == new_columns && rows == new_rows) {
    return;
  }
  columns = new_columns;
  rows = new_rows;
  if (!options.console) {
    return;
  }
  tell(kTellSize);
  if (nr == 0 && owner.active_ && !owner.paused()) {
    owner.active_->interrupts->config_changed();
  }
}

}  // namespace wisp
