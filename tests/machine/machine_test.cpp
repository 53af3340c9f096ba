// The life of a machine: start, pause, reset, shutdown, end.
#include "machine/machine.h"

#include <gmock/gmock.h>
#include <sys/socket.h>

#include "machine/machine_kit.h"

namespace wisp {
namespace {

using ::testing::HasSubstr;

constexpr std::uint16_t kSleepPort = layout::kPowerPort + kPowerSleepControl;
constexpr std::uint8_t kSleepS5 = 0x20 | kPowerSleepTypeS5 << 2;
constexpr std::uint16_t kResetPort = layout::kPowerPort + kPowerReset;
constexpr std::uint16_t kEventPort = layout::kPowerPort + kPowerEventSelector;

class MachineTest : public test::MachineKit {
 protected:
  static FakeExit ask_shutdown() { return FakeExit::port_write(kSleepPort, {kSleepS5}); }
  static FakeExit ask_reset() { return FakeExit::port_write(kResetPort, {kPowerResetValue}); }
  static std::string ended(const char* by, ShutdownReason reason) {
    return fmt::format("shutdown {} {}", by, static_cast<int>(reason));
  }
  void expect_kernel_in_place() {
    const std::uint8_t* at = host(layout::kRawKernel);
    ASSERT_NE(at, nullptr);
    EXPECT_EQ(std::string(at, at + kernel_.size()), kernel_);
  }
};

TEST_F(MachineTest, IsBuiltUpToItsFirstInstruction) {
  config_.cpus = {.count = 2, .max = 4, .topology = {.sockets = 2, .cores = 2}};
  ASSERT_NO_FATAL_FAILURE(create());
  EXPECT_EQ(machine().state(), RunState::kCreated);
  EXPECT_EQ(machine().engine_name(), "fake");
  EXPECT_EQ(vm().options().max_vcpus, 4U);
  EXPECT_EQ(vm().options().topology.cores, 2U);
  EXPECT_NE(vm().vcpu(1), nullptr);
  EXPECT_EQ(vm().vcpu(2), nullptr);
  EXPECT_EQ(vcpu().regs()->rip, layout::kRawKernel);
  EXPECT_NE(vcpu(1).regs()->rip, layout::kRawKernel);
  expect_kernel_in_place();
  EXPECT_TRUE(events_.all().empty());
  ASSERT_EQ(machine().vcpus().size(), 2U);
  EXPECT_NE(machine().vcpus()[0].thread_id, machine().vcpus()[1].thread_id);
  EXPECT_EQ(machine().vcpus()[1].core_id, 1U);

  ASSERT_TRUE(machine().start());
  EXPECT_EQ(machine().state(), RunState::kRunning);
  EXPECT_TRUE(vcpu(0).wait_until_idle());
  EXPECT_TRUE(vcpu(1).wait_until_idle());
}

TEST_F(MachineTest, TheEscapeKeyOfItsTerminalEndsIt) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  const UniqueFd user(ends[0]);
  const UniqueFd standard(ends[1]);
  config_.chardevs = {
      {.kind = "stdio", .id = "tty", .properties = test::properties({{"mux", true}}), .fds = {}}};
  config_.serial = "tty";
  bool ended_by_key = false;
  {
    const test::StandardFiles files(standard.get(), standard.get());
    ASSERT_NO_FATAL_FAILURE(create_and_start());
    ASSERT_EQ(::write(user.get(), "\x01x", 2), 2);
    ended_by_key = run_until_events(1);
    machine_.reset();
  }
  EXPECT_TRUE(ended_by_key);
  EXPECT_EQ(events_.take(), Strings{ended("host", ShutdownReason::kHostUi)});
}

TEST_F(MachineTest, PerformanceCountersReachTheEngineOrAreSaidToBeMissing) {
  ASSERT_NO_FATAL_FAILURE(create());
  EXPECT_FALSE(vm().options().pmu);
  EXPECT_EQ(logged(), "");
  machine_.reset();
  config_.cpus.pmu = true;
  ASSERT_NO_FATAL_FAILURE(create());
  EXPECT_TRUE(vm().options().pmu);
  EXPECT_THAT(logged(), HasSubstr("-cpu pmu=on: the engine 'fake' has no performance counters"));
}

TEST_F(MachineTest, VcpusAreNumberedByTopology) {
  config_.cpus = {
      .count = 8, .max = 8, .topology = {.sockets = 2, .dies = 1, .clusters = 1, .cores = 2, .threads = 2}};
  ASSERT_NO_FATAL_FAILURE(create());
  const auto vcpus = machine().vcpus();
  ASSERT_EQ(vcpus.size(), 8U);
  for (std::uint32_t i = 0; i < 8; ++i) {
    EXPECT_EQ(vcpus[i].thread_in_core, i % 2) << i;
    EXPECT_EQ(vcpus[i].core_id, i / 2 % 2) << i;
    EXPECT_EQ(vcpus[i].socket_id, i / 4) << i;
  }
}

TEST_F(MachineTest, NoTwoVcpusOfAClusteredTopologyAreAlike) {
  config_.cpus = {
      .count = 16, .max = 16, .topology = {.sockets = 1, .dies = 2, .clusters = 2, .cores = 2, .threads = 2}};
  ASSERT_NO_FATAL_FAILURE(create());
  const auto vcpus = machine().vcpus();
  ASSERT_EQ(vcpus.size(), 16U);
  for (std::uint32_t i = 0; i < 16; ++i) {
    EXPECT_EQ(vcpus[i].thread_in_core, i % 2) << i;
    EXPECT_EQ(vcpus[i].core_id, i / 2 % 2) << i;
    EXPECT_EQ(vcpus[i].cluster_id, i / 4 % 2) << i;
    EXPECT_EQ(vcpus[i].die_id, i / 8) << i;
    EXPECT_EQ(vcpus[i].socket_id, 0U) << i;
  }
}

TEST_F(MachineTest, PauseAndResumeTellOnceEach) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(machine().pause()) << "already there";
  EXPECT_EQ(machine().state(), RunState::kPaused);
  EXPECT_TRUE(vcpu().save());
  EXPECT_EQ(events_.take(), Strings{"stop"});
  vcpu().script(FakeExit::port_read(kEventPort, 4));
  ASSERT_TRUE(machine().resume());
  ASSERT_TRUE(machine().resume());
  EXPECT_TRUE(vcpu().wait_until_idle());
  EXPECT_EQ(vcpu().answers().size(), 1U);
  EXPECT_EQ(events_.take(), Strings{"resume"});
}

