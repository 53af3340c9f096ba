// The 16550A UART (National Semiconductor PC16550D data sheet), as Linux's 8250 driver probes and uses it.
//
// Time is not modelled: a character is sent as soon as the back end takes it, whatever the divisor says, and
// a received one is at hand at once. When the back end takes no more, characters wait in the transmit FIFO
// with THRE and TEMT low until CharReceiver::writable(), so a guest that looks waits by itself and a vCPU
// never does. What comes in waits in the back end while the receive FIFO is full, so nothing is lost.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>

#include "chardev/char_backend.h"
#include "devices/device.h"
#include "hypervisor/irq_line.h"

namespace wisp {

inline constexpr std::uint16_t kSerialPortCount = 8;

class Serial final : public Device, public CharReceiver {
 public:
  // `backend` is borrowed and must outlive the device; null: what is sent is dropped and nothing comes in.
  Serial(std::unique_ptr<IrqLine> irq, CharBackend* backend);
  Serial(const Serial&) = delete;
  Serial& operator=(const Serial&) = delete;
  ~Serial() override;

  [[nodiscard]] std::string_view name() const override { return "serial"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  void reset() override;
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

  [[nodiscard]] std::size_t can_receive() override;
  void receive(std::span<const std::uint8_t> bytes) override;
  void writable() override;
  // Linux takes it as the magic SysRq key.
  void receive_break() override;

 private:
  static constexpr std::size_t kFifoSize = 16;

  // A received character with the line status bits that came with it.
  struct Received {
    std::uint8_t value = 0;
    std::uint8_t errors = 0;
  };
  template <typename T>
  struct Fifo {
    std::array<T, kFifoSize> items{};
    std::size_t count = 0;
    void push(T item) { items[count++] = item; }
    T pop();
  };
  // The register file and what is in flight; everything a snapshot keeps.
  struct State {
    std::uint8_t interrupt_enable = 0;
    std::uint8_t fifo_control = 0;
    std::uint8_t line_control = 0;
    std::uint8_t modem_control = 0;
    std::uint8_t modem_status = 0;
    std::uint8_t line_errors = 0;  // OE, PE, FE, BI until the line status is read
    std::uint8_t scratch = 0;
    std::uint16_t divisor = 12;
    bool transmit_interrupt = false;  // THRE interrupt pending
    Fifo<Received> receive;
    Fifo<std::uint8_t> transmit;
  };

  [[nodiscard]] std::uint8_t read_register(std::uint64_t offset);
  void write_register(std::uint64_t offset, std::uint8_t value);
  void write_fifo_control(std::uint8_t value);
  void write_modem_control(std::uint8_t value);
  void transmit(std::uint8_t value);
  void flush_transmit();
  void transmitter_empty();
  // Into the receive FIFO, from the other end or the loop.
  void take_in(Received received);
  [[nodiscard]] std::uint8_t pop_received();
  void show_head_errors();
  void resume_input_if_room();

  [[nodiscard]] bool fifo_enabled() const;
  [[nodiscard]] bool loopback() const;
  [[nodiscard]] std::size_t receive_room() const;
  [[nodiscard]] std::uint8_t line_status() const;
  // Causes of interrupts that are pending and enabled, as bits of the interrupt enable register.
  [[nodiscard]] std::uint8_t causes() const;
  [[nodiscard]] std::uint8_t interrupt_identity() const;
  void update_irq();

  mutable std::mutex mutex_;
  const std::unique_ptr<IrqLine> irq_;
  CharBackend* const backend_;
  State state_;
  std::uint8_t told_causes_ = 0;      // causes() at the last update_irq()
  bool transmitter_emptied_ = false;  // since then: an edge of its own even where THRE was pending before
  bool input_stopped_ = false;        // can_receive() said 0
};

}  // namespace wisp
