// The filters as the kernel takes them (linux/filter.h), compiled from the rules by the build
// (compile_filters.cpp).
#pragma once

#include <linux/filter.h>

#include <span>

#include "sandbox/seccomp.h"

namespace wisp {

[[nodiscard]] std::span<const sock_filter> compiled_filter(ThreadKind kind, SeccompViolation violation);

}  // namespace wisp
