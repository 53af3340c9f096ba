// Handlers and listeners that write down what they are told.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "memory/address_space.h"

namespace wisp {

inline std::string text_of(const FlatRange& range) {
  return fmt::format("{:x}-{:x} {}@{:x}\n", range.start, range.start + (range.size - 1), range.name,
                     range.region_offset);
}

inline std::string text_of(const FlatView& view) {
  std::string text;
  for (const FlatRange& range : view.ranges()) {
    text += text_of(range);
  }
  return text;
}

class RecordingHandler final : public IoHandler {
 public:
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override {
    text_ += fmt::format("r{:x}+{}\n", offset, data.size());
    std::ranges::fill(data, std::uint8_t{0});
  }
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override {
    text_ += fmt::format("w{:x}:", offset);
    for (const std::uint8_t byte : data) {
      text_ += fmt::format("{:02x}", byte);
    }
    text_ += '\n';
  }
  [[nodiscard]] std::string take() { return std::exchange(text_, {}); }

 private:
  std::string text_;
};

class RecordingListener final : public AddressSpaceListener {
 public:
  Result<void> range_added(const FlatRange& range) override {
    if (range.name == refuse) {
      return fail("no room");
    }
    text_ += "+" + text_of(range);
    present_.push_back(text_of(range));
    return {};
  }
  void range_removed(const FlatRange& range) override {
    text_ += "-" + text_of(range);
    const auto found = std::ranges::find(present_, text_of(range));
    WISP_ASSERT(found != present_.end());
    present_.erase(found);
  }
  [[nodiscard]] std::string take() { return std::exchange(text_, {}); }
  // What it has been told is there now, sorted as text.
  [[nodiscard]] std::string present() const {
    std::vector<std::string> sorted = present_;
    std::ranges::sort(sorted);
    std::string text;
    for (const std::string& line : sorted) {
      text += line;
    }
    return text;
  }

  std::string refuse;  // name of the region whose addition it refuses

 private:
  std::string text_;
  std::vector<std::string> present_;
};

}  // namespace wisp
