#include "hypervisor/soft/soft_state.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/bytes.h"
#include "hypervisor/soft/kvm_clock.h"
#include "hypervisor/soft/soft_cpuid.h"
#include "hypervisor/xsave_layout.h"

namespace wisp::soft {
namespace {

CpuSegment segment_of(const Segment& in) {
  const std::uint32_t attributes = in.attributes;
  return {.base = in.base,
          .limit = in.limit,
          .selector = in.selector,
          .type = in.type(),
          .dpl = in.dpl(),
          .present = in.present(),
          .system = !in.is_code_or_data(),
          .long_mode = in.long_mode(),
          .default_big = in.big(),
          .granularity = (attributes & 0x8000) != 0,
          .available = (attributes & 0x1000) != 0,
          .unusable = !in.present()};
}

Segment to_segment(const CpuSegment& in) {
  Segment out{.base = in.base, .limit = in.limit, .selector = in.selector};
  if (in.unusable || !in.present) {
    return out;
  }
  const auto put = [&out](bool value, unsigned shift) {
    out.attributes = static_cast<std::uint16_t>(out.attributes | (value ? 1U << shift : 0U));
  };
  out.attributes = static_cast<std::uint16_t>((in.type & 0xfU) | (in.dpl & 3U) << 5);
  put(!in.system, 4);
  put(true, 7);
  put(in.available, 12);
  put(in.long_mode, 13);
  put(in.default_big, 14);
  put(in.granularity, 15);
  return out;
}

constexpr std::uint64_t kCr0Known = cr0::kPe | cr0::kMp | cr0::kEm | cr0::kTs | cr0::kEt | cr0::kNe |
                                    cr0::kWp | cr0::kAm | cr0::kNw | cr0::kCd | cr0::kPg;
constexpr std::uint64_t kCr4Known = cr4::kVme | cr4::kPvi | cr4::kTsd | cr4::kDe | cr4::kPse | cr4::kPae |
                                    cr4::kMce | cr4::kPge | cr4::kPce | cr4::kOsfxsr | cr4::kOsxmmexcpt |
                                    cr4::kUmip | cr4::kFsgsbase | cr4::kPcide | cr4::kOsxsave | cr4::kSmep |
                                    cr4::kSmap;
constexpr std::uint64_t kEferKnown = efer::kSce | efer::kLme | efer::kLma | efer::kNxe;

bool exists(const CpuSpecialRegs& sregs) {
  const auto has = [](std::uint64_t word, std::uint64_t bits) { return (word & bits) != 0; };
  const bool paging = has(sregs.cr0, cr0::kPg);
  const bool active = has(sregs.efer, efer::kLma);
  return (sregs.cr0 & ~kCr0Known) == 0 && (sregs.cr4 & ~kCr4Known) == 0 && (sregs.efer & ~kEferKnown) == 0 &&
         (!paging || has(sregs.cr0, cr0::kPe)) && (!has(sregs.cr0, cr0::kNw) || has(sregs.cr0, cr0::kCd)) &&
         active == (paging && has(sregs.efer, efer::kLme)) && (!active || has(sregs.cr4, cr4::kPae)) &&
         (!has(sregs.cr4, cr4::kPcide) || active) && sregs.cr3 >> kPhysicalBits == 0;
}

// Where a Cpu keeps an MSR, and which of its bits are there.
struct Field {
  std::uint32_t index;
  std::uint64_t Cpu::Msrs::* field;
  std::uint64_t bits = ~0ULL;
};
constexpr std::array kFields{
    Field{0x3b, &Cpu::Msrs::tsc_adjust},
    Field{0x48, &Cpu::Msrs::spec_ctrl, 7},
    Field{0x174, &Cpu::Msrs::sysenter_cs, 0xffffffff},
    Field{0x175, &Cpu::Msrs::sysenter_esp},
    Field{0x176, &Cpu::Msrs::sysenter_eip},
    Field{0x1a0, &Cpu::Msrs::misc_enable},
    Field{0x277, &Cpu::Msrs::pat},
    Field{0x2ff, &Cpu::Msrs::mtrr_def_type, 0xcff},
    Field{msr::kKvmWallClock, &Cpu::Msrs::kvm_wall_clock},
    Field{msr::kKvmSystemTime, &Cpu::Msrs::kvm_system_time},
    Field{0xc0000081, &Cpu::Msrs::star},
    Field{0xc0000082, &Cpu::Msrs::lstar},
    Field{0xc0000083, &Cpu::Msrs::cstar},
    Field{0xc0000084, &Cpu::Msrs::sfmask, 0xffffffff},
    Field{0xc0000102, &Cpu::Msrs::kernel_gs_base},
    Field{0xc0000103, &Cpu::Msrs::tsc_aux, 0xffffffff},
};

constexpr std::uint32_t kMtrrVariable = 0x200;
constexpr std::array<std::uint32_t, 11> kMtrrFixed{0x250, 0x258, 0x259, 0x268, 0x269, 0x26a,
                                                   0x26b, 0x26c, 0x26d, 0x26e, 0x26f};

// MSRs of other engines' processors that tell about the machine, or switch something that is not here.
constexpr std::array<std::uint32_t, 12> kTellsOfMachine{
    0x11,        // KVM's clock at its old numbers, which the new ones repeat
    0x12,        //
    0x3a,        // feature control
    0x8b,        // microcode revision
    0xce,        // platform information
    0x140,       // features that user code may be denied
    0x179,       // machine check banks
    0x345,       // performance capabilities
    0x4b564d05,  // whether the host may poll before it halts
    0xc0010015,  // AMD: hardware configuration
    0xc001001f,  // AMD: north bridge configuration
    0xc0011029,  // AMD: decode configuration
};

bool canonical_address(std::uint64_t linear) {
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(linear << 16) >> 16) == linear;
}

// Memory types: uncached, write-combining, write-through, write-protected, write-back; in the PAT also UC-.
bool memory_type(std::uint64_t type, bool pat) {
  return type == 0 || type == 1 || (type >= 4 && type <= 6) || (pat && type == 7);
}

bool all_memory_types(std::uint64_t value, bool pat) {
  for (unsigned shift = 0; shift < 64; shift += 8) {
    if (!memory_type(value >> shift & 0xff, pat)) {
      return false;
    }
  }
  return true;
}

constexpr std::uint32_t kPat = 0x277;
constexpr std::uint32_t kMtrrDefault = 0x2ff;

bool holds_address(std::uint32_t index) {
  return index == 0x175 || index == 0x176 || index == 0xc0000082 || index == 0xc0000083 ||
         index == 0xc0000102;
}

}  // namespace

