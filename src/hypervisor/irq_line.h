// Interrupt inputs, as devices see them.
#pragma once

namespace wisp {

// One input of the interrupt controllers (a GSI). Thread-safe.
class IrqLine {
 public:
  virtual ~IrqLine() = default;
  // An edge: up and down.
  virtual void pulse() = 0;
  // A level, for level-triggered inputs.
  virtual void set_level(bool high) = 0;
  // An eventfd whose signal is a pulse (for vhost and other processes), borrowed; -1 where the engine has
  // none.
  [[nodiscard]] virtual int event_fd() const = 0;
};

}  // namespace wisp
