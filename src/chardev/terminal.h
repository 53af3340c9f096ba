// The mode of the terminal that the program was started from.
#pragma once

#include <termios.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "base/error.h"

namespace wisp {

// A terminal in raw mode; back in its former mode when this goes, or when restore_terminal() is called.
class RawTerminal final {
 public:
  // Null where `fd` is no terminal, or one that this process is in the background of (changing it would
  // disturb whoever is in the foreground). The descriptor is borrowed. `keep_signals`: control-C and its like
  // still send signals. Output processing stays on, so that a bare line feed starts a line.
  [[nodiscard]] static std::unique_ptr<RawTerminal> enter(int fd, bool keep_signals);
  RawTerminal(const RawTerminal&) = delete;
  RawTerminal& operator=(const RawTerminal&) = delete;
  ~RawTerminal();

  // Once; async-signal-safe.
  void restore() noexcept;

 private:
  RawTerminal(int fd, const termios& former) : fd_(fd), former_(former) {}
  const int fd_;
  const termios former_;
  std::atomic<bool> raw_ = true;
};

// Puts the terminal of this process back to its former mode, where one is raw. Async-signal-safe: for
// handlers of deadly signals.
void restore_terminal() noexcept;

// Columns and rows; 0, 0 where it is no terminal.
[[nodiscard]] std::pair<std::uint16_t, std::uint16_t> terminal_size(int fd);

}  // namespace wisp
