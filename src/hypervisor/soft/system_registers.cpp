// Control registers, debug registers, EFER and XCR0 (SDM volume 3, 2.5, 4.1 and 17.2; volume 2, MOV to and
// from control and debug registers).
#include <array>

#include "hypervisor/soft/operand.h"
#include "hypervisor/soft/soft_cpuid.h"
#include "hypervisor/soft/system_groups.h"
#include "hypervisor/soft/xsave_area.h"

namespace wisp::soft {
namespace {

constexpr std::uint64_t kCr0Bits = cr0::kPe | cr0::kMp | cr0::kEm | cr0::kTs | cr0::kEt | cr0::kNe |
                                   cr0::kWp | cr0::kAm | cr0::kNw | cr0::kCd | cr0::kPg;
constexpr std::uint64_t kNoFlush = 1ULL << 63;  // of CR3, with PCIDs
constexpr std::uint64_t kPhysicalMask = (1ULL << kPhysicalBits) - 1;
// Page translations depend on these; the TLBs forget all when one changes.
constexpr std::uint64_t kCr0Paging = cr0::kPg | cr0::kPe | cr0::kWp;
constexpr std::uint64_t kCr4Paging =
    cr4::kPse | cr4::kPae | cr4::kPge | cr4::kPcide | cr4::kSmep | cr4::kSmap;

constexpr std::uint64_t kDr6Writable = 0xe00f;
constexpr std::uint64_t kDr6Fixed = 0xffff0ff0;
constexpr std::uint64_t kDr7Writable = 0xffff2bff;
constexpr std::uint64_t kDr7Fixed = 0x400;
constexpr std::uint64_t kDr7GeneralDetect = 1U << 13;
constexpr std::uint64_t kDr6Access = 1U << 13;

bool gp(Core& core) {
  return core.cpu.raise(vec::kGp, 0);
}

// CR4 bits that may be set, by what CPUID offers.
std::uint64_t cr4_bits(Core& core) {
  struct Offer {
    std::uint32_t CpuidEntry::* word;
    unsigned bit;
    std::uint64_t cr4;
  };
  static constexpr std::array kLeaf1{
      Offer{&CpuidEntry::edx, 2, cr4::kDe},      Offer{&CpuidEntry::edx, 3, cr4::kPse},
      Offer{&CpuidEntry::edx, 4, cr4::kTsd},     Offer{&CpuidEntry::edx, 6, cr4::kPae},
      Offer{&CpuidEntry::edx, 7, cr4::kMce},     Offer{&CpuidEntry::edx, 13, cr4::kPge},
      Offer{&CpuidEntry::edx, 24, cr4::kOsfxsr}, Offer{&CpuidEntry::edx, 25, cr4::kOsxmmexcpt},
      Offer{&CpuidEntry::ecx, 17, cr4::kPcide},  Offer{&CpuidEntry::ecx, 26, cr4::kOsxsave},
  };
  static constexpr std::array kLeaf7{
      Offer{&CpuidEntry::ebx, 0, cr4::kFsgsbase},
      Offer{&CpuidEntry::ebx, 7, cr4::kSmep},
      Offer{&CpuidEntry::ebx, 20, cr4::kSmap},
      Offer{&CpuidEntry::ecx, 2, cr4::kUmip},
  };
  std::uint64_t bits = cr4::kPce;
  const auto add = [&bits](const CpuidEntry& entry, const auto& offers) {
    for (const Offer& offer : offers) {
      bits |= (entry.*offer.word >> offer.bit & 1) != 0 ? offer.cr4 : 0;
    }
  };
  add(core.env.cpuid(1, 0), kLeaf1);
  add(core.env.cpuid(7, 0), kLeaf7);
  return bits;
}

bool pae_paging(const Cpu& cpu, std::uint64_t cr0, std::uint64_t cr4) {
  return (cr0 & cr0::kPg) != 0 && (cr4 & cr4::kPae) != 0 && (cpu.efer & efer::kLme) == 0;
}

// The four entries that PAE paging loads when it starts: #GP where a present one has reserved bits. The page
// walk reads them again each time.
bool pointer_table_valid(Core& core, std::uint64_t cr3) {
  std::array<std::uint64_t, 4> entries{};
  if (!core.mmu.read_physical(cr3 & 0xffffffe0, entries.data(), sizeof entries)) {
    return true;  // not RAM: nothing there that could be wrong, and the walk faults
  }
  constexpr std::uint64_t kReserved = ~kPhysicalMask | 0x1e6;
  for (const std::uint64_t entry : entries) {
    if ((entry & 1) != 0 && (entry & kReserved) != 0) {
      return gp(core);
    }
  }
  return true;
}

bool long_mode_may_start(const Cpu& cpu) {
  const bool tss16 = (cpu.tr.type() & 0xd) == 1;
  return (cpu.cr4 & cr4::kPae) != 0 && !cpu.segments[kCs].long_mode() && !tss16;
}

// A debug register by its number, after the checks that reading and writing share.
bool debug_register(Core& core, std::uint8_t number, std::uint64_t*& out) {
  Cpu& cpu = core.cpu;
  if (number == 4 || number == 5) {
    if ((cpu.cr4 & cr4::kDe) != 0) {
      return cpu.raise(vec::kUd);
    }
    number += 2;
  }
  if (cpu.cpl != 0) {
    return gp(core);
  }
  if ((cpu.dr7 & kDr7GeneralDetect) != 0) {
    (void)cpu.raise(vec::kDb);
    cpu.fault.address = kDr6Access;
    return false;
  }
  out = number < 4 ? &cpu.dr[number] : number == 6 ? &cpu.dr6 : &cpu.dr7;
  return true;
}

}  // namespace

bool write_cr0(Core& core, std::uint64_t value) {
  Cpu& cpu = core.cpu;
  const bool paging = (value & cr0::kPg) != 0;
  if (value >> 32 != 0 || (paging && (value & cr0::kPe) == 0) ||
      ((value & cr0::kNw) != 0 && (value & cr0::kCd) == 0)) {
    return gp(core);
  }
  value = (value & kCr0Bits) | cr0::kEt;
  const std::uint64_t changed = value ^ cpu.cr0;
  bool long_mode = cpu.long_mode();
  if ((changed & cr0::kPg) != 0) {
    if (paging) {
      if ((cpu.efer & efer::kLme) != 0) {
        if (!long_mode_may_start(cpu)) {
          return gp(core);
        }
        long_mode = true;
      }
    } else {
      if ((cpu.cr4 & cr4::kPcide) != 0 || cpu.code64()) {
        return gp(core);
      }
      long_mode = false;
    }
  }
  constexpr std::uint64_t kReloads = cr0::kPg | cr0::kCd | cr0::kNw;
  if ((changed & kReloads) != 0 && pae_paging(cpu, value, cpu.cr4) && !pointer_table_valid(core, cpu.cr3)) {
    return false;
  }
  cpu.cr0 = value;
  cpu.efer = long_mode ? cpu.efer | efer::kLma : cpu.efer & ~efer::kLma;
  if ((changed & kCr0Paging) != 0) {
    core.mmu.flush_all();
  }
  return true;
}

bool write_cr3(Core& core, std::uint64_t value) {
  Cpu& cpu = core.cpu;
  bool keep = false;
  if ((cpu.cr4 & cr4::kPcide) != 0) {
    keep = (value & kNoFlush) != 0;
    value &= ~kNoFlush;
  }
  if (cpu.long_mode()) {
    if ((value & ~kPhysicalMask) != 0) {
      return gp(core);
    }
  } else {
    value &= 0xffffffff;
    if (pae_paging(cpu, cpu.cr0, cpu.cr4) && !pointer_table_valid(core, value)) {
      return false;
    }
  }
  cpu.cr3 = value;
  core.mmu.flush_context(keep);
  return true;
}

bool write_cr4(Core& core, std::uint64_t value) {
  Cpu& cpu = core.cpu;
  if ((value & ~cr4_bits(core)) != 0) {
    return gp(core);
  }
  const std::uint64_t changed = value ^ cpu.cr4;
  if (cpu.long_mode() && (value & cr4::kPae) == 0) {
    return gp(core);
  }
  if ((changed & value & cr4::kPcide) != 0 && (!cpu.long_mode() || (cpu.cr3 & 0xfff) != 0)) {
    return gp(core);
  }
  constexpr std::uint64_t kReloads = cr4::kPae | cr4::kPge | cr4::kPse | cr4::kSmep;
  if ((changed & kReloads) != 0 && pae_paging(cpu, cpu.cr0, value) && !pointer_table_valid(core, cpu.cr3)) {
    return false;
  }
  cpu.cr4 = value;
  if ((changed & kCr4Paging) != 0) {
    core.mmu.flush_all();
  }
  return true;
}

bool write_efer(Core& core, std::uint64_t value) {
  Cpu& cpu = core.cpu;
  const CpuidEntry extended = core.env.cpuid(0x80000001, 0);
  std::uint64_t bits = efer::kLma;  // ignored
  bits |= (extended.edx >> 11 & 1) != 0 ? efer::kSce : 0;
  bits |= (extended.edx >> 20 & 1) != 0 ? efer::kNxe : 0;
  bits |= (extended.edx >> 29 & 1) != 0 ? efer::kLme : 0;
  if ((value & ~bits) != 0) {
    return gp(core);
  }
  value = (value & ~efer::kLma) | (cpu.efer & efer::kLma);
  const std::uint64_t changed = value ^ cpu.efer;
  if ((changed & efer::kLme) != 0 && (cpu.cr0 & cr0::kPg) != 0) {
    return gp(core);
  }
  cpu.efer = value;
  if ((changed & efer::kNxe) != 0) {
    core.mmu.flush_all();
  }
  return true;
}

Outcome move_from_cr(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  std::uint64_t value = 0;
  switch (insn.reg) {
    case 0:
      value = cpu.cr0;
      break;
    case 2:
      value = cpu.cr2;
      break;
    case 3:
      value = cpu.cr3;
      break;
    case 4:
      value = cpu.cr4;
      break;
    case 8:
      value = core.env.read_cr8();
      break;
    default:
      return operand::fault(core, vec::kUd);
  }
  set_sized(cpu, insn.rm, insn.operand_size, value);
  return Outcome::kNext;
}

Outcome move_to_cr(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  const std::uint64_t value = sized(cpu, insn.rm, insn.operand_size);
  bool done = true;
  switch (insn.reg) {
    case 0:
      done = write_cr0(core, value);
      break;
    case 2:
      cpu.cr2 = value;
      break;
    case 3:
      done = write_cr3(core, value);
      break;
    case 4:
      done = write_cr4(core, value);
      break;
    case 8:
      if (value > 15) {
        return operand::general_protection(core);
      }
      core.env.write_cr8(value);
      break;
    default:
      return operand::fault(core, vec::kUd);
  }
  return done ? Outcome::kNext : Outcome::kFault;
}

Outcome move_from_dr(Core& core, const Insn& insn) {
  std::uint64_t* source = nullptr;
  if (!debug_register(core, insn.reg, source)) {
    return Outcome::kFault;
  }
  set_sized(core.cpu, insn.rm, insn.operand_size, *source);
  return Outcome::kNext;
}

Outcome move_to_dr(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  std::uint64_t* target = nullptr;
  if (!debug_register(core, insn.reg, target)) {
    return Outcome::kFault;
  }
  const std::uint64_t value = sized(cpu, insn.rm, insn.operand_size);
  if (target != &cpu.dr6 && target != &cpu.dr7) {
    *target = value;
    return Outcome::kNext;
  }
  if (value >> 32 != 0) {
    return operand::general_protection(core);
  }
  *target = target == &cpu.dr6 ? (value & kDr6Writable) | kDr6Fixed : (value & kDr7Writable) | kDr7Fixed;
  return Outcome::kNext;
}

Outcome load_status_word(Core& core, const Insn& insn) {
  Cpu& cpu = core.cpu;
  if (cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  std::uint64_t value = 0;
  if (!operand::load(core, insn, 2, value)) {
    return core.mmu.stopped();
  }
  constexpr std::uint64_t kLoaded = cr0::kPe | cr0::kMp | cr0::kEm | cr0::kTs;
  const std::uint64_t kept = cpu.cr0 & ~(kLoaded & ~cr0::kPe);  // PE can be set but not cleared
  return write_cr0(core, kept | (value & kLoaded)) ? Outcome::kNext : Outcome::kFault;
}

Outcome store_status_word(Core& core, const Insn& insn) {
  if (!umip_allows(core.cpu)) {
    return Outcome::kFault;
  }
  return operand::store(core, insn, insn.operand_size, 2, core.cpu.cr0) ? Outcome::kNext : core.mmu.stopped();
}

Outcome clear_task_switched(Core& core) {
  if (core.cpu.cpl != 0) {
    return operand::general_protection(core);
  }
  core.cpu.cr0 &= ~cr0::kTs;
  return Outcome::kNext;
}

Outcome get_xcr(Core& core) {
  Cpu& cpu = core.cpu;
  if ((cpu.cr4 & cr4::kOsxsave) == 0) {
    return operand::fault(core, vec::kUd);
  }
  // XCR1, what is in use, is not offered.
  if ((cpu.gpr[kRcx] & 0xffffffff) != 0) {
    return operand::general_protection(core);
  }
  cpu.gpr[kRax] = cpu.xcr0 & 0xffffffff;
  cpu.gpr[kRdx] = cpu.xcr0 >> 32;
  return Outcome::kNext;
}

Outcome set_xcr(Core& core) {
  Cpu& cpu = core.cpu;
  if ((cpu.cr4 & cr4::kOsxsave) == 0) {
    return operand::fault(core, vec::kUd);
  }
  const std::uint64_t value = (cpu.gpr[kRdx] << 32) | (cpu.gpr[kRax] & 0xffffffff);
  const CpuidEntry components = core.env.cpuid(0xd, 0);
  const std::uint64_t allowed = (xsave::kX87 | xsave::kSse | xsave::kAvx) & components.eax;
  const bool avx_alone = (value & (xsave::kSse | xsave::kAvx)) == xsave::kAvx;
  if (cpu.cpl != 0 || (cpu.gpr[kRcx] & 0xffffffff) != 0 || (value & xsave::kX87) == 0 ||
      (value & ~allowed) != 0 || avx_alone) {
    return operand::general_protection(core);
  }
  cpu.xcr0 = value;
  return Outcome::kNext;
}

}  // namespace wisp::soft