TEST_F(MachineTest, ManyPausesLoseNoAccess) {
  config_.cpus = {.count = 2, .max = 2, .topology = {.cores = 2}};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  for (int i = 0; i < 300; ++i) {
    for (std::uint32_t id = 0; id < 2; ++id) {
      vcpu(id).script(FakeExit::port_read(kEventPort, 4));
      vcpu(id).script(FakeExit::mmio_read(layout::kVirtioMmio, 4));
    }
    ASSERT_TRUE(machine().pause());
    ASSERT_TRUE(vcpu(0).save());
    ASSERT_TRUE(vcpu(1).save());
    ASSERT_TRUE(machine().resume());
  }
  for (std::uint32_t id = 0; id < 2; ++id) {
    ASSERT_TRUE(vcpu(id).wait_until_idle());
    EXPECT_EQ(vcpu(id).answers().size(), 600U);
  }
}

TEST_F(MachineTest, PauseAndResumeBeforeTheStartSayHowItStarts) {
  ASSERT_NO_FATAL_FAILURE(create());
  EXPECT_EQ(machine().reset().error().message, "the machine has not started yet");
  EXPECT_EQ(machine().powerdown().error().message, "the machine has not started yet");
  ASSERT_TRUE(machine().pause());
  EXPECT_EQ(machine().state(), RunState::kCreated);
  ASSERT_TRUE(machine().start());
  EXPECT_EQ(machine().state(), RunState::kPaused);
  EXPECT_EQ(vm().guest_starts(), 0U);
  ASSERT_TRUE(machine().resume());
  EXPECT_EQ(machine().state(), RunState::kRunning);
  machine().quit(ShutdownReason::kHostQuit);
  EXPECT_EQ(machine().pause().error().message, "the machine has shut down");
  EXPECT_EQ(machine().resume().error().message, "the machine has shut down");

  machine_.reset();
  config_.start_paused = true;
  ASSERT_NO_FATAL_FAILURE(create());
  ASSERT_TRUE(machine().resume());
  ASSERT_TRUE(machine().start());
  EXPECT_EQ(machine().state(), RunState::kRunning);
}

