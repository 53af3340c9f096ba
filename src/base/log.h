// One line per message to a file descriptor, bounded so that a guest cannot make it grow without end.
#pragma once

#include <atomic>
#include <cstdint>
#include <string_view>
#include <utility>

#include "base/clock.h"
#include "base/error.h"

namespace wisp {

enum class LogLevel : std::uint8_t { kError, kWarning, kInfo, kDebug };

// Thread-safe; each line is one write(2) and no lock is taken.
class Log final {
 public:
  explicit Log(int fd = 2, LogLevel level = LogLevel::kWarning) : fd_(fd), level_(level) {}
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

  // Messages above this level are dropped.
  void set_level(LogLevel level) { level_.store(level, std::memory_order_relaxed); }
  // The descriptor is borrowed.
  void set_fd(int fd) { fd_.store(fd, std::memory_order_relaxed); }
  [[nodiscard]] bool wants(LogLevel level) const { return level <= level_.load(std::memory_order_relaxed); }

  template <typename... Args>
  void error(fmt::format_string<Args...> format, Args&&... args) {
    write(LogLevel::kError, fmt::format(format, std::forward<Args>(args)...));
  }
  template <typename... Args>
  void warning(fmt::format_string<Args...> format, Args&&... args) {
    write(LogLevel::kWarning, fmt::format(format, std::forward<Args>(args)...));
  }
  template <typename... Args>
  void info(fmt::format_string<Args...> format, Args&&... args) {
    if (wants(LogLevel::kInfo)) {
      write(LogLevel::kInfo, fmt::format(format, std::forward<Args>(args)...));
    }
  }
  template <typename... Args>
  void debug(fmt::format_string<Args...> format, Args&&... args) {
    if (wants(LogLevel::kDebug)) {
      write(LogLevel::kDebug, fmt::format(format, std::forward<Args>(args)...));
    }
  }
  void write(LogLevel level, std::string_view message);

 private:
  std::atomic<int> fd_;
  std::atomic<LogLevel> level_;
};

// A gate for messages that a guest can cause: `burst` of them at once, then one each `interval_ns`.
// Not thread-safe: one gate per device, used under the device's lock.
class LogGate final {
 public:
  explicit LogGate(const Clock& clock, std::uint32_t burst = 8, std::uint64_t interval_ns = 5'000'000'000)
      : clock_(clock), burst_(burst), interval_ns_(interval_ns), tokens_(burst) {}
  // Whether a message may be written now.
  [[nodiscard]] bool open();

 private:
  const Clock& clock_;
  const std::uint32_t burst_;
  const std::uint64_t interval_ns_;
  std::uint32_t tokens_;
  std::uint64_t refilled_ns_ = 0;
};

}  // namespace wisp
