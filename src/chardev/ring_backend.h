// A back end in memory: keeps the last bytes written, and gives the receiver what a test or QMP puts in.
#pragma once

#include <mutex>
#include <string>
#include <string_view>

#include "chardev/byte_ring.h"
#include "chardev/char_backend.h"

namespace wisp {

class RingBackend final : public CharBackend {
 public:
  explicit RingBackend(std::size_t capacity = 64 << 10) : ring_(capacity) {}

  // What was written since the last take(), at most the capacity; the oldest bytes are lost first.
  [[nodiscard]] std::string take();
  // Gives the receiver as much as it has room for, on this thread; returns how much that was.
  std::size_t put(std::string_view text);

  std::size_t write(std::span<const std::uint8_t> bytes) override;
  void set_receiver(CharReceiver* receiver) override;
  void resume_input() override {}
  [[nodiscard]] std::string description() const override { return "ring"; }
  [[nodiscard]] bool is_connected() const override { return true; }

 private:
  std::mutex mutex_;
  ByteRing ring_;
  std::mutex receiver_mutex_;
  CharReceiver* receiver_ = nullptr;
};

}  // namespace wisp
