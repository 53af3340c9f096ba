// Run by the build: compiles the rules (seccomp_rules.cpp) by libseccomp into programs for the kernel and
// writes them as a C++ source, so that a machine's threads only have to hand them over: compiling one takes
// 0.3 ms, a tenth of the way to a guest's first instruction.
//
// compile_filters OUTPUT
#include <fmt/format.h>
#include <linux/filter.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <memory>
#include <vector>

#include "base/unique_fd.h"
#include "sandbox/seccomp.h"

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

Result<std::vector<sock_filter>> compile(ThreadKind kind, SeccompViolation violation) {
  const FilterContext filter(seccomp_init(violation == SeccompViolation::kKill
                                              ? SCMP_ACT_KILL_PROCESS
                                              : SCMP_ACT_ERRNO(static_cast<std::uint32_t>(EPERM))));
  if (filter == nullptr) {
    return fail("cannot build a seccomp filter: not enough memory");
  }
  // Balanced tree instead of a list: every system call pays for the filter. And calls by another ABI (int
  // 0x80, x32) end the process as unlisted ones do: the library's own choice is the thread alone.
  if (seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_OPTIMIZE, 2) < 0 ||
      seccomp_attr_set(filter.get(), SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS) < 0) {
    return fail("cannot build a seccomp filter: libseccomp refuses its attributes");
  }
  for (const SyscallRule& rule : seccomp_rules(kind)) {
    WISP_TRY(add_rule(filter, rule));
  }
  const UniqueFd file(::memfd_create("filter", MFD_CLOEXEC));
  if (const int error = seccomp_export_bpf(filter.get(), file.get()); error < 0) {
    return fail_errno(-error, "cannot compile the seccomp filter of a {} thread", thread_kind_name(kind));
  }
  const off_t size = ::lseek(file.get(), 0, SEEK_END);
  std::vector<sock_filter> program(static_cast<std::size_t>(size) / sizeof(sock_filter));
  if (size <= 0 || ::pread(file.get(), program.data(), program.size() * sizeof(sock_filter), 0) != size) {
    return fail_errno(errno, "cannot read the compiled seccomp filter of a {} thread",
                      thread_kind_name(kind));
  }
  return program;
}

Result<std::string> source() {
  constexpr std::array kKinds{ThreadKind::kMain, ThreadKind::kVcpu, ThreadKind::kIo, ThreadKind::kWorker,
                              ThreadKind::kEngine};
  std::string arrays;
  std::string cases;
  for (const ThreadKind kind : kKinds) {
    for (const SeccompViolation violation : {SeccompViolation::kKill, SeccompViolation::kErrno}) {
      const auto number = static_cast<unsigned>(kind);
      const auto way = static_cast<unsigned>(violation);
      WISP_ASSIGN(const auto program, compile(kind, violation));
      arrays += fmt::format("constexpr sock_filter kProgram{}{}[] = {{\n", number, way);
      for (const sock_filter& step : program) {
        arrays += fmt::format("    {{{:#x}, {}, {}, {:#x}}},\n", step.code, step.jt, step.jf, step.k);
      }
      arrays += "};\n";
      cases += fmt::format(
          "  if (kind == static_cast<ThreadKind>({0}) && violation == static_cast<SeccompViolation>({1})) "
          "{{\n"
          "    return kProgram{0}{1};\n  }}\n",
          number, way);
    }
  }
  return fmt::format(
      "// Written by compile_filters.\n#include \"sandbox/compiled_filters.h\"\n\nnamespace wisp "
      "{{\nnamespace "
      "{{\n\n{}\n}}  // namespace\n\nstd::span<const sock_filter> compiled_filter(ThreadKind kind, "
      "SeccompViolation violation) {{\n{}  return {{}};\n}}\n\n}}  // namespace wisp\n",
      arrays, cases);
}

int run(const char* path) {
  const auto text = source();
  if (!text) {
    fmt::print(stderr, "compile_filters: {}\n", text.error().message);
    return 1;
  }
  std::ofstream file(path, std::ios::trunc);
  file << *text;
  file.close();
  if (!file) {
    fmt::print(stderr, "compile_filters: cannot write '{}'\n", path);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace wisp

int main(int count, char** arguments) {
  if (count != 2) {
    fmt::print(stderr, "usage: compile_filters OUTPUT\n");
    return 2;
  }
  return wisp::run(arguments[1]);
}