CpuRegs regs_of(const Cpu& cpu) {
  const auto& gpr = cpu.gpr;
  return {.rax = gpr[kRax],
          .rbx = gpr[kRbx],
          .rcx = gpr[kRcx],
          .rdx = gpr[kRdx],
          .rsi = gpr[kRsi],
          .rdi = gpr[kRdi],
          .rsp = gpr[kRsp],
          .rbp = gpr[kRbp],
          .r8 = gpr[kR8],
          .r9 = gpr[kR9],
          .r10 = gpr[kR10],
          .r11 = gpr[kR11],
          .r12 = gpr[kR12],
          .r13 = gpr[kR13],
          .r14 = gpr[kR14],
          .r15 = gpr[kR15],
          .rip = cpu.rip,
          .rflags = cpu.rflags()};
}

void set_regs(Cpu& cpu, const CpuRegs& regs) {
  cpu.gpr = std::array<std::uint64_t, 16>{regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp,
                                          regs.rsi, regs.rdi, regs.r8,  regs.r9,  regs.r10, regs.r11,
                                          regs.r12, regs.r13, regs.r14, regs.r15};
  cpu.rip = regs.rip;
  cpu.set_rflags(regs.rflags);
}

CpuSpecialRegs special_regs_of(const Cpu& cpu) {
  const auto& segments = cpu.segments;
  CpuSpecialRegs out{.cs = segment_of(segments[kCs]),
                     .ds = segment_of(segments[kDs]),
                     .es = segment_of(segments[kEs]),
                     .fs = segment_of(segments[kFs]),
                     .gs = segment_of(segments[kGs]),
                     .ss = segment_of(segments[kSs]),
                     .tr = segment_of(cpu.tr),
                     .ldt = segment_of(cpu.ldtr),
                     .gdt = {.base = cpu.gdt.base, .limit = cpu.gdt.limit},
                     .idt = {.base = cpu.idt.base, .limit = cpu.idt.limit},
                     .cr0 = cpu.cr0,
                     .cr2 = cpu.cr2,
                     .cr3 = cpu.cr3,
                     .cr4 = cpu.cr4,
                     .efer = cpu.efer};
  // The privilege level lives in SS, also where that holds a null selector.
  out.ss.dpl = cpu.cpl;
  return out;
}

