// Interrupt lines into the chipset of the software CPU. Private to this folder.
#pragma once

#include <mutex>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "hypervisor/hypervisor.h"
#include "hypervisor/irq_line.h"
#include "hypervisor/soft/chipset.h"

namespace wisp::soft {

// An eventfd that pulses a line, for vhost and other processes. It is made when somebody first asks for it,
// and watched by the engine's thread.
class LineEvent final {
 public:
  LineEvent(EventLoop& loop, std::function<void()> pulse) : loop_(loop), pulse_(std::move(pulse)) {}
  LineEvent(const LineEvent&) = delete;
  LineEvent& operator=(const LineEvent&) = delete;
  ~LineEvent();
  // -1 where none can be made.
  [[nodiscard]] int fd();

 private:
  EventLoop& loop_;
  const std::function<void()> pulse_;
  std::mutex mutex_;  // held during pulses that come by the eventfd
  UniqueFd fd_;
  Watch watch_;
};

class PinLine final : public IrqLine {
 public:
  PinLine(EventLoop& loop, Chipset& chipset, std::uint32_t gsi)
      : chipset_(chipset), gsi_(gsi), event_(loop, [this] { pulse(); }) {}
  void pulse() override { chipset_.pulse(gsi_); }
  void set_level(bool high) override { chipset_.set_level(gsi_, high); }
  [[nodiscard]] int event_fd() const override { return event_.fd(); }

 private:
  Chipset& chipset_;
  const std::uint32_t gsi_;
  mutable LineEvent event_;
};

class MessageLine final : public IrqLine {
 public:
  MessageLine(EventLoop& loop, Chipset& chipset, const MsiMessage& message)
      : chipset_(chipset), message_(message), event_(loop, [this] { pulse(); }) {}
  void pulse() override { chipset_.bus().deliver_msi(message_.address, message_.data); }
  void set_level(bool /*high*/) override {}  // a message has no level
  [[nodiscard]] int event_fd() const override { return event_.fd(); }

 private:
  Chipset& chipset_;
  const MsiMessage message_;
  mutable LineEvent event_;
};

}  // namespace wisp::soft
