// Devices and back ends that come and go while the machine runs.
#include <gmock/gmock.h>

#include <thread>

#include "boot/acpi_layout.h"
#include "machine/machine_kit.h"

namespace wisp {
namespace {

using test::properties;
using ::testing::HasSubstr;

constexpr std::uint16_t kEventPort = layout::kPowerPort + kPowerEventSelector;
constexpr std::uint32_t kMagic = 0x74726976;

class HotplugTest : public test::MachineKit {
 protected:
  std::uint32_t slot_register(std::uint64_t offset) {
    return guest_port_read(static_cast<std::uint16_t>(layout::kSlotHotplugPort + offset));
  }
  std::uint32_t present() { return slot_register(SlotHotplugRegisters::kPresent0); }
  // As the guest's _EVT: reads and acknowledges.
  std::uint32_t take_changed() {
    const std::uint32_t changed = slot_register(SlotHotplugRegisters::kChanged0);
    guest_port_write(layout::kSlotHotplugPort + SlotHotplugRegisters::kChanged0, changed);
    return changed;
  }
  bool known(const std::string& device) {
    for (const BlockInfo& block : machine().blocks()) {
      if (block.device_id == device) {
        return true;
      }
    }
    return false;
  }
  static DeviceConfig with(DeviceConfig device, const char* name, PropertyValue value) {
    device.properties.set(name, std::move(value));
    return device;
  }
  void mmio_write(Gpa address, std::uint32_t value) {
    std::vector<std::uint8_t> data(4);
    store_le(data.data(), value);
    vcpu().script(FakeExit::mmio_write(address, data));
  }
  // Brings the device of the slot up to DRIVER_OK with an empty first queue.
  void activate(const VirtioMmioSlot& slot) {
    using namespace virtio_mmio;
    mmio_write(slot.base + kStatus, kVirtioStatusAcknowledge | kVirtioStatusDriver);
    mmio_write(slot.base + kDriverFeaturesSel, 1);
    mmio_write(slot.base + kDriverFeatures, 1);  // VERSION_1
    const std::uint32_t ready = kVirtioStatusAcknowledge | kVirtioStatusDriver | kVirtioStatusFeaturesOk;
    mmio_write(slot.base + kStatus, ready);
    mmio_write(slot.base + kQueueSel, 0);
    mmio_write(slot.base + kQueueNum, 16);
    mmio_write(slot.base + kQueueDescLow, 0x300'0000);
    mmio_write(slot.base + kQueueDriverLow, 0x300'1000);
    mmio_write(slot.base + kQueueDeviceLow, 0x300'2000);
    mmio_write(slot.base + kQueueReady, 1);
    mmio_write(slot.base + kStatus, ready | kVirtioStatusDriverOk);
    EXPECT_EQ(guest_read(slot.base + kStatus), ready | kVirtioStatusDriverOk);
  }
};

TEST_F(HotplugTest, ADiskComesAndGoes) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_EQ(present(), 0U);
  ASSERT_TRUE(machine().add_drive(drive("disk")));
  ASSERT_TRUE(machine().add_device(blk("vda", "disk")));

  // What the guest is told.
  EXPECT_TRUE(vm().irqs().level(layout::kGedGsi));
  EXPECT_EQ(guest_port_read(kEventPort), kPowerEventSlotScan);
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  EXPECT_EQ(present(), 1U);
  EXPECT_EQ(take_changed(), 1U);
  EXPECT_EQ(take_changed(), 0U);
  EXPECT_EQ(guest_read(virtio_slot(0).base), kMagic);
  EXPECT_EQ(guest_read(virtio_slot(0).base + virtio_mmio::kConfig), test::kMiB / 512);

  ASSERT_EQ(machine().blocks().size(), 1U);
  EXPECT_EQ(machine().blocks()[0].device_id, "vda");
  EXPECT_EQ(machine().remove_drive("disk").error().message,
            "drive disk is in use by device 'vda': remove the device first");

  ASSERT_TRUE(machine().remove_device("vda"));
  EXPECT_TRUE(events_.all().empty()) << "told by the main loop, after the command was answered";
  ASSERT_TRUE(run_until_events(1));
  EXPECT_EQ(events_.take(), Strings{"deleted vda /machine/peripheral/vda"});
  EXPECT_EQ(guest_port_read(kEventPort), kPowerEventSlotScan);
  EXPECT_EQ(present(), 0U);
  EXPECT_EQ(take_changed(), 1U);
  EXPECT_EQ(guest_read(virtio_slot(0).base), 0xffff'ffffU);
  EXPECT_FALSE(known("vda"));
  EXPECT_TRUE(machine().remove_drive("disk"));
  EXPECT_TRUE(machine().blocks().empty());
  EXPECT_EQ(machine().remove_device("vda").error().message, "there is no device with id 'vda'");
}

TEST_F(HotplugTest, AFreedSlotWaitsForTheNextReset) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().add_drive(drive("disk")));
  for (const std::uint32_t slot : {0U, 1U, 2U}) {
    ASSERT_TRUE(machine().add_device(blk("vda", "disk")));
    EXPECT_EQ(present(), 1U << slot);
    ASSERT_TRUE(machine().remove_device("vda"));
  }
  ASSERT_TRUE(machine().reset());
  EXPECT_EQ(take_changed(), 0U) << "a guest that boots afresh looks at what is present";
  ASSERT_TRUE(machine().add_device(blk("vda", "disk")));
  EXPECT_EQ(present(), 1U);
  ASSERT_TRUE(machine().reset());
  EXPECT_EQ(present(), 1U) << "what was plugged stays over a reset";
  EXPECT_EQ(guest_read(virtio_slot(0).base), kMagic);
}

TEST_F(HotplugTest, DevicesFromTheStartAreNoChange) {
  config_.drives = {drive("a"), drive("b")};
  config_.devices = {blk("vda", "a"), with(blk("vdb", "b"), "addr", std::uint64_t{9})};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_EQ(present(), 1U | 1U << 9);
  EXPECT_EQ(take_changed(), 0U);
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  ASSERT_TRUE(machine().remove_device("vda"));
  EXPECT_EQ(present(), 1U << 9);
}

TEST_F(HotplugTest, WhatFailsLeavesNoTrace) {
  config_.drives = {drive("a"), drive("b")};
  config_.iothreads = {"io"};
  config_.devices = {blk("vda", "a"),
                     {.driver = "virtio-serial-device", .id = "vser", .properties = {}},
                     {.driver = "virtconsole", .id = "port", .properties = properties({{"chardev", "con"}})},
                     {.driver = "isa-debug-exit", .id = "debug", .properties = {}}};
  config_.chardevs = {{.kind = "null", .id = "con", .properties = {}, .fds = {}}};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  const std::uint32_t before = present();
  const auto files_before = test::open_files();
  const auto error = [&](const DeviceConfig& device) {
    const auto added = machine().add_device(device);
    return added ? std::string() : added.error().message;
  };
  EXPECT_EQ(error(blk("vda", "b")), "device id 'vda' is taken");
  EXPECT_EQ(error(blk("port", "b")), "device id 'port' is taken");
  EXPECT_EQ(error(blk("debug", "b")), "device id 'debug' is taken");
  EXPECT_EQ(error(blk("vdb", "a")),
            "-device virtio-blk-device,id=vdb: drive a is already in use by device 'vda'");
  EXPECT_EQ(error(blk("vdb", "none")), "-device virtio-blk-device,id=vdb: there is no drive with id 'none'");
  EXPECT_EQ(error(with(blk("vdb", "b"), "addr", std::uint64_t{0})),
            "-device virtio-blk-device,id=vdb: slot 0 is taken by device 'vda'");
  EXPECT_EQ(error(with(with(blk("vdb", "b"), "addr", std::uint64_t{0}), "iothread", std::string("io"))),
            "-device virtio-blk-device,id=vdb: slot 0 is taken by device 'vda'");
  EXPECT_THAT(error(with(blk("vdb", "b"), "iothread", std::string("io9"))), HasSubstr("iothread=io9"));
  EXPECT_EQ(error({.driver = "isa-debug-exit", .id = "more", .properties = {}}),
            "isa-debug-exit cannot be added to a running machine");
  EXPECT_THAT(error({.driver = "virtio-nothing", .id = "x", .properties = {}}), HasSubstr("virtio-nothing"));
  // A descriptor goes with the attempt, wherever that ends: at the id, at the event loop, at the file itself.
  const auto vsock = [&error](const std::string& id, const char* iothread) {
    DeviceConfig device{.driver = "vhost-vsock-device", .id = id, .properties = {}};
    device.properties.set("guest-cid", std::uint64_t{7});
    device.properties.set("vhostfd", std::to_string(make_eventfd().value().release()));
    return error(iothread == nullptr ? device : with(device, "iothread", std::string(iothread)));
  };
  EXPECT_EQ(vsock("vda", nullptr), "device id 'vda' is taken");
  EXPECT_THAT(vsock("vsock", "io9"), HasSubstr("iothread=io9"));
  EXPECT_THAT(vsock("vsock", nullptr), HasSubstr("vhost-vsock"));

  // Back ends: each of these has opened something when it fails.
  BackendConfig small = drive("small");
  std::filesystem::resize_file(dir_.file("small.img"), 100);
  EXPECT_THAT(machine().add_drive(small).error().message, HasSubstr("drive small: "));
  BackendConfig locked = drive("c");
  locked.properties.set("file", dir_.file("a.img"));
  EXPECT_THAT(machine().add_drive(locked).error().message, HasSubstr("drive c: "));
  const std::string listener = dir_.file("listener.sock");
  const BackendConfig socket{
      .kind = "socket",
      .id = "sock",
      .properties = properties({{"path", listener}, {"server", true}, {"wait", false}}),
      .fds = {}};
  ASSERT_TRUE(machine().add_chardev(socket));
  BackendConfig again = socket;
  again.id = "other";
  EXPECT_THAT(machine().add_chardev(again).error().message, HasSubstr("listener.sock"));
  EXPECT_TRUE(std::filesystem::exists(listener)) << "the one that is served is not taken away";
  EXPECT_TRUE(machine().remove_chardev("sock"));
  EXPECT_FALSE(std::filesystem::exists(listener));
  run_posted();
  EXPECT_EQ(test::open_files(), files_before);
  EXPECT_EQ(machine().blocks().size(), 2U);
  EXPECT_EQ(machine().chardevs().size(), 1U);

  EXPECT_EQ(present(), before);
  EXPECT_EQ(take_changed(), 0U);
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  EXPECT_TRUE(machine().add_device(blk("vdb", "b"))) << "drive b was not left in use";
}

TEST_F(HotplugTest, ABalloonThatFoundNoPlaceIsForgotten) {
  config_.drives = {drive("a")};
  config_.devices = {blk("vda", "a")};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_FALSE(machine().add_device(with(balloon("b"), "addr", std::uint64_t{0})));
  EXPECT_FALSE(machine().balloon()) << "the device does not exist";
  ASSERT_TRUE(machine().add_device(balloon("b")));
  EXPECT_TRUE(machine().balloon());
  EXPECT_FALSE(machine().add_device(balloon("c")));
  EXPECT_TRUE(machine().balloon());
  ASSERT_TRUE(machine().remove_device("b"));
  EXPECT_FALSE(machine().balloon());
  EXPECT_TRUE(machine().add_device(balloon("c")));
}

TEST_F(HotplugTest, ADevicesIdReachesOnlyWhatIsItsOwn) {
  // Whatever a device is called, removing it does not give free what the serial port or a console uses.
  config_.chardevs = {{.kind = "null", .id = "com1", .properties = {}, .fds = {}},
                      {.kind = "null", .id = "hvc0", .properties = {}, .fds = {}}};
  config_.serial = "com1";
  config_.devices = {{.driver = "virtio-serial-device", .id = "vser", .properties = {}},
                     {.driver = "virtconsole", .id = "con", .properties = properties({{"chardev", "hvc0"}})}};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().add_drive(drive("disk")));
  ASSERT_TRUE(machine().add_device(blk("serial0", "disk")));
  ASSERT_TRUE(machine().remove_device("serial0"));
  EXPECT_FALSE(machine().remove_chardev("com1"));
  EXPECT_FALSE(machine().remove_chardev("hvc0"));
  ASSERT_TRUE(machine().remove_device("vser"));
  EXPECT_TRUE(machine().remove_chardev("hvc0")) << "its ports went with it";
  EXPECT_FALSE(machine().remove_chardev("com1"));
  guest_port_write(layout::kSerialPort, 'x', 1);
}

TEST_F(HotplugTest, DevicesWithoutIdUseTheirBackEndsAllTheSame) {
  config_.drives = {drive("a"), drive("b")};
  config_.devices = {blk("", "a"), blk("", "b")};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_FALSE(machine().remove_drive("a"));
  EXPECT_FALSE(machine().remove_drive("b"));
  EXPECT_EQ(present(), 3U);
}

TEST_F(HotplugTest, APausedMachineTakesDevicesThatWaitForItsResume) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(machine().add_drive(drive("disk")));
  ASSERT_TRUE(machine().add_device(blk("vda", "disk")));
  EXPECT_TRUE(vcpu().save()) << "still parked";
  ASSERT_TRUE(machine().add_device(balloon("b")));
  ASSERT_TRUE(machine().remove_device("b"));
  EXPECT_TRUE(vcpu().save()) << "still parked";
  ASSERT_TRUE(machine().resume());
  EXPECT_EQ(present(), 1U);
  activate(virtio_slot(0));
}

TEST_F(HotplugTest, AnInterruptThatWasNotAcknowledgedIsRepeatedAtTheResume) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().add_device(balloon("b")));
  const auto slot = virtio_slot(0);
  activate(slot);
  const std::uint64_t before = vm().irqs().pulses(slot.gsi);
  ASSERT_TRUE(machine().set_balloon(32 * test::kMiB));
  EXPECT_EQ(vm().irqs().pulses(slot.gsi), before + 1);
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(machine().resume());
  EXPECT_EQ(vm().irqs().pulses(slot.gsi), before + 2);
  mmio_write(slot.base + virtio_mmio::kInterruptAck, virtio_mmio::kInterruptConfig);
  EXPECT_EQ(guest_read(slot.base + virtio_mmio::kInterruptStatus), 0U);
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(machine().resume());
  EXPECT_EQ(vm().irqs().pulses(slot.gsi), before + 2);
}

