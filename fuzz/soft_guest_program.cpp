#include "soft_guest_program.h"

#include <iterator>

#include "hypervisor/soft/cpu.h"

namespace wisp::fuzz {
namespace {

namespace cr0 = soft::cr0;
namespace cr4 = soft::cr4;
namespace efer = soft::efer;

constexpr std::uint16_t kCode64 = 0x08, kDataFlat = 0x10, kUserCode32 = 0x18, kUserData = 0x20,
                        kUserCode64 = 0x28, kTask = 0x30, kCode32 = 0x40, kCode16 = 0x48, kData16 = 0x50,
                        kLdtSelector = 0x68;

class Builder final {
 public:
  Builder(Input& input, Program& program) : input_(input), program_(program) {}

  void build() {
    const std::uint8_t flags = input_.byte();
    program_.differential = (flags & 1) != 0;
    program_.interpreter = (flags & 2) != 0;
    program_.two_vcpus = !program_.differential && (flags & 4) != 0;
    program_.parallel = (flags & 8) != 0;
    program_.quick_loop = (flags & 4) != 0;
    ring3_ = (flags & 0x30) == 0x30;
    handlers_ = flags >> 6;
    constexpr std::array<std::uint16_t, 8> kPauses{1, 3, 7, 20, 40, 80, 150, 300};
    const std::uint8_t how = input_.byte();
    program_.pause_every = kPauses[how & 7];
    program_.loops = (how & 8) != 0;
    // Long mode is what guests run in, and what is translated.
    constexpr std::array<Mode, 16> kModes{
        Mode::kLong,   Mode::kReal, Mode::kProtected16, Mode::kProtected32, Mode::kPaging32, Mode::kPae,
        Mode::kCompat, Mode::kLong, Mode::kLong,        Mode::kLong,        Mode::kLong,     Mode::kLong,
        Mode::kLong,   Mode::kLong, Mode::kLong,        Mode::kLong};
    program_.mode = kModes[how >> 4];
    page_tables(input_.byte());
    descriptors();
    interrupt_tables();
    special_registers();
    registers();
    hostile_entries();
    actions();
    answers();
    // A guest that runs off the end of its code halts.
    program_.memory.push_back({.gpa = kCode, .bytes = std::vector<std::uint8_t>(0x8000, 0xf4)});
    make_code(input_, program_.mode, program_);
  }

 private:
  template <typename T>
  void put(std::uint64_t gpa, T value) {
    std::vector<std::uint8_t> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    program_.memory.push_back({.gpa = gpa, .bytes = std::move(bytes)});
  }
  void put_table(std::uint64_t gpa, const std::vector<std::uint64_t>& entries) {
    std::vector<std::uint8_t> bytes(entries.size() * 8);
    std::memcpy(bytes.data(), entries.data(), bytes.size());
    program_.memory.push_back({.gpa = gpa, .bytes = std::move(bytes)});
  }

  // The first 4 MiB in small pages, the rest of the first GiB in large ones, and the same in the upper half;
  // for 32-bit paging the first 4 MiB.
  void page_tables(std::uint8_t how) {
    const std::uint64_t user = (how & 1) != 0 || ring3_ ? 4 : 0;
    const std::uint64_t rights = 3 | user | ((how & 2) != 0 ? 0x60U : 0U) | ((how & 4) != 0 ? 0x100U : 0U);
    const std::uint64_t pointer = 7;
    put_table(kPml4, {kPdpt | pointer});
    put<std::uint64_t>(kPml4 + 8 * 256, kPdpt | pointer);
    put<std::uint64_t>(kPml4 + 8 * 511, kPdpt | pointer);
    put_table(kPdpt, {kPd | pointer, 0x40000083 | user, kPd | pointer, (4ULL << 30) | 0x83 | user});
    put<std::uint64_t>(kPdpt + 8 * 511, kPd | pointer);
    std::vector<std::uint64_t> entries(512);
    entries[0] = kPt | pointer;
    entries[1] = kPtNext | pointer;
    for (std::uint64_t i = 2; i < entries.size(); ++i) {
      entries[i] = i << 21 | 0x80 | rights;
    }
    if ((how & 8) != 0) {
      entries[0] = 0x80 | rights;
    }
    put_table(kPd, entries);
    std::vector<std::uint32_t> small(1024);
    for (std::uint64_t i = 0; i < 1024; ++i) {
      const bool read_only = (how & 16) != 0 && i % 16 == 5;
      const std::uint64_t entry = i << 12 | (read_only ? rights & ~2ULL : rights);
      entries[i % 512] = entry;
      small[i] = static_cast<std::uint32_t>(entry);
      if (i % 512 == 511) {
        put_table(i < 512 ? kPt : kPtNext, entries);
      }
    }
    std::vector<std::uint8_t> bytes(small.size() * 4);
    std::memcpy(bytes.data(), small.data(), bytes.size());
    program_.memory.push_back({.gpa = kPt32, .bytes = std::move(bytes)});
    put<std::uint32_t>(kPd32, static_cast<std::uint32_t>(kPt32 | pointer));
    for (std::uint32_t i = 1; i < 8; ++i) {
      put<std::uint32_t>(kPd32 + i * 4, static_cast<std::uint32_t>(i << 22 | 0x80 | rights));
    }
    put_table(kPdptPae, {kPd | 1, 0, kPd | 1, kPd | 1});
  }

