// The software CPU against the host's own processor: random instructions with random operands, run by both
// from the same state; registers, flags, memory and faults must come out the same.
//
// WISP_DIFF_CASES sets the number of cases (default 200,000 for each executor), WISP_DIFF_SEED the first
// seed.
#include <cpuid.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "hypervisor/soft/case_generator.h"
#include "hypervisor/soft/guest_runner.h"
#include "hypervisor/soft/host_features.h"
#include "hypervisor/soft/native_runner.h"
#include "support/sanitized.h"

namespace wisp::soft {
namespace {

// A sanitizer's shadow memory lies where the guest has none, so the host's side proves nothing then; the
// software CPU's side still runs under the sanitizer's eyes.
using test::kSanitized;

std::uint64_t setting(const char* name, std::uint64_t fallback) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 0) : fallback;
}

// Arithmetic flags that the SDM leaves undefined. Instructions that the host's processor runs for the
// software CPU leave the same there, so only those that are done otherwise are named.
std::uint64_t undefined_flags(const Insn& insn) {
  switch (insn.op) {
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
      return flag::kOf | flag::kSf | flag::kAf | flag::kPf;
    default:
      return 0;
  }
}

// Compares two results of a case; collects what differs.
class Judge {
 public:
  Judge(const Case& one, const Insn& insn, const CaseResult& native, const CaseResult& guest)
      : case_(one), insn_(insn), native_(native), guest_(guest) {}

  // Empty where they agree, else the names of what differs.
  std::string differences() {
    if (guest_.end != CaseResult::End::kException) {
      return " does not end;";
    }
    // Whether a masked byte store touches what its mask leaves out is the processor's own affair.
    const bool got_past = guest_.vector == vec::kBp || guest_.rip == case_.rip + insn_.length;
    if (insn_.op == Op::kMaskMoveBytes && !ended() && got_past) {
      return "";
    }
    if (native_.vector != guest_.vector) {
      differ(fmt::format("vector {} for {}", guest_.vector, native_.vector));
      number("rip", guest_.rip, native_.rip);
      number("cr2", guest_.cr2, native_.cr2);
      return text_;
    }
    if (native_.vector == vec::kPf) {
      // Which byte of a long operand is touched first is the processor's own affair.
      const std::uint64_t keep = insn_.op == Op::kFpuEnvironment ? ~0xfffULL : ~0ULL;
      if (!masked_) {
        number("cr2", guest_.cr2 & keep, native_.cr2 & keep);
      }
    }
    // The host's kernel hides whether there is something at its own addresses.
    const bool kernels = native_.vector == vec::kPf && native_.cr2 >= 0x7ffffffff000;
    const bool has_error = native_.vector >= vec::kTs && native_.vector <= vec::kPf;
    if (has_error && !(masked_ && native_.vector == vec::kPf)) {
      number("error code", guest_.error & ~(kernels ? 1U : 0U), native_.error & ~(kernels ? 1U : 0U));
    }
    number("rip", guest_.rip, native_.rip);
    for (std::size_t i = 0; i < 16; ++i) {
      // Where a repetition with 32-bit addresses faults, this host has cleared the upper halves already.
      const bool half =
          (i == kRcx || i == kRsi || i == kRdi) && insn_.address_size == 4 && insn_.repeat != 0 && !ended();
      const std::uint64_t keep = half ? 0xffffffff : ~0ULL;
      number(fmt::format("r{}", i), guest_.gpr[i] & keep, native_.gpr[i] & keep);
    }
    const std::uint64_t flags =
        (flag::kArithmetic | flag::kDf | flag::kIf | flag::kNt | flag::kAc | flag::kId) &
        ~undefined_flags(insn_);
    number("flags", guest_.rflags & flags, native_.rflags & flags);
    bytes("fcw", 0, 2);
    // VCVTPS2PH to memory that faults has told of its exceptions on the host.
    const bool stores = case_.sequence || (insn_.memory && (insn_.rm_access & kWrites) != 0);
    if (ended() || !stores) {
      bytes("mxcsr", 24, 4);
    }
    // An MMX instruction whose operand faults has switched the x87 unit to MMX on the host: it is run again
    // anyway.
    const bool mmx = insn_.reg_class == OperandClass::kMmx || insn_.rm_class == OperandClass::kMmx;
    if (ended() || !(mmx || case_.sequence)) {
      bytes("fsw", 2, 2);
      bytes("ftw", 4, 1);
      for (std::size_t i = 0; i < 8; ++i) {
        bytes(fmt::format("st{}", i), 32 + 16 * i, 10);
      }
    }
    for (std::size_t i = 0; i < 16; ++i) {
      bytes(fmt::format("xmm{}", i), 160 + 16 * i, 16);
      bytes(fmt::format("ymm{}", i), 576 + 16 * i, 16);
    }
    memory();
    return text_;
  }

