// The state of a processor after power-up, INIT and a start-up IPI (SDM volume 3, 9.1.1 and 8.4.4).
#include <cstring>

#include "hypervisor/soft/executor.h"
#include "hypervisor/soft/xsave_area.h"

namespace wisp::soft {
namespace {

constexpr std::uint16_t kRealModeData = 0x93;
constexpr std::uint16_t kRealModeCode = 0x9b;
constexpr std::uint16_t kLdt = 0x82;
constexpr std::uint16_t kBusyTss = 0x8b;

void reset_segments(Cpu& cpu) {
  cpu.segments.fill({.limit = 0xffff, .attributes = kRealModeData});
  cpu.segments[kCs] = {.base = 0xffff0000, .limit = 0xffff, .selector = 0xf000, .attributes = kRealModeCode};
  cpu.ldtr = {.limit = 0xffff, .attributes = kLdt};
  cpu.tr = {.limit = 0xffff, .attributes = kBusyTss};
  cpu.gdt = cpu.idt = {.base = 0, .limit = 0xffff};
  cpu.cpl = 0;
}

}  // namespace

void reset_cpu(Cpu& cpu, bool power_up) {
  cpu.gpr = GeneralRegisters();
  cpu.rip = 0xfff0;
  cpu.set_rflags(flag::kFixed);
  reset_segments(cpu);
  constexpr std::uint64_t kCacheControl = cr0::kCd | cr0::kNw;
  const std::uint64_t caching = power_up ? kCacheControl : cpu.cr0 & kCacheControl;
  cpu.cr0 = cr0::kEt | caching;
  cpu.cr2 = cpu.cr3 = cpu.cr4 = 0;
  cpu.efer = 0;
  cpu.dr.fill(0);
  cpu.dr6 = 0xffff0ff0;
  cpu.dr7 = 0x400;
  if (power_up) {
    cpu.xcr0 = 1;
    cpu.msr = {};
    cpu.tsc_offset = 0;
    reset_xsave_area(cpu);
  }
  cpu.interrupt_shadow = 0;
  cpu.breakpoint_hits = 0;
  cpu.nmi_masked = false;
  cpu.halted = false;
  cpu.fault = {};
  cpu.io = {};
}

void start_at(Cpu& cpu, std::uint8_t sipi_vector) {
  Segment& cs = cpu.segments[kCs];
  cs.selector = static_cast<std::uint16_t>(sipi_vector << 8);
  cs.base = std::uint64_t{sipi_vector} << 12;
  cpu.rip = 0;
  cpu.halted = false;
}

}  // namespace wisp::soft
