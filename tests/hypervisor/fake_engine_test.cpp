// The fake engine keeps the contract of the seam, since tests of machines lean on it.
#include "support/fake_engine.h"

#include <gtest/gtest.h>

#include <thread>

#include "base/bytes.h"

namespace wisp {
namespace {

class FakeEngine : public ::testing::Test {
 protected:
  void SetUp() override {
    VmOptions options;
    options.max_vcpus = 2;
    vm_ = *hypervisor_.create_vm(options);
    vcpu_ = *vm_->create_vcpu(0);
  }
  FakeVm& fake() { return *hypervisor_.vm(); }
  FakeVcpu& fake_vcpu() { return *fake().vcpu(0); }

  FakeHypervisor hypervisor_;
  std::unique_ptr<Vm> vm_;
  std::unique_ptr<Vcpu> vcpu_;
};

TEST_F(FakeEngine, RunsItsScript) {
  fake_vcpu().script({FakeExit::port_write(0x3f8, {'x'}), FakeExit::mmio_read(0xd0000000, 4),
                      FakeExit::port_read(0x60, 1), FakeExit::shutdown()});
  const Exit first = vcpu_->run();
  EXPECT_EQ(std::get<PortWriteExit>(first).port, 0x3f8);
  EXPECT_EQ(std::get<PortWriteExit>(first).data[0], 'x');
  const Exit second = vcpu_->run();
  EXPECT_EQ(std::get<MmioReadExit>(second).address, 0xd0000000U);
  u64_to_bytes(0x11223344, std::get<MmioReadExit>(second).data);
  EXPECT_TRUE(fake_vcpu().answers().empty());
  const Exit third = vcpu_->run();
  EXPECT_EQ(std::get<PortReadExit>(third).data.size(), 1U);
  EXPECT_EQ(fake_vcpu().answers(), (std::vector<std::vector<std::uint8_t>>{{0x44, 0x33, 0x22, 0x11}}));
  EXPECT_TRUE(std::holds_alternative<ShutdownExit>(vcpu_->run()));
}

TEST_F(FakeEngine, KicksComeBeforeTheScriptAndAfterTheAccess) {
  fake_vcpu().script({FakeExit::port_read(0x60, 1), FakeExit::reset()});
  const Exit read = vcpu_->run();
  std::get<PortReadExit>(read).data[0] = 9;
  EXPECT_FALSE(vcpu_->save().has_value());
  vcpu_->kick();
  EXPECT_TRUE(std::holds_alternative<InterruptedExit>(vcpu_->run()));
  EXPECT_EQ(fake_vcpu().answers(), (std::vector<std::vector<std::uint8_t>>{{9}}));
  EXPECT_TRUE(vcpu_->save().has_value());
  EXPECT_TRUE(std::holds_alternative<ResetExit>(vcpu_->run()));
}

TEST_F(FakeEngine, WaitsAtTheEndOfTheScript) {
  std::thread runner([&] {
    EXPECT_TRUE(std::holds_alternative<PortWriteExit>(vcpu_->run()));
    EXPECT_TRUE(std::holds_alternative<InterruptedExit>(vcpu_->run()));
  });
  fake_vcpu().script(FakeExit::port_write(1, {2}));
  EXPECT_TRUE(fake_vcpu().wait_until_idle());
  EXPECT_FALSE(vcpu_->regs().has_value());
  vcpu_->kick();
  runner.join();
  EXPECT_FALSE(fake_vcpu().wait_until_idle(std::chrono::milliseconds(1)));
}

TEST_F(FakeEngine, KeepsState) {
  CpuRegs regs;
  regs.rip = 0x1234;
  EXPECT_TRUE(vcpu_->set_regs(regs).has_value());
  EXPECT_EQ(vcpu_->regs()->rip, 0x1234U);
  EXPECT_TRUE(vcpu_->reset().has_value());
  EXPECT_EQ(vcpu_->regs()->rip, 0U);
  EXPECT_EQ(fake_vcpu().resets(), 1U);
  fake_vcpu().refuse_loads("not today");
  EXPECT_EQ(vcpu_->load({}).error().message, "not today");
}

TEST_F(FakeEngine, CountsInterrupts) {
  auto line = *vm_->irq_line(5);
  const auto other = *vm_->irq_line(5);
  const auto message = *vm_->msi_line({.address = 0xfee00000, .data = 0x41});
  line->pulse();
  line->pulse();
  signal_eventfd(other->event_fd());
  message->pulse();
  EXPECT_EQ(fake().irqs().pulses(5), 3U);
  EXPECT_TRUE(fake().irqs().wait_for_pulses(24, 1));
  EXPECT_FALSE(fake().irqs().wait_for_pulses(24, 2, std::chrono::milliseconds(1)));
  line->set_level(true);
  line->set_level(true);
  EXPECT_TRUE(fake().irqs().level(5));
  EXPECT_EQ(fake().irqs().rises(5), 1U);
  line->pulse();
  line.reset();
  EXPECT_EQ(fake().irqs().pulses(5), 4U);
  EXPECT_EQ(fake().irqs().lines(), 2U);
  EXPECT_EQ(fake().messages().at(0).data, 0x41U);
  EXPECT_FALSE(vm_->irq_line(24).has_value());
}

TEST_F(FakeEngine, RecordsMemoryAndItsDirtyPages) {
  AddressSpace memory("memory", 0);
  ASSERT_TRUE(memory.add_listener(&vm_->memory_listener()).has_value());
  std::vector<std::uint8_t> bytes(0x50000);
  const auto ram = MemoryRegion::ram("ram", bytes.data(), bytes.size());
  fake().memory_listener().refuse(1);
  EXPECT_FALSE(memory.add(ram, 0x10000).has_value());
  EXPECT_TRUE(memory.add(ram, 0x10000).has_value());
  EXPECT_EQ(fake().memory_listener().ranges().at(0x10000).size, 0x50000U);
  fake().mark_dirty(0x10000);
  ASSERT_TRUE(vm_->set_dirty_log(true).has_value());
  fake().mark_dirty(0x11fff);
  fake().mark_dirty(0x10000 + 65 * 0x1000);
  EXPECT_EQ(*vm_->take_dirty_log(0x10000), (std::vector<std::uint64_t>{2, 2}));
  EXPECT_EQ(*vm_->take_dirty_log(0x10000), (std::vector<std::uint64_t>{0, 0}));
  EXPECT_FALSE(vm_->take_dirty_log(0x20000).has_value());
  ASSERT_TRUE(memory.remove(ram).has_value());
  EXPECT_TRUE(fake().memory_listener().ranges().empty());
  EXPECT_EQ(fake().memory_listener().events().size(), 2U);
  memory.remove_listener(&vm_->memory_listener());
}

TEST_F(FakeEngine, VcpusComeInOrder) {
  EXPECT_FALSE(vm_->create_vcpu(0).has_value());
  const auto second = vm_->create_vcpu(1);
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ((*second)->id(), 1U);
  EXPECT_FALSE(vm_->create_vcpu(2).has_value());
  EXPECT_EQ(fake().vcpu(7), nullptr);
}

}  // namespace
}  // namespace wisp
