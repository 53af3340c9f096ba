// What a guest does comes out as the right exit, and what the caller answers reaches the guest.
#include "hypervisor/engine_test.h"

namespace wisp {
namespace {

using EngineExit = EngineTest;
WISP_FOR_EACH_ENGINE(EngineExit);

TEST_P(EngineExit, PortWritesOfAllSizes) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0x66, 0xb8, 0x44, 0x33, 0x22, 0x11,  // mov eax, 0x11223344
                        0xe6, 0x10,                          // out 0x10, al
                        0xba, 0x34, 0x12,                    // mov dx, 0x1234
                        0xef,                                // out dx, ax
                        0x66, 0xef,                          // out dx, eax
                        0xf4,                                // hlt
                    });
  guest.start_real(0x1000);
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x10, 1, 0x44}));
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x1234, 2, 0x3344}));
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x1234, 4, 0x11223344}));
}

TEST_P(EngineExit, PortReadsOfAllSizes) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0x66, 0x31, 0xc0,        // xor eax, eax
                        0xba, 0x00, 0x05,        // mov dx, 0x500
                        0xec,                    // in al, dx
                        0x66, 0xa3, 0x00, 0x20,  // mov [0x2000], eax
                        0xed,                    // in ax, dx
                        0x66, 0xa3, 0x04, 0x20,  // mov [0x2004], eax
                        0x66, 0xed,              // in eax, dx
                        0x66, 0xa3, 0x08, 0x20,  // mov [0x2008], eax
                        0xe6, 0x10,              // out 0x10, al
                    });
  guest.start_real(0x1000);
  for (const std::size_t size : {1U, 2U, 4U}) {
    const Exit exit = guest.run();
    const auto* read = std::get_if<PortReadExit>(&exit);
    ASSERT_NE(read, nullptr);
    EXPECT_EQ(read->port, 0x500);
    ASSERT_EQ(read->data.size(), size);
    u64_to_bytes(0x87654321, read->data);
  }
  EXPECT_EQ(port_write_of(guest.run()).port, 0x10);
  EXPECT_EQ(load_le<std::uint32_t>(guest.at(0x2000)), 0x21U);
  EXPECT_EQ(load_le<std::uint32_t>(guest.at(0x2004)), 0x4321U);
  EXPECT_EQ(load_le<std::uint32_t>(guest.at(0x2008)), 0x87654321U);
}

// Debian's drivers look for them; KVM answers so, too.
TEST_P(EngineExit, EnergyCountersStandAtZero) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0x66, 0xb9, 0x06, 0x06, 0x00, 0x00,  // mov ecx, 0x606: their unit
                        0x66, 0x83, 0xc8, 0xff,              // or eax, -1
                        0x0f, 0x32,                          // rdmsr
                        0x66, 0xe7, 0x10,                    // out 0x10, eax
                        0x66, 0xb9, 0x11, 0x06, 0x00, 0x00,  // mov ecx, 0x611: the package's
                        0x66, 0x83, 0xc8, 0xff,              // or eax, -1
                        0x0f, 0x32,                          // rdmsr
                        0x66, 0xe7, 0x11,                    // out 0x11, eax
                    });
  guest.start_real(0x1000);
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x10, 4, 0}));
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x11, 4, 0}));
}

TEST_P(EngineExit, StringPortInstructions) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xfc,              // cld
                        0xba, 0x00, 0x05,  // mov dx, 0x500
                        0xbe, 0x00, 0x20,  // mov si, 0x2000
                        0xb9, 0x64, 0x00,  // mov cx, 100
                        0xf3, 0x6e,        // rep outsb
                        0xbf, 0x00, 0x30,  // mov di, 0x3000
                        0xb9, 0x32, 0x00,  // mov cx, 50
                        0xf3, 0x6d,        // rep insw
                        0xe6, 0x10,        // out 0x10, al
                    });
  for (std::size_t i = 0; i < 100; ++i) {
    guest.at(0x2000)[i] = static_cast<std::uint8_t>(i * 7);
  }
  guest.start_real(0x1000);
  std::vector<std::uint8_t> written;
  std::uint16_t next = 0x4000;
  std::size_t elements = 0;
  for (;;) {
    const Exit exit = guest.run();
    if (const auto* write = std::get_if<PortWriteExit>(&exit); write != nullptr && write->port == 0x500) {
      EXPECT_EQ(write->data.size(), write->count);
      written.insert(written.end(), write->data.begin(), write->data.end());
      continue;
    }
    if (const auto* read = std::get_if<PortReadExit>(&exit)) {
      ASSERT_EQ(read->data.size(), read->count * std::size_t{2});
      elements += read->count;
      for (std::size_t i = 0; i < read->count; ++i) {
        store_le(read->data.data() + 2 * i, next++);
      }
      continue;
    }
    EXPECT_EQ(port_write_of(exit).port, 0x10);
    break;
  }
  EXPECT_EQ(written, std::vector<std::uint8_t>(guest.at(0x2000), guest.at(0x2000) + 100));
  // KVM may read ahead of what the instruction takes; the guest gets the first 50 in order.
  EXPECT_GE(elements, 50U);
  for (std::uint32_t i = 0; i < 50; ++i) {
    EXPECT_EQ(load_le<std::uint16_t>(guest.at(0x3000 + 2 * i)), 0x4000 + i);
  }
}

