// Model-specific registers (SDM volume 4, chapter 2) that are state of the processor alone; the environment
// answers for the local APIC, the TSC deadline and KVM's paravirtual ones.
#include <fmt/format.h>

#include <array>
#include <bit>

#include "hypervisor/soft/soft_cpuid.h"
#include "hypervisor/soft/system_groups.h"

namespace wisp::soft {
namespace {

enum Index : std::uint32_t {
  kMachineCheckAddress = 0x0,
  kMachineCheckType = 0x1,
  kTsc = 0x10,
  kPlatformId = 0x17,
  kPowerOn = 0x2a,
  kFeatureControl = 0x3a,
  kTscAdjust = 0x3b,
  kSpecControl = 0x48,
  kPredictorCommand = 0x49,
  kMicrocodeUpdate = 0x79,
  kMicrocodeRevision = 0x8b,
  kPlatformInfo = 0xce,
  kMtrrCapabilities = 0xfe,
  kArchCapabilities = 0x10a,
  kMiscFeatures = 0x140,
  kSysenterCs = 0x174,
  kSysenterEsp = 0x175,
  kSysenterEip = 0x176,
  kMachineCheckCapabilities = 0x179,
  kMachineCheckStatus = 0x17a,
  kMiscEnable = 0x1a0,
  kDebugControl = 0x1d9,
  kMtrrVariable = 0x200,
  kMtrrVariableEnd = 0x210,
  kMtrrFixed64K = 0x250,
  kMtrrFixed16K = 0x258,
  kMtrrFixed4K = 0x268,
  kPat = 0x277,
  kMtrrDefault = 0x2ff,
  kEfer = 0xc0000080,
  kStar = 0xc0000081,
  kLstar = 0xc0000082,
  kCstar = 0xc0000083,
  kFmask = 0xc0000084,
  kFsBase = 0xc0000100,
  kGsBase = 0xc0000101,
  kKernelGsBase = 0xc0000102,
  kTscAux = 0xc0000103,
};

// Eight variable ranges, the fixed ones, and write combining.
constexpr std::uint64_t kMtrrCapabilitiesValue = 8 | 1U << 8 | 1U << 10;
constexpr std::uint64_t kPhysicalReserved = ~((1ULL << kPhysicalBits) - 1);
// Branch trace store and event sampling are not there.
constexpr std::uint64_t kMiscEnableFixed = 1U << 11 | 1U << 12;
// The revision that Linux takes for "a hypervisor's": as KVM's.
constexpr std::uint64_t kMicrocodeRevisionValue = 1ULL << 32;
constexpr std::uint64_t kFeatureControlLocked = 1;

bool mtrr_type(std::uint64_t type) {
  return type == 0 || type == 1 || (type >= 4 && type <= 6);
}
bool pat_type(std::uint64_t type) {
  return mtrr_type(type) || type == 7;
}

// Whether each byte of a value is a memory type.
template <typename Valid>
bool all_bytes(std::uint64_t value, Valid valid) {
  for (unsigned i = 0; i < 8; ++i) {
    if (!valid(value >> (8 * i) & 0xff)) {
      return false;
    }
  }
  return true;
}

// Where a fixed-range MTRR is kept; null for others.
std::uint64_t* fixed_mtrr(Cpu& cpu, std::uint32_t index) {
  auto& fixed = cpu.msr.mtrr_fixed;
  if (index == kMtrrFixed64K) {
    return &fixed[0];
  }
  if (index == kMtrrFixed16K || index == kMtrrFixed16K + 1) {
    return &fixed[1 + index - kMtrrFixed16K];
  }
  if (index >= kMtrrFixed4K && index < kMtrrFixed4K + 8) {
    return &fixed[3 + index - kMtrrFixed4K];
  }
  return nullptr;
}

// Registers that are plain 64-bit words of the processor.
std::uint64_t* plain(Cpu& cpu, std::uint32_t index) {
  switch (index) {
    case kSysenterCs:
      return &cpu.msr.sysenter_cs;
    case kSysenterEsp:
      return &cpu.msr.sysenter_esp;
    case kSysenterEip:
      return &cpu.msr.sysenter_eip;
    case kMtrrDefault:
      return &cpu.msr.mtrr_def_type;
    case kPat:
      return &cpu.msr.pat;
    case kStar:
      return &cpu.msr.star;
    case kLstar:
      return &cpu.msr.lstar;
    case kCstar:
      return &cpu.msr.cstar;
    case kFmask:
      return &cpu.msr.sfmask;
    case kFsBase:
      return &cpu.segments[kFs].base;
    case kGsBase:
      return &cpu.segments[kGs].base;
    case kKernelGsBase:
      return &cpu.msr.kernel_gs_base;
    case kTscAux:
      return &cpu.msr.tsc_aux;
    default:
      break;
  }
  if (index >= kMtrrVariable && index < kMtrrVariableEnd) {
    return &cpu.msr.mtrr_variable[index - kMtrrVariable];
  }
  return fixed_mtrr(cpu, index);
}

// Whether a plain register takes a value.
bool plain_value_valid(std::uint32_t index, std::uint64_t value) {
  switch (index) {
    case kSysenterEsp:
    case kSysenterEip:
    case kLstar:
    case kCstar:
    case kFsBase:
    case kGsBase:
    case kKernelGsBase:
      return canonical(value);
    case kFmask:
    case kTscAux:
      return value >> 32 == 0;
    case kSysenterCs:
    case kStar:
      return true;
    case kMtrrDefault:
      return (value & ~0xcffULL) == 0 && mtrr_type(value & 0xff);
    case kPat:
      return all_bytes(value, pat_type);
    default:
      break;
  }
  if (index >= kMtrrVariable && index < kMtrrVariableEnd) {
    if ((index & 1) == 0) {
      return (value & (kPhysicalReserved | 0xf00)) == 0 && mtrr_type(value & 0xff);
    }
    return (value & (kPhysicalReserved | 0x7ff)) == 0;
  }
  return all_bytes(value, mtrr_type);  // a fixed range
}

// Bits of SPEC_CTRL, of which CPUID tells one by one.
std::uint64_t spec_control_bits(Core& core) {
  const std::uint32_t features = core.env.cpuid(7, 0).edx;
  return (features >> 26 & 1) | (features >> 27 & 1) << 1 | (features >> 31 & 1) << 2;
}

// The highest rate without turbo in units of 100 MHz, in bits 15:8.
std::uint64_t platform_info(Core& core) {
  const std::uint64_t megahertz = core.env.cpuid(0x16, 0).eax & 0xffff;
  return (megahertz / 100 & 0xff) << 8;
}

bool arch_capabilities_offered(Core& core) {
  return offered(core, 7, &CpuidEntry::edx, 29);
}

// Registers that always read the same, or are computed. False: not one of these.
bool read_special(Core& core, std::uint32_t index, std::uint64_t& value) {
  Cpu& cpu = core.cpu;
  switch (index) {
    case kTsc:
      value = core.env.read_tsc() + cpu.tsc_offset;
      return true;
    case kTscAdjust:
      value = cpu.msr.tsc_adjust;
      return offered(core, 7, &CpuidEntry::ebx, 1);
    case kEfer:
      value = cpu.efer;
      return true;
    case kMiscEnable:
      value = cpu.msr.misc_enable | kMiscEnableFixed;
      return true;
    case kSpecControl:
      value = cpu.msr.spec_ctrl;
      return spec_control_bits(core) != 0;
    case kArchCapabilities:
      value = kSoftArchCapabilities;
      return arch_capabilities_offered(core);
    case kMtrrCapabilities:
      value = kMtrrCapabilitiesValue;
      return true;
    case kFeatureControl:
      value = kFeatureControlLocked;
      return true;
    case kMicrocodeRevision:
      value = kMicrocodeRevisionValue;
      return true;
    case kPlatformInfo:
      value = platform_info(core);
      return true;
    case kMachineCheckAddress:
    case kMachineCheckType:
    case kPlatformId:
    case kPowerOn:
    case kMiscFeatures:
    case kMachineCheckCapabilities:
    case kMachineCheckStatus:
    case kDebugControl:
      value = 0;
      return true;
    default:
      return false;
  }
}

enum class Written : std::uint8_t { kDone, kBadValue, kUnknown };

Written done_if(bool valid) {
  return valid ? Written::kDone : Written::kBadValue;
}

Written write_special(Core& core, std::uint32_t index, std::uint64_t value) {
  Cpu& cpu = core.cpu;
  switch (index) {
    case kTsc: {
      const std::uint64_t offset = value - core.env.read_tsc();
      cpu.msr.tsc_adjust += offset - cpu.tsc_offset;
      cpu.tsc_offset = offset;
      return Written::kDone;
    }
    case kTscAdjust:
      if (!offered(core, 7, &CpuidEntry::ebx, 1)) {
        return Written::kUnknown;
      }
      cpu.tsc_offset += value - cpu.msr.tsc_adjust;
      cpu.msr.tsc_adjust = value;
      return Written::kDone;
    case kEfer:
      return done_if(write_efer(core, value));
    case kMiscEnable:
      cpu.msr.misc_enable = value & ~kMiscEnableFixed;
      return Written::kDone;
    case kSpecControl: {
      const std::uint64_t bits = spec_control_bits(core);
      if (bits == 0) {
        return Written::kUnknown;
      }
      if ((value & ~bits) != 0) {
        return Written::kBadValue;
      }
      cpu.msr.spec_ctrl = value;
      return Written::kDone;
    }
    case kPredictorCommand:
      return (spec_control_bits(core) & 1) != 0 ? done_if((value & ~1ULL) == 0) : Written::kUnknown;
    // Written before CPUID to learn the revision, or to load an update: neither changes anything.
    case kMicrocodeRevision:
    case kMicrocodeUpdate:
      return Written::kDone;
    case kMachineCheckAddress:
    case kMachineCheckType:
    case kMiscFeatures:
    case kMachineCheckStatus:
    case kDebugControl:
      return done_if(value == 0);
    case kPlatformId:
    case kPowerOn:
    case kFeatureControl:
    case kPlatformInfo:
    case kMtrrCapabilities:
    case kMachineCheckCapabilities:
      return Written::kBadValue;  // read-only
    case kArchCapabilities:
      return arch_capabilities_offered(core) ? Written::kBadValue : Written::kUnknown;
    default:
      return Written::kUnknown;
  }
}

}  // namespace

bool read_msr(Core& core, std::uint32_t index, std::uint64_t& value) {
  if (const std::uint64_t* word = plain(core.cpu, index)) {
    value = *word;
    return true;
  }
  if (read_special(core, index, value)) {
    return true;
  }
  if (const auto answer = core.env.read_msr(index)) {
    value = *answer;
    return true;
  }
  core.env.note(fmt::format("a read of MSR {:#x}", index));
  return core.cpu.raise(vec::kGp, 0);
}

bool write_msr(Core& core, std::uint32_t index, std::uint64_t value) {
  if (std::uint64_t* word = plain(core.cpu, index)) {
    if (!plain_value_valid(index, value)) {
      return core.cpu.raise(vec::kGp, 0);
    }
    *word = value;
    return true;
  }
  switch (write_special(core, index, value)) {
    case Written::kDone:
      return true;
    case Written::kBadValue:
      return core.cpu.raise(vec::kGp, 0);
    case Written::kUnknown:
      break;
  }
  switch (core.env.write_msr(index, value)) {
    case Environment::MsrWrite::kDone:
      return true;
    case Environment::MsrWrite::kBadValue:
      break;
    case Environment::MsrWrite::kUnknown:
      core.env.note(fmt::format("a write of {:#x} to MSR {:#x}", value, index));
      break;
  }
  return core.cpu.raise(vec::kGp, 0);
}

}  // namespace wisp::soft
