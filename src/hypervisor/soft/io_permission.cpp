#include "hypervisor/soft/executor.h"

namespace wisp::soft {

// SDM volume 1, 19.5.
bool port_allowed(Core& core, std::uint16_t port, std::uint32_t size) {
  Cpu& cpu = core.cpu;
  if (!cpu.protected_mode() || (!cpu.virtual_8086() && cpu.cpl <= cpu.iopl())) {
    return true;
  }
  constexpr std::uint32_t kMapBase = 0x66;
  const Segment& tss = cpu.tr;
  const bool has_map = tss.present() && (tss.type() & 9) == 9;  // a TSS of 32 or 64 bits
  std::uint16_t map = 0;
  if (!has_map || tss.limit < kMapBase + 1) {
    return cpu.raise(vec::kGp, 0);
  }
  if (!core.mmu.load(tss.base + kMapBase, map, As::kSystem)) {
    return false;
  }
  // Two bytes are read always: a port's bits may lie in both.
  const std::uint32_t at = map + port / 8U;
  std::uint16_t bits = 0;
  if (at + 1 > tss.limit) {
    return cpu.raise(vec::kGp, 0);
  }
  if (!core.mmu.load(tss.base + at, bits, As::kSystem)) {
    return false;
  }
  if ((std::uint32_t{bits} >> (port & 7U) & ((1U << size) - 1)) != 0) {
    return cpu.raise(vec::kGp, 0);
  }
  return true;
}

}  // namespace wisp::soft
