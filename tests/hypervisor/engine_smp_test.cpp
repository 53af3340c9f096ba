// Eight vCPUs, started the way an operating system starts them.
#include <atomic>
#include <mutex>
#include <set>
#include <thread>

#include "hypervisor/engine_test.h"

namespace wisp {
namespace {

using EngineSmp = EngineTest;
WISP_FOR_EACH_ENGINE(EngineSmp);

TEST_P(EngineSmp, EightCpusStartByInitAndSipi) {
  constexpr std::uint32_t kCpus = 8;
  VmOptions options;
  options.max_vcpus = kCpus;
  options.topology = {.sockets = 2, .dies = 1, .clusters = 1, .cores = 2, .threads = 2};
  BareGuest guest = make(options);
  guest.put(0x1000,
            {
                // INIT, then SIPI with vector 8, to all but this one, through the local APIC.
                0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00,  // mov [0xfee00300], 0xc4500
                0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x0c, 0x00,  // mov [0xfee00300], 0xc4608
                0x80, 0x3d, 0x00, 0x20, 0x00, 0x00, 0x07,                    // wait: cmp byte [0x2000], 7
                0x75, 0xf7,                                                  // jne wait
                0xe6, 0x10,                                                  // out 0x10, al
                0xf4,                                                        // hlt
            });
  guest.put(0x8000, {
                        0x66, 0xb8, 0x01, 0x00, 0x00, 0x00,  // mov eax, 1
                        0x0f, 0xa2,                          // cpuid
                        0x66, 0xc1, 0xeb, 0x18,              // shr ebx, 24
                        0x88, 0xd8,                          // mov al, bl: the APIC id
                        0xe6, 0x51,                          // out 0x51, al
                        0x31, 0xdb,                          // xor bx, bx
                        0x8e, 0xdb,                          // mov ds, bx
                        0xf0, 0xfe, 0x06, 0x00, 0x20,        // lock inc byte [0x2000]
                        0xf4,                                // hlt
                        0xeb, 0xfd,                          // jmp to the hlt
                    });
  guest.start_protected(0x1000);

  std::mutex mutex;
  std::multiset<std::uint64_t> ids;
  std::atomic<bool> boot_done = false;
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < kCpus; ++i) {
    threads.emplace_back([&, i] {
      while (!stop) {
        const Exit exit = guest.vcpu(i).run();
        if (std::holds_alternative<InterruptedExit>(exit)) {
          continue;
        }
        const PortWrite write = port_write_of(exit);
        if (write.port == 0x51) {
          EXPECT_EQ(write.value, i);
          const std::scoped_lock lock(mutex);
          ids.insert(write.value);
        } else {
          EXPECT_EQ(write.port, 0x10);
          EXPECT_EQ(i, 0U);
          boot_done = true;
          boot_done.notify_all();
        }
      }
    });
  }
  boot_done.wait(false);
  // All wait in the kernel now, halted; every one hears a kick.
  stop = true;
  for (std::uint32_t i = 0; i < kCpus; ++i) {
    guest.vcpu(i).kick();
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(ids, (std::multiset<std::uint64_t>{1, 2, 3, 4, 5, 6, 7}));
  for (std::uint32_t i = 1; i < kCpus; ++i) {
    guest.vcpu(i).kick();
    ASSERT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu(i).run()));
    const CpuState state = must(guest.vcpu(i).save());
    EXPECT_TRUE(state.run_state == CpuRunState::kHalted || state.run_state == CpuRunState::kRunnable);
    EXPECT_EQ(state.sregs.cs.selector, 0x800);
    must(guest.vcpu(i).reset());
    EXPECT_EQ(must(guest.vcpu(i).save()).run_state, CpuRunState::kUninitialized);
  }
}

TEST_P(EngineSmp, ACpuThatWaitsForSipiHearsKicks) {
  VmOptions options;
  options.max_vcpus = 2;
  BareGuest guest = make(options);
  for (int i = 0; i < 50; ++i) {
    std::atomic<bool> stopped = false;
    std::thread runner([&] {
      EXPECT_TRUE(std::holds_alternative<InterruptedExit>(guest.vcpu(1).run()));
      stopped = true;
    });
    std::this_thread::sleep_for(std::chrono::microseconds(100 * (i % 5)));
    guest.vcpu(1).kick();
    runner.join();
  }
}

}  // namespace
}  // namespace wisp
