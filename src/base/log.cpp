#include "base/log.h"

#include <unistd.h>

#include <algorithm>
#include <string>

namespace wisp {
namespace {

constexpr std::size_t kMaxLine = 2000;

std::string_view level_name(LogLevel level) {
  switch (level) {
    case LogLevel::kError:
      return "error: ";
    case LogLevel::kWarning:
      return "warning: ";
    case LogLevel::kInfo:
      return "";
    case LogLevel::kDebug:
      return "debug: ";
  }
  return "";
}

}  // namespace

void Log::write(LogLevel level, std::string_view message) {
  if (!wants(level)) {
    return;
  }
  std::string line = "wisp: ";
  line += level_name(level);
  line += message.substr(0, kMaxLine);
  // A message may quote text from a guest: it must not steer the terminal.
  std::ranges::replace_if(
      line, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  line += '\n';
  [[maybe_unused]] const ssize_t written =
      ::write(fd_.load(std::memory_order_relaxed), line.data(), line.size());
}

bool LogGate::open() {
  const std::uint64_t now = clock_.monotonic_ns();
  const std::uint64_t refill = (now - refilled_ns_) / interval_ns_;
  if (refill > 0) {
    tokens_ = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(burst_, tokens_ + std::min<std::uint64_t>(refill, burst_)));
    refilled_ns_ = now;
  }
  if (tokens_ == 0) {
    return false;
  }
  --tokens_;
  return true;
}

}  // namespace wisp
