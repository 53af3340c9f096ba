#include "cli/doctor.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "base/clock.h"
#include "base/property.h"
#include "base/unique_fd.h"
#include "hypervisor/kvm/kvm_hypervisor.h"
#include "hypervisor/kvm/kvm_probe.h"
#include "hypervisor/soft/soft_hypervisor.h"

namespace wisp {
namespace {

constexpr std::uint64_t kMiB = 1ULL << 20;
constexpr std::uint64_t kLittleMemory = 256 * kMiB;

std::optional<std::string> read_text(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return std::nullopt;
  }
  std::string text(4096, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  while (text.ends_with('\n')) {
    text.pop_back();
  }
  return text;
}

std::optional<std::uint64_t> read_number(const std::string& path) {
  const auto text = read_text(path);
  return text ? parse_uint(*text) : std::nullopt;
}

// The number behind "NAME:" in /proc/meminfo or /proc/self/status.
std::optional<std::string> field(const std::string& text, std::string_view name) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(name) && line.size() > name.size() && line[name.size()] == ':') {
      std::istringstream words(line.substr(name.size() + 1));
      std::string word;
      words >> word;
      return word;
    }
  }
  return std::nullopt;
}

// Machines can do without KVM where the software CPU runs.
Finding check_kvm(const HostView& host, bool software_cpu) {
  const EngineReport report = host.probe_kvm();
  const FindingState missing = software_cpu ? FindingState::kLimited : FindingState::kBad;
  return {.name = "kvm",
          .state = report.usable ? FindingState::kGood : missing,
          .found = report.summary,
          .advice = report.usable ? std::string() : report.advice};
}

Finding check_software_cpu(const EngineReport& report) {
  return {.name = "software CPU",
          .state = report.usable ? FindingState::kGood : FindingState::kLimited,
          .found = report.summary,
          .advice = report.usable ? std::string() : report.advice};
}

Finding check_memory(const HostView& host) {
  const auto text = read_text(host.root + "/proc/meminfo");
  const auto word = text ? field(*text, "MemAvailable") : std::nullopt;
  const auto kib = word ? parse_uint(*word) : std::nullopt;
  if (!kib) {
    return {.name = "memory",
            .state = FindingState::kLimited,
            .found = "cannot tell: /proc/meminfo has no MemAvailable",
            .advice = "mount /proc"};
  }
  const std::uint64_t mib = *kib / 1024;
  const bool little = mib * kMiB < kLittleMemory;
  return {.name = "memory",
          .state = little ? FindingState::kLimited : FindingState::kGood,
          .found = fmt::format("{} MiB available", mib),
          .advice = little ? "free memory, or give machines less with -m" : ""};
}

Finding check_hugepages(const HostView& host) {
  const std::string base = host.root + "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  const auto total = read_number(base + "nr_hugepages");
  const auto free = read_number(base + "free_hugepages");
  if (!total || !free) {
    return {.name = "hugepages",
            .state = FindingState::kLimited,
            .found = "the kernel has none of 2 MiB",
            .advice = "machines run without; for faster memory use a kernel with CONFIG_HUGETLBFS"};
  }
  return {.name = "hugepages",
          .state = *free > 0 ? FindingState::kGood : FindingState::kLimited,
          .found = fmt::format("{} of {} pages of 2 MiB are free", *free, *total),
          .advice = *free > 0 ? "" : "only needed for -mem-path /dev/hugepages: sysctl vm.nr_hugepages=N"};
}