TEST_F(MachineTest, StartsPausedWhereAsked) {
  config_.start_paused = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_EQ(machine().state(), RunState::kPaused);
  EXPECT_TRUE(vcpu().save()) << "parked";
  EXPECT_TRUE(events_.all().empty());
  EXPECT_EQ(vm().guest_starts(), 0U);
  ASSERT_TRUE(machine().resume());
  EXPECT_TRUE(vcpu().wait_until_idle());
  EXPECT_EQ(events_.take(), Strings{"resume"});
  EXPECT_EQ(vm().guest_starts(), 1U);
}

TEST_F(MachineTest, TheEngineHearsOnceThatTheGuestRuns) {
  ASSERT_NO_FATAL_FAILURE(create());
  EXPECT_EQ(vm().guest_starts(), 0U);
  ASSERT_TRUE(machine().start());
  EXPECT_EQ(vm().guest_starts(), 1U);
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(machine().resume());
  ASSERT_TRUE(machine().reset());
  EXPECT_EQ(vm().guest_starts(), 1U);
}

TEST_F(MachineTest, ThePowerButtonRaisesTheEventInterrupt) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  ASSERT_TRUE(machine().powerdown());
  EXPECT_EQ(events_.take(), Strings{"powerdown"});
  EXPECT_TRUE(vm().irqs().level(layout::kGedGsi));
  EXPECT_EQ(guest_port_read(kEventPort), kPowerEventPowerButton);
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  EXPECT_EQ(machine().state(), RunState::kRunning) << "what follows is the guest's choice";

  // Pressed while paused, it is there at the resume.
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(machine().powerdown());
  ASSERT_TRUE(machine().resume());
  EXPECT_EQ(guest_port_read(kEventPort), kPowerEventPowerButton);
}

TEST_F(MachineTest, WithoutAcpiThereIsNoPowerButton) {
  config_.acpi = false;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  const auto pressed = machine().powerdown();
  ASSERT_FALSE(pressed);
  EXPECT_THAT(pressed.error().message, HasSubstr("acpi=off"));
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  EXPECT_TRUE(events_.all().empty());
}

TEST_F(MachineTest, AResetFromOutsidePutsEverythingBack) {
  config_.drives.push_back(drive("disk"));
  config_.devices.push_back(blk("vda", "disk"));
  config_.cpus = {.count = 2, .max = 2, .topology = {.cores = 2}};
  ASSERT_NO_FATAL_FAILURE(create());
  ASSERT_TRUE(machine().start());
  vm().set_platform({9, 9});  // the guest programmed its interrupt controllers
  constexpr Gpa kDirty = 32 * test::kMiB;
  const Gpa status = virtio_slot(0).base + virtio_mmio::kStatus;
  std::fill_n(host(layout::kRawKernel), kernel_.size(), std::uint8_t{0xcc});
  *host(kDirty) = 7;
  vcpu().script(FakeExit::mmio_write(status, {3, 0, 0, 0}));
  EXPECT_EQ(guest_read(status), 3U);
  ASSERT_TRUE(machine().powerdown());
  events_.take();

  ASSERT_TRUE(machine().reset());
  EXPECT_EQ(events_.take(), Strings{"reset host"}) << "by the host, as QEMU tells of system_reset";
  EXPECT_EQ(machine().state(), RunState::kRunning);
  EXPECT_EQ(vcpu(0).resets(), 1U);
  EXPECT_EQ(vcpu(1).resets(), 1U);
  expect_kernel_in_place();
  EXPECT_EQ(*host(kDirty), 0);
  EXPECT_TRUE(vm().save_platform()->empty()) << "the power-up state of the interrupt controllers";
  EXPECT_FALSE(vm().irqs().level(layout::kGedGsi));
  EXPECT_EQ(guest_read(status), 0U);
  ASSERT_TRUE(machine().pause());
  EXPECT_EQ(vcpu(0).regs()->rip, layout::kRawKernel);
}

TEST_F(MachineTest, ResetsDoNotFillTheLog) {
  config_.boot.cmdline += std::string(2020, ' ') + "x";
  config_.devices = {balloon("without-room-on-the-command-line")};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  const std::string once = logged();
  EXPECT_NE(once.find("1 devices do not fit"), std::string::npos) << once;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(machine().reset());
  }
  EXPECT_EQ(logged(), once);
}

TEST_F(MachineTest, AResetOfAPausedMachineLeavesItPaused) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().pause());
  *host(32 * test::kMiB) = 7;
  ASSERT_TRUE(machine().reset());
  EXPECT_EQ(machine().state(), RunState::kPaused);
  EXPECT_EQ(*host(32 * test::kMiB), 0);
  EXPECT_EQ(vcpu().regs()->rip, layout::kRawKernel);
  EXPECT_EQ(events_.take(), (Strings{"stop", "reset host"}));
}

