// Lines for the log that a guest can cause: each text once, and not without end.
#pragma once

#include <functional>
#include <mutex>
#include <set>
#include <string>

namespace wisp::soft {

// Thread-safe.
class Notes final {
 public:
  explicit Notes(std::function<void(const std::string&)> write) : write_(std::move(write)) {}
  void add(const std::string& text) {
    constexpr std::size_t kMost = 64;
    const std::lock_guard lock(mutex_);
    if (!write_ || told_.size() >= kMost || !told_.insert(text).second) {
      return;
    }
    write_(text);
    if (told_.size() == kMost) {
      write_("more of such lines are left out");
    }
  }

 private:
  const std::function<void(const std::string&)> write_;
  std::mutex mutex_;
  std::set<std::string> told_;
};

}  // namespace wisp::soft
