// -machine, -accel, -name, -smp, -cpu, -m, -numa, -object memory-backend-*: what the machine itself is.
#include <algorithm>
#include <array>

#include "base/checked.h"
#include "control/option_table.h"

namespace wisp {
namespace {

constexpr std::uint64_t kMiB = 1ULL << 20;
constexpr std::uint64_t kMinMemory = kMiB;
constexpr std::uint64_t kMaxMemory = 1ULL << 46;

constexpr std::string_view kAlreadyMicrovm = "a microVM is without it";

constexpr auto kMachineProperties = std::to_array<PropertySpec>({
    {.name = "type", .help = "the machine", .default_text = "microvm", .maximum = 64},
    {.name = "accel", .help = "the CPU engine: kvm, soft or auto", .default_text = "auto", .maximum = 64},
    {.name = "dump-guest-core",
     .kind = PropertyKind::kBool,
     .help = "guest memory is part of core dumps",
     .default_text = "on"},
    {.name = "mem-share",
     .kind = PropertyKind::kBool,
     .help = "guest memory is shared (memfd), as vhost-user devices need it",
     .default_text = "off"},
    {.name = "mem-merge",
     .kind = PropertyKind::kBool,
     .help = "the host may merge equal pages (KSM)",
     .default_text = "off"},
    {.name = "memory-backend", .help = "id of the memory-backend object that is the RAM", .maximum = 127},
    {.name = "acpi",
     .kind = PropertyKind::kBool,
     .help = "describe devices by ACPI tables; off: by MP table and command line only",
     .default_text = "on"},
    {.name = "auto-kernel-cmdline",
     .kind = PropertyKind::kBool,
     .help = "append virtio_mmio.device= for each device to the kernel's command line",
     .default_text = "on"},
    {.name = "usb",
     .kind = PropertyKind::kEnum,
     .help = "accepted as off",
     .default_text = "off",
     .choices = "off|no|false"},
    {.name = "graphics",
     .kind = PropertyKind::kEnum,
     .help = "accepted as off",
     .default_text = "off",
     .choices = "off|no|false"},
    {.name = "vmport",
     .kind = PropertyKind::kEnum,
     .help = "accepted as off",
     .default_text = "off",
     .choices = "off|no|false"},
    {.name = "kernel-irqchip", .help = "chosen by the engine", .ignored_because = "the engine chooses"},
    {.name = "kernel_irqchip", .help = "chosen by the engine", .ignored_because = "the engine chooses"},
    {.name = "isa-serial", .help = "use -serial", .ignored_because = "-serial decides"},
    {.name = "x-option-roms", .help = "there are none", .ignored_because = kAlreadyMicrovm},
    {.name = "pit", .help = "chosen by the engine", .ignored_because = "the engine chooses"},
    {.name = "pic", .help = "chosen by the engine", .ignored_because = "the engine chooses"},
    {.name = "rtc", .help = "always there", .ignored_because = "the clock is always there"},
    {.name = "pcie", .help = "there is none", .ignored_because = kAlreadyMicrovm},
});

constexpr auto kAccelProperties = std::to_array<PropertySpec>({
    {.name = "accel", .help = "kvm, soft or auto", .required = true, .maximum = 64},
    {.name = "executor",
     .kind = PropertyKind::kEnum,
     .help = "how the software CPU runs code: by translating it, or one instruction at a time",
     .default_text = "translate",
     .choices = "translate|interpret"},
    {.name = "probe",
     .kind = PropertyKind::kBool,
     .help = "measure first whether KVM runs guest kernels on the processor, which takes part of a "
             "millisecond; off for measurements, and for hosts that are known to do so",
     .default_text = "on"},
    {.name = "clock",
     .kind = PropertyKind::kEnum,
     .help = "the software CPU's time: the host's, or virtual: a nanosecond for each instruction and a jump "
             "over idle "
             "times, so that the same inputs give the same run (one vCPU)",
     .default_text = "host",
     .choices = "host|virtual"},
    {.name = "seed",
     .kind = PropertyKind::kUint,
     .help = "with clock=virtual: where the processor's random numbers (RDRAND, RDSEED) start",
     .default_text = "1"},
    {.name = "state-log",
     .help = "with clock=virtual: a file that is written a line of the processor's state now and then, to "
             "compare runs "
             "(scripts/lockstep)",
     .maximum = 4096},
    {.name = "state-log-every",
     .kind = PropertyKind::kUint,
     .help = "instructions between two lines of state-log",
     .default_text = "1000000",
     .minimum = 1},
    {.name = "state-log-from",
     .kind = PropertyKind::kUint,
     .help = "instructions before the first line of state-log",
     .default_text = "0"},
    {.name = "statistics",
     .kind = PropertyKind::kBool,
     .help = "log at the end what the software CPU did: translations, TLB fills, what it interpreted",
     .default_text = "off"},
    {.name = "thread", .help = "one thread per CPU", .ignored_because = "each CPU always has its own thread"},
    {.name = "kernel-irqchip", .help = "chosen by the engine", .ignored_because = "the engine chooses"},
    {.name = "dirty-ring-size", .help = "chosen by the engine", .ignored_because = "the engine chooses"},
});

constexpr auto kNameProperties = std::to_array<PropertySpec>({
    {.name = "guest", .help = "the machine's name", .maximum = 255},
    {.name = "process", .help = "not used", .ignored_because = "the process keeps its own name"},
    {.name = "debug-threads",
     .kind = PropertyKind::kBool,
     .help = "accepted",
     .ignored_because = "threads always carry names"},
});

constexpr auto kSmpProperties = std::to_array<PropertySpec>({
    {.name = "cpus",
     .kind = PropertyKind::kUint,
     .help = "CPUs at start",
     .default_text = "1",
     .minimum = 1,
     .maximum = kMaxVcpus},
    {.name = "maxcpus",
     .kind = PropertyKind::kUint,
     .help = "CPUs that the topology has room for",
     .default_text = "cpus",
     .minimum = 1,
     .maximum = kMaxVcpus},
    {.name = "sockets", .kind = PropertyKind::kUint, .help = "sockets", .minimum = 1, .maximum = kMaxVcpus},
    {.name = "dies",
     .kind = PropertyKind::kUint,
     .help = "dies a socket",
     .minimum = 1,
     .maximum = kMaxVcpus},
    {.name = "clusters",
     .kind = PropertyKind::kUint,
     .help = "clusters a die",
     .minimum = 1,
     .maximum = kMaxVcpus},
    {.name = "cores",
     .kind = PropertyKind::kUint,
     .help = "cores a cluster",
     .minimum = 1,
     .maximum = kMaxVcpus},
    {.name = "threads",
     .kind = PropertyKind::kUint,
     .help = "threads a core",
     .minimum = 1,
     .maximum = kMaxVcpus},
});

constexpr auto kCpuProperties = std::to_array<PropertySpec>({
    {.name = "model",
     .kind = PropertyKind::kEnum,
     .help = "what the host's CPU can do",
     .required = true,
     .choices = "host|max"},
    {.name = "pmu",
     .kind = PropertyKind::kBool,
     .help = "the guest sees the host's performance counters; by KVM only",
     .default_text = "off"},
    {.name = "migratable",
     .kind = PropertyKind::kBool,
     .help = "accepted",
     .ignored_because = "the CPU is always the host's"},
    {.name = "sve",
     .kind = PropertyKind::kBool,
     .help = "ARM only",
     .ignored_because = "only ARM processors have it"},
    {.name = "kvm-steal-time",
     .kind = PropertyKind::kBool,
     .help = "ARM only",
     .ignored_because = "only ARM processors have it"},
});

constexpr auto kMemoryProperties = std::to_array<PropertySpec>({
    {.name = "size", .help = "memory, in MiB unless it ends in K, M, G or T", .default_text = "256M"},
    {.name = "maxmem",
     .help = "room for memory that is added later",
     .ignored_because = "memory cannot be added to a running machine yet"},
    {.name = "slots",
     .help = "number of memory modules that can be added",
     .ignored_because = "memory cannot be added to a running machine yet"},
});

constexpr auto kNumaProperties = std::to_array<PropertySpec>({
    {.name = "kind", .kind = PropertyKind::kEnum, .help = "node", .required = true, .choices = "node|dist"},
    {.name = "nodeid", .kind = PropertyKind::kUint, .help = "the node", .default_text = "0", .maximum = 127},
    {.name = "cpus", .help = "all CPUs are in the one node", .maximum = 256, .joined_by = ","},
    {.name = "memdev", .help = "id of the memory-backend object that is the RAM", .maximum = 127},
    {.name = "mem", .help = "all memory is in the one node", .maximum = 32},
    {.name = "src", .help = "of dist", .maximum = 8},
    {.name = "dst", .help = "of dist", .maximum = 8},
    {.name = "val", .help = "of dist", .maximum = 8},
});

constexpr std::string_view kPolicyIgnored = "memory is placed by the policy that wisp was started with";

constexpr auto kMemoryBackendProperties = std::to_array<PropertySpec>({
    {.name = "size", .kind = PropertyKind::kSize, .help = "bytes, equal to -m", .required = true},
    {.name = "share", .kind = PropertyKind::kBool, .help = "writes reach other processes that map it"},
    {.name = "mem-path", .help = "a file, or a directory on tmpfs or hugetlbfs", .maximum = 4095},
    {.name = "mem-prealloc", .kind = PropertyKind::kBool, .help = "take all of it from the host at start"},
    {.name = "prealloc", .kind = PropertyKind::kBool, .help = "take all of it from the host at start"},
    {.name = "dump-guest-core", .kind = PropertyKind::kBool, .help = "part of core dumps"},
    {.name = "dump", .kind = PropertyKind::kBool, .help = "part of core dumps"},
    {.name = "merge", .kind = PropertyKind::kBool, .help = "the host may merge equal pages"},
    {.name = "hugetlb", .kind = PropertyKind::kBool, .help = "of huge pages (memfd)"},
    {.name = "hugetlbsize",
     .kind = PropertyKind::kSize,
     .help = "size of the huge pages",
     .default_text = "2M"},
    {.name = "host-nodes", .help = "NUMA nodes of the host", .ignored_because = kPolicyIgnored},
    {.name = "policy", .help = "NUMA policy", .ignored_because = kPolicyIgnored},
});

constexpr auto kOwnObjects = std::to_array<DriverInfo>({
    {.name = "memory-backend-ram", .help = "anonymous memory", .properties = kMemoryBackendProperties},
    {.name = "memory-backend-file", .help = "memory in a file", .properties = kMemoryBackendProperties},
    {.name = "memory-backend-memfd",
     .help = "memory that other processes can map",
     .properties = kMemoryBackendProperties},
    {.name = "iothread", .help = "a thread that devices can run on (at most 8)", .properties = {}},
});

Result<Accel> parse_accel(std::string_view text, std::string_view what) {
  // QEMU's list of preferences: kvm:tcg.
  const std::string_view first = text.substr(0, text.find(':'));
  if (first == "kvm") {
    return text == "kvm" ? Accel::kKvm : Accel::kAuto;
  }
  if (text == "auto" || text == "kvm:auto") {
    return Accel::kAuto;
  }
  if (text == "soft" || text == "tcg") {
    return Accel::kSoft;
  }
  return fail("{}: '{}' is not an accelerator, expected kvm, soft or auto", what, clip(text, 40));
}

soft::ExecutorChoice parse_executor(std::string_view text) {
  if (text == "interpret") {
    return soft::ExecutorChoice::kInterpret;
  }
  return soft::ExecutorChoice::kTranslate;
}

Result<void> check_machine_type(std::string_view type) {
  if (type == "microvm") {
    return {};
  }
  if (type == "q35" || type == "virt" || type == "pc" || type == "none" || type.starts_with("pc-")) {
    return fail("-machine: type '{}' is a standard machine, which Wisp does not have; use -machine microvm",
                type);
  }
  return fail("-machine: unknown type '{}', expected microvm", clip(type, 80));
}

// The product of the counts that were given; 0 where it does not fit.
std::uint64_t product(std::initializer_list<std::uint64_t> factors) {
  std::uint64_t total = 1;
  for (const std::uint64_t factor : factors) {
    total = checked_mul(total, factor).value_or(0);
  }
  return total;
}

Result<void> check_size(std::uint64_t size, std::string_view what) {
  if (size < kMinMemory || size > kMaxMemory) {
    return fail("{}: {} bytes of memory are out of range, expected 1M to 64T", what, size);
  }
  if (!is_aligned(size, 4096)) {
    return fail("{}: {} bytes of memory are not a multiple of 4K", what, size);
  }
  return {};
}

Result<void> take_memory_backend(CommandLineBuilder& builder, const std::string& kind, const std::string& id,
                                 const PropertySet& set, const std::string& what) {
  MemoryBackend backend{.id = id, .ram = {}};
  RamOptions& ram = backend.ram;
  ram.size = set.get_uint("size", 0);
  WISP_TRY(check_size(ram.size, what));
  const bool memfd = kind == "memory-backend-memfd";
  ram.share = set.get_bool("share", memfd);
  ram.path = set.get_string("mem-path");
  if (kind == "memory-backend-file") {
    if (ram.path.empty()) {
      return fail("{}: option 'mem-path' is missing (the file or directory the memory lies in)", what);
    }
    ram.source = RamSource::kFile;
  } else if (!ram.path.empty()) {
    return fail("{}: option 'mem-path' belongs to memory-backend-file", what);
  } else if (memfd || ram.share) {
    ram.source = RamSource::kMemfd;
  }
  ram.prealloc = set.get_bool("prealloc", set.get_bool("mem-prealloc", false));
  ram.dump = set.get_bool("dump", set.get_bool("dump-guest-core", true));
  ram.merge = set.get_bool("merge", false);
  if (set.get_bool("hugetlb", set.has("hugetlbsize"))) {
    ram.huge_page_size = set.get_uint("hugetlbsize", 2 * kMiB);
    if (ram.source == RamSource::kFile) {
      return fail("{}: huge pages of a file come from its file system: put mem-path on hugetlbfs", what);
    }
    if (*ram.huge_page_size != 2 * kMiB && *ram.huge_page_size != 1024 * kMiB) {
      return fail("{}: option 'hugetlbsize': {} bytes is not a huge page size, expected 2M or 1G", what,
                  *ram.huge_page_size);
    }
  }
  builder.memory_backends.push_back(std::move(backend));
  return {};
}

}  // namespace

std::span<const PropertySpec> fixed_properties(std::string_view option) {
  struct Fixed {
    std::string_view option;
    std::span<const PropertySpec> properties;
  };
  for (const Fixed& fixed :
       {Fixed{"machine", kMachineProperties}, Fixed{"accel", kAccelProperties},
        Fixed{"name", kNameProperties}, Fixed{"smp", kSmpProperties}, Fixed{"cpu", kCpuProperties},
        Fixed{"m", kMemoryProperties}, Fixed{"numa", kNumaProperties}, Fixed{"mon", mon_properties()}}) {
    if (fixed.option == option) {
      return fixed.properties;
    }
  }
  return {};
}
std::span<const DriverInfo> own_object_kinds() {
  return kOwnObjects;
}

Result<void> take_machine(CommandLineBuilder& builder, const OptionSpec& /*option*/,
                          const std::string& value) {
  WISP_ASSIGN(const auto pairs, split_options(value, "type"));
  builder.machine_options.insert(builder.machine_options.end(), pairs.begin(), pairs.end());
  return {};
}

Result<void> take_accel(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "accel"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kAccelProperties, {}, what, builder.warnings));
  builder.machine_options.push_back({.key = "accel", .value = set.get_string("accel")});
  if (set.has("probe")) {
    builder.launch.machine.probe_kvm = set.get_bool("probe", true);
  }
  const std::string engine = set.get_string("accel");
  for (const std::string_view name :
       {"executor", "statistics", "seed", "state-log", "state-log-every", "state-log-from"}) {
    if (engine == "kvm" && set.has(name)) {
      return fail("{}: {}= goes with -accel soft; KVM runs code on the processor", what, name);
    }
  }
  if (set.has("executor")) {
    builder.launch.machine.execution.executor = parse_executor(set.get_string("executor"));
  }
  const bool virtual_clock = set.get_string("clock", "host") == "virtual";
  if (virtual_clock && engine != "soft") {
    return fail(
        "{}: clock=virtual needs the software CPU, and '{}' is asked for; use -accel soft,clock=virtual",
        what, clip(engine, 40));
  }
  if (set.has("seed") && !virtual_clock) {
    return fail("{}: seed= goes with clock=virtual; without it random numbers come from the host", what);
  }
  if (set.has("state-log") && !virtual_clock) {
    return fail("{}: state-log= goes with clock=virtual; other runs are never the same twice", what);
  }
  for (const std::string_view name : {"state-log-every", "state-log-from"}) {
    if (set.has(name) && !set.has("state-log")) {
      return fail("{}: {}= goes with state-log=, which names the file", what, name);
    }
  }
  builder.launch.machine.execution.state_log = set.get_string("state-log");
  builder.launch.machine.execution.state_log_every = set.get_uint("state-log-every", 1'000'000);
  builder.launch.machine.execution.state_log_from = set.get_uint("state-log-from", 0);
  builder.launch.machine.execution.virtual_clock = virtual_clock;
  builder.launch.machine.execution.seed = set.get_uint("seed", 1);
  builder.launch.machine.execution.statistics = set.get_bool("statistics", false);
  return {};
}