// Whether a device node can be opened for reading and writing, and if not, why.
Finding check_node(const HostView& host, std::string_view name, const std::string& path,
                   std::string_view module, std::string_view purpose, std::string_view group_advice) {
  const UniqueFd fd(::open((host.root + path).c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (fd.valid()) {
    return {.name = name, .found = fmt::format("{} can be opened", path), .advice = {}};
  }
  const int error = errno;
  const bool denied = error == EACCES || error == EPERM;
  return {.name = name,
          .state = FindingState::kLimited,
          .found = fmt::format("{}: {}", path, errno_text(error)),
          .advice = denied ? fmt::format("{}; {}", purpose, group_advice)
                           : fmt::format("{}; load it: modprobe {}", purpose, module)};
}

Finding check_tap(const HostView& host) {
  Finding finding =
      check_node(host, "tap", "/dev/net/tun", "tun", "needed for -netdev tap by name",
                 "run as root, or let a manager hand an open tap over (fd=), or use -netdev user");
  if (finding.state == FindingState::kGood) {
    constexpr int kCapNetAdmin = 12;
    const auto status = read_text(host.root + "/proc/self/status");
    const auto caps = status ? field(*status, "CapEff") : std::nullopt;
    const auto bits = caps ? parse_uint("0x" + *caps) : std::nullopt;
    if (bits && (*bits >> kCapNetAdmin & 1) == 0) {
      finding.state = FindingState::kLimited;
      finding.found += ", but interfaces cannot be created (no CAP_NET_ADMIN)";
      finding.advice = "use taps that root made for this user (ip tuntap add user ...), or -netdev user";
    }
  }
  return finding;
}

Finding check_passt(const HostView& host) {
  std::istringstream directories(host.path);
  for (std::string directory; std::getline(directories, directory, ':');) {
    const std::string path = directory + "/passt";
    if (!directory.empty() && ::access((host.root + path).c_str(), X_OK) == 0) {
      return {.name = "passt", .found = path, .advice = {}};
    }
  }
  return {.name = "passt",
          .state = FindingState::kLimited,
          .found = "not found in PATH",
          .advice = "needed for -netdev user: apt install passt"};
}

Finding check_io_uring(const HostView& host) {
  io_uring_params parameters{};
  const UniqueFd ring(static_cast<int>(::syscall(SYS_io_uring_setup, 1, &parameters)));
  if (ring.valid()) {
    return {.name = "io_uring", .found = "allowed", .advice = {}};
  }
  const int error = errno;
  const auto disabled = read_number(host.root + "/proc/sys/kernel/io_uring_disabled");
  const bool by_sysctl = disabled && *disabled != 0;
  return {.name = "io_uring",
          .state = FindingState::kLimited,
          .found = by_sysctl ? fmt::format("switched off (kernel.io_uring_disabled={})", *disabled)
                             : errno_text(error),
          .advice = by_sysctl ? "disks use threads; for io_uring: sysctl kernel.io_uring_disabled=0"
                              : "disks use threads; a container's seccomp profile may forbid io_uring"};
}

Finding check_seccomp() {
  std::uint32_t action = SECCOMP_RET_KILL_PROCESS;
  if (::syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0) {
    return {.name = "seccomp", .found = "filters can be installed", .advice = {}};
  }
  return {.name = "seccomp",
          .state = FindingState::kLimited,
          .found = errno_text(errno),
          .advice = "start machines with -disable-seccomp, or use a kernel with CONFIG_SECCOMP_FILTER"};
}

Finding check_user_namespaces() {
  // In a child, so that this process stays where it is.
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(::unshare(CLONE_NEWUSER) == 0 ? 0 : errno);
  }
  int status = 0;
  if (child < 0 || ::waitpid(child, &status, 0) != child || !WIFEXITED(status)) {
    return {.name = "user namespaces",
            .state = FindingState::kLimited,
            .found = "cannot tell: no process could be started",
            .advice = "raise the limit on processes"};
  }
  if (const int error = WEXITSTATUS(status); error != 0) {
    return {.name = "user namespaces",
            .state = FindingState::kLimited,
            .found = errno_text(error),
            .advice =
                "passt isolates itself less without; sysctl user.max_user_namespaces=N, or "
                "kernel.apparmor_restrict_unprivileged_userns=0"};
  }
  return {.name = "user namespaces", .found = "allowed", .advice = {}};
}

std::string_view state_word(FindingState state) {
  switch (state) {
    case FindingState::kGood:
      return "ok";
    case FindingState::kLimited:
      return "limited";
    case FindingState::kBad:
      return "missing";
  }
  return "missing";
}

EngineReport probe_real_kvm() {
  auto kvm = KvmHypervisor::open();
  if (!kvm) {
    // The message says what was found and what to do about it.
    return {.usable = false, .summary = kvm.error().message, .advice = {}};
  }
  const SystemClock clock;
  return describe(probe_ring0(**kvm, clock));
}

}  // namespace

HostView real_host() {
  const char* path = std::getenv("PATH");
  return {.root = {},
          .path = path != nullptr ? path : "/usr/bin:/bin",
          .probe_kvm = probe_real_kvm,
          .probe_software_cpu = describe_software_cpu};
}

std::vector<Finding> examine_host(const HostView& host) {
  const EngineReport software_cpu = host.probe_software_cpu();
  return {check_kvm(host, software_cpu.usable),
          check_software_cpu(software_cpu),
          check_memory(host),
          check_hugepages(host),
          check_tap(host),
          check_passt(host),
          check_node(host, "vhost-net", "/dev/vhost-net", "vhost_net", "needed for vhost=on",
                     "run as root or as a member of its group"),
          check_node(host, "vhost-vsock", "/dev/vhost-vsock", "vhost_vsock", "needed for vhost-vsock-device",
                     "run as root or as a member of its group"),
          check_io_uring(host),
          check_seccomp(),
          check_user_namespaces()};
}

bool can_run_machines(std::span<const Finding> findings) {
  return std::ranges::none_of(findings,
                              [](const Finding& finding) { return finding.state == FindingState::kBad; });
}

std::string findings_table(std::span<const Finding> findings) {
  std::string out;
  for (const Finding& finding : findings) {
    out += fmt::format("{:<16} {:<8} {}\n", finding.name, state_word(finding.state), finding.found);
    if (!finding.advice.empty()) {
      out += fmt::format("{:<16} {:<8} -> {}\n", "", "", finding.advice);
    }
  }
  out += can_run_machines(findings) ? "Machines can run here.\n" : "Machines cannot run here.\n";
  return out;
}

std::string findings_json(std::span<const Finding> findings) {
  using Json = nlohmann::json;
  Json list = Json::array();
  for (const Finding& finding : findings) {
    Json entry{{"name", finding.name}, {"state", state_word(finding.state)}, {"found", finding.found}};
    if (!finding.advice.empty()) {
      entry["advice"] = finding.advice;
    }
    list.push_back(std::move(entry));
  }
  return Json{{"machines", can_run_machines(findings)}, {"findings", std::move(list)}}.dump(
             2, ' ', false, Json::error_handler_t::replace) +
         "\n";
}

int run_doctor(std::span<const std::string> arguments, const HostView& host) {
  bool json = false;
  for (const std::string& argument : arguments) {
    if (argument == "--json" || argument == "-json") {
      json = true;
    } else if (argument == "--help" || argument == "-h" || argument == "-help") {
      std::fputs(
          "wisp doctor [--json]\nTells what this host can do for machines. Exit status 0: they can run.\n",
          stdout);
      return 0;
    } else {
      (void)std::fprintf(stderr, "wisp: doctor: unknown argument '%s', expected --json\n", argument.c_str());
      return 2;
    }
  }
  const std::vector<Finding> findings = examine_host(host);
  const std::string text = json ? findings_json(findings) : findings_table(findings);
  std::fputs(text.c_str(), stdout);
  return can_run_machines(findings) ? 0 : 1;
}

}  // namespace wisp
