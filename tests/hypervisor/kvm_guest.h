// A bare guest on the host's /dev/kvm.
#pragma once

#include "hypervisor/bare_guest.h"
#include "hypervisor/kvm/kvm_hypervisor.h"

namespace wisp {

class KvmTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (::access("/dev/kvm", F_OK) != 0) {
      GTEST_SKIP() << "this host has no /dev/kvm";
    }
  }
};

class KvmGuest final : public BareGuest {
 public:
  explicit KvmGuest(const VmOptions& options = {}, bool with_ram = true)
      : BareGuest(must(KvmHypervisor::open()), options, with_ram) {}
};

}  // namespace wisp
