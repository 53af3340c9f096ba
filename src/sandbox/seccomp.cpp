#include "sandbox/seccomp.h"

#include <seccomp.h>
#include <sys/prctl.h>

#include <cerrno>
#include <memory>

namespace wisp {
namespace {

struct ReleaseFilter {
  void operator()(void* context) const { seccomp_release(context); }
};
using FilterContext = std::unique_ptr<void, ReleaseFilter>;

Result<void> add_rule(const FilterContext& filter, const SyscallRule& rule) {
  const auto refused = [&rule](int error) {
    return fail_errno(-error, "cannot add system call {} to a seccomp filter", rule.number);
  };
  if (rule.argument == SyscallRule::kAny) {
    if (const int error = seccomp_rule_add_array(filter.get(), SCMP_ACT_ALLOW, rule.number, 0, nullptr);
        error < 0) {
      return refused(error);
    }
    return {};
  }
  for (const std::uint64_t value : rule.values) {
    const scmp_arg_cmp compare{.arg = static_cast<unsigned>(rule.argument),
                               .op = SCMP_CMP_MASKED_EQ,
                               .datum_a = rule.mask,
                               .datum_b = value};
    if (const int error = seccomp_rule_add_array(filter.get(), SCMP_ACT_ALLOW, rule.number, 1, &compare);
        error < 0) {
      return refused(error);
    }
  }
  return {};
}

}  // namespace

std::string_view thread_kind_name(ThreadKind kind) {
  switch (kind) {
    case ThreadKind::kMain:
      return "main";
    case ThreadKind::kVcpu:
      return "vcpu";
    case ThreadKind::kIo:
      return "io";
    case ThreadKind::kWorker:
      return "worker";
    case ThreadKind::kEngine:
      return "engine";
  }
  return "unknown";
}

Result<void> forbid_new_privileges() {
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
    return fail_errno(errno, "cannot set no_new_privs");
  }
  return {};
}

Result<void> install_seccomp(ThreadKind kind, SeccompViolation violation) {
  const FilterContext filter(seccomp_init(violation == SeccompViolation::kKill
                                              ? SCMP_ACT_KILL_PROCESS
                                              : SCMP_ACT_ERRNO(static_cast<std::uint32_t>(EPERM))));
  if (filter == nullptr) {
    return fail("cannot build a seccomp filter: not enough memory");
  }
  // Balanced tree instead of a list: every system call pays for the filter.
  seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_OPTIMIZE, 2);
  for (const SyscallRule& rule : seccomp_rules(kind)) {
    WISP_TRY(add_rule(filter, rule));
  }
  WISP_TRY(forbid_new_privileges());
  if (const int error = seccomp_load(filter.get()); error < 0) {
    return fail_errno(-error, "cannot install the seccomp filter of a {} thread", thread_kind_name(kind));
  }
  return {};
}

}  // namespace wisp