TEST_P(EngineExit, MmioOfOneTwoAndFourBytes) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0xb8, 0x44, 0x33, 0x22, 0x11,              // mov eax, 0x11223344
                        0xa2, 0x01, 0x00, 0x00, 0xd0,              // mov [0xd0000001], al
                        0x66, 0xa3, 0x02, 0x00, 0x00, 0xd0,        // mov [0xd0000002], ax
                        0xa3, 0x04, 0x00, 0x00, 0xd0,              // mov [0xd0000004], eax
                        0xa0, 0x09, 0x00, 0x00, 0xd0,              // mov al, [0xd0000009]
                        0x66, 0x8b, 0x1d, 0x0a, 0x00, 0x00, 0xd0,  // mov bx, [0xd000000a]
                        0x8b, 0x0d, 0x0c, 0x00, 0x00, 0xd0,        // mov ecx, [0xd000000c]
                        0xe6, 0x10,                                // out 0x10, al
                    });
  guest.start_protected(0x1000);
  std::uint64_t value = 0x44;
  for (const std::size_t size : {1U, 2U, 4U}) {
    const Exit exit = guest.run();
    const auto* write = std::get_if<MmioWriteExit>(&exit);
    ASSERT_NE(write, nullptr) << exit.index();
    EXPECT_EQ(write->address, 0xd0000000U + size);
    ASSERT_EQ(write->data.size(), size);
    EXPECT_EQ(bytes_to_u64(write->data), value);
    value = size == 1 ? 0x3344 : 0x11223344;
  }
  for (const std::size_t size : {1U, 2U, 4U}) {
    const Exit exit = guest.run();
    const auto* read = std::get_if<MmioReadExit>(&exit);
    ASSERT_NE(read, nullptr) << exit.index();
    EXPECT_EQ(read->address, 0xd0000008U + size);
    ASSERT_EQ(read->data.size(), size);
    u64_to_bytes(0xa1b2c3d4, read->data);
  }
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x10, 1, 0xd4}));
  guest.complete();
  const CpuRegs regs = must(guest.vcpu().regs());
  EXPECT_EQ(regs.rbx & 0xffff, 0xc3d4U);
  EXPECT_EQ(regs.rcx, 0xa1b2c3d4U);
}

TEST_P(EngineExit, LongModeAndMmioOfEightBytes) {
  BareGuest guest = make();
  guest.put(0x1000, {
                        0x48, 0xb8, 8,    7,    6,    5,    4,    3, 2, 1,  // mov rax, 0x0102030405060708
                        0x48, 0xc7, 0xc3, 0x00, 0x00, 0x00, 0x50,           // mov rbx, 0x50000000
                        0x48, 0x01, 0xdb,                                   // add rbx, rbx
                        0x48, 0x89, 0x43, 0x08,                             // mov [rbx + 8], rax
                        0x48, 0x8b, 0x4b, 0x10,                             // mov rcx, [rbx + 16]
                        0x49, 0x89, 0xcf,                                   // mov r15, rcx
                        0xe6, 0x10,                                         // out 0x10, al
                    });
  guest.start_long(0x1000);
  {
    const Exit exit = guest.run();
    const auto* write = std::get_if<MmioWriteExit>(&exit);
    ASSERT_NE(write, nullptr) << exit.index();
    EXPECT_EQ(write->address, 0xa0000008U);
    ASSERT_EQ(write->data.size(), 8U);
    EXPECT_EQ(bytes_to_u64(write->data), 0x0102030405060708U);
  }
  {
    const Exit exit = guest.run();
    const auto* read = std::get_if<MmioReadExit>(&exit);
    ASSERT_NE(read, nullptr) << exit.index();
    EXPECT_EQ(read->address, 0xa0000010U);
    ASSERT_EQ(read->data.size(), 8U);
    u64_to_bytes(0xfedcba9876543210, read->data);
  }
  EXPECT_EQ(port_write_of(guest.run()).port, 0x10);
  guest.complete();
  EXPECT_EQ(must(guest.vcpu().regs()).r15, 0xfedcba9876543210U);
  EXPECT_EQ(must(guest.vcpu().special_regs()).efer, 0x500U);
}

