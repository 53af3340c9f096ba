// The console device with several ports (virtio 1.2, section 5.3): virtio-serial with virtconsole and
// virtserialport.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/property.h"
#include "chardev/char_backend.h"
#include "virtio/device.h"

namespace wisp {

// Port numbers are below this; number 0 is for a virtconsole.
inline constexpr std::uint32_t kVirtioConsoleMaxPorts = 31;

struct VirtioConsolePortOptions {
  std::string id{};
  std::string chardev{};  // id of the back end
  std::optional<std::uint32_t> nr{};
  std::string name{};    // as the guest finds it under /dev/virtio-ports; may be empty
  bool console = false;  // virtconsole (/dev/hvcN), else virtserialport
};

struct VirtioConsoleOptions {
  std::string id{};
};

// virtio-serial-device has none but `id`.
inline constexpr std::array<PropertySpec, 0> kVirtioSerialProperties{};
// virtconsole and virtserialport.
inline constexpr std::array<PropertySpec, 3> kVirtioConsolePortProperties{{
    {.name = "chardev", .help = "id of the -chardev behind this port", .required = true, .maximum = 255},
    {.name = "nr",
     .kind = PropertyKind::kUint,
     .help = "number of the port; 0 is for a virtconsole",
     .default_text = "the lowest that is free",
     .minimum = 0,
     .maximum = kVirtioConsoleMaxPorts - 1},
    {.name = "name", .help = "the port's name in the guest, under /dev/virtio-ports", .maximum = 255},
}};

[[nodiscard]] VirtioConsolePortOptions virtio_console_port_options(const std::string& id, bool console,
                                                                   const PropertySet& properties);

// A port and its back end (borrowed, outliving the device).
struct VirtioConsolePort {
  VirtioConsolePortOptions options;
  CharBackend* backend = nullptr;
};

// Nothing is buffered here: what the back end does not take stays in the guest's ring until it does, and what
// the guest has no buffer for stays in the back end.
//
// Lock order: the device's strand, then whatever a back end locks inside its functions. A back end therefore
// holds nothing that write() or resume_input() need while it calls its receiver.
class VirtioConsole final : public VirtioDevice {
 public:
  // Takes over the back ends' input until it is destroyed, which is done without the strand's lock held.
  // Fails where a port number is taken twice, too high, or 0 for a virtserialport.
  [[nodiscard]] static Result<std::unique_ptr<VirtioConsole>> create(EventLoop& loop,
                                                                     const GuestMemory& memory,
                                                                     const VirtioConsoleOptions& options,
                                                                     std::vector<VirtioConsolePort> ports,
                                                                     Log& log, const Clock& clock);
  ~VirtioConsole() override;

  [[nodiscard]] std::string_view name() const override { return "virtio-console"; }
  [[nodiscard]] std::uint32_t device_id() const override { return 3; }
  [[nodiscard]] std::uint64_t features() const override;
  [[nodiscard]] std::span<const std::uint16_t> queue_sizes() const override { return queue_sizes_; }
  void read_config(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void write_config(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  [[nodiscard]] Result<void> activate(VirtioActivation activation) override;
  void notify(std::uint16_t queue) override;
  void reset() override;
  [[nodiscard]] const Queue* queue(std::uint16_t index) const override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 protected:
  void on_pause() override;
  void on_resume() override;

 private:
  class Port;
  struct ControlMessage;

  VirtioConsole(EventLoop& loop, const GuestMemory& memory, VirtioConsoleOptions options, Log& log,
                const Clock& clock);
  [[nodiscard]] bool multiport() const;
  [[nodiscard]] Port* find_port(std::uint32_t nr) const;
  // The queue, where it is set up and the device may use it now.
  [[nodiscard]] Queue* usable_queue(std::uint16_t index);
  // Pops; tells where the queue is empty (after asking for notifications) or broken by giving false.
  [[nodiscard]] bool pop(std::uint16_t index, DescriptorChain& chain);
  void interrupt(std::uint16_t index);
  // Gets the driver's control messages, sends what is pending to it.
  void receive_control();
  void handle_control(const ControlMessage& message);
  void send_control();
  [[nodiscard]] std::size_t build_message(Port& port, std::uint8_t bit, std::span<std::uint8_t> out) const;
  void transmit(Port& port);
  template <typename... Args>
  void guest_error(fmt::format_string<Args...> format, Args&&... args);

  const VirtioConsoleOptions options_;
  Log& log_;
  LogGate gate_;
  std::vector<std::unique_ptr<Port>> ports_;  // by number, ascending
  std::vector<std::uint16_t> queue_sizes_;
  std::optional<VirtioActivation> active_;
  DescriptorChain chain_;
  bool restored_ = false;  // peers may have come and gone since the state was saved
};

}  // namespace wisp