 private:
  [[nodiscard]] bool ended() const { return native_.vector == vec::kBp || native_.vector == vec::kDb; }
  void differ(const std::string& what) { text_ += " " + what + ";"; }
  void number(const std::string& what, std::uint64_t guest, std::uint64_t native) {
    if (guest != native) {
      differ(fmt::format("{} {:#x} for {:#x}", what, guest, native));
    }
  }
  void bytes(const std::string& what, std::size_t at, std::size_t size) {
    if (std::memcmp(guest_.vectors.data() + at, native_.vectors.data() + at, size) != 0) {
      differ(what + " " + hex(guest_.vectors.data() + at, size) + "for " +
             hex(native_.vectors.data() + at, size));
    }
  }
  static std::string hex(const std::uint8_t* data, std::size_t size) {
    std::string text;
    for (std::size_t i = size; i > 0; --i) {
      text += fmt::format("{:02x}", data[i - 1]);
    }
    return text + " ";
  }
  void memory() {
    for (std::size_t i = 0; i < kCaseDataSize; ++i) {
      if (guest_.data[i] == native_.data[i]) {
        continue;
      }
      const std::uint64_t linear = kCaseData + i;
      if (insn_.op == Op::kFpuEnvironment && linear >= case_.target + 6 && linear < case_.target + 28) {
        continue;  // where the last x87 instruction was: not kept
      }
      if (insn_.op == Op::kCallIndirect && native_.vector == vec::kGp && linear < case_.gpr[kRsp] &&
          linear + 8 >= case_.gpr[kRsp]) {
        continue;  // Intel's processors push before they look at the target, AMD's only see that they could
      }
      if (insn_.vector_use == VectorUse::kX87 && insn_.memory_size == 10 && !ended()) {
        continue;  // FSTP m80 and FBSTP have stored the half that could be
      }
      differ(fmt::format("byte {:#x}: {:02x} for {:02x}", linear, guest_.data[i], native_.data[i]));
      return;
    }
  }

  const Case& case_;
  const Insn& insn_;
  const CaseResult& native_;
  const CaseResult& guest_;
  // Masked stores touch their elements in an order of the processor's own.
  const bool masked_ = insn_.op == Op::kMaskMoveBytes || insn_.op == Op::kMaskMove;
  std::string text_{};
};

bool host_is_amd() {
  std::uint32_t leaf = 0;
  std::array<std::uint32_t, 3> vendor{};
  __cpuid(0, leaf, vendor[0], vendor[2], vendor[1]);
  return std::memcmp(vendor.data(), "AuthenticAMD", sizeof vendor) == 0;
}

