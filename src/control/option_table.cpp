#include "control/option_table.h"

#include <array>

#include "control/command_line.h"

namespace wisp {
namespace {

Result<void> take_kernel(CommandLineBuilder& builder, const OptionSpec&, const std::string& value) {
  builder.launch.machine.boot.kernel = value;
  return {};
}
Result<void> take_initrd(CommandLineBuilder& builder, const OptionSpec&, const std::string& value) {
  builder.launch.machine.boot.initrd = value;
  return {};
}
Result<void> take_append(CommandLineBuilder& builder, const OptionSpec&, const std::string& value) {
  builder.launch.machine.boot.cmdline = value;
  return {};
}
Result<void> take_paused(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.launch.machine.start_paused = true;
  return {};
}
Result<void> take_no_reboot(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.launch.machine.no_reboot = true;
  return {};
}
Result<void> take_no_shutdown(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.launch.machine.no_shutdown = true;
  return {};
}
Result<void> take_log(CommandLineBuilder& builder, const OptionSpec&, const std::string& value) {
  builder.launch.process.verbose = true;
  builder.launch.process.log_file = value;
  return {};
}
Result<void> take_daemonize(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.launch.process.daemonize = true;
  return {};
}
Result<void> take_pidfile(CommandLineBuilder& builder, const OptionSpec&, const std::string& value) {
  builder.launch.process.pidfile = value;
  return {};
}
Result<void> take_no_seccomp(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.launch.process.seccomp = false;
  return {};
}
Result<void> take_display(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  if (value != "none") {
    return fail("{}: a microVM has no display; use -display none, and -serial for a console",
                what_of(option, value));
  }
  builder.warn("-display none: a microVM has no display anyway");
  return {};
}
Result<void> take_help(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.print = help_text();
  return {};
}
Result<void> take_version(CommandLineBuilder& builder, const OptionSpec&, const std::string&) {
  builder.print = version_text();
  return {};
}

// Accepted because libvirt and scripts written for QEMU give it; help says why it changes nothing.
Result<void> ignore(CommandLineBuilder& builder, const OptionSpec& option, const std::string&) {
  builder.warn(fmt::format("-{} is ignored: {}", option.name, option.help));
  return {};
}
Result<void> refuse(CommandLineBuilder&, const OptionSpec& option, const std::string&) {
  return fail("-{} is not possible here: {}", option.name, option.help);
}

constexpr OptionValue kNone = OptionValue::kNone;
using Group = OptionGroup;

constexpr auto kOptions = std::to_array<OptionSpec>({
    {.name = "machine",
     .repeatable = true,
     .group = Group::kMachine,
     .argument =
         "[type=]microvm[,dump-guest-core=on|off][,mem-share=on|off][,accel=kvm|soft|auto][,acpi=on|off]"
         "[,auto-kernel-cmdline=on|off][,memory-backend=ID]",
     .help = "The kind of machine. microvm is the only one and the default.",
     .example = "-machine microvm,acpi=off,mem-share=on",
     .handler = take_machine},
    {.name = "M",
     .repeatable = true,
     .group = Group::kMachine,
     .argument = "...",
     .help = "Short for -machine.",
     .example = "-M microvm",
     .handler = take_machine,
     .alias_of = "machine"},
    {.name = "accel",
     .repeatable = true,
     .group = Group::kMachine,
     .argument = "kvm|soft|auto[,probe=on|off][,executor=translate|interpret][,statistics=on|off]"
                 "[,clock=host|virtual][,seed=N]"
                 "[,state-log=FILE][,state-log-every=N][,state-log-from=N]",
     .help =
         "The CPU engine: kvm (/dev/kvm), soft (a CPU in software, for hosts without hardware "
         "virtualization), or auto (the default), which takes kvm where the host's processor runs guests, "
         "else soft, and says so.",
     .example = "-accel kvm",
     .handler = take_accel},
    {.name = "enable-kvm",
     .value = kNone,
     .group = Group::kMachine,
     .help = "Short for -accel kvm.",
     .example = "-enable-kvm",
     .handler = take_enable_kvm,
     .alias_of = "accel"},
    {.name = "smp",
     .group = Group::kMachine,
     .argument = "[cpus=]N[,maxcpus=N][,sockets=N][,dies=N][,clusters=N][,cores=N][,threads=N]",
     .help = "Number of CPUs (default 1, at most 254) and how the guest sees them arranged. What is left out "
             "follows: cores first.",
     .example = "-smp 4,sockets=1,cores=2,threads=2",
     .handler = take_smp},
    {.name = "cpu",
     .group = Group::kMachine,
     .argument = "host[,pmu=on|off]",
     .help = "The CPU model: always the host's (max is another word for it).",
     .example = "-cpu host",
     .handler = take_cpu},
    {.name = "m",
     .group = Group::kMachine,
     .argument = "[size=]N[K|M|G|T]",
     .help = "Memory, in MiB without a letter (default 256).",
     .example = "-m 1G",
     .handler = take_memory},
    {.name = "mem-path",
     .group = Group::kMachine,
     .argument = "PATH",
     .help = "Guest memory lies in this file, or in an unnamed file in this directory (hugetlbfs, tmpfs).",
     .example = "-mem-path /dev/hugepages",
     .handler = take_mem_path},
    {.name = "mem-prealloc",
     .value = kNone,
     .group = Group::kMachine,
     .help = "Take all guest memory from the host at start, and fail there if it is not to be had.",
     .example = "-mem-prealloc",
     .handler = take_mem_prealloc},
    {.name = "numa",
     .repeatable = true,
     .group = Group::kMachine,
     .argument = "node[,nodeid=0][,cpus=0-N][,memdev=ID]",
     .help = "The one NUMA node of a microVM; memdev= names the memory-backend object that is the RAM.",
     .example = "-object memory-backend-memfd,id=ram,size=1G -numa node,memdev=ram -m 1G",
     .handler = take_numa},
    {.name = "object",
     .repeatable = true,
     .group = Group::kMachine,
     .argument = "KIND,id=ID[,...]",
     .help = "A part without a device of its own: memory, a source of randomness, a thread.",
     .example = "-object rng-random,id=rng0,filename=/dev/urandom",
     .handler = take_object},
    {.name = "name",
     .group = Group::kMachine,
     .argument = "NAME",
     .help = "The machine's name, for query-name and log lines.",
     .example = "-name web-1",
     .handler = take_name},
    {.name = "uuid",
     .group = Group::kMachine,
     .argument = "UUID",
     .help = "The machine's identity, for query-uuid.",
     .example = "-uuid 550e8400-e29b-41d4-a716-446655440000",
     .handler = take_uuid},
    {.name = "kernel",
     .group = Group::kBoot,
     .argument = "FILE",
     .help = "The kernel to start: ELF vmlinux, bzImage, or raw vmlinux.bin. Required.",
     .example = "-kernel vmlinux",
     .handler = take_kernel},
    {.name = "initrd",
     .group = Group::kBoot,
     .argument = "FILE",
     .help = "The initial RAM disk.",
     .example = "-initrd initrd.img",
     .handler = take_initrd},
    {.name = "append",
     .value = OptionValue::kSeveral,
     .group = Group::kBoot,
     .argument = "\"WORDS\"",
     .help = "The kernel's command line; several words up to the next option are joined by spaces.",
     .example = "-append \"console=ttyS0 root=/dev/vda reboot=k panic=1\"",
     .handler = take_append},
    {.name = "drive",
     .repeatable = true,
     .group = Group::kDisk,
     .argument = "id=ID,file=PATH[,readonly=on|off][,direct=on|off][,aio=...]",
     .help = "A disk image or block device, used by a -device through drive=ID. All options: -drive help.",
     .example = "-drive id=rootfs,file=rootfs.img,direct=off -device virtio-blk-device,drive=rootfs,id=blk0",
     .handler = take_drive},
    {.name = "netdev",
     .repeatable = true,
     .group = Group::kNetwork,
     .argument = "KIND,id=ID[,...]",
     .help = "A network on the host, used by a -device through netdev=ID. Kinds and options: -netdev help.",
     .example = "-netdev tap,id=net0,ifname=tap0 -device virtio-net-device,netdev=net0,id=nic0",
     .handler = take_netdev},
    {.name = "serial",
     .group = Group::kConsole,
     .argument = "stdio|pty|file,path=P|socket,path=P[,server][,nowait]|chardev:ID|none",
     .help = "Where the serial port (ttyS0) leads.",
     .example = "-serial stdio",
     .handler = take_serial},
    {.name = "chardev",
     .repeatable = true,
     .group = Group::kConsole,
     .argument = "KIND,id=ID[,...]",
     .help = "A stream of bytes, used by a device through chardev=ID. Kinds and options: -chardev help.",
     .example = "-chardev socket,id=con0,path=con.sock,server,nowait -serial chardev:con0",
     .handler = take_chardev},
    {.name = "device",
     .repeatable = true,
     .group = Group::kDevice,
     .argument = "DRIVER[,id=ID][,...]",
     .help = "A device of the guest. Drivers: -device help; the options of one: -device DRIVER,help.",
     .example =
         "-device virtio-rng-device,rng=rng0,id=rngdev0 -object rng-random,id=rng0,filename=/dev/urandom",
     .handler = take_device},
    {.name = "qmp",
     .repeatable = true,
     .group = Group::kControl,
     .argument = "unix:PATH,server[,nowait] | tcp:ADDRESS:PORT,server[,nowait]",
     .help = "Take QMP commands there (docs/qmp.md). Without nowait the start waits for a client.",
     .example = "-qmp unix:qmp.sock,server,nowait",
     .handler = take_qmp},
    {.name = "mon",
     .repeatable = true,
     .group = Group::kControl,
     .argument = "chardev=ID[,mode=control]",
     .help = "Take QMP commands on a listening socket chardev.",
     .example = "-chardev socket,id=mon0,path=qmp.sock,server,nowait -mon chardev=mon0,mode=control",
     .handler = take_mon},
    {.name = "S",
     .value = kNone,
     .group = Group::kControl,
     .help = "Do not start the CPUs; QMP cont does.",
     .example = "-S",
     .handler = take_paused},
    {.name = "freeze",
     .value = kNone,
     .group = Group::kControl,
     .help = "StratoVirt's word for -S.",
     .example = "-freeze",
     .handler = take_paused,
     .alias_of = "S"},
    {.name = "no-reboot",
     .value = kNone,
     .group = Group::kControl,
     .help = "A reset by the guest ends the machine.",
     .example = "-no-reboot",
     .handler = take_no_reboot},
    {.name = "no-shutdown",
     .value = kNone,
     .group = Group::kControl,
     .help = "A shutdown by the guest pauses the machine, for a look through QMP.",
     .example = "-no-shutdown",
     .handler = take_no_shutdown},
    {.name = "D",
     .value = OptionValue::kOptional,
     .group = Group::kProcess,
     .argument = "[FILE]",
     .help = "Log more, to this file or to standard error.",
     .example = "-D wisp.log",
     .handler = take_log},
    {.name = "daemonize",
     .value = kNone,
     .group = Group::kProcess,
     .help = "Go to the background once the machine runs; errors until then are told in the foreground.",
     .example = "-daemonize -pidfile wisp.pid",
     .handler = take_daemonize},
    {.name = "pidfile",
     .group = Group::kProcess,
     .argument = "FILE",
     .help = "Write the process id there; locked while the machine lives, removed at its end.",
     .example = "-pidfile wisp.pid",
     .handler = take_pidfile},
    {.name = "disable-seccomp",
     .value = kNone,
     .group = Group::kProcess,
     .help = "Run without system-call filters, for debugging.",
     .example = "-disable-seccomp",
     .handler = take_no_seccomp},
    {.name = "help",
     .value = kNone,
     .group = Group::kProcess,
     .help = "This text.",
     .example = "-help",
     .handler = take_help},
    {.name = "h",
     .value = kNone,
     .group = Group::kProcess,
     .help = "Short for -help.",
     .example = "-h",
     .handler = take_help,
     .alias_of = "help"},
    {.name = "version",
     .value = kNone,
     .group = Group::kProcess,
     .help = "The program's version.",
     .example = "-version",
     .handler = take_version},
    {.name = "V",
     .value = kNone,
     .group = Group::kProcess,
     .help = "Short for -version.",
     .example = "-V",
     .handler = take_version,
     .alias_of = "version"},
    // Accepted without effect; `help` finishes the sentence "is ignored: ".
    {.name = "overcommit",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "the host's own settings decide",
     .example = "-overcommit mem-lock=off",
     .handler = ignore},
    {.name = "no-user-config",
     .value = kNone,
     .group = Group::kCompat,
     .help = "there are no configuration files to leave unread",
     .example = "-no-user-config",
     .handler = ignore},
    {.name = "nodefaults",
     .value = kNone,
     .group = Group::kCompat,
     .help = "there are no default devices to leave out",
     .example = "-nodefaults",
     .handler = ignore},
    {.name = "sandbox",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "system-call filters are on unless -disable-seccomp is given",
     .example = "-sandbox on",
     .handler = ignore},
    {.name = "msg",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "messages have one form",
     .example = "-msg timestamp=on",
     .handler = ignore},
    {.name = "rtc",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "the clock always shows UTC",
     .example = "-rtc base=utc",
     .handler = ignore},
    {.name = "boot",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "the kernel is given by -kernel",
     .example = "-boot strict=on",
     .handler = ignore},
    {.name = "nographic",
     .value = kNone,
     .group = Group::kCompat,
     .help = "a microVM has no display anyway; for a console on the terminal use -serial stdio",
     .example = "-nographic",
     .handler = ignore},
    {.name = "display",
     .group = Group::kCompat,
     .argument = "none",
     .help = "a microVM has no display anyway",
     .example = "-display none",
     .handler = take_display},
    {.name = "realtime",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "the host's own settings decide",
     .example = "-realtime mlock=off",
     .handler = ignore},
    {.name = "usb",
     .value = kNone,
     .group = Group::kCompat,
     .help = "a microVM has no USB",
     .example = "-usb",
     .handler = ignore},
    {.name = "trace",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "there are no trace points",
     .example = "-trace type=all",
     .handler = ignore},
    {.name = "smbios",
     .repeatable = true,
     .group = Group::kCompat,
     .argument = "...",
     .help = "a microVM has no SMBIOS tables",
     .example = "-smbios type=1,product=wisp",
     .handler = ignore},
    // Refused; `help` finishes the sentence "is not possible here: ".
    {.name = "incoming",
     .group = Group::kCompat,
     .argument = "...",
     .help = "Wisp cannot take in a saved or migrated machine yet",
     .handler = refuse},
    {.name = "hardware-signature",
     .group = Group::kCompat,
     .argument = "...",
     .help = "it needs a standard machine, and this is a microVM",
     .handler = refuse},
    {.name = "global",
     .group = Group::kCompat,
     .argument = "...",
     .help = "it sets PCIe root ports, which only a standard machine has",
     .handler = refuse},
    {.name = "battery",
     .value = kNone,
     .group = Group::kCompat,
     .help = "it needs a standard machine, and this is a microVM",
     .handler = refuse},
    {.name = "mod-test",
     .group = Group::kCompat,
     .argument = "...",
     .help = "it is a test interface of StratoVirt's standard machine",
     .handler = refuse},
    {.name = "cameradev",
     .group = Group::kCompat,
     .argument = "...",
     .help = "it needs a standard machine with USB, and this is a microVM",
     .handler = refuse},
    {.name = "vnc",
     .group = Group::kCompat,
     .argument = "...",
     .help = "a microVM has no display; use -serial for a console",
     .handler = refuse},
    {.name = "windows_emu_pid",
     .group = Group::kCompat,
     .argument = "...",
     .help = "it needs a standard machine with a display, and this is a microVM",
     .handler = refuse},
});

struct ForeignOption {
  std::string_view name;
  std::string_view hint;
};
constexpr auto kForeignOptions = std::to_array<ForeignOption>({
    {"hda", "use -drive id=hd0,file=FILE -device virtio-blk-device,drive=hd0"},
    {"hdb", "use -drive id=hd1,file=FILE -device virtio-blk-device,drive=hd1"},
    {"cdrom", "use -drive id=cd0,file=FILE,readonly=on -device virtio-blk-device,drive=cd0"},
    {"net", "use -netdev and -device virtio-net-device"},
    {"nic", "use -netdev and -device virtio-net-device"},
    {"bios", "a microVM starts -kernel directly"},
    {"pflash", "a microVM starts -kernel directly"},
    {"monitor", "use -qmp, whose human-monitor-command takes 'info ...'"},
    {"vga", "a microVM has no display; use -serial"},
    {"dtb", "x86 machines have no device tree"},
    {"virtfs", "use -chardev socket and -device vhost-user-fs-device with virtiofsd"},
    {"fsdev", "use -chardev socket and -device vhost-user-fs-device with virtiofsd"},
    {"gdb", "there is no debugger interface yet"},
    {"loadvm", "there are no snapshots yet"},
});

}  // namespace

std::span<const OptionSpec> option_table() {
  return kOptions;
}

const OptionSpec* find_option(std::string_view name) {
  for (const OptionSpec& option : kOptions) {
    if (option.name == name) {
      return &option;
    }
  }
  return nullptr;
}

std::string_view foreign_option_hint(std::string_view name) {
  for (const ForeignOption& option : kForeignOptions) {
    if (option.name == name) {
      return option.hint;
    }
  }
  return {};
}

}  // namespace wisp
