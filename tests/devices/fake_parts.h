// What simple devices are given in tests.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "chardev/char_backend.h"
#include "devices/device.h"
#include "hypervisor/irq_line.h"

namespace wisp {

// What a line was told; outlives the line.
struct IrqRecord {
  std::atomic<int> pulses = 0;
  std::atomic<bool> level = false;
};

class FakeIrqLine final : public IrqLine {
 public:
  explicit FakeIrqLine(IrqRecord& record) : record_(record) {}
  void pulse() override { ++record_.pulses; }
  void set_level(bool high) override { record_.level = high; }
  [[nodiscard]] int event_fd() const override { return -1; }

 private:
  IrqRecord& record_;
};

class FakeClock final : public Clock {
 public:
  [[nodiscard]] std::uint64_t monotonic_ns() const override { return now.load(); }
  [[nodiscard]] std::uint64_t realtime_ns() const override { return now.load(); }
  void advance(std::uint64_t ns) { now += ns; }
  std::atomic<std::uint64_t> now = 1'000'000'000'000'000'000;  // 2001-09-09 01:46:40 UTC
};

// Takes as much as the test allows.
class FakeCharBackend final : public CharBackend {
 public:
  std::size_t write(std::span<const std::uint8_t> bytes) override {
    const std::size_t count = std::min(bytes.size(), room);
    room -= count;
    written.append(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }
  void set_receiver(CharReceiver* receiver) override { receiver_ = receiver; }
  void resume_input() override { ++resumed; }
  [[nodiscard]] std::string description() const override { return "fake"; }
  [[nodiscard]] bool is_connected() const override { return true; }

  // Gives the receiver what it can take of the text, as the loop of a back end would; returns the rest.
  std::string offer(std::string text) {
    while (!text.empty() && receiver_ != nullptr) {
      const std::size_t count = std::min(receiver_->can_receive(), text.size());
      if (count == 0) {
        break;
      }
      receiver_->receive(std::span(reinterpret_cast<const std::uint8_t*>(text.data()), count));
      text.erase(0, count);
    }
    return text;
  }
  void make_room(std::size_t bytes) {
    room = bytes;
    receiver_->writable();
  }
  [[nodiscard]] bool has_receiver() const { return receiver_ != nullptr; }

  std::string written;
  std::size_t room = SIZE_MAX;
  int resumed = 0;

 private:
  CharReceiver* receiver_ = nullptr;
};

inline std::uint8_t in8(IoHandler& device, std::uint64_t offset) {
  std::uint8_t value = 0;
  device.io_read(offset, std::span(&value, 1));
  return value;
}

inline std::uint64_t in(IoHandler& device, std::uint64_t offset, std::size_t size) {
  std::uint8_t data[8] = {};
  device.io_read(offset, std::span(data, size));
  return bytes_to_u64(std::span(data, size));
}

inline void out(IoHandler& device, std::uint64_t offset, std::uint64_t value, std::size_t size = 1) {
  std::uint8_t data[8] = {};
  u64_to_bytes(value, std::span(data, size));
  device.io_write(offset, std::span<const std::uint8_t>(data, size));
}

}  // namespace wisp
