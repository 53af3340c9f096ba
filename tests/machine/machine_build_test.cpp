// A machine that cannot be built: the error names what is at fault, and nothing stays behind.
#include <gmock/gmock.h>

#include <csignal>
#include <thread>

#include "machine/machine_kit.h"

namespace wisp {
namespace {

using test::properties;
using ::testing::HasSubstr;

std::size_t threads() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    ++count;
  }
  return count;
}

class BuildTest : public test::MachineKit {
 protected:
  void SetUp() override {
    // Everything a machine may have, so that much exists already when a late stage fails.
    config_.cpus = {.count = 2, .max = 2, .topology = {.cores = 2}};
    config_.drives = {drive("a"), drive("b")};
    config_.chardevs = {
        {.kind = "socket",
         .id = "con",
         .properties = properties({{"path", dir_.file("con.sock")}, {"server", true}, {"wait", false}}),
         .fds = {}},
        {.kind = "pty", .id = "hvc", .properties = {}, .fds = {}}};
    config_.serial = "con";
    config_.objects = {{.kind = "rng-random", .id = "random", .properties = {}, .fds = {}}};
    config_.iothreads = {"io0"};
    config_.devices = {
        blk("vda", "a"),
        {.driver = "virtio-rng-device", .id = "rng", .properties = properties({{"rng", "random"}})},
        {.driver = "virtio-serial-device", .id = "vser", .properties = {}},
        {.driver = "virtconsole", .id = "port", .properties = properties({{"chardev", "hvc"}})},
        balloon("balloon"),
        blk("vdb", "b")};
    config_.devices.back().properties.set("iothread", std::string("io0"));
  }

  // Creating fails with the text in its message, and leaves descriptors, files and threads as they were.
  void expect_failure(const std::string& text) {
    const auto files_before = test::open_files();
    const std::size_t entries_before = dir_.entries();
    const std::size_t threads_before = threads();
    const auto made = try_create();
    ASSERT_FALSE(made) << text;
    EXPECT_THAT(made.error().message, HasSubstr(text));
    EXPECT_EQ(made.error().message.find('\n'), std::string::npos) << "one line";
    run_posted();
    EXPECT_EQ(test::open_files(), files_before) << text;
    EXPECT_EQ(dir_.entries(), entries_before) << text << ": a socket was left";
    EXPECT_TRUE(run_until([&] { return threads() == threads_before; })) << text;
  }
  BackendConfig bad_drive() {
    return {
        .kind = "", .id = "bad", .properties = properties({{"file", dir_.file("missing.img")}}), .fds = {}};
  }
};

TEST_F(BuildTest, TheFullMachineIsBuiltAndTakenDownWithoutARest) {
  const auto before = test::open_files();
  const std::size_t entries = dir_.entries();
  std::thread([] {}).join();  // with the first one a sanitizer may start one of its own, which stays
  const std::size_t threads_before = threads();
  for (int i = 0; i < 3; ++i) {
    ASSERT_NO_FATAL_FAILURE(create_and_start());
    EXPECT_GT(test::open_files().size(), before.size());
    EXPECT_GT(dir_.entries(), entries) << "its socket";
    EXPECT_GE(threads(), threads_before + 3);
    machine_.reset();
    run_posted();
    EXPECT_EQ(test::open_files(), before);
    EXPECT_EQ(dir_.entries(), entries);
    EXPECT_TRUE(run_until([&] { return threads() == threads_before; }));
  }
}

TEST_F(BuildTest, TooManyVcpus) {
  config_.cpus.max = 65;
  expect_failure("-smp: 65 vCPUs are more than the 64 that fake has");
}

TEST_F(BuildTest, MoreVcpusThanTheMostOfThem) {
  config_.cpus = {.count = 3, .max = 2, .topology = {}};
  expect_failure("vCPU 2");
}

TEST_F(BuildTest, AnEngineThatIsJudgedUnfit) {
  auto engine = std::make_unique<FakeHypervisor>();
  int asked = 0;
  const auto made =
      Machine::create(config_, std::move(engine),
                      {.loop = *loop_,
                       .log = log_,
                       .clock = clock_,
                       .entropy = entropy_,
                       .seccomp = false,
                       .judge_engine = [&](Vcpu& vcpu, const GuestMemory& memory) -> Result<void> {
                         ++asked;
                         EXPECT_EQ(vcpu.id(), 0U);
                         EXPECT_EQ(memory.blocks().front().size, config_.memory.size);
                         EXPECT_EQ(dir_.entries(), 4U) << "before anything else is made";
                         return fail("this engine is too slow");
                       }});
  ASSERT_FALSE(made);
  EXPECT_EQ(made.error().message, "this engine is too slow");
  EXPECT_EQ(asked, 1);
}

TEST_F(BuildTest, AnotherEngineInPlaceOfAnUnfitOne) {
  std::string why;
  Vcpu* judged = nullptr;
  const auto made =
      Machine::create(config_, std::make_unique<FakeHypervisor>(),
                      {.loop = *loop_,
                       .log = log_,
                       .clock = clock_,
                       .entropy = entropy_,
                       .seccomp = false,
                       .judge_engine = [&](Vcpu& vcpu, const GuestMemory&) -> Result<void> {
                         EXPECT_EQ(judged, nullptr) << "the other is not judged";
                         judged = &vcpu;
                         return fail("this engine is too slow");
                       },
                       .other_engine = [&](const Error& error) -> Result<std::unique_ptr<Hypervisor>> {
                         why = error.message;
                         return std::make_unique<FakeHypervisor>();
                       }});
  ASSERT_TRUE(made) << made.error().message;
  EXPECT_EQ(why, "this engine is too slow");
  EXPECT_NE(judged, nullptr);

  const auto none =
      Machine::create(config_, std::make_unique<FakeHypervisor>(),
                      {.loop = *loop_,
                       .log = log_,
                       .clock = clock_,
                       .entropy = entropy_,
                       .seccomp = false,
                       .judge_engine = [](Vcpu&, const GuestMemory&) { return Result<void>(fail("slow")); },
                       .other_engine = [](const Error&) -> Result<std::unique_ptr<Hypervisor>> {
                         return fail("no other engine here");
                       }});
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().message, "no other engine here");
}