Result<void> take_enable_kvm(CommandLineBuilder& builder, const OptionSpec& /*option*/,
                             const std::string& /*value*/) {
  builder.machine_options.push_back({.key = "accel", .value = "kvm"});
  return {};
}

Result<void> take_name(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "guest"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kNameProperties, {}, what, builder.warnings));
  builder.launch.machine.name = set.get_string("guest");
  return {};
}

Result<void> take_uuid(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  bool good = value.size() == 36;
  for (std::size_t i = 0; good && i < value.size(); ++i) {
    const bool dash = i == 8 || i == 13 || i == 18 || i == 23;
    good = dash ? value[i] == '-' : std::string_view("0123456789abcdefABCDEF").contains(value[i]);
  }
  if (!good) {
    return fail("{}: not a UUID, expected the form 550e8400-e29b-41d4-a716-446655440000",
                what_of(option, value));
  }
  builder.launch.process.uuid = value;
  return {};
}

Result<void> take_smp(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "cpus"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kSmpProperties, {}, what, builder.warnings));
  const auto given = [&](std::string_view name) { return set.get_uint(name, 0); };
  const auto one = [&](std::string_view name) { return set.get_uint(name, 1); };
  const std::uint64_t dies = one("dies");
  const std::uint64_t clusters = one("clusters");
  std::uint64_t sockets = given("sockets");
  std::uint64_t cores = given("cores");
  std::uint64_t threads = given("threads");
  std::uint64_t max = given("maxcpus");
  const std::uint64_t cpus = given("cpus");
  if (max == 0) {
    const bool topology =
        sockets != 0 || cores != 0 || threads != 0 || set.has("dies") || set.has("clusters");
    max = cpus != 0  ? cpus
          : topology ? product({one("sockets"), dies, clusters, one("cores"), one("threads")})
                     : 1;
  }
  // What was not given follows from maxcpus: cores first, then sockets, then threads.
  const auto rest = [&](std::uint64_t a, std::uint64_t b) {
    const std::uint64_t known = product({dies, clusters, a, b});
    return known == 0 ? 0 : std::max<std::uint64_t>(1, max / known);
  };
  const bool no_cores = cores == 0;
  const bool no_sockets = sockets == 0;
  sockets = no_sockets ? 1 : sockets;
  threads = threads == 0 ? 1 : threads;
  if (no_cores) {
    cores = rest(sockets, threads);
  } else if (no_sockets) {
    sockets = rest(cores, threads);
  } else if (!set.has("threads")) {
    threads = rest(sockets, cores);
  }
  const std::uint64_t total = product({sockets, dies, clusters, cores, threads});
  if (total != max) {
    return fail("{}: sockets={} dies={} clusters={} cores={} threads={} make {} CPUs, but {} were asked for",
                what, sockets, dies, clusters, cores, threads, total, max);
  }
  if (max > kMaxVcpus) {
    return fail("{}: {} CPUs are too many, expected 1 to {}", what, max, kMaxVcpus);
  }
  if (cpus > max) {
    return fail("{}: cpus={} is more than maxcpus={}", what, cpus, max);
  }
  CpuConfig& config = builder.launch.machine.cpus;
  config.max = static_cast<std::uint32_t>(max);
  config.count = cpus == 0 ? config.max : static_cast<std::uint32_t>(cpus);
  config.topology = {.sockets = static_cast<std::uint32_t>(sockets),
                     .dies = static_cast<std::uint32_t>(dies),
                     .clusters = static_cast<std::uint32_t>(clusters),
                     .cores = static_cast<std::uint32_t>(cores),
                     .threads = static_cast<std::uint32_t>(threads)};
  if (config.count < config.max) {
    builder.warn(
        fmt::format("{}: CPUs cannot be added to a running machine yet: it keeps {}", what, config.count));
  }
  return {};
}