TEST_P(EngineExit, GuestSeesItsOwnCpuid) {
  VmOptions options;
  options.max_vcpus = 2;
  options.topology.cores = 2;
  BareGuest guest = make(options);
  guest.put(0x1000, {
                        0xb8, 0x01, 0x00, 0x00, 0x00,  // mov eax, 1
                        0x0f, 0xa2,                    // cpuid
                        0x89, 0xc8,                    // mov eax, ecx
                        0xe7, 0x10,                    // out 0x10, eax
                        0xb8, 0x0b, 0x00, 0x00, 0x00,  // mov eax, 0xb
                        0xb9, 0x01, 0x00, 0x00, 0x00,  // mov ecx, 1
                        0x0f, 0xa2,                    // cpuid
                        0x89, 0xd8,                    // mov eax, ebx
                        0xe7, 0x10,                    // out 0x10, eax
                        0xb8, 0x00, 0x00, 0x00, 0x40,  // mov eax, 0x40000000
                        0x0f, 0xa2,                    // cpuid
                        0x89, 0xd8,                    // mov eax, ebx
                        0xe7, 0x10,                    // out 0x10, eax
                        0xb8, 0x10, 0x00, 0x00, 0x40,  // mov eax, 0x40000010
                        0x0f, 0xa2,                    // cpuid
                        0xe7, 0x10,                    // out 0x10, eax
                    });
  guest.start_protected(0x1000);
  const std::uint64_t features = port_write_of(guest.run()).value;
  EXPECT_NE(features & (1ULL << 31), 0U);  // hypervisor
  EXPECT_NE(features & (1ULL << 21), 0U);  // x2APIC
  EXPECT_EQ(features & (1ULL << 5), 0U);   // no VMX
  EXPECT_EQ(port_write_of(guest.run()).value, 2U);
  EXPECT_EQ(port_write_of(guest.run()).value, 0x4b4d564bU);  // "KVMK"
  const std::uint64_t khz = port_write_of(guest.run()).value;
  guest.complete();
  EXPECT_EQ(khz, must(guest.vcpu().save()).tsc_khz);
  EXPECT_GT(khz, 100'000U);
}

TEST_P(EngineExit, TripleFaultIsShutdown) {
  BareGuest guest = make();
  guest.put(0x1000, {0x0f, 0x0b});  // ud2, with an interrupt table of no entries
  CpuSpecialRegs sregs = must(guest.vcpu().special_regs());
  sregs.idt = {};
  must(guest.vcpu().set_special_regs(sregs));
  guest.start_protected(0x1000);
  const Exit exit = guest.run();
  EXPECT_TRUE(std::holds_alternative<ShutdownExit>(exit)) << exit.index();
  // The vCPU can be reset and used again.
  must(guest.vcpu().reset());
  guest.put(0x1000, {0xe6, 0x10});  // out 0x10, al
  guest.start_real(0x1000);
  EXPECT_EQ(port_write_of(guest.run()).port, 0x10);
}

TEST_P(EngineExit, WritesToRomComeAsMmioAndReadsDoNot) {
  BareGuest guest = make();
  const HostPages rom(0x2000);
  rom.data()[0x10] = 0x5a;
  must(guest.vm().memory_listener().range_added({.start = 0xc0000000,
                                                 .size = rom.size(),
                                                 .kind = RegionKind::kRom,
                                                 .host = rom.data(),
                                                 .name = "rom"}));
  guest.put(0x1000, {
                        0xa0, 0x10, 0x00, 0x00, 0xc0,  // mov al, [0xc0000010]
                        0xfe, 0xc0,                    // inc al
                        0xa2, 0x10, 0x00, 0x00, 0xc0,  // mov [0xc0000010], al
                        0xe6, 0x10,                    // out 0x10, al
                    });
  guest.start_protected(0x1000);
  const Exit exit = guest.run();
  const auto* write = std::get_if<MmioWriteExit>(&exit);
  ASSERT_NE(write, nullptr) << exit.index();
  EXPECT_EQ(write->address, 0xc0000010U);
  EXPECT_EQ(bytes_to_u64(write->data), 0x5bU);
  EXPECT_EQ(port_write_of(guest.run()), (PortWrite{0x10, 1, 0x5b}));
  EXPECT_EQ(rom.data()[0x10], 0x5a);
}

}  // namespace
}  // namespace wisp
