#include "hypervisor/cpuid_fit.h"

#include <algorithm>
#include <array>
#include <bit>
#include <string>

namespace wisp {
namespace {

constexpr std::uint32_t bit(unsigned number) {
  return 1U << number;
}

const CpuidEntry* find_entry(std::span<const CpuidEntry> entries, std::uint32_t leaf, std::uint32_t subleaf) {
  const auto found = std::ranges::find_if(entries, [&](const CpuidEntry& entry) {
    return entry.leaf == leaf && (!entry.has_subleaf || entry.subleaf == subleaf);
  });
  return found != entries.end() ? &*found : nullptr;
}

// Registers that are sets of features. `ignored` bits say something else.
struct FeatureWord {
  std::uint32_t leaf, subleaf;
  std::uint32_t CpuidEntry::* word;
  const char* name;
  std::uint32_t ignored = 0;
};
constexpr std::array kFeatureWords{
    FeatureWord{1, 0, &CpuidEntry::ecx, "ECX", bit(27)},  // OSXSAVE follows CR4
    FeatureWord{1, 0, &CpuidEntry::edx, "EDX", bit(28)},  // HTT follows the topology
    FeatureWord{7, 0, &CpuidEntry::ebx, "EBX"},
    FeatureWord{7, 0, &CpuidEntry::ecx, "ECX", bit(4)},  // OSPKE follows CR4
    FeatureWord{7, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{7, 1, &CpuidEntry::eax, "EAX"},
    FeatureWord{7, 1, &CpuidEntry::ebx, "EBX"},
    FeatureWord{7, 1, &CpuidEntry::edx, "EDX"},
    FeatureWord{7, 2, &CpuidEntry::edx, "EDX"},
    FeatureWord{0xd, 0, &CpuidEntry::eax, "EAX"},
    FeatureWord{0xd, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{0xd, 1, &CpuidEntry::eax, "EAX"},
    FeatureWord{0xd, 1, &CpuidEntry::ecx, "ECX"},
    FeatureWord{0x40000001, 0, &CpuidEntry::eax, "EAX"},
    FeatureWord{0x80000001, 0, &CpuidEntry::ecx, "ECX", bit(1)},  // CmpLegacy follows the topology
    FeatureWord{0x80000001, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{0x80000007, 0, &CpuidEntry::edx, "EDX"},
    FeatureWord{0x80000008, 0, &CpuidEntry::ebx, "EBX"},
    FeatureWord{0x80000021, 0, &CpuidEntry::eax, "EAX"},
};

// Names of the features whose loss a user is most likely to meet.
struct FeatureName {
  std::uint32_t leaf;
  std::uint32_t CpuidEntry::* word;
  unsigned bit_number;
  const char* name;
};
constexpr std::array kFeatureNames{
    FeatureName{1, &CpuidEntry::ecx, 12, "fma"},
    FeatureName{1, &CpuidEntry::ecx, 13, "cmpxchg16b"},
    FeatureName{1, &CpuidEntry::ecx, 20, "sse4.2"},
    FeatureName{1, &CpuidEntry::ecx, 21, "x2apic"},
    FeatureName{1, &CpuidEntry::ecx, 23, "popcnt"},
    FeatureName{1, &CpuidEntry::ecx, 24, "tsc-deadline"},
    FeatureName{1, &CpuidEntry::ecx, 25, "aes"},
    FeatureName{1, &CpuidEntry::ecx, 26, "xsave"},
    FeatureName{1, &CpuidEntry::ecx, 28, "avx"},
    FeatureName{1, &CpuidEntry::ecx, 30, "rdrand"},
    FeatureName{7, &CpuidEntry::ebx, 0, "fsgsbase"},
    FeatureName{7, &CpuidEntry::ebx, 3, "bmi1"},
    FeatureName{7, &CpuidEntry::ebx, 4, "hle"},
    FeatureName{7, &CpuidEntry::ebx, 5, "avx2"},
    FeatureName{7, &CpuidEntry::ebx, 8, "bmi2"},
    FeatureName{7, &CpuidEntry::ebx, 10, "invpcid"},
    FeatureName{7, &CpuidEntry::ebx, 11, "rtm"},
    FeatureName{7, &CpuidEntry::ebx, 16, "avx512f"},
    FeatureName{7, &CpuidEntry::ebx, 18, "rdseed"},
    FeatureName{7, &CpuidEntry::ebx, 20, "smap"},
    FeatureName{7, &CpuidEntry::ebx, 29, "sha"},
    FeatureName{7, &CpuidEntry::ebx, 30, "avx512bw"},
    FeatureName{7, &CpuidEntry::ecx, 3, "pku"},
    FeatureName{7, &CpuidEntry::ecx, 16, "la57"},
    FeatureName{7, &CpuidEntry::ecx, 22, "rdpid"},
    FeatureName{7, &CpuidEntry::edx, 23, "avx512-fp16"},
    FeatureName{7, &CpuidEntry::edx, 26, "spec-ctrl"},
    FeatureName{7, &CpuidEntry::edx, 31, "ssbd"},
    FeatureName{0x80000001, &CpuidEntry::edx, 20, "nx"},
    FeatureName{0x80000001, &CpuidEntry::edx, 26, "1-GiB pages"},
    FeatureName{0x80000001, &CpuidEntry::edx, 27, "rdtscp"},
};

std::string feature_name(const FeatureWord& word, unsigned bit_number) {
  const auto named = std::ranges::find_if(kFeatureNames, [&](const FeatureName& name) {
    return name.leaf == word.leaf && word.subleaf == 0 && name.word == word.word &&
           name.bit_number == bit_number;
  });
  return fmt::format("{}{}CPUID leaf {:#x} sub-leaf {} {} bit {}{}",
                     named != kFeatureNames.end() ? named->name : "",
                     named != kFeatureNames.end() ? " (" : "", word.leaf, word.subleaf, word.name, bit_number,
                     named != kFeatureNames.end() ? ")" : "");
}

}  // namespace

Result<void> check_cpuid_fits(std::span<const CpuidEntry> saved, std::span<const CpuidEntry> host) {
  if (saved.size() > kMaxCpuidEntries) {
    return fail("saved CPU state holds {} CPUID entries; at most {} are possible", saved.size(),
                kMaxCpuidEntries);
  }
  for (const FeatureWord& word : kFeatureWords) {
    const CpuidEntry* wanted = find_entry(saved, word.leaf, word.subleaf);
    if (wanted == nullptr) {
      continue;
    }
    const CpuidEntry* here = find_entry(host, word.leaf, word.subleaf);
    const std::uint32_t lost = wanted->*word.word & ~(here != nullptr ? here->*word.word : 0) & ~word.ignored;
    if (lost != 0) {
      return fail(
          "the guest uses a CPU feature that this host does not have: {}; load it on a host with the same or "
          "a "
          "newer CPU",
          feature_name(word, static_cast<unsigned>(std::countr_zero(lost))));
    }
  }
  for (const CpuidEntry& entry : saved) {
    if (entry.leaf == 0xd && entry.subleaf >= 2 && entry.eax != 0) {
      const CpuidEntry* here = find_entry(host, 0xd, entry.subleaf);
      if (here == nullptr || here->eax != entry.eax || here->ebx != entry.ebx) {
        return fail(
            "the guest keeps state component {} at {:#x}, {} bytes, in its XSAVE area; this host's CPU has "
            "it "
            "elsewhere or not at all",
            entry.subleaf, entry.ebx, entry.eax);
      }
    }
    if (entry.leaf == 0x80000008) {
      const CpuidEntry* here = find_entry(host, 0x80000008, 0);
      const std::uint32_t width = entry.eax & 0xff;
      if (here == nullptr || width > (here->eax & 0xff) || width < 36) {
        return fail("the guest uses physical addresses of {} bits; this host has {}", width,
                    here != nullptr ? here->eax & 0xff : 36U);
      }
    }
  }
  return {};
}

}  // namespace wisp
