// Guest code of structured instructions: what touches memory, changes what is cached, transfers control and
// asks the machine, with operands that reach the corners.
#include "soft_guest_program.h"

namespace wisp::fuzz {
namespace {

class CodeMaker final {
 public:
  CodeMaker(Input& input, Mode mode, Program& program) : input_(input), mode_(mode), program_(program) {}

  void make() {
    while (!input_.empty() && program_.memory.size() < 400) {
      const std::uint8_t op = input_.byte();
      if (op < 0x30) {  // raw bytes
        const auto bytes = input_.take(1U + op % 12U);
        code_.insert(code_.end(), bytes.begin(), bytes.end());
        continue;
      }
      if (op >= 0xf8) {
        elsewhere(op);
        continue;
      }
      structured(op);
    }
    if (program_.loops && mode_ >= Mode::kProtected32) {  // around again
      add({0xe9});
      add_value(static_cast<std::int32_t>(kCode - (at_ + code_.size() + 4)));
    }
    flush();
  }

 private:
  [[nodiscard]] bool wide() const { return mode_ == Mode::kLong; }
  void add(std::initializer_list<std::uint8_t> bytes) { code_.insert(code_.end(), bytes); }
  template <typename T>
  void add_value(T value) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&value);
    code_.insert(code_.end(), bytes, bytes + sizeof value);
  }
  void flush() {
    if (!code_.empty()) {
      program_.memory.push_back({.gpa = at_, .bytes = code_});
      at_ += code_.size();
      code_.clear();
    }
  }

  // Code or data at another place.
  void elsewhere(std::uint8_t op) {
    flush();
    const std::uint16_t offset = input_.get<std::uint16_t>();
    switch (op & 7) {
      case 0:
      case 1:
        at_ = kCode + offset % 0x8000U;
        break;
      case 2:
        at_ = kCode + 0xff0 + (offset & 0x700f);  // across pages
        break;
      case 3:
        at_ = kHandlers + (offset & 0x3f) * 16U;
        break;
      case 4: {  // data
        const auto bytes = input_.take(1U + (offset >> 12));
        program_.memory.push_back({.gpa = kData + (offset & 0xfff), .bytes = {bytes.begin(), bytes.end()}});
        break;
      }
      case 5:
        at_ = (offset & 1) != 0 ? kRom + offset % kRomSize : kMiddleRam + offset;
        break;
      case 6:  // for returns and far pointers
        program_.memory.push_back(
            {.gpa = kStack - 0x800 + (offset & 0xf8), .bytes = bytes_of(kCode + (offset >> 8))});
        break;
      default: {
        const std::uint8_t which = input_.byte();
        program_.memory.push_back(
            {.gpa = kStack - 0x800 + (offset & 0xf8), .bytes = bytes_of(interesting_address(which))});
        break;
      }
    }
  }
  static std::vector<std::uint8_t> bytes_of(std::uint64_t value) {
    std::vector<std::uint8_t> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
  }

  // Of a short jump: mostly a little forward.
  std::uint8_t distance() {
    const std::uint8_t bits = input_.byte();
    return bits < 0xc0 ? bits & 0x1fU : bits;
  }

