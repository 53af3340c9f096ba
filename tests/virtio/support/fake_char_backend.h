// A character back end under the test's control.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "chardev/char_backend.h"

namespace wisp::test {

// Not thread-safe beyond the thread that runs the device's event loop.
class FakeCharBackend final : public CharBackend {
 public:
  // Takes `room` bytes of output, then no more until set_room().
  explicit FakeCharBackend(std::size_t room = std::numeric_limits<std::size_t>::max()) : room_(room) {}

  std::size_t write(std::span<const std::uint8_t> bytes) override {
    const std::size_t count = std::min(bytes.size(), room_);
    room_ -= count;
    if (output_.size() < kKeptOutput) {
      output_.append(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count));
    }
    return count;
  }
  void set_receiver(CharReceiver* receiver) override { receiver_ = receiver; }
  void resume_input() override { ++resumes_; }
  [[nodiscard]] std::string description() const override { return "fake"; }
  [[nodiscard]] bool is_connected() const override { return connected_; }
  [[nodiscard]] std::pair<std::uint16_t, std::uint16_t> size() const override { return {80, 25}; }

  // What the outside does.
  // Offers bytes as a back end does; returns how many were taken.
  std::size_t input(std::string_view text) {
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
  void set_room(std::size_t room) {
    room_ = room;
    if (receiver_ != nullptr) {
      receiver_->writable();
    }
  }
  void set_connected(bool connected) {
    connected_ = connected;
    if (receiver_ != nullptr) {
      connected ? receiver_->connected() : receiver_->disconnected();
    }
  }
  void resize(std::uint16_t columns, std::uint16_t rows) {
    if (receiver_ != nullptr) {
      receiver_->resized(columns, rows);
    }
  }
  [[nodiscard]] std::string take_output() { return std::exchange(output_, {}); }
  [[nodiscard]] int resumes() const { return resumes_; }
  [[nodiscard]] bool has_receiver() const { return receiver_ != nullptr; }

 private:
  static constexpr std::size_t kKeptOutput = 1 << 20;
  std::size_t room_;
  std::string output_;
  CharReceiver* receiver_ = nullptr;
  bool connected_ = true;
  int resumes_ = 0;
};

}  // namespace wisp::test