  void descriptors() {
    constexpr std::uint64_t kTssDescriptor = 0x0000890000000067ULL | kTss << 16;
    constexpr std::uint64_t kLdtDescriptor = 0x00008200000000ffULL | kLdt << 16;
    constexpr std::uint64_t kGate =
        (kHandlers & 0xffff) | std::uint64_t{kCode64} << 16 | 0x0000ec0000000000ULL;
    put_table(kGdt, {0, 0x00af9b000000ffffULL, 0x00cf93000000ffffULL, 0x00cffb000000ffffULL,
                     0x00cff3000000ffffULL, 0x00affb000000ffffULL, kTssDescriptor, 0, 0x00cf9b000000ffffULL,
                     0x00009b020000ffffULL, 0x000093000000ffffULL, kGate, 0, kLdtDescriptor, 0});
    put<std::uint32_t>(kTss + 4, static_cast<std::uint32_t>(kStack));
    put<std::uint32_t>(kTss + 8, kDataFlat);
    put<std::uint32_t>(kTss + 0x24, static_cast<std::uint32_t>(kIst));
    put<std::uint16_t>(kTss + 0x66, 0x68);
  }

  // Each handler drops its error code, or not, and goes back, on, or nowhere.
  void interrupt_tables() {
    std::vector<std::uint64_t> gates64;
    std::vector<std::uint64_t> gates32;
    std::vector<std::uint8_t> code;
    for (std::uint64_t vector = 0; vector < 256; ++vector) {
      const std::uint64_t handler = kHandlers + (vector % 64) * 16;
      const bool error = vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
      const std::uint64_t dpl = vector == 3 || vector == 0x80 ? 0x6000 : 0;
      const std::uint64_t ist = vector == 8 ? 1 : 0;
      const std::uint64_t low = (handler & 0xffff) | (0x8e00 | dpl) << 32;
      gates64.push_back(low | std::uint64_t{kCode64} << 16 | ist << 32);
      gates64.push_back(0);
      const bool wide = program_.mode != Mode::kProtected16;
      gates32.push_back(low | std::uint64_t{wide ? kCode32 : kCode16} << 16);
      if (vector < 64) {
        put<std::uint32_t>(vector * 4, static_cast<std::uint32_t>(kHandlers + vector * 16));
        handler_code(code, error);
      }
    }
    put_table(kIdt64, gates64);
    put_table(kIdt32, gates32);
    program_.memory.push_back({.gpa = kHandlers, .bytes = std::move(code)});
  }
  void handler_code(std::vector<std::uint8_t>& code, bool error) const {
    const std::size_t start = code.size();
    const bool wide = program_.mode == Mode::kLong || program_.mode == Mode::kCompat;
    const auto add = [&code](std::initializer_list<std::uint8_t> bytes) { code.insert(code.end(), bytes); };
    switch (handlers_) {
      case 0:
        add({0xf4});
        break;
      case 1:  // back to the instruction: around for ever
        if (error) {
          wide ? add({0x48, 0x83, 0xc4, 0x08}) : add({0x83, 0xc4, 0x04});
        }
        wide ? add({0x48, 0xcf}) : add({0xcf});
        break;
      default:  // some bytes further on
        if (error) {
          wide ? add({0x48, 0x83, 0xc4, 0x08}) : add({0x83, 0xc4, 0x04});
        }
        if (wide) {
          add({0x48, 0x83, 0x04, 0x24, handlers_ == 2 ? std::uint8_t{2} : std::uint8_t{4}, 0x48, 0xcf});
        } else if (program_.mode == Mode::kReal || program_.mode == Mode::kProtected16) {
          add({0x89, 0xe5, 0x83, 0x46, 0x00, 0x02, 0xcf});  // mov bp, sp; add word [bp], 2; iret
        } else {
          add({0x83, 0x04, 0x24, 0x02, 0xcf});
        }
        break;
    }
    code.resize(start + 16, 0x90);
  }

