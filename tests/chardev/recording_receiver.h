// A receiver that keeps what it is given, with as much room as a test allows.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "chardev/char_backend.h"

namespace wisp {

class RecordingReceiver final : public CharReceiver {
 public:
  std::size_t can_receive() override { return room; }
  void receive(std::span<const std::uint8_t> bytes) override {
    overfed = overfed || bytes.size() > room;
    room -= std::min<std::size_t>(room, bytes.size());
    const std::lock_guard lock(mutex_);
    text_.append(bytes.begin(), bytes.end());
  }
  void connected() override { ++connects; }
  void disconnected() override { ++disconnects; }
  void writable() override { ++writables; }
  void resized(std::uint16_t columns, std::uint16_t rows) override { size = {columns, rows}; }
  void receive_break() override { ++breaks; }

  [[nodiscard]] std::string text() const {
    const std::lock_guard lock(mutex_);
    return text_;
  }

  std::atomic<std::size_t> room = SIZE_MAX;
  std::atomic<int> connects = 0;
  std::atomic<int> disconnects = 0;
  std::atomic<int> writables = 0;
  std::atomic<int> breaks = 0;
  std::pair<std::uint16_t, std::uint16_t> size{};
  std::atomic<bool> overfed = false;

 private:
  mutable std::mutex mutex_;
  std::string text_;
};

}  // namespace wisp
