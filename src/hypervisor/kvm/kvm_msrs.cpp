#include "hypervisor/kvm/kvm_msrs.h"

#include <algorithm>

#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"

namespace wisp::kvm {
namespace {

constexpr bool within(std::uint32_t value, std::uint32_t first, std::uint32_t last) {
  return value >= first && value <= last;
}

constexpr bool left_out(std::uint32_t index) {
  return within(index, 0x40000000, 0x400001ff) ||  // Hyper-V
         within(index, 0x480, 0x493) ||            // VMX capabilities
         within(index, 0xc0010114, 0xc0010117) ||  // SVM control and save area
         within(index, 0x800, 0x8ff) ||            // x2APIC: LapicState
         index == 0x1b ||                          // APIC base: CpuSpecialRegs, as the three below
         index == 0xc0000080 || index == 0xc0000100 || index == 0xc0000101;
}

// IA32_ARCH_CAPABILITIES bits that promise an immunity: a guest that saw one left a mitigation off.
constexpr std::uint64_t kImmunities = (1ULL << 0) |   // RDCL_NO
                                      (1ULL << 3) |   // SKIP_L1DFL_VMENTRY
                                      (1ULL << 4) |   // SSB_NO
                                      (1ULL << 5) |   // MDS_NO
                                      (1ULL << 6) |   // IF_PSCHANGE_MC_NO
                                      (1ULL << 8) |   // TAA_NO
                                      (1ULL << 13) |  // SBDR_SSDP_NO
                                      (1ULL << 14) |  // FBSDP_NO
                                      (1ULL << 15) |  // PSDP_NO
                                      (1ULL << 20) |  // BHI_NO
                                      (1ULL << 24) |  // PBRSB_NO
                                      (1ULL << 26) |  // GDS_NO
                                      (1ULL << 27) |  // RFDS_NO
                                      (1ULL << 62);   // ITS_NO

int load_rank(std::uint32_t index) {
  if (index == msr::kTsc) {
    return 0;
  }
  return index == msr::kTscDeadline ? 2 : 1;
}

bool loads_before(std::uint32_t a, std::uint32_t b) {
  return load_rank(a) != load_rank(b) ? load_rank(a) < load_rank(b) : a < b;
}

}  // namespace

std::vector<std::uint32_t> state_msrs(std::span<const std::uint32_t> listed) {
  std::vector<std::uint32_t> kept;
  kept.reserve(listed.size() + 32);
  std::ranges::copy_if(listed, std::back_inserter(kept),
                       [](std::uint32_t index) { return !left_out(index); });
  kept.insert(kept.end(), {msr::kMtrrDefType, 0x250U, 0x258U, 0x259U});
  for (std::uint32_t i = 0; i < 8; ++i) {
    kept.push_back(0x268 + i);          // fixed ranges of 4 KiB
    kept.push_back(0x200 + 2 * i);      // variable ranges: base
    kept.push_back(0x200 + 2 * i + 1);  // and mask
  }
  std::ranges::sort(kept, loads_before);
  const auto repeated = std::ranges::unique(kept);
  kept.erase(repeated.begin(), repeated.end());
  return kept;
}

Result<std::vector<CpuMsr>> read_msrs(int vcpu_fd, std::vector<std::uint32_t>& indices) {
  std::vector<CpuMsr> values;
  values.reserve(indices.size());
  // KVM stops at the first that it cannot read and says how many it did: go on behind that one.
  while (values.size() < indices.size()) {
    const std::size_t count = indices.size() - values.size();
    FlexArray<kvm_msrs, kvm_msr_entry> msrs(count);
    msrs.header()->nmsrs = static_cast<std::uint32_t>(count);
    for (std::size_t i = 0; i < count; ++i) {
      msrs.entries()[i].index = indices[values.size() + i];
    }
    const int got = call(vcpu_fd, KVM_GET_MSRS, msrs.header());
    if (got < 0 || static_cast<std::size_t>(got) > count) {
      return fail_errno(errno, "KVM refused KVM_GET_MSRS");
    }
    for (const kvm_msr_entry& entry : msrs.entries().first(static_cast<std::size_t>(got))) {
      values.push_back({.index = entry.index, .value = entry.data});
    }
    if (static_cast<std::size_t>(got) < count) {
      indices.erase(indices.begin() + static_cast<std::ptrdiff_t>(values.size()));
    }
  }
  return values;
}

Result<void> write_msrs(int vcpu_fd, std::span<const CpuMsr> msrs) {
  while (!msrs.empty()) {
    FlexArray<kvm_msrs, kvm_msr_entry> batch(msrs.size());
    batch.header()->nmsrs = static_cast<std::uint32_t>(msrs.size());
    for (std::size_t i = 0; i < msrs.size(); ++i) {
      batch.entries()[i].index = msrs[i].index;
      batch.entries()[i].data = msrs[i].value;
    }
    const int set = call(vcpu_fd, KVM_SET_MSRS, batch.header());
    if (set < 0 || static_cast<std::size_t>(set) > msrs.size()) {
      return fail_errno(errno, "KVM refused KVM_SET_MSRS");
    }
    msrs = msrs.subspan(static_cast<std::size_t>(set));
    if (msrs.empty()) {
      break;
    }
    const CpuMsr refused = msrs.front();
    std::vector<std::uint32_t> index{refused.index};
    WISP_ASSIGN(const auto present, read_msrs(vcpu_fd, index));
    if (present.empty() || present.front().value != refused.value) {
      return fail("KVM refused the value {:#x} for MSR {:#x}", refused.value, refused.index);
    }
    msrs = msrs.subspan(1);
  }
  return {};
}

Result<std::vector<CpuMsr>> msrs_to_load(std::span<const CpuMsr> saved, std::span<const std::uint32_t> known,
                                         std::uint64_t host_immunities) {
  constexpr std::size_t kMost = 4096;
  if (saved.size() > kMost) {
    return fail("saved CPU state holds {} MSRs; at most {} are possible", saved.size(), kMost);
  }
  std::vector<CpuMsr> sorted(saved.begin(), saved.end());
  std::ranges::sort(sorted, loads_before, &CpuMsr::index);
  const auto twice = std::ranges::adjacent_find(sorted, {}, &CpuMsr::index);
  if (twice != sorted.end()) {
    return fail("saved CPU state holds MSR {:#x} twice", twice->index);
  }
  std::vector<CpuMsr> loaded;
  loaded.reserve(sorted.size());
  for (const CpuMsr& entry : sorted) {
    if (entry.index == msr::kArchCapabilities) {
      const std::uint64_t lost = entry.value & kImmunities & ~host_immunities;
      if (lost != 0) {
        return fail(
            "saved CPU state relies on immunities that this host does not have (IA32_ARCH_CAPABILITIES bits "
            "{:#x}); load it on a host with the same or a newer CPU and microcode",
            lost);
      }
    }
    if (std::ranges::find(known, entry.index) != known.end()) {
      loaded.push_back(entry);
    } else if (entry.value != 0) {
      return fail("saved CPU state holds MSR {:#x} = {:#x}, which this host's KVM does not have", entry.index,
                  entry.value);
    }
  }
  return loaded;
}

}  // namespace wisp::kvm