TEST_F(HotplugTest, ADeviceOfAnIothreadGoesWhileTheGuestKicksIt) {
  config_.iothreads = {"io0", "io1"};
  config_.cpus = {.count = 2, .max = 2, .topology = {.cores = 2}};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_EQ(machine().iothreads().size(), 2U);
  EXPECT_NE(machine().iothreads()[0].thread_id, machine().iothreads()[1].thread_id);
  ASSERT_TRUE(machine().add_drive(drive("disk")));
  for (int round = 0; round < 40; ++round) {
    const auto slot = virtio_slot(static_cast<std::uint32_t>(round));
    ASSERT_TRUE(machine().add_device(
        with(blk("vda", "disk"), "iothread", std::string(round % 2 == 0 ? "io0" : "io1"))));
    activate(slot);
    for (int kick = 0; kick < 50; ++kick) {
      vcpu(1).script(FakeExit::mmio_write(slot.base + virtio_mmio::kQueueNotify, {0, 0, 0, 0}));
    }
    ASSERT_TRUE(machine().remove_device("vda"));
    ASSERT_TRUE(vcpu(1).wait_until_idle());
  }
  // And at the end of the machine, with one in place and being kicked.
  ASSERT_TRUE(machine().add_device(with(blk("vda", "disk"), "iothread", std::string("io1"))));
  activate(virtio_slot(40));
  for (int kick = 0; kick < 500; ++kick) {
    vcpu(1).script(FakeExit::mmio_write(virtio_slot(40).base + virtio_mmio::kQueueNotify, {0, 0, 0, 0}));
  }
  machine_.reset();
}

TEST_F(HotplugTest, BackEndsComeAndGoByThemselves) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  const auto before = test::open_files();
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(machine().add_drive(drive("disk")));
    ASSERT_TRUE(machine().add_chardev({.kind = "ringbuf", .id = "ring", .properties = {}, .fds = {}}));
    EXPECT_FALSE(machine().add_drive(drive("disk")));
    ASSERT_EQ(machine().chardevs().size(), 1U);
    ASSERT_TRUE(machine().remove_drive("disk"));
    ASSERT_TRUE(machine().remove_chardev("ring"));
    EXPECT_FALSE(machine().remove_chardev("ring"));
  }
  EXPECT_EQ(test::open_files(), before);
}

TEST_F(HotplugTest, ARemovedDeviceLeavesNothingOpen) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  run_posted();
  const auto before = test::open_files();
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(machine().add_drive(drive("disk")));
    ASSERT_TRUE(machine().add_device(blk("vda", "disk")));
    activate(virtio_slot(static_cast<std::uint32_t>(i)));
    ASSERT_TRUE(machine().remove_device("vda"));
    ASSERT_TRUE(machine().remove_drive("disk"));
  }
  run_posted();
  EXPECT_EQ(test::open_files(), before);
}

}  // namespace
}  // namespace wisp
