#include "hypervisor/power_up.h"

#include "base/bytes.h"
#include "hypervisor/xsave_layout.h"

namespace wisp {
namespace {

constexpr std::size_t kXsaveSize = 4096;

}  // namespace

CpuState power_up_state(std::uint32_t apic_id, bool boot, std::uint32_t version, std::uint32_t signature) {
  CpuState state;
  state.run_state = boot ? CpuRunState::kRunnable : CpuRunState::kUninitialized;
  state.regs.rip = 0xfff0;
  state.regs.rdx = signature;

  const CpuSegment data{.limit = 0xffff, .type = 3, .present = true};
  CpuSpecialRegs& sregs = state.sregs;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
  sregs.cs = {.base = 0xffff0000, .limit = 0xffff, .selector = 0xf000, .type = 11, .present = true};
  sregs.ldt = {.limit = 0xffff, .type = 2, .present = true, .system = true};
  sregs.tr = {.limit = 0xffff, .type = 11, .present = true, .system = true};
  sregs.gdt.limit = sregs.idt.limit = 0xffff;
  sregs.apic_base = 0xfee00800 | (boot ? 0x100U : 0U);

  state.xsave.resize(kXsaveSize);
  store_le<std::uint16_t>(state.xsave.data() + xsave::kControl, 0x40);
  store_le<std::uint16_t>(state.xsave.data() + xsave::kTag, 0);  // abridged: all empty
  store_le(state.xsave.data() + xsave::kMxcsr, xsave::kMxcsrInit);
  store_le(state.xsave.data() + xsave::kHeader, xsave::kX87 | xsave::kSse);

  const auto set = [&](std::size_t offset, std::uint32_t value) {
    store_le(state.lapic.regs.data() + offset, value);
  };
  constexpr std::uint32_t kMasked = 1U << 16;
  set(lapic::kId, apic_id << 24);
  set(lapic::kVersion, version);
  set(lapic::kDestinationFormat, UINT32_MAX);
  set(lapic::kSpuriousVector, 0xff);
  for (std::size_t lvt = lapic::kLvtTimer; lvt <= lapic::kLvtError; lvt += 0x10) {
    set(lvt, kMasked);
  }
  if (boot) {
    set(lapic::kLvtLint0, 0x700);  // ExtINT
    set(lapic::kLvtLint1, 0x400);  // NMI
  }
  return state;
}

}  // namespace wisp