TEST_F(MachineTest, EveryWayInWhichAGuestAsksForAReset) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  const FakeExit ways[] = {
      ask_reset(),                         // ACPI's reset register
      FakeExit::port_write(0x64, {0xfe}),  // the keyboard controller's reset line
      FakeExit::shutdown(),                // triple fault
      FakeExit::reset(),                   // told by the engine
  };
  std::uint32_t resets = 0;
  for (const FakeExit& way : ways) {
    *host(32 * test::kMiB) = 7;
    vcpu().script(way);
    ASSERT_TRUE(run_until_events(1)) << resets;
    EXPECT_EQ(events_.take(), Strings{"reset guest"});
    EXPECT_EQ(vcpu().resets(), ++resets);
    EXPECT_EQ(*host(32 * test::kMiB), 0);
    EXPECT_EQ(machine().state(), RunState::kRunning);
    ASSERT_TRUE(vcpu().wait_until_idle()) << "it runs again";
  }
}

TEST_F(MachineTest, AResetForgetsWhatTheGuestAskedForBeforeIt) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  // The main loop is busy meanwhile.
  vcpu().script({ask_reset(), ask_reset(), FakeExit::port_write(0x64, {0xfe}), ask_shutdown()});
  ASSERT_TRUE(vcpu().wait_until_idle());
  ASSERT_TRUE(machine().reset());
  run_posted();
  EXPECT_EQ(events_.take(), Strings{"reset host"});
  EXPECT_EQ(vcpu().resets(), 1U);
  EXPECT_EQ(machine().state(), RunState::kRunning);
  // And what it asks for afterwards counts.
  vcpu().script(ask_reset());
  ASSERT_TRUE(run_until_events(1));
  EXPECT_EQ(events_.take(), Strings{"reset guest"});
}

TEST_F(MachineTest, ManyRequestsBecomeOneReset) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  for (int i = 0; i < 1000; ++i) {
    vcpu().script(ask_reset());
  }
  ASSERT_TRUE(vcpu().wait_until_idle());
  ASSERT_TRUE(run_until_events(1));
  run_posted();
  EXPECT_EQ(events_.take(), Strings{"reset guest"});
}

TEST_F(MachineTest, AGuestThatPowersOffEndsTheMachine) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  vcpu().script(ask_shutdown());
  loop_->run();  // until the machine stops it
  EXPECT_EQ(events_.take(), Strings{ended("guest", ShutdownReason::kGuestShutdown)});
  EXPECT_EQ(machine().state(), RunState::kShutdown);
  EXPECT_EQ(machine().exit_status(), 0);

  // Nothing but questions from here on.
  EXPECT_FALSE(machine().pause());
  EXPECT_FALSE(machine().resume());
  EXPECT_FALSE(machine().reset());
  EXPECT_FALSE(machine().powerdown());
  machine().quit(ShutdownReason::kError);
  EXPECT_EQ(machine().exit_status(), 0) << "it had ended already";
  EXPECT_TRUE(events_.all().empty());
  EXPECT_EQ(machine().vcpus().size(), 1U);
}

TEST_F(MachineTest, WithNoShutdownAGuestThatPowersOffIsPaused) {
  config_.no_shutdown = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  vcpu().script({ask_shutdown(), ask_shutdown()});
  ASSERT_TRUE(vcpu().wait_until_idle());
  ASSERT_TRUE(run_until_events(2));
  run_posted();
  EXPECT_EQ(events_.take(), (Strings{ended("guest", ShutdownReason::kGuestShutdown), "stop"}));
  EXPECT_EQ(machine().state(), RunState::kPaused);
  EXPECT_FALSE(loop_->stopping());
  ASSERT_TRUE(machine().reset());
  ASSERT_TRUE(machine().resume());
  ASSERT_TRUE(vcpu().wait_until_idle());
  run_posted();
  EXPECT_EQ(events_.take(), (Strings{"reset host", "resume"}));
}

