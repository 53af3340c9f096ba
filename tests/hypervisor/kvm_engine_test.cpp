// What only KVM does among the engines; the rest is in engine_*_test.cpp.
#include <fcntl.h>

#include "base/unique_fd.h"
#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"
#include "hypervisor/kvm/kvm_memory.h"
#include "hypervisor/kvm_guest.h"

namespace wisp {
namespace {

using KvmEngine = KvmTest;

TEST_F(KvmEngine, ExecutionWithoutMemoryIsAnEngineErrorWithItsPlace) {
  KvmGuest guest;
  guest.put(0x1000, {0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0});  // mov eax, 0xd0000000; jmp eax
  guest.start_protected(0x1000);
  const Exit exit = guest.run();
  const auto* error = std::get_if<EngineErrorExit>(&exit);
  ASSERT_NE(error, nullptr) << exit.index();
  EXPECT_NE(error->message.find("vCPU 0"), std::string::npos) << error->message;
  EXPECT_NE(error->message.find("0xd0000000"), std::string::npos) << error->message;
}

TEST_F(KvmEngine, LimitsAreToldBeforeKvmIsAsked) {
  auto hypervisor = must(KvmHypervisor::open());
  EXPECT_EQ(hypervisor->name(), "kvm");
  EXPECT_GE(hypervisor->max_vcpus(), 8U);
  VmOptions options;
  options.max_vcpus = 0;
  EXPECT_FALSE(hypervisor->create_vm(options).has_value());
  options.max_vcpus = hypervisor->max_vcpus() + 1;
  EXPECT_FALSE(hypervisor->create_vm(options).has_value());
  options.max_vcpus = 1;
  options.topology.threads = 0;
  EXPECT_FALSE(hypervisor->create_vm(options).has_value());
  options.topology = {.sockets = UINT32_MAX, .dies = UINT32_MAX, .clusters = 2, .cores = 2, .threads = 1};
  EXPECT_FALSE(hypervisor->create_vm(options).has_value());
  // 200 vCPUs in sockets of 5 cores: ids with gaps, up to 8 * 39 + 4.
  options.max_vcpus = 200;
  options.topology = {.sockets = 40, .dies = 1, .clusters = 1, .cores = 5, .threads = 1};
  const auto gaps = hypervisor->create_vm(options);
  ASSERT_FALSE(gaps.has_value());
  EXPECT_NE(gaps.error().message.find("APIC id 316"), std::string::npos) << gaps.error().message;
  options = {};
  const auto vm = must(hypervisor->create_vm(options));
  const auto vcpu = must(vm->create_vcpu(0));
  EXPECT_FALSE(vm->create_vcpu(1).has_value());
  EXPECT_FALSE(vm->create_vcpu(0).has_value());
}

TEST_F(KvmEngine, SlotsAreUsedAgainAndRunOut) {
  constexpr std::uint32_t kSlots = 4;
  const UniqueFd device(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(device.valid());
  const UniqueFd vm(kvm::call(device.get(), KVM_CREATE_VM, 0UL));
  ASSERT_TRUE(vm.valid());
  kvm::MemoryListener listener(vm.get(), kSlots);
  const HostPages host(0x1000);
  const auto at = [&](std::uint64_t i) {
    return FlatRange{.start = 0xc0000000 + i * 0x1000,
                     .size = 0x1000,
                     .kind = RegionKind::kRam,
                     .host = host.data(),
                     .name = "page"};
  };
  for (std::uint64_t i = 0; i < kSlots; ++i) {
    must(listener.range_added(at(i)));
  }
  const auto full = listener.range_added(at(kSlots));
  ASSERT_FALSE(full.has_value());
  EXPECT_NE(full.error().message.find("all 4 memory slots"), std::string::npos) << full.error().message;
  // Whichever comes free is used by the next.
  for (std::uint64_t i = 0; i < 20; ++i) {
    listener.range_removed(at(i));
    must(listener.range_added(at(i + kSlots)));
  }
  EXPECT_FALSE(listener.range_added(at(100)).has_value());
}

}  // namespace
}  // namespace wisp
