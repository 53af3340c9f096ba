// Interrupt lines, messages and doorbells between the guest and eventfds.
#include <chrono>
#include <thread>

#include "base/unique_fd.h"
#include "hypervisor/engine_test.h"
#include "memory/address_space.h"

namespace wisp {
namespace {

using EngineIrq = EngineTest;
WISP_FOR_EACH_ENGINE(EngineIrq);

// Sets up the PICs with vectors from 0x20 and all inputs open but the timer's, says that it is ready by port
// 0x10, then halts. The handler of vector 0x24 (input 4) writes to port 0x11 and counts at 0x2000.
void put_irq_program(BareGuest& guest) {
  guest.put(0x1000, {
                        0xb0, 0x11, 0xe6, 0x20, 0xe6, 0xa0,  // ICW1: mov al, 0x11; out 0x20, al; out 0xa0, al
                        0xb0, 0x20, 0xe6, 0x21,              // ICW2: vectors 0x20
                        0xb0, 0x28, 0xe6, 0xa1,              // and 0x28
                        0xb0, 0x04, 0xe6, 0x21,              // ICW3
                        0xb0, 0x02, 0xe6, 0xa1,              //
                        0xb0, 0x01, 0xe6, 0x21, 0xe6, 0xa1,  // ICW4
                        0xb0, 0x01, 0xe6, 0x21,              // mask input 0
                        0xb0, 0x00, 0xe6, 0xa1,              //
                        0xe6, 0x10,                          // out 0x10, al
                        0xfb,                                // sti
                        0xf4,                                // hlt
                        0xeb, 0xfd,                          // jmp to the hlt
                    });
  guest.put(0x1100, {
                        0xff, 0x06, 0x00, 0x20,  // inc word [0x2000]
                        0xb0, 0x20, 0xe6, 0x20,  // end of interrupt: mov al, 0x20; out 0x20, al
                        0xe6, 0x11,              // out 0x11, al
                        0xcf,                    // iret
                    });
  store_le<std::uint32_t>(guest.at(0x24 * 4), 0x1100);
  guest.start_real(0x1000);
}

TEST_P(EngineIrq, PulsesReachTheGuest) {
  BareGuest guest = make();
  const auto line = must(guest.vm().irq_line(4));
  put_irq_program(guest);
  ASSERT_EQ(port_write_of(guest.run()).port, 0x10);
  for (std::uint16_t i = 1; i <= 5; ++i) {
    // Both by the call and by whoever holds the eventfd, from another thread while the guest is halted.
    std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      if (i % 2 == 0) {
        line->pulse();
      } else {
        signal_eventfd(line->event_fd());
      }
    }).join();
    EXPECT_EQ(port_write_of(guest.run()).port, 0x11);
    EXPECT_EQ(load_le<std::uint16_t>(guest.at(0x2000)), i);
  }
}

TEST_P(EngineIrq, ALevelThatRisesReachesTheGuestOnce) {
  BareGuest guest = make();
  const auto line = must(guest.vm().irq_line(4));
  put_irq_program(guest);
  ASSERT_EQ(port_write_of(guest.run()).port, 0x10);
  line->set_level(true);
  EXPECT_EQ(port_write_of(guest.run()).port, 0x11);
  // Still high: an edge-triggered input does not fire again.
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    guest.vcpu().kick();
  });
  EXPECT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu().run()));
  kicker.join();
  line->set_level(false);
  line->set_level(true);
  EXPECT_EQ(port_write_of(guest.run()).port, 0x11);
  EXPECT_EQ(load_le<std::uint16_t>(guest.at(0x2000)), 2);
}

TEST_P(EngineIrq, PinsAreLimited) {
  BareGuest guest = make();
  EXPECT_TRUE(guest.vm().irq_line(23).has_value());
  EXPECT_FALSE(guest.vm().irq_line(24).has_value());
  EXPECT_FALSE(guest.vm().irq_line(UINT32_MAX).has_value());
}