Result<void> take_cpu(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "model"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kCpuProperties, {}, what, builder.warnings));
  builder.launch.machine.cpus.pmu = set.get_bool("pmu", false);
  return {};
}

Result<void> take_memory(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "size"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kMemoryProperties, {}, what, builder.warnings));
  if (const auto text = set.find_string("size")) {
    const auto size = parse_size(*text, kMiB);
    if (!size) {
      return fail("{}: '{}' is not a size such as 1024 (MiB), 512M or 2G", what, clip(*text, 40));
    }
    WISP_TRY(check_size(*size, what));
    builder.memory_size = size;
  }
  return {};
}

Result<void> take_mem_path(CommandLineBuilder& builder, const OptionSpec& /*option*/,
                           const std::string& value) {
  builder.memory_path = value;
  return {};
}

Result<void> take_mem_prealloc(CommandLineBuilder& builder, const OptionSpec& /*option*/,
                               const std::string& /*value*/) {
  builder.memory_prealloc = true;
  return {};
}

Result<void> take_numa(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(const auto pairs, split_options(value, "kind"));
  WISP_ASSIGN(const PropertySet set, parse_properties(pairs, kNumaProperties, {}, what, builder.warnings));
  if (builder.numa_seen || set.get_string("kind") == "dist" || set.get_uint("nodeid", 0) != 0) {
    return fail("{}: a microVM has one NUMA node, number 0; give at most one -numa node", what);
  }
  builder.numa_seen = true;
  builder.numa_memdev = set.get_string("memdev");
  return {};
}