  std::uint8_t rex(bool w, std::uint8_t reg, std::uint8_t base) const {
    return static_cast<std::uint8_t>(0x40 | (w ? 8 : 0) | (reg >> 3 << 2) | base >> 3);
  }
  // OP reg, [base + displacement], with prefixes before REX and opcode bytes behind it.
  void memory_form(std::initializer_list<std::uint8_t> prefixes, std::initializer_list<std::uint8_t> opcode,
                   bool w) {
    // Mostly some registers hold addresses and others values, so that much of the code comes to something.
    constexpr std::array<std::uint8_t, 16> kValues{0, 1, 2, 8, 9, 10, 11, 0, 1, 2, 8, 9, 10, 11, 5, 7};
    constexpr std::array<std::uint8_t, 16> kBases{3, 6, 7, 15, 14, 13, 3, 6, 7, 15, 14, 13, 15, 15, 0, 12};
    const std::uint8_t bits = input_.byte();
    const std::uint8_t reg = kValues.at(bits & 15U) & (wide() ? 15U : 7U);
    std::uint8_t base = kBases.at(bits >> 4) & (wide() ? 15U : 7U);
    add(prefixes);
    if (wide()) {
      add({rex(w, reg, base)});
    }
    add(opcode);
    if ((base & 7) == 4) {  // would need a SIB byte
      base = static_cast<std::uint8_t>(base ^ 1U);
    }
    const std::int8_t displacement = input_.get<std::int8_t>();
    if (mode_ == Mode::kReal || mode_ == Mode::kProtected16) {
      add({static_cast<std::uint8_t>(0x40 | (reg & 7) << 3 | (base & 7)),
           static_cast<std::uint8_t>(displacement)});
      return;
    }
    if (displacement == 0x7f) {  // RIP-relative, or absolute: into the code around
      add({static_cast<std::uint8_t>((reg & 7) << 3 | 5)});
      add_value(wide() ? std::int32_t{input_.get<std::int8_t>()}
                       : static_cast<std::int32_t>(kCode + code_.size()) + input_.get<std::int8_t>());
      return;
    }
    add({static_cast<std::uint8_t>(0x40 | (reg & 7) << 3 | (base & 7)),
         static_cast<std::uint8_t>(displacement)});
  }
  // MOV reg, number.
  void load_register(std::uint8_t reg, std::uint64_t value) {
    reg &= wide() ? 15U : 7U;
    if (wide()) {
      add({rex(true, 0, reg)});
    }
    add({static_cast<std::uint8_t>(0xb8 | (reg & 7))});
    if (wide()) {
      add_value(value);
    } else if (mode_ == Mode::kReal || mode_ == Mode::kProtected16) {
      add_value(static_cast<std::uint16_t>(value));
    } else {
      add_value(static_cast<std::uint32_t>(value));
    }
  }