TEST_F(MachineTest, WhatAGuestAskedForJustBeforeItWasPausedIsDone) {
  config_.no_shutdown = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  vcpu().script(ask_shutdown());
  ASSERT_TRUE(vcpu().wait_until_idle());
  ASSERT_TRUE(machine().pause());
  run_posted();
  EXPECT_EQ(events_.take(), (Strings{"stop", ended("guest", ShutdownReason::kGuestShutdown)}));
  ASSERT_TRUE(machine().resume());
  events_.take();

  // A triple fault: the read is complete when the vCPU is at the next exit.
  vcpu().script({FakeExit::port_read(kEventPort, 4), FakeExit::shutdown()});
  while (vcpu().answers().empty()) {  // without the main loop, which would act on the fault
    std::this_thread::yield();
  }
  ASSERT_TRUE(machine().pause());
  ASSERT_TRUE(run_until_events(2));
  EXPECT_EQ(events_.take(), (Strings{"stop", "reset guest"}));
  EXPECT_EQ(machine().state(), RunState::kPaused);
  EXPECT_EQ(vcpu().resets(), 1U);
}

TEST_F(MachineTest, WithNoRebootAResetEndsTheMachine) {
  config_.no_reboot = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  vcpu().script(FakeExit::shutdown());
  loop_->run();
  EXPECT_EQ(events_.take(), Strings{ended("guest", ShutdownReason::kGuestReset)});
  EXPECT_EQ(machine().exit_status(), 0);
  EXPECT_EQ(vcpu().resets(), 0U);
}

TEST_F(MachineTest, WithNoRebootAResetFromOutsideIsStillAReset) {
  config_.no_reboot = true;
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().reset());
  EXPECT_EQ(events_.take(), Strings{"reset host"});
  EXPECT_EQ(machine().state(), RunState::kRunning);
}

TEST_F(MachineTest, TheDebugExitPortGivesTheStatus) {
  config_.devices.push_back(
      {.driver = "isa-debug-exit",
       .id = "debug",
       .properties = test::properties({{"iobase", std::uint64_t{0xf4}}, {"iosize", std::uint64_t{4}}})});
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  vcpu().script(FakeExit::port_write(0xf4, {0x15, 0x01, 0, 0}));
  loop_->run();
  EXPECT_EQ(events_.take(), Strings{ended("guest", ShutdownReason::kDebugExit)});
  EXPECT_EQ(machine().exit_status(), 0x2b) << "(0x115 << 1 | 1) & 0xff";
}

TEST_F(MachineTest, WithoutTheDeviceThePortIsNobodys) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  guest_port_write(0x501, 1, 1);
  guest_port_write(0xf4, 1);
  run_posted();
  EXPECT_EQ(machine().state(), RunState::kRunning);
}

TEST_F(MachineTest, AnEngineThatCannotGoOnEndsTheMachineWithStatusOne) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  vcpu().script(FakeExit::engine_error("KVM internal error 1"));
  loop_->run();
  EXPECT_EQ(events_.take(), Strings{ended("host", ShutdownReason::kError)});
  EXPECT_EQ(machine().exit_status(), 1);
  EXPECT_THAT(logged(), HasSubstr("vCPU 0 cannot go on: KVM internal error 1"));
}

TEST_F(MachineTest, EveryReasonHasItsStatusAndIsToldWhoseItWas) {
  const struct {
    ShutdownReason reason;
    const char* by;
    int status;
  } cases[] = {
      {ShutdownReason::kHostQuit, "host", 0},       {ShutdownReason::kHostSignal, "host", 0},
      {ShutdownReason::kGuestShutdown, "guest", 0}, {ShutdownReason::kGuestReset, "guest", 0},
      {ShutdownReason::kError, "host", 1},
  };
  for (const auto& one : cases) {
    ASSERT_NO_FATAL_FAILURE(create_and_start());
    machine().quit(one.reason);
    EXPECT_EQ(events_.take(), Strings{ended(one.by, one.reason)});
    EXPECT_EQ(machine().exit_status(), one.status);
    EXPECT_EQ(machine().state(), RunState::kShutdown);
    EXPECT_TRUE(loop_->stopping());
    machine_.reset();
  }
}

TEST_F(MachineTest, AResetThatFailsEndsTheMachineAndNamesTheFile) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_EQ(::unlink(config_.boot.kernel.c_str()), 0);
  const auto reset = machine().reset();
  ASSERT_FALSE(reset);
  EXPECT_THAT(reset.error().message, HasSubstr(config_.boot.kernel));
  EXPECT_EQ(events_.take(), Strings{ended("host", ShutdownReason::kError)});
  EXPECT_EQ(machine().exit_status(), 1);
  EXPECT_THAT(logged(), HasSubstr(config_.boot.kernel));
}