Result<void> take_object(CommandLineBuilder& builder, const OptionSpec& option, const std::string& value) {
  const std::string what = what_of(option, value);
  WISP_ASSIGN(auto pairs, split_options(value, "qom-type"));
  WISP_ASSIGN(const std::string kind, take_value(pairs, "qom-type", what));
  const DriverInfo* info = find_driver(kOwnObjects, kind);
  const bool own = info != nullptr;
  if (!own) {
    info = find_driver(builder.tables.objects, kind);
  }
  if (info == nullptr) {
    std::vector<std::string_view> known;
    for (const auto table : {std::span<const DriverInfo>(kOwnObjects), builder.tables.objects}) {
      for (const DriverInfo& driver : table) {
        known.push_back(driver.name);
      }
    }
    if (kind.starts_with("tls-creds") || kind.starts_with("authz-")) {
      return fail("{}: '{}' belongs to VNC, which Wisp does not have", what, kind);
    }
    return fail("{}: unknown object '{}'{}", what, clip(kind, 80), suggest(kind, known));
  }
  WISP_ASSIGN(const std::string id, take_value(pairs, "id", what));
  if (id.empty()) {
    return fail("{}: option 'id' is missing", what);
  }
  WISP_TRY(check_id(id, what));
  WISP_ASSIGN(PropertySet set, parse_properties(pairs, info->properties, {}, what, builder.warnings));
  if (!own) {
    builder.launch.machine.objects.push_back(
        {.kind = kind, .id = id, .properties = std::move(set), .fds = {}});
    return {};
  }
  if (kind != "iothread") {
    return take_memory_backend(builder, kind, id, set, what);
  }
  auto& iothreads = builder.launch.machine.iothreads;
  if (iothreads.size() == kMaxIothreads) {
    return fail("{}: there are {} iothreads already, the most a machine may have", what, kMaxIothreads);
  }
  iothreads.push_back(id);
  return {};
}

