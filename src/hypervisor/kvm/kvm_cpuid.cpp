#include "hypervisor/kvm/kvm_cpuid.h"

#include <algorithm>

#include "hypervisor/cpuid_fit.h"
#include "hypervisor/cpuid_topology.h"
#include "hypervisor/kvm/kvm_abi.h"
#include "hypervisor/kvm/kvm_ioctl.h"

namespace wisp::kvm {
namespace {

constexpr std::uint32_t bit(unsigned number) {
  return 1U << number;
}

void set_features(CpuidTable& table, const CpuidInput& input, std::uint32_t apic_id,
                  const CpuidLevels& levels) {
  if (CpuidEntry* leaf = table.find(1)) {
    const std::uint32_t ids_per_package = std::min(1U << std::min(levels.shifts.package, 8U), 255U);
    leaf->ebx = (leaf->ebx & 0x0000ffffU) | (ids_per_package << 16) | ((apic_id & 0xff) << 24);
    leaf->ecx |= bit(21) | bit(31);    // x2APIC, hypervisor
    leaf->ecx &= ~(bit(5) | bit(27));  // VMX; OSXSAVE, which KVM keeps itself
    leaf->ecx = input.tsc_deadline ? leaf->ecx | bit(24) : leaf->ecx & ~bit(24);
    leaf->edx = levels.per_package > 1 ? leaf->edx | bit(28) : leaf->edx & ~bit(28);
    if (!input.pmu) {
      leaf->ecx &= ~bit(15);  // PDCM
    }
  }
  if (CpuidEntry* leaf = table.find(7, 0)) {
    leaf->ebx &= ~bit(2);  // SGX
  }
  if (CpuidEntry* leaf = table.find(0x80000001)) {
    leaf->ecx &= ~bit(2);  // SVM
    if (table.vendor_is(kVendorAmd) || table.vendor_is(kVendorHygon)) {
      leaf->ecx = levels.per_package > 1 ? leaf->ecx | bit(1) : leaf->ecx & ~bit(1);  // CmpLegacy
    }
    if (!input.pmu) {
      leaf->ecx &= ~(bit(23) | bit(24) | bit(28));  // performance counter extensions
    }
  }
  table.remove(0x12);        // SGX
  table.remove(0x8000000a);  // SVM
  if (!input.pmu) {
    for (const std::uint32_t leaf : {0x0aU, 0x23U, 0x80000022U}) {
      table.remove(leaf);
    }
  }
}

// AMX without its tiles in XCR0 is a processor that does not exist: the feature bits go with the state. (KVM
// shows the state only to a process that asked the kernel for it, which Wisp does not.)
void drop_amx_without_state(CpuidTable& table) {
  const CpuidEntry* state = table.find(0xd, 0);
  if (state != nullptr && (state->eax & (bit(17) | bit(18))) == (bit(17) | bit(18))) {
    return;
  }
  if (CpuidEntry* leaf = table.find(7, 0)) {
    leaf->edx &= ~(bit(22) | bit(24) | bit(25));  // AMX-BF16, AMX-TILE, AMX-INT8
  }
  if (CpuidEntry* leaf = table.find(7, 1); leaf != nullptr && leaf->subleaf == 1) {
    leaf->eax &= ~bit(21);  // AMX-FP16
    leaf->edx &= ~bit(8);   // AMX-COMPLEX
  }
  table.remove(0x1d);
  table.remove(0x1e);
}

void set_amd_topology(CpuidTable& table, const CpuTopology& topology, std::uint32_t apic_id,
                      const CpuidLevels& levels) {
  const bool amd = table.vendor_is(kVendorAmd) || table.vendor_is(kVendorHygon);
  if (CpuidEntry* leaf = table.find(0x80000008)) {
    leaf->ecx =
        amd ? std::min(levels.per_package - 1, 255U) | (std::min(levels.shifts.package, 15U) << 12) : 0;
  }
  table.remove(0x80000026);  // the extended topology of Zen 4: 0xb says the same
  CpuidEntry* leaf = table.find(0x8000001e);
  if (leaf == nullptr) {
    return;
  }
  if (!amd) {
    table.remove(0x8000001e);
    return;
  }
  const std::uint32_t core =
      (apic_id >> levels.shifts.core) & ((1U << (levels.shifts.package - levels.shifts.core)) - 1);
  leaf->eax = apic_id;
  leaf->ebx = (core & 0xff) | (std::min(topology.threads - 1, 255U) << 8);
  leaf->ecx = ((apic_id >> levels.shifts.die) & 0xff) | (std::min(topology.dies - 1, 7U) << 8);
  leaf->edx = 0;
}

}  // namespace

std::vector<CpuidEntry> guest_cpuid(std::span<const CpuidEntry> supported, const CpuidInput& input) {
  CpuidTable table(supported);
  const CpuidLevels levels(input.topology);
  const std::uint32_t apic_id = apic_id_of(input.topology, input.index);
  set_features(table, input, apic_id, levels);
  drop_amx_without_state(table);
  set_cpuid_caches(table, levels);
  set_cpuid_topology(table, input.topology, apic_id, levels);
  set_amd_topology(table, input.topology, apic_id, levels);
  set_cpuid_clock(table, input.tsc_khz);
  return table.take();
}

Result<std::vector<CpuidEntry>> read_supported_cpuid(int kvm_fd) {
  FlexArray<kvm_cpuid2, kvm_cpuid_entry2> list(kMaxCpuidEntries);
  list.header()->nent = kMaxCpuidEntries;
  WISP_KVM_TRY(kvm_fd, KVM_GET_SUPPORTED_CPUID, list.header());
  std::vector<CpuidEntry> entries;
  const std::size_t count = std::min<std::size_t>(list.header()->nent, kMaxCpuidEntries);
  entries.reserve(count + 16);
  for (const kvm_cpuid_entry2& entry : list.entries().first(count)) {
    entries.push_back({.leaf = entry.function,
                       .subleaf = entry.index,
                       .has_subleaf = (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) != 0,
                       .eax = entry.eax,
                       .ebx = entry.ebx,
                       .ecx = entry.ecx,
                       .edx = entry.edx});
  }
  return entries;
}

Result<void> write_cpuid(int vcpu_fd, std::span<const CpuidEntry> entries) {
  if (entries.size() > kMaxCpuidEntries) {
    return fail("{} CPUID entries are more than the {} that KVM takes", entries.size(), kMaxCpuidEntries);
  }
  FlexArray<kvm_cpuid2, kvm_cpuid_entry2> list(entries.size());
  list.header()->nent = static_cast<std::uint32_t>(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const CpuidEntry& entry = entries[i];
    kvm_cpuid_entry2& out = list.entries()[i];
    out.function = entry.leaf;
    out.index = entry.subleaf;
    out.flags = entry.has_subleaf ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
    out.eax = entry.eax;
    out.ebx = entry.ebx;
    out.ecx = entry.ecx;
    out.edx = entry.edx;
  }
  WISP_KVM_TRY(vcpu_fd, KVM_SET_CPUID2, list.header());
  return {};
}

}  // namespace wisp::kvm
