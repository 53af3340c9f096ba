// A back end in memory: keeps the last bytes written, for whoever takes them (QMP ringbuf-read).
#pragma once

#include <mutex>
#include <string>

#include "chardev/byte_ring.h"
#include "chardev/char_backend.h"

namespace wisp {

class RingBackend final : public CharBackend {
 public:
  explicit RingBackend(std::size_t capacity = 64 << 10) : ring_(capacity) {}

  // The oldest of the bytes that are kept, at most `most`, which are forgotten here.
  [[nodiscard]] std::string take(std::size_t most);

  // Takes all; past the capacity the oldest are lost.
  std::size_t write(std::span<const std::uint8_t> bytes) override;
  // No bytes ever come in.
  void set_receiver(CharReceiver* /*receiver*/) override {}
  void resume_input() override {}
  [[nodiscard]] std::string description() const override { return "ringbuf"; }
  [[nodiscard]] bool is_connected() const override { return true; }

 private:
  std::mutex mutex_;
  ByteRing ring_;
};

}  // namespace wisp
