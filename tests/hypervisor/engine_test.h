// Tests that every engine passes: a fixture whose guests run on the engine that the parameter names.
#pragma once

#include <string>

#include "hypervisor/bare_guest.h"
#include "hypervisor/kvm/kvm_hypervisor.h"
#include "hypervisor/soft/soft_hypervisor.h"

namespace wisp {

inline std::unique_ptr<Hypervisor> open_engine(const std::string& name) {
  if (name == "kvm") {
    return must(KvmHypervisor::open());
  }
  soft::ExecutionOptions execution;
  execution.executor =
      name == "interpreter" ? soft::ExecutorChoice::kInterpret : soft::ExecutorChoice::kTranslate;
  return must(SoftHypervisor::open({.execution = execution}));
}

class EngineTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!soft() && ::access("/dev/kvm", F_OK) != 0) {
      GTEST_SKIP() << "this host has no /dev/kvm";
    }
  }
  [[nodiscard]] static bool soft() { return std::string(GetParam()) != "kvm"; }
  [[nodiscard]] static std::unique_ptr<Hypervisor> engine() { return open_engine(GetParam()); }
  [[nodiscard]] static BareGuest make(const VmOptions& options = {}, bool with_ram = true) {
    return BareGuest(engine(), options, with_ram);
  }
};

#define WISP_FOR_EACH_ENGINE(suite)                                                               \
  INSTANTIATE_TEST_SUITE_P(Engines, suite, ::testing::Values("kvm", "interpreter", "translator"), \
                           [](const auto& engine) { return std::string(engine.param); })

}  // namespace wisp
