// Register accesses, resets, input and saved states of every simple device, as a hostile guest and a hostile
// snapshot would have them.
#include <array>
#include <memory>

#include "base/event_loop.h"
#include "devices/boot_timer.h"
#include "devices/debug_exit.h"
#include "devices/fake_parts.h"
#include "devices/i8042.h"
#include "devices/power.h"
#include "devices/rtc.h"
#include "devices/serial.h"
#include "input.h"

namespace wisp {
namespace {

using fuzz::Input;

void run(Input input) {
  static const std::unique_ptr<EventLoop> kLoop = *EventLoop::create();
  FakeClock clock;
  Log log(-1);
  IrqRecord irq;
  FakeCharBackend backend;
  const auto line = [&] { return std::make_unique<FakeIrqLine>(irq); };
  std::unique_ptr<Device> device;
  std::uint64_t size = 0;
  switch (input.byte() % 6) {
    case 0:
      device = std::make_unique<Serial>(line(), &backend);
      size = kSerialPortCount;
      break;
    case 1:
      device = *Rtc::create(*kLoop, clock, line());
      size = kRtcPortCount;
      break;
    case 2:
      device = std::make_unique<I8042>([] {});
      size = kI8042PortCount;
      break;
    case 3:
      device = std::make_unique<PowerDevice>(line(), PowerCallbacks{});
      size = kPowerPortCount;
      break;
    case 4:
      device = std::make_unique<DebugExit>([](std::uint32_t) {});
      size = 2;
      break;
    default:
      device = std::make_unique<BootTimer>(clock, 0, log);
      size = kBootTimerPortCount;
      break;
  }
  while (!input.empty()) {
    const std::uint8_t what = input.byte();
    const std::uint64_t offset = input.byte() % size;
    const std::size_t width = 1 + what / 16 % std::min<std::uint64_t>(8, size - offset);
    std::array<std::uint8_t, 8> data{};
    switch (what % 16) {
      case 0:
        device->reset();
        break;
      case 1: {
        const auto record = input.take(input.byte());
        const auto loaded = device->load(
            {.name = std::string(device->name()), .version = 1, .bytes = {record.begin(), record.end()}});
        if (loaded.has_value() && !device->load(device->save()).has_value()) {
          __builtin_trap();
        }
        break;
      }
      case 2:
        clock.advance(std::uint64_t{1} << (offset * 8 + width) % 40);
        break;
      case 3: {
        const auto text = input.take(input.byte());
        backend.offer(std::string(text.begin(), text.end()));
        break;
      }
      case 4:
        backend.room = input.byte();
        break;
      case 5:
        if (device->load(device->save()).has_value()) {
          break;
        }
        __builtin_trap();
      case 6:
      case 7:
      case 8:
      case 9:
        device->io_read(offset, std::span(data).first(width));
        break;
      default:
        device->io_write(offset, input.take(width));
        break;
    }
  }
}

}  // namespace
}  // namespace wisp

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  wisp::run(wisp::Input(data, size));
  return 0;
}