  void structured(std::uint8_t op) {
    const bool w = (op & 1) != 0;
    switch (op >> 2) {
      case 0x0c:  // a register gets an address, or a small number
      case 0x0d:
      case 0x0e: {
        const std::uint8_t reg = input_.byte();
        const std::uint8_t which = input_.byte();
        load_register(static_cast<std::uint8_t>(reg ^ (reg == 4 ? 1U : 0U)),
                      which < 0x40 ? which : interesting_address(which));
        break;
      }
      case 0x0f:
      case 0x10:
        memory_form({}, {static_cast<std::uint8_t>((op & 2) != 0 ? 0x8b : 0x8a)}, w);
        break;
      case 0x11:
      case 0x12:
        memory_form({}, {static_cast<std::uint8_t>((op & 2) != 0 ? 0x89 : 0x88)}, w);
        break;
      case 0x13: {  // arithmetic
        constexpr std::array<std::uint8_t, 16> kOps{0x00, 0x01, 0x02, 0x03, 0x11, 0x13, 0x29, 0x2b,
                                                    0x39, 0x3b, 0x85, 0x31, 0x33, 0x21, 0x09, 0x87};
        memory_form({}, {kOps.at(input_.byte() & 15)}, w);
        break;
      }
      case 0x14:  // locked
        if ((op & 2) != 0) {
          memory_form({0xf0}, {0x0f, static_cast<std::uint8_t>(w ? 0xc1 : 0xb1)}, input_.byte() > 127);
        } else {
          memory_form({0xf0}, {static_cast<std::uint8_t>(0x01 | (input_.byte() & 0x30))}, w);
        }
        break;
      case 0x15: {  // vectors
        constexpr std::array<std::uint8_t, 8> kOps{0x10, 0x11, 0x28, 0x29, 0x6f, 0x7f, 0xe7, 0xef};
        const std::uint8_t what = input_.byte();
        if ((what & 0x80) != 0) {
          add({0xc5, static_cast<std::uint8_t>(what & 0x40 ? 0xfd : 0xfe), kOps.at(what & 7),
               static_cast<std::uint8_t>(0x40 | (input_.byte() & 0x3b)), input_.byte()});
        } else {
          memory_form({static_cast<std::uint8_t>(what & 8 ? 0x66 : 0xf3)}, {0x0f, kOps.at(what & 7)}, false);
        }
        break;
      }
      case 0x16:  // strings
        add({static_cast<std::uint8_t>(0xf2 | (op & 1))});
        if (wide() && (op & 2) != 0) {
          add({0x48});
        }
        add({std::array<std::uint8_t, 8>{0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xa7, 0xaf, 0xa6}.at(input_.byte() &
                                                                                            7)});
        break;
      case 0x17:  // ports
        add({std::array<std::uint8_t, 8>{0xe4, 0xe6, 0xe5, 0xe7, 0xec, 0xee, 0x6c, 0x6e}.at(
            (op & 3) * 2U + (input_.byte() & 1))});
        if ((op & 3) < 2) {
          add({input_.byte()});
        }
        break;
      case 0x18:  // stack
        add({static_cast<std::uint8_t>(0x50 | (input_.byte() & 15))});
        break;
      case 0x19:
        add({std::array<std::uint8_t, 16>{0x9c, 0x9d, 0xc3, 0xcf, 0xcb, 0xc9, 0x60, 0x61, 0x1f, 0x17, 0xcc,
                                          0xf1, 0xce, 0xca, 0xc2, 0xc8}
                 .at(input_.byte() & 15)});
        break;
      case 0x1a:  // jumps, near by
      case 0x1b:
        add({static_cast<std::uint8_t>(0x70 | (input_.byte() & 15)), distance()});
        break;
      case 0x1c:
        add({static_cast<std::uint8_t>(0xe0 | (op & 3)), distance()});  // LOOP, JRCXZ
        break;
      case 0x1d:
        if ((op & 2) != 0) {
          add({static_cast<std::uint8_t>(w ? 0xe8 : 0xe9)});
          if (mode_ == Mode::kReal || mode_ == Mode::kProtected16) {
            add_value(input_.get<std::int16_t>());
          } else {
            add_value(std::int32_t{input_.get<std::int16_t>()});
          }
        } else {
          add({0xff, static_cast<std::uint8_t>((w ? 0xd0 : 0xe0) | (input_.byte() & 7))});
        }
        break;
      case 0x1e:
        memory_form({}, {0xff}, w);  // INC ... PUSH, by the register field
        break;
      case 0x1f: {  // control registers
        const std::uint8_t what = input_.byte();
        constexpr std::array<std::uint8_t, 4> kWhich{0, 3, 4, 2};
        add({0x0f,
             static_cast<std::uint8_t>((op & 3) == 3   ? 0x23
                                       : (op & 1) != 0 ? 0x22
                                                       : 0x20),
             static_cast<std::uint8_t>(0xc0 | kWhich.at(what >> 3 & 3) << 3 | (what & 7))});
        break;
      }
      case 0x20:  // turns a bit of a control register: read, change, write
      {
        const std::uint8_t bits = input_.byte();
        const std::uint8_t reg = (op & 1) != 0 ? 0xc0 : 0xe0;  // CR0, CR4
        add({0x0f, 0x20, reg, 0x0f, 0xba, 0xf8, static_cast<std::uint8_t>(bits & 31), 0x0f, 0x22, reg});
        break;
      }
      case 0x21:  // MOV to CR3 of what it holds
        add({0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8});
        break;
      case 0x22:  // INVLPG, LGDT, LIDT, SMSW, LMSW and more
        memory_form({}, {0x0f, 0x01}, false);
        break;
      case 0x23: {  // MSRs
        constexpr std::array<std::uint32_t, 24> kMsrs{
            0x10,  0x1b,  0x3b,  0x6e0, 0xc0000080, 0xc0000081, 0xc0000082, 0xc0000084,
            0x174, 0x175, 0x176, 0x277, 0xc0000100, 0xc0000101, 0xc0000102, 0xc0000103,
            0x808, 0x80b, 0x80f, 0x830, 0x832,      0x838,      0x4b564d01, 0x4b564d00};
        load_register(1, kMsrs.at(input_.byte() % kMsrs.size()));
        if ((op & 2) != 0) {
          const std::uint8_t which = input_.byte();
          load_register(0, which < 0x80 ? which : interesting_address(which));
          if (which < 0xc0) {
            add({0x31, 0xd2});
          }
        }
        add({0x0f, static_cast<std::uint8_t>((op & 2) != 0 ? 0x30 : 0x32)});
        break;
      }
      case 0x24: {  // the rest of the system
        constexpr std::array<std::array<std::uint8_t, 3>, 24> kOps{
            {{0xf4, 0x90, 0x90}, {0x90, 0x90, 0xfb}, {0x90, 0x90, 0xfa}, {0x0f, 0x05, 0x90},
             {0x0f, 0x07, 0x90}, {0x0f, 0x34, 0x90}, {0x0f, 0x35, 0x90}, {0x0f, 0xa2, 0x90},
             {0x0f, 0x31, 0x90}, {0x0f, 0x01, 0xf9}, {0x0f, 0x01, 0xf8}, {0x0f, 0x01, 0xd1},
             {0x0f, 0x01, 0xd0}, {0x0f, 0x06, 0x90}, {0x0f, 0x08, 0x90}, {0x0f, 0x09, 0x90},
             {0x0f, 0x0b, 0x90}, {0x0f, 0xc7, 0xf0}, {0x0f, 0xc7, 0xf9}, {0x0f, 0x01, 0xca},
             {0x0f, 0x01, 0xcb}, {0xdb, 0xe3, 0x9b}, {0x0f, 0x01, 0xc1}, {0x0f, 0x01, 0xe8}}};
        const auto& bytes = kOps.at(input_.byte() % kOps.size());
        code_.insert(code_.end(), bytes.begin(), bytes.end());
        break;
      }
      case 0x25:  // segments: selectors, MOV SS, LTR, LLDT, LAR, LSL, VERR
        if ((op & 2) != 0) {
          load_register(0, input_.byte());
          add({0x8e, static_cast<std::uint8_t>(0xc0 | (input_.byte() & 0x38))});
        } else if (w) {
          load_register(0, input_.byte());
          add({0x0f, 0x00, static_cast<std::uint8_t>(0xc0 | (input_.byte() & 0x38))});
        } else {
          memory_form({}, {0x0f, static_cast<std::uint8_t>(0x02 | (input_.byte() & 1))}, true);
        }
        break;
      case 0x26:  // an interrupt return or a far return, with a frame for it
        if (wide()) {
          add({0x6a, static_cast<std::uint8_t>(input_.byte() & 0x7f), 0x54, 0x9c, 0x6a,
               static_cast<std::uint8_t>(input_.byte() & 0x7f)});
          add({0x68});
          add_value(static_cast<std::uint32_t>(kCode + input_.get<std::uint16_t>() % 0x400U));
          add({0x48, static_cast<std::uint8_t>((op & 1) != 0 ? 0xcf : 0xcb)});
        } else {
          add({0x9c, 0x6a, static_cast<std::uint8_t>(input_.byte() & 0x7f), 0x6a, input_.byte(),
               static_cast<std::uint8_t>((op & 1) != 0 ? 0xcf : 0xcb)});
        }
        break;
      case 0x27:  // extended state
        memory_form({}, {0x0f, 0xae}, (op & 1) != 0);
        break;
      case 0x28:
        memory_form({}, {0x0f, 0xc7}, (op & 1) != 0);  // CMPXCHG8B, XSAVEC, XRSTORS, RDRAND ...
        break;
      case 0x29:  // code that changes itself
        if (wide()) {
          add({0xc6, 0x05});
          add_value(std::int32_t{input_.get<std::int8_t>()});
          add({input_.byte()});
        } else {
          memory_form({}, {0xc6}, false);
          add({input_.byte()});
        }
        break;
      case 0x2a:  // bits by number: far from the operand
        memory_form({}, {0x0f, static_cast<std::uint8_t>(0xa3 | (input_.byte() & 0x18))}, w);
        break;
      case 0x2b:
        memory_form({static_cast<std::uint8_t>(0x64 | (op & 1))},
                    {static_cast<std::uint8_t>(0x89 | (op & 2))}, true);
        break;
      case 0x2c:
        memory_form({}, {static_cast<std::uint8_t>((op & 2) != 0 ? 0xf7 : 0xf6)}, w);  // DIV and the like
        add({input_.byte()});
        break;
      case 0x2d: {  // gathers and masked moves
        constexpr std::array<std::uint8_t, 8> kOps{0x90, 0x91, 0x92, 0x93, 0x2c, 0x2e, 0x8c, 0x8e};
        const std::uint8_t what = input_.byte();
        add({0xc4, 0xe2, static_cast<std::uint8_t>(0x45 | (what & 0xb8)), kOps.at(what & 7)});
        if ((what & 4) != 0) {
          add({static_cast<std::uint8_t>(0x40 | (input_.byte() & 0x3b)), input_.byte()});
        } else {
          add({static_cast<std::uint8_t>(0x44 | (input_.byte() & 0x38)), input_.byte(), input_.byte()});
        }
        break;
      }
      case 0x2e:
        memory_form({}, {static_cast<std::uint8_t>(0xd8 | (input_.byte() & 7))}, w);  // x87
        break;
      case 0x2f:
        add({0xcd, input_.byte()});
        break;
      default: {
        const std::uint8_t first = input_.byte();
        memory_form({}, {0x0f, first}, w);
        break;
      }
    }
  }

  Input& input_;
  const Mode mode_;
  Program& program_;
  std::uint64_t at_ = kCode;
  std::vector<std::uint8_t> code_;
};

}  // namespace

void make_code(Input& input, Mode mode, Program& program) {
  CodeMaker(input, mode, program).make();
}

}  // namespace wisp::fuzz