Result<void> set_special_regs(Cpu& cpu, const CpuSpecialRegs& sregs) {
  if (!exists(sregs)) {
    return fail(
        "special registers that no processor has together (CR0 {:#x}, CR3 {:#x}, CR4 {:#x}, EFER {:#x})",
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer);
  }
  cpu.segments[kCs] = to_segment(sregs.cs);
  cpu.segments[kDs] = to_segment(sregs.ds);
  cpu.segments[kEs] = to_segment(sregs.es);
  cpu.segments[kFs] = to_segment(sregs.fs);
  cpu.segments[kGs] = to_segment(sregs.gs);
  cpu.segments[kSs] = to_segment(sregs.ss);
  cpu.cpl = sregs.ss.dpl & 3;
  cpu.tr = to_segment(sregs.tr);
  cpu.ldtr = to_segment(sregs.ldt);
  cpu.gdt = {.base = sregs.gdt.base, .limit = sregs.gdt.limit};
  cpu.idt = {.base = sregs.idt.base, .limit = sregs.idt.limit};
  cpu.cr0 = sregs.cr0 | cr0::kEt;
  cpu.cr2 = sregs.cr2;
  cpu.cr3 = sregs.cr3;
  cpu.cr4 = sregs.cr4;
  cpu.efer = sregs.efer;
  return {};
}

std::vector<std::uint8_t> xsave_of(const Cpu& cpu) {
  std::vector<std::uint8_t> area(cpu.vectors.begin(), cpu.vectors.end());
  const auto components = load_le<std::uint64_t>(area.data() + xsave::kHeader);
  if ((components & xsave::kSse) == 0 &&
      load_le<std::uint32_t>(area.data() + xsave::kMxcsr) != xsave::kMxcsrInit) {
    // The host's processor calls the component initial by the registers alone, but whoever loads the area
    // takes MXCSR from it only where the component is there.
    std::fill_n(area.begin() + xsave::kXmm, xsave::kXmmEnd - xsave::kXmm, std::uint8_t{0});
    store_le(area.data() + xsave::kHeader, components | xsave::kSse);
  }
  return area;
}