  static CpuSegment segment(std::uint16_t selector, std::uint8_t type, std::uint8_t dpl, bool big,
                            bool wide) {
    return {.limit = big || wide ? 0xffffffffU : 0xffffU,
            .selector = static_cast<std::uint16_t>(selector | dpl),
            .type = type,
            .dpl = dpl,
            .present = true,
            .long_mode = wide,
            .default_big = big,
            .granularity = big || wide};
  }

  void special_registers() {
    CpuSpecialRegs& sregs = program_.sregs;
    const Mode mode = program_.mode;
    const bool wide = mode == Mode::kLong;
    const bool long_mode = wide || mode == Mode::kCompat;
    const bool narrow = mode == Mode::kReal || mode == Mode::kProtected16;
    const std::uint8_t dpl = ring3_ && mode != Mode::kReal ? 3 : 0;
    const std::uint16_t tweaks = input_.get<std::uint16_t>();
    const auto on = [tweaks](unsigned bit, std::uint64_t value) {
      return (tweaks >> bit & 1) != 0 ? value : 0;
    };
    sregs.cr0 = cr0::kEt | cr0::kNe | (mode == Mode::kReal ? 0 : cr0::kPe) |
                (mode >= Mode::kPaging32 ? cr0::kPg : 0) | on(0, cr0::kWp) | on(1, cr0::kAm) |
                on(2, cr0::kTs) | on(3, cr0::kMp);
    sregs.cr4 = (mode >= Mode::kPae ? cr4::kPae : 0) | cr4::kPse | (on(4, 1) != 0 ? 0 : cr4::kOsfxsr) |
                (on(4, 1) != 0 ? 0 : cr4::kOsxsave) | cr4::kOsxmmexcpt | on(5, cr4::kPge) |
                on(6, cr4::kSmep) | on(7, cr4::kSmap) | on(8, cr4::kUmip) | on(9, cr4::kFsgsbase) |
                (long_mode ? on(10, cr4::kPcide) : 0) | on(11, cr4::kTsd) | on(12, cr4::kDe);
    sregs.efer = efer::kSce | efer::kNxe | (long_mode ? efer::kLme | efer::kLma : 0);
    sregs.cr3 = mode == Mode::kPaging32 ? kPd32 : mode == Mode::kPae ? kPdptPae : kPml4;
    const std::uint16_t code = wide     ? (dpl != 0 ? kUserCode64 : kCode64)
                               : narrow ? kCode16
                                        : (dpl != 0 ? kUserCode32 : kCode32);
    const std::uint16_t data = narrow ? kData16 : dpl != 0 ? kUserData : kDataFlat;
    sregs.cs = segment(code, 0xb, dpl, !wide && !narrow, wide);
    for (CpuSegment* each : {&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss}) {
      *each = segment(data, 0x3, dpl, !narrow, false);
    }
    if (narrow) {
      sregs.cs.base = kCode;
      if (mode == Mode::kReal) {
        sregs.cs.selector = kCode >> 4;
        for (CpuSegment* each : {&sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss}) {
          each->selector = 0;
        }
        sregs.es.base = kData;
        sregs.es.selector = kData >> 4;
      }
    }
    sregs.tr = {.base = kTss, .limit = 0x67, .selector = kTask, .type = 0xb, .present = true, .system = true};
    sregs.ldt = {
        .base = kLdt, .limit = 0xff, .selector = kLdtSelector, .type = 2, .present = true, .system = true};
    sregs.gdt = {.base = kGdt, .limit = 0x77};
    sregs.idt = {.base = long_mode ? kIdt64 : mode == Mode::kReal ? 0 : kIdt32, .limit = 0xfff};
    // The same one bit off, now and then.
    const std::uint8_t odd = input_.byte();
    const std::uint8_t bit = odd >= 0xe0 ? input_.byte() : 0;
    switch (odd) {
      case 0xe0:
        sregs.cr0 ^= 1ULL << (bit & 31);
        break;
      case 0xe1:
        sregs.cr4 ^= 1ULL << (bit & 31);
        break;
      case 0xe2:
        sregs.efer ^= 1ULL << (bit & 15);
        break;
      case 0xe3:
        sregs.cr3 = interesting_address(bit) & 0x3ffffffff000;
        break;
      case 0xe4:
        sregs.gdt.base = interesting_address(bit);
        break;
      case 0xe5:
        sregs.idt.base = interesting_address(bit);
        break;
      case 0xe6:
        sregs.idt.limit = bit;
        break;
      case 0xe7:
        sregs.tr.base = interesting_address(bit);
        break;
      case 0xe8:
        sregs.cs.base = interesting_address(bit);
        break;
      case 0xe9:
        sregs.ss.base = interesting_address(bit);
        break;
      case 0xea:
        sregs.fs.base = interesting_address(bit);
        sregs.gs.base = interesting_address(static_cast<std::uint8_t>(bit + 7));
        break;
      case 0xeb:
        sregs.cs.limit = input_.get<std::uint32_t>();
        break;
      case 0xec:
        sregs.ss.limit = input_.get<std::uint32_t>();
        break;
      case 0xed:
        (bit & 1 ? sregs.cs : sregs.ss).type = bit >> 1 & 15;
        (bit & 1 ? sregs.cs : sregs.ss).dpl = bit >> 5 & 3;
        break;
      case 0xee:
        sregs.ds.unusable = (bit & 1) != 0;
        sregs.es.unusable = (bit & 2) != 0;
        sregs.ss.unusable = (bit & 4) != 0;
        sregs.cs.long_mode ^= (bit & 8) != 0;
        sregs.cs.default_big ^= (bit & 16) != 0;
        sregs.ss.default_big ^= (bit & 32) != 0;
        break;
      case 0xef:
        program_.debug.dr7 = 0x400 | (bit & 0xff) | std::uint64_t{input_.get<std::uint16_t>()} << 16;
        for (std::uint64_t& address : program_.debug.db) {
          address = kCode + input_.byte();
        }
        break;
      case 0xf0:
        program_.halted = true;
        break;
      case 0xf1:
        program_.shadow = bit & 3;
        break;
      case 0xf2:
        program_.xcr0 = bit;
        break;
      default:
        break;
    }
  }

