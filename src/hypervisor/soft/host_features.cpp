#include "hypervisor/soft/host_features.h"

#include <cpuid.h>

namespace wisp::soft {
namespace {

std::uint64_t read_xcr0() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

constexpr std::uint32_t kHygon = 0x6f677948;  // "Hygo", whose processors are AMD's in this

HostFeatures detect() {
  HostFeatures found;
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0) {
    found.quick_loop = (ebx == signature_AMD_ebx && ecx == signature_AMD_ecx) || ebx == kHygon;
  }
  const auto set = [&found](Feature feature, bool there) {
    found.present |= there ? 1U << static_cast<unsigned>(feature) : 0U;
  };
  set(Feature::kBase, true);
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) {
    return found;
  }
  constexpr std::uint32_t kV2 = bit_SSE3 | bit_SSSE3 | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT;
  const bool xsave = (ecx & bit_OSXSAVE) != 0;
  found.xcr0 = xsave ? read_xcr0() : 3;
  const bool avx = xsave && (found.xcr0 & 7) == 7 && (ecx & bit_AVX) != 0;
  found.x86_64_v2 = (ecx & kV2) == kV2 && xsave;
  set(Feature::kAvx, avx);
  set(Feature::kFma, avx && (ecx & bit_FMA) != 0);
  set(Feature::kF16c, avx && (ecx & bit_F16C) != 0);
  set(Feature::kMovbe, (ecx & bit_MOVBE) != 0);
  set(Feature::kAes, (ecx & bit_AES) != 0);
  set(Feature::kPclmul, (ecx & bit_PCLMUL) != 0);
  if (!avx) {
    found.xcr0 &= 3;
  }
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
    set(Feature::kAvx2, avx && (ebx & bit_AVX2) != 0);
    set(Feature::kBmi1, (ebx & bit_BMI) != 0);
    set(Feature::kBmi2, (ebx & bit_BMI2) != 0);
    set(Feature::kAdx, (ebx & bit_ADX) != 0);
  }
  if (__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) != 0) {
    set(Feature::kLzcnt, (ecx & bit_LZCNT) != 0);
  }
  return found;
}

}  // namespace

const HostFeatures& host_features() {
  static const HostFeatures kFeatures = detect();
  return kFeatures;
}

}  // namespace wisp::soft
