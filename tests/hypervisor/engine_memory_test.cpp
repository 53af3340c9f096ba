// RAM and ROM as memory slots, driven through an address space, and the dirty log.
#include <optional>

#include "hypervisor/engine_test.h"
#include "memory/address_space.h"

namespace wisp {
namespace {

using EngineMemory = EngineTest;
WISP_FOR_EACH_ENGINE(EngineMemory);

// Copies the byte at 0xc0000000 + esi to port 0x10 and writes its successor back.
void put_probe(BareGuest& guest) {
  guest.put(0x1000, {
                        0x8a, 0x86, 0x00, 0x00, 0x00, 0xc0,  // mov al, [esi + 0xc0000000]
                        0xe6, 0x10,                          // out 0x10, al
                        0xfe, 0xc0,                          // inc al
                        0x88, 0x86, 0x00, 0x00, 0x00, 0xc0,  // mov [esi + 0xc0000000], al
                        0xe6, 0x11,                          // out 0x11, al
                    });
}

// What the guest finds there; nothing where it is not memory.
std::optional<std::uint64_t> probe(BareGuest& guest, std::uint32_t offset) {
  guest.start_protected(0x1000);
  CpuRegs regs = must(guest.vcpu().regs());
  regs.rsi = offset;
  must(guest.vcpu().set_regs(regs));
  std::optional<std::uint64_t> found;
  for (;;) {
    Exit exit = guest.run();
    if (auto* read = std::get_if<MmioReadExit>(&exit)) {
      std::ranges::fill(read->data, std::uint8_t{0xff});
      continue;
    }
    if (std::holds_alternative<MmioWriteExit>(exit)) {
      found.reset();
      continue;
    }
    const PortWrite write = port_write_of(exit);
    if (write.port == 0x10) {
      found = write.value;
      continue;
    }
    guest.complete();
    return found;
  }
}

TEST_P(EngineMemory, FollowsTheAddressSpace) {
  BareGuest guest = make();
  const HostPages host(0x8000);
  host.data()[0] = 10;
  host.data()[0x4000] = 20;
  AddressSpace memory("memory", 0);
  must(memory.add_listener(&guest.vm().memory_listener()));
  put_probe(guest);

  const auto low = MemoryRegion::ram("low", host.data(), 0x4000);
  const auto high = MemoryRegion::ram("high", host.data() + 0x4000, 0x4000);
  EXPECT_EQ(probe(guest, 0), std::nullopt);
  must(memory.add(low, 0xc0000000));
  must(memory.add(high, 0xc0004000));  // neighbours
  EXPECT_EQ(probe(guest, 0), 10U);
  EXPECT_EQ(probe(guest, 0x4000), 20U);
  EXPECT_EQ(host.data()[0], 11);
  EXPECT_EQ(host.data()[0x4000], 21);
  must(memory.remove(low));
  EXPECT_EQ(probe(guest, 0), std::nullopt);
  EXPECT_EQ(probe(guest, 0x4000), 21U);
  must(memory.add(low, 0xc0004000, 1));  // over the other
  EXPECT_EQ(probe(guest, 0x4000), 11U);
  must(memory.remove(low));
  EXPECT_EQ(probe(guest, 0x4000), 22U);
  memory.remove_listener(&guest.vm().memory_listener());
}

TEST_P(EngineMemory, PartsOfPagesAreLeftToExits) {
  BareGuest guest = make();
  const HostPages host(0x4000);
  host.data()[0x100] = 1;
  host.data()[0x1000] = 2;
  host.data()[0x3000] = 3;
  const FlatRange range{.start = 0xc0000100,
                        .size = 0x3000,  // ends inside the fourth page
                        .kind = RegionKind::kRam,
                        .host = host.data() + 0x100,
                        .name = "odd"};
  AddressSpaceListener& listener = guest.vm().memory_listener();
  must(listener.range_added(range));
  put_probe(guest);
  EXPECT_EQ(probe(guest, 0x100), std::nullopt);
  EXPECT_EQ(probe(guest, 0x1000), 2U);
  EXPECT_EQ(probe(guest, 0x3000), std::nullopt);
  listener.range_removed(range);
  EXPECT_EQ(probe(guest, 0x1000), std::nullopt);

  // Nothing whole inside: nothing to do, but it is there and goes away again.
  const FlatRange sliver{.start = 0xc0000100,
                         .size = 0x200,
                         .kind = RegionKind::kRam,
                         .host = host.data() + 0x100,
                         .name = "sliver"};
  must(listener.range_added(sliver));
  listener.range_removed(sliver);

  // Guest and host at different places in a page cannot be.
  const FlatRange shifted{.start = 0xc0000000,
                          .size = 0x2000,
                          .kind = RegionKind::kRam,
                          .host = host.data() + 0x10,
                          .name = "shifted"};
  EXPECT_FALSE(listener.range_added(shifted).has_value());
}

TEST_P(EngineMemory, OverlapsAreRefusedWithTheName) {
  BareGuest guest = make();
  const HostPages host(0x4000);
  const auto refused = guest.vm().memory_listener().range_added(
      {.start = 0x1000, .size = 0x4000, .kind = RegionKind::kRam, .host = host.data(), .name = "second"});
  ASSERT_FALSE(refused.has_value());
  EXPECT_NE(refused.error().message.find("second"), std::string::npos);
  EXPECT_NE(refused.error().message.find("0x1000"), std::string::npos);
}

TEST_P(EngineMemory, DirtyLog) {
  BareGuest guest = make();
  const HostPages host(0x46000);  // 70 pages: more than one word
  const FlatRange range{.start = 0xc0000000,
                        .size = host.size(),
                        .kind = RegionKind::kRam,
                        .host = host.data(),
                        .name = "logged"};
  must(guest.vm().memory_listener().range_added(range));
  put_probe(guest);
  EXPECT_FALSE(guest.vm().take_dirty_log(0xc0000000).has_value());
  (void)probe(guest, 0x5000);  // before the log starts
  must(guest.vm().set_dirty_log(true));
  must(guest.vm().set_dirty_log(true));
  EXPECT_EQ(must(guest.vm().take_dirty_log(0xc0000000)), (std::vector<std::uint64_t>{0, 0}));
  (void)probe(guest, 0x3000);
  (void)probe(guest, 0x7fff);
  (void)probe(guest, 0x45000);
  EXPECT_EQ(must(guest.vm().take_dirty_log(0xc0000000)),
            (std::vector<std::uint64_t>{(1U << 3) | (1U << 7), 1U << 5}));
  EXPECT_EQ(must(guest.vm().take_dirty_log(0xc0000000)), (std::vector<std::uint64_t>{0, 0}));
  EXPECT_FALSE(guest.vm().take_dirty_log(0xc0001000).has_value());
  EXPECT_FALSE(guest.vm().take_dirty_log(UINT64_MAX).has_value());

  // Memory that comes while the log is on is logged from its start, ROM never.
  const HostPages more(0x2000);
  const FlatRange added{
      .start = 0xc8000000, .size = 0x2000, .kind = RegionKind::kRam, .host = more.data(), .name = "added"};
  must(guest.vm().memory_listener().range_added(added));
  (void)probe(guest, 0x8001000);
  EXPECT_EQ(must(guest.vm().take_dirty_log(0xc8000000)), std::vector<std::uint64_t>{2});
  guest.vm().memory_listener().range_removed(added);
  must(guest.vm().memory_listener().range_added(
      {.start = 0xc8000000, .size = 0x2000, .kind = RegionKind::kRom, .host = more.data(), .name = "rom"}));
  EXPECT_FALSE(guest.vm().take_dirty_log(0xc8000000).has_value());

  (void)probe(guest, 0x3000);
  must(guest.vm().set_dirty_log(false));
  EXPECT_FALSE(guest.vm().take_dirty_log(0xc0000000).has_value());
  must(guest.vm().set_dirty_log(true));
  EXPECT_EQ(must(guest.vm().take_dirty_log(0xc0000000)), (std::vector<std::uint64_t>{0, 0}));
}

}  // namespace
}  // namespace wisp
