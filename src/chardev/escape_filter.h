// The escape key of a terminal that is the guest's console: control-A, then one more key.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace wisp {

class EscapeFilter final {
 public:
  static constexpr std::uint8_t kKey = 0x01;  // control-A

  struct Actions {
    std::function<void()> quit;        // x
    std::function<void()> send_break;  // b
    std::function<void()> help;        // h, ?
  };
  explicit EscapeFilter(Actions actions) : actions_(std::move(actions)) {}

  // Appends to `out` what is for the guest, never more bytes than came in, and does the actions on the way.
  // The key twice is the key once for the guest; any other key after it is dropped.
  void filter(std::span<const std::uint8_t> in, std::vector<std::uint8_t>& out);

 private:
  const Actions actions_;
  bool escaped_ = false;
};

}  // namespace wisp