  void registers() {
    CpuRegs& regs = program_.regs;
    const bool narrow = program_.mode == Mode::kReal || program_.mode == Mode::kProtected16;
    regs.rip = narrow ? 0 : kCode;
    regs.rsp = ring3_ ? kData + 0x8000 : kStack - 0x800;
    regs.rflags = 2 | (input_.byte() & 0xd5U);
    const std::uint8_t flags = input_.byte();
    regs.rflags |= ((flags & 1) != 0 ? 0x200U : 0U) | ((flags & 2) != 0 ? 0x400U : 0U) |
                   (flags >> 4 == 15 ? 0x100U : 0U) | (flags >> 4 == 14 ? 0x40000U : 0U) |
                   (flags >> 4 == 13 ? 0x4000U : 0U) | (flags >> 4 == 12 ? 0x3000U : 0U) |
                   (flags >> 4 == 11 ? 0x20000U : 0U) | (flags >> 4 == 10 ? 0x10000U : 0U);
    std::array<std::uint64_t*, 14> all{&regs.rax, &regs.rcx, &regs.rdx, &regs.rbx, &regs.rbp,
                                       &regs.rsi, &regs.rdi, &regs.r8,  &regs.r9,  &regs.r10,
                                       &regs.r11, &regs.r12, &regs.r13, &regs.r14};
    for (std::uint64_t* reg : all) {
      const std::uint8_t kind = input_.byte();
      *reg = kind < 0x30 ? kind : kind < 0x38 ? input_.get<std::uint64_t>() : interesting_address(kind);
    }
    regs.r15 = kData + 0x4000;
    program_.msrs = {{.index = 0xc0000081, .value = std::uint64_t{kCode64} << 32 | std::uint64_t{0x18} << 48},
                     {.index = 0xc0000082, .value = kHandlers + 0x80},
                     {.index = 0xc0000084, .value = 0x200},
                     {.index = 0x174, .value = kCode64},
                     {.index = 0x175, .value = kStack},
                     {.index = 0x176, .value = kHandlers + 0x80}};
  }