Result<void> finish_machine(CommandLineBuilder& builder) {
  // -accel kvm beside -machine accel=kvm says the same thing twice, which is fine.
  auto& pairs = builder.machine_options;
  const auto accel = std::ranges::find(pairs, std::string_view("accel"), &KeyValue::key);
  if (accel != pairs.end()) {
    const std::string first = accel->value;
    const auto repeated = [&](const KeyValue& pair) { return pair.key == "accel" && pair.value == first; };
    pairs.erase(std::remove_if(accel + 1, pairs.end(), repeated), pairs.end());
  }
  WISP_ASSIGN(const PropertySet set,
              parse_properties(pairs, kMachineProperties, {}, "-machine", builder.warnings));
  WISP_TRY(check_machine_type(set.get_string("type", "microvm")));
  MachineConfig& machine = builder.launch.machine;
  WISP_ASSIGN(machine.accel, parse_accel(set.get_string("accel", "auto"), "-machine accel"));
  machine.acpi = set.get_bool("acpi", true);
  machine.boot.auto_cmdline = set.get_bool("auto-kernel-cmdline", true);
  machine.memory.dump = set.get_bool("dump-guest-core", true);
  machine.memory.merge = set.get_bool("mem-merge", false);
  machine.memory.share = set.get_bool("mem-share", false);
  if (const std::string backend = set.get_string("memory-backend"); !backend.empty()) {
    if (!builder.numa_memdev.empty() && builder.numa_memdev != backend) {
      return fail("-machine memory-backend={} and -numa memdev={} name two memories; name one", backend,
                  builder.numa_memdev);
    }
    builder.numa_memdev = backend;
  }
  return {};
}