Result<void> set_xsave(Cpu& cpu, std::span<const std::uint8_t> area, std::uint64_t allowed) {
  if (area.size() < xsave::kYmm || area.size() > xsave::kMost) {
    return fail("saved CPU state has an XSAVE area of {} bytes; it must have {} to {}", area.size(),
                xsave::kYmm, xsave::kMost);
  }
  if (load_le<std::uint64_t>(area.data() + xsave::kHeader + 8) != 0) {
    return fail("saved CPU state has a compacted XSAVE area; only the standard format is loaded");
  }
  if (area.size() > kXsaveSize &&
      std::ranges::any_of(area.subspan(kXsaveSize), [](std::uint8_t byte) { return byte != 0; })) {
    return fail("saved CPU state has an XSAVE area of {} bytes in use; the software CPU's has {}",
                area.size(), kXsaveSize);
  }
  const auto components = load_le<std::uint64_t>(area.data() + xsave::kHeader);
  if ((components & ~allowed) != 0) {
    return fail(
        "saved CPU state uses vector registers (XSAVE components {:#x}) that this CPU does not have; load it "
        "with "
        "the engine or on a host that has it",
        components & ~allowed);
  }
  if ((components & xsave::kAvx) != 0 && area.size() < kXsaveSize) {
    return fail("saved CPU state has AVX registers in use beyond the end of its XSAVE area");
  }
  // A component that is not in use has its initial state, whatever lies in its place.
  std::array<std::uint8_t, kXsaveSize> next{};
  const auto take = [&](std::size_t offset, std::size_t size) {
    std::copy_n(area.data() + offset, size, next.data() + offset);
  };
  store_le<std::uint16_t>(next.data() + xsave::kControl, xsave::kControlInit);
  if ((components & xsave::kX87) != 0) {
    take(0, xsave::kMxcsr);
    take(xsave::kStack, xsave::kStackEnd - xsave::kStack);
  }
  if ((components & xsave::kSse) != 0) {
    take(xsave::kXmm, xsave::kXmmEnd - xsave::kXmm);
  }
  if ((components & xsave::kAvx) != 0) {
    take(xsave::kYmm, xsave::kYmmSize);
  }
  const auto mxcsr = load_le<std::uint32_t>(area.data() + xsave::kMxcsr);
  if ((components & (xsave::kSse | xsave::kAvx)) != 0 && (mxcsr & ~xsave::kMxcsrBits) != 0) {
    return fail("saved CPU state has MXCSR {:#x}, with bits that do not exist", mxcsr);
  }
  store_le<std::uint32_t>(next.data() + xsave::kMxcsr,
                          (components & (xsave::kSse | xsave::kAvx)) != 0 ? mxcsr : xsave::kMxcsrInit);
  store_le<std::uint32_t>(next.data() + xsave::kMxcsrMask, xsave::kMxcsrBits);
  store_le<std::uint64_t>(next.data() + xsave::kHeader, allowed & 7);
  cpu.vectors = next;
  return {};
}

std::vector<CpuMsr> msrs_of(const Cpu& cpu) {
  std::vector<CpuMsr> out;
  for (const Field& field : kFields) {
    out.push_back({.index = field.index, .value = cpu.msr.*field.field});
  }
  for (std::uint32_t i = 0; i < cpu.msr.mtrr_variable.size(); ++i) {
    out.push_back({.index = kMtrrVariable + i, .value = cpu.msr.mtrr_variable[i]});
  }
  for (std::size_t i = 0; i < kMtrrFixed.size(); ++i) {
    out.push_back({.index = kMtrrFixed[i], .value = cpu.msr.mtrr_fixed[i]});
  }
  std::ranges::sort(out, {}, &CpuMsr::index);
  return out;
}

MsrLoad load_msr(Cpu& cpu, const CpuMsr& entry) {
  if (const auto field = std::ranges::find(kFields, entry.index, &Field::index); field != kFields.end()) {
    if ((entry.value & ~field->bits) != 0 ||
        (holds_address(entry.index) && !canonical_address(entry.value)) ||
        (entry.index == kPat && !all_memory_types(entry.value, true)) ||
        (entry.index == kMtrrDefault && !memory_type(entry.value & 0xff, false))) {
      return MsrLoad::kUnknown;
    }
    cpu.msr.*field->field = entry.value;
    return MsrLoad::kTaken;
  }
  if (entry.index >= kMtrrVariable && entry.index - kMtrrVariable < cpu.msr.mtrr_variable.size()) {
    const bool base = (entry.index & 1) == 0;
    const std::uint64_t holes = base ? 0xf00ULL : 0x7ffULL;
    if (entry.value >> kPhysicalBits != 0 || (entry.value & holes) != 0 ||
        (base && !memory_type(entry.value & 0xff, false))) {
      return MsrLoad::kUnknown;
    }
    cpu.msr.mtrr_variable[entry.index - kMtrrVariable] = entry.value;
    return MsrLoad::kTaken;
  }
  if (const auto fixed = std::ranges::find(kMtrrFixed, entry.index); fixed != kMtrrFixed.end()) {
    if (!all_memory_types(entry.value, false)) {
      return MsrLoad::kUnknown;
    }
    cpu.msr.mtrr_fixed[static_cast<std::size_t>(fixed - kMtrrFixed.begin())] = entry.value;
    return MsrLoad::kTaken;
  }
  return entry.value == 0 || std::ranges::find(kTellsOfMachine, entry.index) != kTellsOfMachine.end()
             ? MsrLoad::kPassedOver
             : MsrLoad::kUnknown;
}

}  // namespace wisp::soft
