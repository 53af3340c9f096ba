// How long a processor that has nothing to do looks for work before its thread goes to sleep: waking a thread
// takes tens of microseconds, and a guest that waits for a device is often called within as much.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wisp::soft {

class HaltPoll final {
 public:
  static constexpr std::uint64_t kLongest = 100'000;  // ns
  static constexpr std::uint64_t kShortest = 10'000;

  // In ns; 0: sleep at once.
  [[nodiscard]] std::uint64_t window() const { return window_; }
  // A wait is over that took so many ns, looking and asleep: short ones call for looking, long ones speak
  // against it.
  void waited(std::uint64_t ns) {
    if (ns <= kLongest) {
      window_ = std::clamp(2 * window_, kShortest, kLongest);
    } else {
      window_ = window_ / 2 < kShortest ? 0 : window_ / 2;
    }
  }

 private:
  std::uint64_t window_ = 0;
};

}  // namespace wisp::soft