Result<void> finish_memory(CommandLineBuilder& builder) {
  RamOptions& memory = builder.launch.machine.memory;
  if (!builder.numa_memdev.empty()) {
    const auto backend = std::ranges::find(builder.memory_backends, builder.numa_memdev, &MemoryBackend::id);
    if (backend == builder.memory_backends.end()) {
      return fail("memory backend '{}' is not there; define it: -object memory-backend-ram,id={},size=...",
                  clip(builder.numa_memdev, 80), clip(builder.numa_memdev, 80));
    }
    if (builder.memory_size && *builder.memory_size != backend->ram.size) {
      return fail("-m gives {} MiB, but -object memory-backend id={} has {} MiB; make them equal",
                  *builder.memory_size / kMiB, backend->id, backend->ram.size / kMiB);
    }
    if (!builder.memory_path.empty()) {
      return fail("-mem-path and -object memory-backend id={} both say where the memory lies; leave one out",
                  backend->id);
    }
    const RamOptions wishes = memory;
    memory = backend->ram;
    memory.dump = memory.dump && wishes.dump;
    memory.merge = memory.merge || wishes.merge;
    memory.share = memory.share || wishes.share;
    backend->used = true;
  } else {
    memory.size = builder.memory_size.value_or(memory.size);
    memory.path = builder.memory_path;
    if (!memory.path.empty()) {
      memory.source = RamSource::kFile;
    }
  }
  memory.prealloc = memory.prealloc || builder.memory_prealloc;
  if (memory.share && memory.source == RamSource::kAnonymous) {
    memory.source = RamSource::kMemfd;
  }
  for (const MemoryBackend& backend : builder.memory_backends) {
    if (!backend.used) {
      builder.warn(
          fmt::format("-object memory-backend id={} is not used by anything: name it in -machine "
                      "memory-backend={}",
                      backend.id, backend.id));
    }
  }
  return {};
}

}  // namespace wisp
