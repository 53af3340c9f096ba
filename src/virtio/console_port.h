// One port of the console device; part of VirtioConsole's implementation.
#pragma once

#include <cstdint>
#include <span>

#include "chardev/char_backend.h"
#include "virtio/console.h"

namespace wisp {

// Called by its back end on the back end's event loop: takes the device's lock.
class VirtioConsole::Port final : public CharReceiver {
 public:
  Port(VirtioConsole& console, VirtioConsolePort port, std::uint32_t number)
      : owner(console), options(std::move(port.options)), backend(*port.backend), nr(number) {}

  // What the driver is still to be told, in this order.
  static constexpr std::uint8_t kTellAdd = 1;
  static constexpr std::uint8_t kTellConsole = 2;
  static constexpr std::uint8_t kTellSize = 4;
  static constexpr std::uint8_t kTellName = 8;
  static constexpr std::uint8_t kTellOpen = 16;
  static constexpr std::uint8_t kTellAll = 31;

  // Port 0 has the first two queues, the control queues are the next two (5.3.2).
  [[nodiscard]] std::uint16_t receive_queue() const {
    return static_cast<std::uint16_t>(nr == 0 ? 0 : 2 * nr + 2);
  }
  [[nodiscard]] std::uint16_t transmit_queue() const {
    return static_cast<std::uint16_t>(receive_queue() + 1);
  }
  // Whether the driver reads from this port.
  [[nodiscard]] bool open() const { return owner.multiport() ? guest_open : nr == 0; }
  [[nodiscard]] bool host_open() const { return options.console || backend.is_connected(); }
  void tell(std::uint8_t bits) {
    if (ready) {
      pending = static_cast<std::uint8_t>(pending | bits);
      owner.send_control();
    }
  }
  // Lets the back end read again, where it was stopped.
  void resume_input();
  void forget();

  // CharReceiver
  std::size_t can_receive() override;
  void receive(std::span<const std::uint8_t> bytes) override;
  void connected() override { peer_changed(); }
  void disconnected() override { peer_changed(); }
  void writable() override;
  void resized(std::uint16_t columns, std::uint16_t rows) override;

  VirtioConsole& owner;
  const VirtioConsolePortOptions options;
  CharBackend& backend;
  const std::uint32_t nr;

  // All under the owner's lock.
  bool ready = false;       // the driver has it (PORT_READY)
  bool guest_open = false;  // PORT_OPEN
  std::uint8_t pending = 0;
  bool input_stopped = false;
  bool output_blocked = false;      // until the back end says writable()
  bool transmit_held = false;       // transmit_chain was popped and is partly written
  std::size_t transmit_offset = 0;  // of the first byte not written; also kept over pause and snapshot
  DescriptorChain transmit_chain;
  bool receive_held = false;  // receive_chain was popped and waits for input
  DescriptorChain receive_chain;
  std::uint16_t columns = 0;
  std::uint16_t rows = 0;

 private:
  [[nodiscard]] bool take_receive_chain();
  void peer_changed();
};

}  // namespace wisp