TEST_F(MachineTest, AListenerMayEndTheMachineOrLeaveWhileItIsTold) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  test::EventRecord second;
  machine().add_events(&second);
  events_.then = [&](const std::string& event) {
    if (event == "stop") {
      machine().remove_events(&second);
    } else if (event == "reset host") {
      machine().quit(ShutdownReason::kHostQuit);
    }
  };
  ASSERT_TRUE(machine().pause());
  EXPECT_TRUE(second.all().empty()) << "it left before its turn";
  ASSERT_TRUE(machine().resume());
  (void)machine().reset();
  EXPECT_EQ(machine().state(), RunState::kShutdown);
  EXPECT_TRUE(vcpu().save()) << "nothing runs any more";
}

TEST_F(MachineTest, CanBeDestroyedInEveryState) {
  for (int state = 0; state < 7; ++state) {
    config_.start_paused = false;
    ASSERT_NO_FATAL_FAILURE(create()) << state;
    switch (state) {
      case 0:  // created
        break;
      case 1:
        ASSERT_TRUE(machine().start());
        break;
      case 2:
        ASSERT_TRUE(machine().start());
        ASSERT_TRUE(machine().pause());
        break;
      case 3:
        ASSERT_TRUE(machine().start());
        machine().quit(ShutdownReason::kHostQuit);
        break;
      case 4:  // with requests on their way to the main loop, which then find it gone
        ASSERT_TRUE(machine().start());
        vcpu().script({ask_shutdown(), ask_reset()});
        ASSERT_TRUE(vcpu().wait_until_idle());
        break;
      case 5:
        ASSERT_TRUE(machine().start());
        vcpu().script(FakeExit::engine_error("x"));
        break;
      default:  // never stopped before it ended
        machine().quit(ShutdownReason::kHostSignal);
        break;
    }
    machine_.reset();
    run_posted();
    events_.take();
  }
}

TEST_F(MachineTest, SerialOutputGoesToItsChardev) {
  const std::string out = dir_.file("console");
  config_.chardevs.push_back(
      {.kind = "file", .id = "con", .properties = test::properties({{"path", out}}), .fds = {}});
  config_.serial = "con";
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  for (const char letter : std::string("hello")) {
    vcpu().script(FakeExit::port_write(layout::kSerialPort, {static_cast<std::uint8_t>(letter)}));
  }
  ASSERT_TRUE(vcpu().wait_until_idle());
  EXPECT_TRUE(run_until([&] {
    std::ifstream file(out);
    return std::string(std::istreambuf_iterator<char>(file), {}) == "hello";
  }));
  ASSERT_EQ(machine().chardevs().size(), 1U);
  EXPECT_EQ(machine().chardevs()[0].id, "con");
}

TEST_F(MachineTest, ThereIsOneBalloonOrNone) {
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  EXPECT_THAT(machine().balloon().error().message, HasSubstr("no balloon device"));
  EXPECT_THAT(machine().set_balloon(test::kMiB).error().message, HasSubstr("no balloon device"));
  machine_.reset();

  config_.devices = {balloon("b")};
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  ASSERT_TRUE(machine().balloon());
  EXPECT_EQ(machine().balloon()->actual, 64 * test::kMiB);
  ASSERT_TRUE(machine().set_balloon(48 * test::kMiB));
  EXPECT_EQ(machine().balloon()->actual, 64 * test::kMiB) << "until the guest gave some";
  const Gpa config = virtio_slot(0).base + virtio_mmio::kConfig;
  EXPECT_EQ(guest_read(config), 16 * test::kMiB / 4096);
  // The guest says what it gave: 2 MiB.
  vcpu().script(FakeExit::mmio_write(config + 4, {0, 2, 0, 0}));
  ASSERT_TRUE(run_until_events(1));
  EXPECT_EQ(events_.take(), Strings{fmt::format("balloon {}", 62 * test::kMiB)});
  EXPECT_EQ(machine().balloon()->actual, 62 * test::kMiB);
  EXPECT_FALSE(machine().set_balloon(0));
  machine_.reset();

  config_.devices = {balloon("b"), balloon("c")};
  const auto two = try_create();
  ASSERT_FALSE(two);
  EXPECT_EQ(two.error().message,
            "-device virtio-balloon-device,id=c: the machine has a balloon already: device 'b'");
}

}  // namespace
}  // namespace wisp
