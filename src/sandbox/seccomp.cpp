#include "sandbox/seccomp.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "sandbox/compiled_filters.h"

namespace wisp {

Result<void> forbid_new_privileges() {
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
    return fail_errno(errno, "cannot set no_new_privs");
  }
  return {};
}

Result<void> install_seccomp(ThreadKind kind, SeccompViolation violation) {
  const std::span<const sock_filter> filter = compiled_filter(kind, violation);
  WISP_TRY(forbid_new_privileges());
  // The kernel only reads it.
  const sock_fprog program{.len = static_cast<unsigned short>(filter.size()),
                           .filter = const_cast<sock_filter*>(filter.data())};
  if (::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0) {
    return fail_errno(errno, "cannot install the seccomp filter of a {} thread", thread_kind_name(kind));
  }
  return {};
}

}  // namespace wisp