// The software CPU is one of Intel's. AMD's processors do otherwise here (AMD64 Architecture Programmer's
// Manual, volume 3), so there this is left out.
bool same_on_amd(const Insn& insn) {
  bool repeat_prefix = false;
  for (const std::uint8_t byte : insn.bytes) {
    if (byte == insn.opcode) {
      break;
    }
    repeat_prefix = repeat_prefix || byte == 0xf2 || byte == 0xf3;
  }
  switch (insn.op) {
    case Op::kCall:
    case Op::kCallIndirect:
    case Op::kReturn:
    case Op::kReturnImm:
    case Op::kJump:
    case Op::kJumpIndirect:
    case Op::kJumpIf:
    case Op::kLoop:
    case Op::kLoopEqual:
    case Op::kLoopNotEqual:
    case Op::kJumpRcxZero:
      return !insn.operand_prefix && !repeat_prefix;  // 66 halves the target, F2 and F3 change LOOPcc
    case Op::kSysexit:                                // not in long mode
    case Op::kGather:                                 // how far one came that faults
      return false;
    case Op::kScanString:
      return insn.repeat == 0;  // flags after a fault
    case Op::kCompareString:    // and which operand is read first
      return false;
    case Op::kMoveString:
    case Op::kStoreString:
    case Op::kLoadString:
      return insn.repeat == 0 || insn.address_size == 8;  // the count's upper half where its lower one is 0
    case Op::kBitTest:
    case Op::kBitSet:
    case Op::kBitReset:
    case Op::kBitComplement:
      return insn.segment != kFs &&
             insn.segment != kGs;  // also #GP where the address without the base is not canonical
    default:
      break;
  }
  const bool exchange = insn.map == 0 && insn.opcode == 0x90 && repeat_prefix;  // PAUSE with REX.B
  const bool prefetch = insn.map == 1 && insn.opcode == 0x0d && !insn.memory;   // #UD
  const bool x87_store = insn.vector_use == VectorUse::kX87 && insn.memory;     // which fault comes first
  const bool extend = insn.map == 0 && insn.opcode == 0x63 && insn.operand_size == 2;  // reads four bytes
  const bool convert = insn.feature == Feature::kF16c && insn.memory;  // which fault comes first
  return !exchange && !prefetch && !x87_store && !extend && !convert;
}

class Differential {
 public:
  Differential(const ExecutionOptions& options, bool sequences) : guest_(options), sequences_(sequences) {}

  void run(std::uint64_t seed, std::uint64_t count) {
    auto guest_result = std::make_unique<CaseResult>();
    for (std::uint64_t batch = 0; batch * NativeRunner::kMost < count; ++batch) {
      CaseGenerator generator(seed + batch, NativeRunner::fs_base());
      if (amd_) {
        generator.set_filter(same_on_amd);
      }
      auto data = std::make_unique<CaseData>();
      generator.make_data(*data);
      std::vector<Case> cases(NativeRunner::kMost);
      std::vector<Insn> insns(NativeRunner::kMost);
      for (std::size_t i = 0; i < cases.size(); ++i) {
        if (sequences_) {
          generator.make_sequence(cases[i]);
        } else {
          generator.make_case(cases[i], insns[i]);
        }
        if (!any_stack_) {
          cases[i].gpr[kRsp] &= 0x7fffffffffff;
        }
      }
      const std::string trouble = native_.run(cases, *data);
      if (!trouble.empty() && !kSanitized) {
        ADD_FAILURE() << "seed " << seed + batch << ": " << trouble;
      }
      for (std::size_t i = 0; i < cases.size(); ++i) {
        const CaseResult& native = native_.result(i);
        if (native.end == CaseResult::End::kNone) {
          break;
        }
        if (native.end == CaseResult::End::kHang) {
          ++hangs_;
          continue;
        }
        guest_.run(cases[i], *data, NativeRunner::fs_base(), *guest_result);
        if (!any_stack_ && !canonical(guest_result->gpr[kRsp])) {
          // A host interrupt while it was so has ended the case there, in a way of the hypervisor's own.
          ++stacks_;
          continue;
        }
        ++compared_;
        ended_well_ += native.vector == vec::kBp || native.vector == vec::kDb ? 1U : 0U;
        const std::string differences = Judge(cases[i], insns[i], native, *guest_result).differences();
        if (!differences.empty() && !kSanitized) {
          note(cases[i], insns[i], native, differences, seed + batch);
        }
      }
    }
  }

