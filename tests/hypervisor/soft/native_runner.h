// Runs instructions on the host's own processor, one at a time, in a child process that survives whatever
// they do.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <span>
#include <string>

#include "hypervisor/soft/native_case.h"

namespace wisp::soft {

class NativeRunner final {
 public:
  static constexpr std::size_t kMost = 512;  // cases of one batch

  // The FS base that cases run with: the child's own.
  [[nodiscard]] static std::uint64_t fs_base();

  NativeRunner();
  ~NativeRunner();
  NativeRunner(const NativeRunner&) = delete;
  NativeRunner& operator=(const NativeRunner&) = delete;

  // Runs the cases, at most kMost, in a new child. The results are valid until the next call. Empty: all
  // well, else what went wrong with the child.
  [[nodiscard]] std::string run(std::span<const Case> cases, const CaseData& data);
  [[nodiscard]] const CaseResult& result(std::size_t i) const;
  // Whether this host goes back to user code whose stack pointer is not canonical; some hypervisors do not.
  [[nodiscard]] bool takes_any_stack_pointer();

 private:
  struct Shared;
  Shared* shared_ = nullptr;
};

}  // namespace wisp::soft
