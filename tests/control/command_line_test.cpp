#include "control/command_line.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "machine/device_table.h"

namespace wisp {
namespace {

using testing::HasSubstr;

// Words as a shell would cut them: spaces separate, "..." keeps spaces.
std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> result;
  std::string word;
  bool quoted = false;
  bool any = false;
  for (const char c : text) {
    if (c == '"') {
      quoted = !quoted;
      any = true;
    } else if (c == ' ' && !quoted) {
      if (any) {
        result.push_back(std::exchange(word, {}));
      }
      any = false;
    } else {
      word += c;
      any = true;
    }
  }
  if (any) {
    result.push_back(word);
  }
  return result;
}

Result<CommandLine> parse(const std::string& text) {
  return parse_command_line(words(text), driver_tables());
}

CommandLine good(const std::string& text) {
  auto parsed = parse(text);
  EXPECT_TRUE(parsed.has_value()) << text << "\n" << (parsed ? "" : parsed.error().message);
  return parsed ? *std::move(parsed) : CommandLine{};
}

MachineConfig machine(const std::string& text) {
  return good("-kernel k " + text).launch.machine;
}
ProcessConfig process(const std::string& text) {
  return good("-kernel k " + text).launch.process;
}

TEST(CommandLine, TheLineThatEveryStratovirtUserTypes) {
  const CommandLine line = good(
      "-machine microvm -smp 1 -m 1024m -kernel vmlinux.bin -append \"console=ttyS0 pci=off reboot=k quiet "
      "panic=1 root=/dev/vda\" -drive file=rootfs.ext4,id=rootfs,readonly=off,direct=off -device "
      "virtio-blk-device,drive=rootfs,id=rootfs -qmp unix:S,server,nowait -serial stdio");
  EXPECT_TRUE(line.warnings.empty());
  const MachineConfig& config = line.launch.machine;
  EXPECT_EQ(config.memory.size, 1ULL << 30);
  EXPECT_EQ(config.boot.kernel, "vmlinux.bin");
  EXPECT_EQ(config.boot.cmdline, "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda");
  ASSERT_EQ(config.drives.size(), 1U);
  EXPECT_EQ(config.drives[0].id, "rootfs");
  EXPECT_EQ(config.drives[0].properties.get_string("file"), "rootfs.ext4");
  EXPECT_FALSE(config.drives[0].properties.get_bool("direct", true));
  ASSERT_EQ(config.devices.size(), 1U);
  EXPECT_EQ(config.devices[0].driver, "virtio-blk-device");
  EXPECT_EQ(config.devices[0].properties.get_string("drive"), "rootfs");
  ASSERT_EQ(config.chardevs.size(), 1U);
  EXPECT_EQ(config.chardevs[0].kind, "stdio");
  EXPECT_EQ(config.serial, "serial0");
  ASSERT_EQ(line.launch.process.qmp.size(), 1U);
  EXPECT_EQ(line.launch.process.qmp[0].path, "S");
  EXPECT_FALSE(line.launch.process.qmp[0].wait);
}

TEST(CommandLine, KatasLine) {
  const int tap = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  const int vsock = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  const CommandLine line = good(fmt::format(
      "-name sandbox-3f2 -uuid 550e8400-e29b-41d4-a716-446655440000 -smp 2 -m 2048 -kernel /k/vmlinux "
      "-append "
      "\"root=/dev/vda reboot=k panic=1 net.ifnames=0 pci=off iommu=off acpi=off\" -qmp "
      "unix:/run/q.sock,server,nowait -D -disable-seccomp -machine "
      "type=microvm,dump-guest-core=off,mem-share=on -initrd /k/initrd -object "
      "rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,id=virtio-rng0 "
      "-drive "
      "id=rootfs,file=/k/img,readonly=on,direct=off -device virtio-blk-device,drive=rootfs,id=virtio-blk0 "
      "-device vhost-vsock-device,id=vsock-id,guest-cid=77,vhostfd={} -netdev tap,id=eth0,fds={} -device "
      "virtio-net-device,netdev=eth0,id=eth0,mac=52:54:00:12:34:56 -chardev "
      "socket,id=virtio_fs,path=/run/fs.sock,server,nowait -device "
      "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0 -device "
      "virtio-serial-device,id=virtio-serial0 -chardev "
      "socket,id=charconsole0,path=/run/con.sock,server,nowait -device "
      "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
      vsock, tap));
  EXPECT_THAT(line.warnings, testing::IsEmpty());
  const LaunchConfig& launch = line.launch;
  EXPECT_EQ(launch.machine.name, "sandbox-3f2");
  EXPECT_EQ(launch.process.uuid, "550e8400-e29b-41d4-a716-446655440000");
  EXPECT_EQ(launch.machine.cpus.count, 2U);
  EXPECT_EQ(launch.machine.memory.size, 2048ULL << 20);
  EXPECT_TRUE(launch.machine.memory.share);
  EXPECT_EQ(launch.machine.memory.source, RamSource::kMemfd);
  EXPECT_FALSE(launch.machine.memory.dump);
  EXPECT_TRUE(launch.process.verbose);
  EXPECT_TRUE(launch.process.log_file.empty());
  EXPECT_FALSE(launch.process.seccomp);
  ASSERT_EQ(launch.machine.netdevs.size(), 1U);
  EXPECT_THAT(launch.machine.netdevs[0].fds, testing::ElementsAre(tap));
  EXPECT_EQ(launch.machine.devices.size(), 7U);
  ASSERT_EQ(launch.machine.chardevs.size(), 2U);
  EXPECT_TRUE(launch.machine.chardevs[0].properties.get_bool("server", false));
  EXPECT_FALSE(launch.machine.chardevs[0].properties.get_bool("wait", true));
  ::close(tap);
  ::close(vsock);
}

TEST(CommandLine, MachineAndAccelerator) {
  EXPECT_EQ(machine("").accel, Accel::kAuto);
  EXPECT_EQ(machine("-accel kvm").accel, Accel::kKvm);
  EXPECT_EQ(machine("--machine microvm,accel=kvm --accel kvm").accel, Accel::kKvm);
  EXPECT_EQ(machine("-enable-kvm").accel, Accel::kKvm);
  EXPECT_EQ(machine("-accel soft").accel, Accel::kSoft);
  EXPECT_EQ(machine("-accel soft").execution.executor, soft::ExecutorChoice::kTranslate);
  EXPECT_EQ(machine("-accel soft,executor=interpret").execution.executor, soft::ExecutorChoice::kInterpret);
  EXPECT_EQ(machine("-accel soft,executor=translate").execution.executor, soft::ExecutorChoice::kTranslate);
  EXPECT_TRUE(machine("-accel kvm").probe_kvm);
  EXPECT_FALSE(machine("-accel kvm,probe=off").probe_kvm);
  EXPECT_TRUE(machine("-accel auto,probe=on").probe_kvm);
  EXPECT_EQ(machine("-accel auto,executor=interpret").execution.executor, soft::ExecutorChoice::kInterpret);
  EXPECT_FALSE(machine("-cpu host").cpus.pmu);
  EXPECT_FALSE(machine("-cpu host,pmu=off").cpus.pmu);
  EXPECT_TRUE(machine("-cpu host,pmu=on").cpus.pmu);
  EXPECT_EQ(machine("-M type=microvm -machine accel=kvm:tcg").accel, Accel::kAuto);
  EXPECT_FALSE(machine("-machine microvm,acpi=off").acpi);
  EXPECT_FALSE(machine("-machine auto-kernel-cmdline=off").boot.auto_cmdline);
  EXPECT_EQ(machine("-name guest=a,,b=c").name, "a,b=c");
}

TEST(CommandLine, ProcessorsAndTheirTopology) {
  struct Case {
    const char* text;
    std::uint32_t count, max, sockets, dies, clusters, cores, threads;
  };
  for (const Case& c : std::initializer_list<Case>{
           {"", 1, 1, 1, 1, 1, 1, 1},
           {"-smp 4", 4, 4, 1, 1, 1, 4, 1},
           {"-smp cpus=4,sockets=2", 4, 4, 2, 1, 1, 2, 1},
           {"-smp 8,cores=2,threads=2", 8, 8, 2, 1, 1, 2, 2},
           {"-smp 4,sockets=1,cores=2", 4, 4, 1, 1, 1, 2, 2},
           {"-smp 8,dies=2,clusters=2", 8, 8, 1, 2, 2, 2, 1},
           {"-smp sockets=2,cores=2", 4, 4, 2, 1, 1, 2, 1},
           {"-smp 2,maxcpus=4", 2, 4, 1, 1, 1, 4, 1},
           {"-smp 254", 254, 254, 1, 1, 1, 254, 1},
       }) {
    const CpuConfig cpus = machine(c.text).cpus;
    EXPECT_EQ(cpus.count, c.count) << c.text;
    EXPECT_EQ(cpus.max, c.max) << c.text;
    EXPECT_EQ(cpus.topology.sockets, c.sockets) << c.text;
    EXPECT_EQ(cpus.topology.dies, c.dies) << c.text;
    EXPECT_EQ(cpus.topology.clusters, c.clusters) << c.text;
    EXPECT_EQ(cpus.topology.cores, c.cores) << c.text;
    EXPECT_EQ(cpus.topology.threads, c.threads) << c.text;
  }
}

TEST(CommandLine, Memory) {
  EXPECT_EQ(machine("").memory.size, 256ULL << 20);
  EXPECT_EQ(machine("-m 512").memory.size, 512ULL << 20);
  EXPECT_EQ(machine("-m 2g").memory.size, 2ULL << 30);
  EXPECT_EQ(machine("-m size=1536K").memory.size, 1536ULL << 10);
  EXPECT_EQ(machine("").memory.source, RamSource::kAnonymous);
  const RamOptions file = machine("-mem-path /dev/hugepages -mem-prealloc").memory;
  EXPECT_EQ(file.source, RamSource::kFile);
  EXPECT_EQ(file.path, "/dev/hugepages");
  EXPECT_TRUE(file.prealloc);
  const RamOptions backend = machine(
                                 "-m 64 -object memory-backend-memfd,id=ram,size=64M,hugetlb=on,prealloc=on "
                                 "-numa node,nodeid=0,cpus=0,memdev=ram")
                                 .memory;
  EXPECT_EQ(backend.source, RamSource::kMemfd);
  EXPECT_TRUE(backend.share);
  EXPECT_TRUE(backend.prealloc);
  EXPECT_EQ(backend.huge_page_size, 2ULL << 20);
  const RamOptions named =
      machine("-object memory-backend-file,id=r,size=1G,mem-path=/tmp/x,share=off -machine memory-backend=r")
          .memory;
  EXPECT_EQ(named.source, RamSource::kFile);
  EXPECT_EQ(named.size, 1ULL << 30);
  EXPECT_FALSE(named.share);
}

TEST(CommandLine, AppendTakesSeveralWordsUpToTheNextOption) {
  EXPECT_EQ(machine("-append console=ttyS0 root=/dev/vda ro -m 64").boot.cmdline,
            "console=ttyS0 root=/dev/vda ro");
  EXPECT_EQ(machine("-append \"init=/bin/sh -- -c true\" -m 64").boot.cmdline, "init=/bin/sh -- -c true");
  EXPECT_EQ(machine("-append \"\"").boot.cmdline, "");
}

TEST(CommandLine, CommasInsideValues) {
  EXPECT_EQ(machine("-drive id=d,file=/a,,b=c,,d").drives.at(0).properties.get_string("file"), "/a,b=c,d");
}

TEST(CommandLine, SerialForms) {
  struct Case {
    const char* text;
    const char* kind;
    const char* path;
  };
  for (const Case& c : std::initializer_list<Case>{{"stdio", "stdio", ""},
                                                   {"mon:stdio", "stdio", ""},
                                                   {"pty", "pty", ""},
                                                   {"file,path=/tmp/f", "file", "/tmp/f"},
                                                   {"file:/tmp/f", "file", "/tmp/f"},
                                                   {"socket,path=/tmp/s,server,nowait", "socket", "/tmp/s"},
                                                   {"unix:/tmp/s,server,nowait", "socket", "/tmp/s"}}) {
    const MachineConfig config = machine(std::string("-serial ") + c.text);
    ASSERT_EQ(config.chardevs.size(), 1U) << c.text;
    EXPECT_EQ(config.chardevs[0].kind, c.kind) << c.text;
    EXPECT_EQ(config.chardevs[0].properties.get_string("path"), c.path) << c.text;
    EXPECT_EQ(config.serial, config.chardevs[0].id);
  }
  const MachineConfig port = machine("-serial socket,port=4444,host=127.0.0.1,server,nowait");
  EXPECT_EQ(port.chardevs.at(0).properties.get_uint("port", 0), 4444U);
  EXPECT_TRUE(machine("-serial mon:stdio").chardevs.at(0).properties.get_bool("mux", false));
  EXPECT_EQ(machine("-serial chardev:con -chardev pty,id=con").serial, "con");
  EXPECT_EQ(machine("-serial none").serial, std::nullopt);
}

TEST(CommandLine, QmpEndpoints) {
  const ProcessConfig two = process("-qmp unix:/a,server,nowait -qmp tcp:127.0.0.1:4445,server=on,wait=off");
  ASSERT_EQ(two.qmp.size(), 2U);
  EXPECT_EQ(two.qmp[1].kind, QmpEndpoint::Kind::kTcp);
  EXPECT_EQ(two.qmp[1].port, 4445U);
  EXPECT_FALSE(two.qmp[1].wait);
  EXPECT_TRUE(process("-qmp unix:/a,server").qmp.at(0).wait);
  EXPECT_EQ(process("-qmp tcp:[::1]:1,server,nowait").qmp.at(0).host, "::1");
  const CommandLine mon =
      good("-kernel k -chardev socket,id=m,path=/p,server,nowait -mon chardev=m,id=x,mode=control");
  EXPECT_EQ(mon.launch.process.qmp.at(0).path, "/p");
  EXPECT_TRUE(mon.launch.machine.chardevs.empty());
  EXPECT_TRUE(mon.warnings.empty());
}

TEST(CommandLine, ProcessOptions) {
  const ProcessConfig p = process("-D /tmp/log -daemonize -pidfile /tmp/pid");
  EXPECT_EQ(p.log_file, "/tmp/log");
  EXPECT_TRUE(p.daemonize);
  EXPECT_EQ(p.pidfile, "/tmp/pid");
  EXPECT_TRUE(p.seccomp);
  EXPECT_TRUE(machine("-S").start_paused);
  EXPECT_TRUE(machine("-freeze").start_paused);
  EXPECT_TRUE(machine("-no-reboot").no_reboot);
  EXPECT_TRUE(machine("--no-shutdown").no_shutdown);
}

TEST(CommandLine, IothreadsAndObjects) {
  const MachineConfig config = machine(
      "-object iothread,id=io0 -drive id=d,file=f -device virtio-blk-device,drive=d,iothread=io0,id=b");
  EXPECT_THAT(config.iothreads, testing::ElementsAre("io0"));
}

TEST(CommandLine, WhatLibvirtGivesIsTakenWithAWarningEach) {
  const std::vector<std::string> options{
      "-overcommit mem-lock=off",
      "-no-user-config",
      "-nodefaults",
      "-sandbox on",
      "-msg timestamp=on",
      "-rtc base=utc",
      "-boot strict=on",
      "-nographic",
      "-realtime mlock=off",
      "-display none",
      "-usb",
      "-trace type=all",
      "-smbios type=1,product=x",
      "-smp 1,maxcpus=2",
      "-m 64,maxmem=1G",
      "-cpu host,migratable=on",

      "-drive id=d,file=f",
      "-netdev user,id=n",
      "-chardev pty,id=c",
      "-object memory-backend-ram,id=m,size=64M",
      "-drive id=d,file=f,werror=stop -device virtio-blk-device,drive=d,id=b",
      "-drive id=d,file=f,detect-zeroes=unmap -device virtio-blk-device,drive=d,id=b",
      "-drive id=d,file=f -device virtio-blk-device,drive=d,id=b,bootindex=1"};
  for (const std::string& option : options) {
    const CommandLine line = good("-kernel k " + option);
    ASSERT_EQ(line.warnings.size(), 1U) << option;
    EXPECT_THAT(line.warnings[0], testing::StartsWith(option.substr(0, option.find(' ')).substr(0, 2)))
        << option;
    EXPECT_EQ(line.warnings[0].find('\n'), std::string::npos);
  }
  EXPECT_TRUE(good("-kernel k -drive id=d,file=f,if=none,format=raw,media=disk -device "
                   "virtio-blk-device,drive=d,id=b -netdev tap,id=n,ifname=t,script=no -device "
                   "virtio-net-device,netdev=n,id=e -machine microvm,usb=off")
                  .warnings.empty());
}

// Every error is one line that names the option, what was found, and what to do.
TEST(CommandLine, Errors) {
  struct Case {
    const char* text;
    const char* message;
  };
  const std::vector<Case> cases{
      {"", "-kernel is missing: give the kernel to start, such as -kernel vmlinux; see wisp --help"},
      {"vmlinux", "'vmlinux' is not an option; options start with '-', see wisp --help"},
      {"-kernal k", "unknown option '-kernal'; did you mean '-kernel'?"},
      {"--seriall x", "unknown option '--seriall'; did you mean '-serial'?"},
      {"-qqqqqqqqqqqqq", "unknown option '-qqqqqqqqqqqqq'; wisp --help lists all options"},
      {"-hda x", "unknown option '-hda': use -drive id=hd0,file=FILE -device virtio-blk-device,drive=hd0"},
      {"--m=512", "unknown option '--m=512': write the value as its own word: -m 512"},
      {"-kernel", "-kernel needs a value: -kernel FILE"},
      {"-kernel -smp 2", "-kernel needs a value, but the option '-smp' follows"},
      {"-kernel \"\"", "-kernel needs a value, but an empty one is given"},
      {"-kernel a -kernel b", "-kernel is given twice; give it once"},
      {"-S -", "'-' is not an option; options start with '-', see wisp --help"},
      {"-incoming file:/x",
       "-incoming is not possible here: Wisp cannot take in a saved or migrated machine yet"},
      {"-vnc :0", "-vnc is not possible here: a microVM has no display; use -serial for a console"},
      {"-display gtk",
       "-display 'gtk': a microVM has no display; use -display none, and -serial for a console"},
      {"-machine q35",
       "-machine: type 'q35' is a standard machine, which Wisp does not have; use -machine microvm"},
      {"-machine foo", "-machine: unknown type 'foo', expected microvm"},
      {"-machine microvm,acpi=maybe", "-machine: option 'acpi': 'maybe' is not on or off"},
      {"-machine microvm,acp=on", "-machine: unknown option 'acp'; did you mean 'acpi'?"},
      {"-machine microvm,acpi=on -machine acpi=off", "-machine: option 'acpi' is given twice"},
      {"-machine microvm -machine microvm", "-machine: option 'type' is given twice"},
      {"-machine microvm,usb=on", "-machine: option 'usb': 'on' is not one of off|no|false"},
      {"-accel xen", "-machine accel: 'xen' is not an accelerator, expected kvm, soft or auto"},
      {"-accel kvm,executor=interpret",
       "-accel 'kvm,executor=interpret': executor= goes with -accel soft; KVM runs code on the processor"},
      {"-accel kvm,statistics=on",
       "-accel 'kvm,statistics=on': statistics= goes with -accel soft; KVM runs code on the processor"},
      {"-accel kvm,state-log-every=5",
       "-accel 'kvm,state-log-every=5': state-log-every= goes with -accel soft; KVM runs code on the "
       "processor"},
      {"-accel soft,state-log-from=5",
       "-accel 'soft,state-log-from=5': state-log-from= goes with state-log=, which names the file"},
      {"-accel kvm -machine accel=auto", "-machine: option 'accel' is given twice"},
      {"-cpu qemu64", "-cpu 'qemu64': option 'model': 'qemu64' is not one of host|max"},
      {"-cpu host,+avx",
       "-cpu 'host,+avx': unknown option '+avx'; known: model, pmu, migratable, sve, "
       "kvm-steal-time"},
      {"-smp 0", "-smp '0': option 'cpus': '0' is out of range, expected 1 to 254"},
      {"-smp 255", "-smp '255': option 'cpus': '255' is out of range, expected 1 to 254"},
      {"-smp two", "-smp 'two': option 'cpus': 'two' is not a number"},
      {"-smp 4,maxcpus=2", "-smp '4,maxcpus=2': cpus=4 is more than maxcpus=2"},
      {"-smp 4,sockets=3,cores=1,threads=1",
       "-smp '4,sockets=3,cores=1,threads=1': sockets=3 dies=1 clusters=1 cores=1 threads=1 make 3 CPUs, but "
       "4 "
       "were asked for"},
      {"-smp sockets=254,cores=254",
       "-smp 'sockets=254,cores=254': 64516 CPUs are too many, expected 1 to 254"},
      {"-m 0", "-m '0': 0 bytes of memory are out of range, expected 1M to 64T"},
      {"-m 1x", "-m '1x': '1x' is not a size such as 1024 (MiB), 512M or 2G"},
      {"-m -5", "-m '-5': '-5' is not a size such as 1024 (MiB), 512M or 2G"},
      {"-m 65T", "-m '65T': 71468255805440 bytes of memory are out of range, expected 1M to 64T"},
      {"-m 1025k", "-m '1025k': 1049600 bytes of memory are not a multiple of 4K"},
      {"-m 99999999999999999999",
       "-m '99999999999999999999': '99999999999999999999' is not a size such as 1024 (MiB), 512M or 2G"},
      {"-uuid 12", "-uuid '12': not a UUID, expected the form 550e8400-e29b-41d4-a716-446655440000"},
      {"-numa node -numa node",
       "-numa 'node': a microVM has one NUMA node, number 0; give at most one -numa node"},
      {"-numa node,memdev=r",
       "memory backend 'r' is not there; define it: -object memory-backend-ram,id=r,size=..."},
      {"-m 64 -numa node,memdev=r -object memory-backend-ram,id=r,size=128M",
       "-m gives 64 MiB, but -object memory-backend id=r has 128 MiB; make them equal"},
      {"-object memory-backend-file,id=r,size=64M",
       "-object 'memory-backend-file,id=r,size=64M': option 'mem-path' is missing (the file or directory the "
       "memory lies in)"},
      {"-object memory-backend-ram,id=r,size=64M,hugetlbsize=4M",
       "-object 'memory-backend-ram,id=r,size=64M,hugetlbsize=4M': option 'hugetlbsize': 4194304 bytes is "
       "not a "
       "huge page size, expected 2M or 1G"},
      {"-object rng-randon,id=r",
       "-object 'rng-randon,id=r': unknown object 'rng-randon'; did you mean "
       "'rng-random'?"},
      {"-object rng-random", "-object 'rng-random': option 'id' is missing"},
      {"-object iothread,id=a -object iothread,id=a", "-object: id 'a' is used twice; ids must differ"},
      {"-object iothread,id=1 -object iothread,id=2 -object iothread,id=3 -object iothread,id=4 -object "
       "iothread,id=5 -object iothread,id=6 -object iothread,id=7 -object iothread,id=8 -object "
       "iothread,id=9",
       "-object 'iothread,id=9': there are 8 iothreads already, the most a machine may have"},
      {"-drive id=a", "-drive 'id=a': option 'file' is missing (path of the disk image or block device)"},
      {"-drive file=x", "-drive 'file=x': option 'id' is missing"},
      {"-drive file=x,id=a/b",
       "-drive 'file=x,id=a/b': id 'a/b' is not usable, expected 1 to 127 letters, "
       "digits, '-', '_', '.' or ':'"},
      {"-drive file=x,id=a,readonly=maybe",
       "-drive 'file=x,id=a,readonly=maybe': option 'readonly': 'maybe' is not on or off"},
      {"-drive file=x,id=a,id=b", "-drive 'file=x,id=a,id=b': option 'id' is given twice"},
      {"-drive file=x,file=y,id=b", "-drive 'file=x,file=y,id=b': option 'file' is given twice"},
      {"-drive file=x,id=a,redonly=on",
       "-drive 'file=x,id=a,redonly=on': unknown option 'redonly'; did you mean 'readonly'?"},
      {"-drive file,id=a", "-drive 'file,id=a': option 'file' needs a value: file=..."},
      {"-drive file=x,id=a,",
       "-drive: 'file=x,id=a,' has an empty part; write one ',' between options and ',,' "
       "for a comma in a value"},
      {"-drive file=x,id=a,format=qcow2",
       "-drive 'file=x,id=a,format=qcow2': option 'format': 'qcow2' is not supported, expected raw; convert "
       "the image with: qemu-img convert -O raw OLD NEW"},
      {"-drive file=x,id=a,unit=0",
       "-drive 'file=x,id=a,unit=0': option 'unit': it belongs to if=pflash, which only a standard machine "
       "has"},
      {"-drive file=x,id=a,if=pflash,unit=0",
       "-drive 'file=x,id=a,if=pflash,unit=0': firmware flash (if=pflash) needs a standard machine; a "
       "microVM "
       "starts -kernel directly"},
      {"-drive file=x,id=a,throttling.iops-total=1000001",
       "-drive 'file=x,id=a,throttling.iops-total=1000001': option 'throttling.iops-total': '1000001' is out "
       "of "
       "range, expected 0 to 1000000"},
      {"-drive file=x,id=a -drive file=y,id=a", "-drive: id 'a' is used twice; ids must differ"},
      {"-netdev tup,id=a", "-netdev 'tup,id=a': unknown network 'tup'; did you mean 'tap'?"},
      {"-netdev vhost-user,id=a,chardev=c",
       "-netdev 'vhost-user,id=a,chardev=c': unknown network 'vhost-user'; known: tap, user, passt, stream, "
       "dgram"},
      {"-netdev tap,id=a,fd=987",
       "-netdev 'tap,id=a,fd=987': file descriptor 987 is not open; the starting "
       "program must hand it over"},
      {"-netdev tap,id=a,fds=0:x",
       "-netdev 'tap,id=a,fds=0:x': '0:x' is not a list of file descriptors such as 4 or 4:5"},
      {"-netdev tap,id=a,fds=0:0", "-netdev 'tap,id=a,fds=0:0': file descriptor 0 is given twice"},
      {"-chardev socket,id=a,path=x,sever",
       "-chardev 'socket,id=a,path=x,sever': unknown option 'sever'; did you mean 'server'?"},
      {"-chardev stdio,id=a -chardev stdio,id=b",
       "standard input and output are used twice: by chardev 'a' and by chardev 'b'"},
      {"-serial chardev:x", "-serial: chardev 'x' is not there; define it with -chardev"},
      {"-serial foo",
       "-serial 'foo': unknown character device 'foo'; known: stdio, pty, socket, file, null, ringbuf"},
      {"-device virtio-blk-device,id=a",
       "-device 'virtio-blk-device,id=a': option 'drive' is missing (id of the "
       "-drive behind it)"},
      {"-device virtio-blk-device,id=a,drive=x",
       "-device virtio-blk-device id=a: drive 'x' is not there; define it with -drive"},
      {"-device virtio-blk-device,id=a,drive=rootf -drive file=x,id=rootfs",
       "-device virtio-blk-device id=a: drive 'rootf' is not there; define it with -drive; did you mean "
       "'rootfs'?"},
      {"-drive file=x,id=d -device virtio-blk-device,id=a,drive=d -device virtio-blk-device,id=b,drive=d",
       "-device virtio-blk-device id=b: drive 'd' is used by -device virtio-blk-device id=a already"},
      {"-drive file=x,id=d -drive file=y,id=e -device virtio-blk-device,id=a,drive=d -device "
       "virtio-blk-device,id=a,drive=e",
       "-device: id 'a' is used twice; ids must differ"},
      {"-drive file=x,id=d -device virtio-blk-device,id=a,drive=d,bus=pcie.0",
       "-device 'virtio-blk-device,id=a,drive=d,bus=pcie.0': option 'bus': a microVM has no PCI bus; leave "
       "it "
       "out"},
      {"-drive file=x,id=d -device virtio-blk-device,id=a,drive=d,serial=123456789012345678901",
       "-device 'virtio-blk-device,id=a,drive=d,serial=123456789012345678901': option 'serial': "
       "'123456789012345678901' is longer than 20 characters"},
      {"-device virtio-blk-pci,id=a",
       "-device 'virtio-blk-pci,id=a': 'virtio-blk-pci' needs a standard machine "
       "with PCI; on a microVM use 'virtio-blk-device'"},
      {"-device usb-kbd,id=a",
       "-device 'usb-kbd,id=a': 'usb-kbd' needs a standard machine, and this is a "
       "microVM"},
      {"-device virtio-bkl-device,id=a",
       "-device 'virtio-bkl-device,id=a': unknown device 'virtio-bkl-device'; did you mean "
       "'virtio-blk-device'?"},
      {"-device vhost-vsock-device,id=a,guest-cid=2",
       "-device 'vhost-vsock-device,id=a,guest-cid=2': option 'guest-cid': '2' is out of range, expected 3 "
       "to "
       "4294967294"},
      {"-chardev socket,id=c,path=p -device vhost-user-fs-device,id=f,chardev=c,tag=t",
       "-device vhost-user-fs-device id=f: another process serves it and must see the guest's memory: add "
       "mem-share=on to -machine"},
      {"-qmp unix:/a", "-qmp 'unix:/a': option 'server' is missing: wisp listens here, it does not connect"},
      {"-qmp /a,server",
       "-qmp '/a,server': expected unix:PATH,server,nowait or tcp:ADDRESS:PORT,server,nowait"},
      {"-qmp unix:,server",
       "-qmp 'unix:,server': expected unix:PATH,server,nowait or tcp:ADDRESS:PORT,server,nowait"},
      {"-qmp unix:/a,server,nowiat",
       "-qmp 'unix:/a,server,nowiat': unknown option 'nowiat'; did you mean "
       "'nowait'?"},
      {"-qmp tcp:127.0.0.1:99999,server",
       "-qmp 'tcp:127.0.0.1:99999,server': '99999' is not a TCP port, expected 1 to 65535"},
      {"-qmp tcp:example.org:1,server",
       "-qmp 'tcp:example.org:1,server': 'example.org' is not a numeric address "
       "such as 127.0.0.1 or [::1]"},
      {"-qmp unix:/a,server,nowait -qmp unix:/a,server,nowait",
       "-qmp: /a is given twice; each socket needs its own path"},
      {"-mon chardev=x",
       "-mon 'chardev=x': chardev 'x' is not there; define it with -chardev "
       "socket,id=x,path=...,server,nowait"},
      {"-chardev pty,id=x -mon chardev=x",
       "-mon 'chardev=x': chardev 'x' is of kind pty; QMP needs a socket: "
       "-chardev socket,id=x,path=...,server,nowait"},
      {"-chardev socket,id=x,path=p -mon chardev=x",
       "-mon 'chardev=x': chardev 'x' connects to a socket; QMP needs one that listens: add server,nowait"},
      {"-kernel k -daemonize -serial stdio",
       "-daemonize: chardev 'serial0' uses the terminal, which a daemon "
       "leaves; use a socket, pty or file"},
  };
  for (const Case& c : cases) {
    const auto parsed = parse(c.text);
    ASSERT_FALSE(parsed.has_value()) << c.text;
    EXPECT_EQ(parsed.error().message, c.message) << c.text;
    EXPECT_EQ(parsed.error().message.find('\n'), std::string::npos) << c.text;
  }
}

TEST(CommandLine, HostileTextStaysOneShortLine) {
  for (const std::string& text : {std::string(100'000, 'x'), "-" + std::string(100'000, 'y'),
                                  std::string("-\x1b[2J\n"), std::string()}) {
    const auto parsed = parse_command_line(std::vector<std::string>{text}, driver_tables());
    ASSERT_FALSE(parsed.has_value());
    EXPECT_LT(parsed.error().message.size(), 400U);
    EXPECT_EQ(parsed.error().message.find('\n'), std::string::npos);
    EXPECT_EQ(parsed.error().message.find('\x1b'), std::string::npos);
  }
  const auto drive = parse("-drive id=" + std::string(100'000, 'x') + ",file=y");
  ASSERT_FALSE(drive.has_value());
  EXPECT_LT(drive.error().message.size(), 600U);
}

TEST(CommandLine, HelpTeaches) {
  for (const char* text : {"--help", "-h", "-help", "-kernel k --help"}) {
    const CommandLine line = good(text);
    EXPECT_EQ(line.action, CommandAction::kPrint) << text;
    EXPECT_EQ(line.text, help_text());
  }
  EXPECT_LT(help_text().find("wisp -kernel"), 200U);
  EXPECT_EQ(good("-V").text, version_text());
  EXPECT_EQ(good("--version").text, "wisp " + std::string(program_version()) + "\n");
}

TEST(CommandLine, HelpInsideValues) {
  EXPECT_THAT(good("-device help").text, HasSubstr("virtio-blk-device          a disk (hotplug)"));
  EXPECT_THAT(good("-device virtio-net-device,help").text, HasSubstr("mac="));
  EXPECT_THAT(good("-netdev help").text, HasSubstr("tap"));
  EXPECT_THAT(good("-netdev tap,help").text, HasSubstr("ifname="));
  EXPECT_THAT(good("-chardev ?").text, HasSubstr("socket"));
  EXPECT_THAT(good("-object help").text, HasSubstr("iothread"));
  EXPECT_THAT(good("-drive help").text, HasSubstr("readonly="));
  EXPECT_THAT(good("-machine help").text, HasSubstr("acpi="));
  EXPECT_THAT(good("-M help").text, HasSubstr("acpi="));
  EXPECT_THAT(good("-smp help").text, HasSubstr("threads="));
  EXPECT_THAT(good("-m help").text, HasSubstr("size="));
  EXPECT_THAT(good("-cpu help").text, HasSubstr("host"));
  EXPECT_FALSE(parse("-device nothing,help").has_value());
}

// The examples that help and docs show must parse.
TEST(CommandLine, EveryExampleInTheReferenceParses) {
  std::istringstream page(options_markdown());
  int examples = 0;
  for (std::string line; std::getline(page, line);) {
    if (!line.starts_with("Example: `")) {
      continue;
    }
    std::string example = line.substr(10, line.rfind('`') - 10);
    if (!example.starts_with("-kernel")) {
      example.insert(0, "-kernel k ");
    }
    EXPECT_TRUE(parse(example).has_value()) << example << "\n" << parse(example).error().message;
    ++examples;
  }
  EXPECT_GT(examples, 30);
}

TEST(CommandLine, TheOptionsPageIsUpToDate) {
  const std::string path = std::string(WISP_SOURCE_DIR) + "/docs/options.md";
  if (std::getenv("WISP_UPDATE_DOCS") != nullptr) {
    std::ofstream(path) << options_markdown();
  }
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(text.str() == options_markdown())
      << "docs/options.md differs from the table; run WISP_UPDATE_DOCS=1 test_control";
}

}  // namespace
}  // namespace wisp