  void report() {
    for (const auto& [kind, finding] : findings_) {
      ADD_FAILURE() << kind << ", " << finding.count << " times, first:" << finding.example;
    }
    for (const std::string& note : guest_.notes()) {
      if (note.find("does not have") != std::string::npos) {
        ADD_FAILURE() << note;
      }
    }
    EXPECT_LT(hangs_, 1 + compared_ / 1000);
    EXPECT_LT(stacks_, 1 + compared_ / 20);
    EXPECT_GT(ended_well_, compared_ * 2 / 5) << "of " << compared_;
    fmt::print("{} cases compared, {} ended without a fault, {} left out\n", compared_, ended_well_,
               hangs_ + stacks_);
  }

 private:
  struct Finding {
    std::uint64_t count = 0;
    std::string example{};
  };
  void note(const Case& one, const Insn& insn, const CaseResult& native, const std::string& differences,
            std::uint64_t seed) {
    const bool group = insn.map == 0 && ((insn.opcode & 0xfc) == 0x80 || (insn.opcode & 0xf6) == 0xf6 ||
                                         (insn.opcode & 0xf8) == 0xd8 || (insn.opcode & 0xec) == 0xc0);
    const std::string kind =
        one.sequence ? "a sequence" + differences.substr(0, differences.find(' ', 1))
                     : fmt::format("map {} opcode {:02x}{}{}{}", insn.map, insn.opcode,
                                   group || (insn.map == 1 && insn.opcode >= 0x71 && insn.opcode < 0x74)
                                       ? fmt::format(" /{}", insn.reg_field())
                                       : "",
                                   insn.vex ? " VEX" : "", insn.memory ? " memory" : "");
    Finding& finding = findings_[kind];
    if (++finding.count > 1) {
      return;
    }
    std::string bytes;
    for (std::size_t i = 0; i < one.length; ++i) {
      bytes += fmt::format(" {:02x}", one.bytes[i]);
    }
    for (std::size_t i = 0; i < 16; ++i) {
      bytes += fmt::format("{}{:x}", i == 0 ? " (registers " : " ", one.gpr[i]);
    }
    bytes += ")";
    finding.example = fmt::format(
        "{} at {:#x}, operand at {:#x}, flags {:#x}{}, seed {}, host's vector {}:{}", bytes, one.rip,
        one.target, one.rflags, one.single_step ? " stepping" : "", seed, native.vector, differences);
  }

  NativeRunner native_{};
  const bool amd_ = host_is_amd();
  const bool any_stack_ = native_.takes_any_stack_pointer();
  GuestRunner guest_;
  const bool sequences_;
  std::map<std::string, Finding> findings_{};
  std::uint64_t compared_ = 0;
  std::uint64_t ended_well_ = 0;
  std::uint64_t hangs_ = 0;
  std::uint64_t stacks_ = 0;
};

void compare(const ExecutionOptions& options, bool sequences) {
  Differential differential(options, sequences);
  const std::uint64_t cases = setting("WISP_DIFF_CASES", 200000);
  differential.run(setting("WISP_DIFF_SEED", 1), sequences ? cases / 2 : cases);
  differential.report();
}

TEST(SoftAgainstNative, Interpreter) {
  compare({.executor = ExecutorChoice::kInterpret}, false);
}
TEST(SoftAgainstNative, Translator) {
  compare({.executor = ExecutorChoice::kTranslate}, false);
}
TEST(SoftAgainstNative, InterpreterInSequence) {
  compare({.executor = ExecutorChoice::kInterpret}, true);
}
TEST(SoftAgainstNative, TranslatorInSequence) {
  compare({.executor = ExecutorChoice::kTranslate}, true);
}
TEST(SoftAgainstNative, TranslatorWithTheOtherComparison) {
  compare({.quick_loop = !host_features().quick_loop}, true);
}

}  // namespace
}  // namespace wisp::soft