TEST_F(BuildTest, MemoryThatCannotBe) {
  config_.memory.size = 4097;
  expect_failure("-m");
}

TEST_F(BuildTest, AFileForMemoryGoesWithAMachineThatFails) {
  config_.memory.source = RamSource::kFile;
  config_.memory.path = dir_.file("ram");
  config_.drives.push_back(bad_drive());
  expect_failure(dir_.file("missing.img"));
  EXPECT_FALSE(std::filesystem::exists(dir_.file("ram")));
  config_.drives.pop_back();
  ASSERT_NO_FATAL_FAILURE(create_and_start());
  machine_.reset();
  EXPECT_TRUE(std::filesystem::exists(dir_.file("ram")));
}

TEST_F(BuildTest, ADriveWhoseFileIsMissing) {
  config_.drives.push_back(bad_drive());
  expect_failure(dir_.file("missing.img"));
  // Sockets, locks on images and ids of what was made before the fault do not stand in the way of a second
  // try.
  static_cast<void>(dir_.image("missing.img", test::kMiB));
  create_and_start();
}

TEST_F(BuildTest, AChardevThatCannotListen) {
  config_.chardevs.push_back(
      {.kind = "socket",
       .id = "late",
       .properties = properties({{"path", dir_.file("no/such.sock")}, {"server", true}, {"wait", false}}),
       .fds = {}});
  expect_failure("no/such.sock");
}

TEST_F(BuildTest, ANetdevWithoutAPeer) {
  config_.netdevs = {{.kind = "stream",
                      .id = "net",
                      .properties = properties({{"path", dir_.file("switch.sock")}}),
                      .fds = {}}};
  expect_failure("netdev net");
}

TEST_F(BuildTest, TooManyIothreads) {
  for (int i = 1; i < 9; ++i) {
    config_.iothreads.push_back("io" + std::to_string(i));
  }
  expect_failure("-object iothread: 9 threads are more than 8");
}

TEST_F(BuildTest, ASerialPortWithoutItsChardev) {
  config_.serial = "other";
  expect_failure("there is no chardev with id 'other'");
}

TEST_F(BuildTest, ADebugPortWhereAnotherDeviceIsDoesNotHideIt) {
  config_.devices.push_back(
      {.driver = "isa-debug-exit",
       .id = "debug",
       .properties = properties({{"iobase", std::uint64_t{0xffff}}, {"iosize", std::uint64_t{4}}})});
  expect_failure("0xffff");
}

TEST_F(BuildTest, ADeviceWithoutItsDrive) {
  config_.devices.push_back(blk("vdc", "nowhere"));
  expect_failure("-device virtio-blk-device,id=vdc: there is no drive with id 'nowhere'");
}

TEST_F(BuildTest, ADeviceWithoutItsIothread) {
  config_.devices.back().properties.set("iothread", std::string("io7"));
  expect_failure("-device virtio-blk-device,id=vdb: iothread=io7");
}

TEST_F(BuildTest, TwoDevicesWithOneId) {
  config_.drives.push_back(drive("c"));
  config_.devices.push_back(blk("vda", "c"));
  expect_failure("there is a device 'vda' already");
}

TEST_F(BuildTest, MoreDevicesThanSlots) {
  for (int i = 0; i < 60; ++i) {
    config_.devices.push_back({.driver = "virtio-rng-device",
                               .id = "r" + std::to_string(i),
                               .properties = properties({{"rng", "random"}})});
  }
  expect_failure("-device virtio-rng-device,id=r59: all 64 device slots of the machine are taken");
}

TEST_F(BuildTest, AVhostUserDeviceWithoutSharedMemory) {
  config_.chardevs.push_back({.kind = "socket",
                              .id = "fs",
                              .properties = properties({{"path", dir_.file("virtiofsd.sock")}}),
                              .fds = {}});
  config_.devices.push_back(
      {.driver = "vhost-user-fs-device",
       .id = "fs0",
       .properties = properties({{"chardev", std::string("fs")}, {"tag", std::string("share")}})});
  expect_failure("guest memory is private to this process");
  // A file's private mapping has a descriptor all the same.
  config_.memory.source = RamSource::kFile;
  config_.memory.path = dir_.image("ram", config_.memory.size);
  expect_failure("add mem-share=on to -machine");
  config_.memory.share = true;
  expect_failure("virtiofsd.sock");  // further on: nobody listens there
}

TEST_F(BuildTest, AKernelThatIsMissing) {
  config_.boot.kernel = dir_.file("vmlinux");
  expect_failure(dir_.file("vmlinux"));
}

TEST_F(BuildTest, AKernelThatIsADirectory) {
  std::filesystem::create_directory(dir_.file("kernels"));
  config_.boot.kernel = dir_.file("kernels");
  expect_failure(dir_.file("kernels"));
}

TEST_F(BuildTest, AKernelThatIsLargerThanTheMemory) {
  config_.boot.kernel = dir_.image("huge", 100 * test::kMiB);
  expect_failure(dir_.file("huge"));
}

TEST_F(BuildTest, AnInitrdThatIsMissing) {
  config_.boot.initrd = dir_.file("initrd.img");
  expect_failure(dir_.file("initrd.img"));
}

}  // namespace
}  // namespace wisp