  // Entries of the paging structures, of descriptor tables and the TSS, put in raw.
  void hostile_entries() {
    const std::uint32_t count = input_.byte() % 12U;
    for (std::uint32_t i = 0; i < count; ++i) {
      constexpr std::array<std::uint64_t, 16> kTables{kPml4, kPdpt,    kPd,  kPt,    kPtNext, kPd32,
                                                      kPt32, kPdptPae, kGdt, kIdt64, kIdt32,  kTss,
                                                      kLdt,  kPt,      kPd,  kPt};
      const std::uint8_t what = input_.byte();
      const std::uint64_t table = kTables[what & 15];
      const std::uint64_t at = table + (input_.get<std::uint16_t>() & 0x1ff) * 8ULL;
      const std::uint8_t flags = input_.byte();
      std::uint64_t value = 0;
      switch (what >> 4 & 7) {
        case 0:  // one of the tables again, or itself
          value = kTables[flags & 15] | 7;
          break;
        case 1:
          value = (interesting_address(input_.byte()) & 0x000ffffffffff000) | flags;
          break;
        case 2:
          value = (interesting_address(input_.byte()) & 0x000ffffffffff000) | flags | 1ULL << 63;
          break;
        case 3:  // a large page, wherever
          value = (std::uint64_t{input_.get<std::uint16_t>()} << 20) | flags | 0x80;
          break;
        case 4:
          value = kCode | flags;
          break;
        case 5:
          value = input_.get<std::uint64_t>();
          break;
        case 6:
          value = kData | flags | 0x7;
          break;
        default:
          value = flags;
          break;
      }
      put(at, value);
    }
  }

  void actions() {
    const std::uint32_t count = input_.byte() % 24U;
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint8_t kind = input_.byte();
      if (kind % 16 > static_cast<std::uint8_t>(Action::Kind::kRegisters)) {
        program_.actions.push_back({});
        continue;
      }
      program_.actions.push_back({.kind = static_cast<Action::Kind>(kind % 16),
                                  .a = input_.byte(),
                                  .b = input_.byte(),
                                  .value = input_.get<std::uint32_t>()});
    }
  }
  void answers() {
    const auto bytes = input_.take(input_.byte() % 64U);
    program_.answers.assign(bytes.begin(), bytes.end());
  }

  Input& input_;
  Program& program_;
  bool ring3_ = false;
  std::uint8_t handlers_ = 0;
};

}  // namespace

std::uint64_t interesting_address(std::uint8_t which) {
  constexpr std::array<std::uint64_t, 48> kAddresses{
      kData,
      kData + 0xffc,
      kData + 0x1000,
      kCode,
      kCode + 0x40,
      kCode + 0xff0,
      kLowSize - 8,
      kLowSize - 1,
      kLowSize,
      kMiddleRam,
      kMiddleRam - 4,
      kMiddleRam + kMiddleSize - 4,
      kMiddleRam + kMiddleSize,
      kRom,
      kRom - 2,
      kRom + kRomSize - 4,
      kRom + kRomSize,
      0xa0000,
      kFarRam,
      kFarRam - 4,
      kFarRam + kFarSize - 8,
      kFarRam + kFarSize,
      0xfee00000,
      0xfee00300,
      0xfec00000,
      0xfec00010,
      0xfffffff8,
      0xffffffff,
      kPml4,
      kPdpt,
      kPd + 8,
      kPt + 0x100,
      kPt + kCode / 0x200,
      kGdt,
      kIdt64 + 0xe0,
      kTss,
      kStack - 8,
      0x7fffffffffff,
      0x7ffffffffff8,
      0x800000000000,
      0xffff7fffffffffff,
      0xffff800000000000,
      0xffff800000000000 + kData,
      0xffffffff80000000 + kCode,
      0xffffffffffffffff,
      0xfffffffffffffff8,
      0x40000000,
      0x4000000000000000,
  };
  return kAddresses.at(which % kAddresses.size());
}

Program make_program(Input input) {
  Program program;
  Builder(input, program).build();
  return program;
}

}  // namespace wisp::fuzz