// Whether `vector` waits in the vCPU's local APIC.
bool waits(BareGuest& guest, unsigned vector) {
  const CpuState state = must(guest.vcpu().save());
  const auto word = load_le<std::uint32_t>(state.lapic.regs.data() + 0x200 + (vector / 32) * 0x10);
  return (word & (1U << (vector % 32))) != 0;
}

bool comes(BareGuest& guest, unsigned vector) {
  for (int i = 0; i < 2000; ++i) {
    if (waits(guest, vector)) {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

void enable_lapic(BareGuest& guest) {
  CpuState state = must(guest.vcpu().save());
  store_le<std::uint32_t>(state.lapic.regs.data() + 0xf0, 0x1ff);
  must(guest.vcpu().load(state));
}

TEST_P(EngineIrq, MessagesReachTheLocalApic) {
  BareGuest guest = make();
  enable_lapic(guest);
  auto first = must(guest.vm().msi_line({.address = 0xfee00000, .data = 0x51}));
  const auto second = must(guest.vm().msi_line({.address = 0xfee00000, .data = 0x52}));
  EXPECT_FALSE(waits(guest, 0x51));
  first->set_level(true);  // means nothing
  EXPECT_FALSE(waits(guest, 0x51));
  first->pulse();
  EXPECT_TRUE(comes(guest, 0x51));
  EXPECT_FALSE(waits(guest, 0x52));
  second->pulse();
  EXPECT_TRUE(comes(guest, 0x52));
  // A number that came free is used again and sends the new message.
  first.reset();
  const auto third = must(guest.vm().msi_line({.address = 0xfee00000, .data = 0x63}));
  third->pulse();
  EXPECT_TRUE(comes(guest, 0x63));
}

TEST_P(EngineIrq, PinsStillWorkBesideMessages) {
  BareGuest guest = make();
  const auto message = must(guest.vm().msi_line({.address = 0xfee00000, .data = 0x51}));
  const auto line = must(guest.vm().irq_line(4));
  put_irq_program(guest);
  ASSERT_EQ(port_write_of(guest.run()).port, 0x10);
  line->pulse();
  EXPECT_EQ(port_write_of(guest.run()).port, 0x11);
}

TEST_P(EngineIrq, LinesComeAndGo) {
  BareGuest guest = make();
  for (int i = 0; i < 200; ++i) {
    const auto pin = must(guest.vm().irq_line(static_cast<std::uint32_t>(i % 24)));
    const auto same = must(guest.vm().irq_line(static_cast<std::uint32_t>(i % 24)));
    EXPECT_GE(pin->event_fd(), 0);
    EXPECT_NE(pin->event_fd(), same->event_fd());
  }
}

class NoDevice final : public IoHandler {
 public:
  void io_read(std::uint64_t /*offset*/, std::span<std::uint8_t> data) override {
    std::ranges::fill(data, std::uint8_t{0});
  }
  void io_write(std::uint64_t /*offset*/, std::span<const std::uint8_t> /*data*/) override {}
};

TEST_P(EngineIrq, DoorbellsInMemoryAndPorts) {
  BareGuest guest = make();
  const UniqueFd any = must(make_eventfd());
  const UniqueFd one = must(make_eventfd());
  const UniqueFd port = must(make_eventfd());
  AddressSpace memory("memory", 0);
  AddressSpace ports("ports", 0x10000);
  must(memory.add_listener(&guest.vm().memory_listener()));
  must(ports.add_listener(&guest.vm().port_listener()));
  const auto region = MemoryRegion::io("device", std::make_shared<NoDevice>(), 0x1000,
                                       {{.offset = 0x50, .size = 0, .value = {}, .fd = any.get()},
                                        {.offset = 0x60, .size = 4, .value = 1, .fd = one.get()}});
  must(memory.add(region, 0xd0000000));
  must(ports.add(MemoryRegion::io("doorbell", std::make_shared<NoDevice>(), 8,
                                  {{.offset = 2, .size = 2, .value = {}, .fd = port.get()}}),
                 0x500));
  guest.put(0x1000, {
                        0x31, 0xc0,                          // xor eax, eax
                        0xa3, 0x50, 0x00, 0x00, 0xd0,        // mov [0xd0000050], eax
                        0x66, 0xa3, 0x50, 0x00, 0x00, 0xd0,  // mov [0xd0000050], ax
                        0x40,                                // inc eax
                        0xa3, 0x60, 0x00, 0x00, 0xd0,        // mov [0xd0000060], eax
                        0x66, 0xba, 0x02, 0x05,              // mov dx, 0x502
                        0x66, 0xef,                          // out dx, ax
                        0x40,                                // inc eax
                        0xa3, 0x60, 0x00, 0x00, 0xd0,        // mov [0xd0000060], eax: another value
                        0xa3, 0x50, 0x00, 0x00, 0xd0,        // mov [0xd0000050], eax
                        0xe6, 0x10,                          // out 0x10, al
                        0xa3, 0x50, 0x00, 0x00, 0xd0,        // mov [0xd0000050], eax: the doorbell is gone
                    });
  guest.start_protected(0x1000);
  if (soft()) {
    // Ports are left to the machine's port space.
    ASSERT_EQ(port_write_of(guest.run()), (PortWrite{0x502, 2, 1}));
    signal_eventfd(port.get());
  }
  {
    const Exit exit = guest.run();
    const auto* write = std::get_if<MmioWriteExit>(&exit);
    ASSERT_NE(write, nullptr) << exit.index();
    EXPECT_EQ(write->address, 0xd0000060U);
    EXPECT_EQ(bytes_to_u64(write->data), 2U);
    EXPECT_EQ(drain_eventfd(any.get()), 2U);
    EXPECT_EQ(drain_eventfd(one.get()), 1U);
    EXPECT_EQ(drain_eventfd(port.get()), 1U);
  }
  EXPECT_EQ(port_write_of(guest.run()).port, 0x10);
  EXPECT_EQ(drain_eventfd(any.get()), 1U);
  must(memory.remove(region));
  {
    const Exit exit = guest.run();
    const auto* write = std::get_if<MmioWriteExit>(&exit);
    ASSERT_NE(write, nullptr) << exit.index();
    EXPECT_EQ(write->address, 0xd0000050U);
    EXPECT_EQ(drain_eventfd(any.get()), 0U);
  }
  memory.remove_listener(&guest.vm().memory_listener());
  ports.remove_listener(&guest.vm().port_listener());
}

TEST_P(EngineIrq, ARefusedDoorbellLeavesNoneBehind) {
  BareGuest guest = make();
  UniqueFd bell = must(make_eventfd());
  const UniqueFd second = must(make_eventfd());
  FlatRange range{.start = 0xd0000000,
                  .size = 0x1000,
                  .kind = RegionKind::kIo,
                  .host = nullptr,
                  .events = {{.offset = 0, .size = 4, .value = {}, .fd = bell.get()},
                             {.offset = 8, .size = 3, .value = {}, .fd = second.get()}},
                  .name = "device"};
  AddressSpaceListener& listener = guest.vm().memory_listener();
  const auto bad_size = listener.range_added(range);
  ASSERT_FALSE(bad_size.has_value());
  EXPECT_NE(bad_size.error().message.find("device"), std::string::npos);
  range.events[1] = {.offset = 8, .size = 0, .value = 7, .fd = second.get()};
  EXPECT_FALSE(listener.range_added(range).has_value());
  range.events[1] = {.offset = 8, .size = 4, .value = {}, .fd = -1};
  EXPECT_FALSE(listener.range_added(range).has_value());
  range.events[1] = range.events[0];  // twice the same
  EXPECT_FALSE(listener.range_added(range).has_value());
  range.events.pop_back();
  // The first was taken off each time, and again although its device closed the descriptor meanwhile.
  for (int i = 0; i < 3; ++i) {
    bell = must(make_eventfd());
    range.events[0].fd = bell.get();
    must(listener.range_added(range));
    bell.reset();
    listener.range_removed(range);
  }
}

}  // namespace
}  // namespace wisp
