// `wisp doctor`: what this host can do for machines, and how to mend what it cannot.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hypervisor/hypervisor.h"

namespace wisp {

enum class FindingState : std::uint8_t {
  kGood,
  kLimited,  // something that machines can do without is missing
  kBad,      // no machine can run
};

struct Finding {
  std::string_view name;
  FindingState state = FindingState::kGood;
  std::string found;
  std::string advice;  // empty where there is nothing to mend
};

// The host as the checks see it; tests give a directory of their own as root.
struct HostView {
  std::string root;                         // put in front of every path; empty for the real host
  std::string path;                         // where programs are looked for, as $PATH
  std::function<EngineReport()> probe_kvm;  // whether KVM runs guests on hardware
  std::function<EngineReport()> probe_software_cpu;
};

[[nodiscard]] HostView real_host();
[[nodiscard]] std::vector<Finding> examine_host(const HostView& host);

[[nodiscard]] bool can_run_machines(std::span<const Finding> findings);
[[nodiscard]] std::string findings_table(std::span<const Finding> findings);
[[nodiscard]] std::string findings_json(std::span<const Finding> findings);

// `arguments` behind the word "doctor". The exit status: 0 a machine can run, 1 none can, 2 bad arguments.
[[nodiscard]] int run_doctor(std::span<const std::string> arguments, const HostView& host);

}  // namespace wisp
