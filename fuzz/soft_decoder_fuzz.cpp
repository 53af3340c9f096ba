// The decoder on arbitrary bytes: what it says of lengths must hold, and what it hands to the native emitter
// must be emitted in the room there is for it.
#include <array>
#include <cstdlib>
#include <span>

#include "hypervisor/soft/decoder.h"
#include "hypervisor/soft/native_code.h"

namespace wisp::soft {
namespace {

void require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

void check_done(std::span<const std::uint8_t> bytes, CodeSize code, const Insn& insn) {
  require(insn.length >= 1 && insn.length <= bytes.size());
  require(insn.base <= kRipBase && insn.index <= kNoRegister && insn.scale <= 3 && insn.segment <= kGs);
  require(insn.operand_size == 1 || insn.operand_size == 2 || insn.operand_size == 4 ||
          insn.operand_size == 8);
  if (code != CodeSize::k64) {
    require(insn.rex_w() == false || insn.vex);
    require(insn.base != kRipBase && (insn.base < 8 || insn.base == kNoRegister));
    require(insn.reg < 8 && insn.rm < 8 && insn.vvvv < 8);
  }
  const bool valid = insn.op != Op::kUndefined && insn.op != Op::kUnknown;
  if (!valid) {
    return;
  }
  Insn less;
  require(decode(bytes.first(insn.length), code, less) == DecodeResult::kDone && less.length == insn.length);
  if (insn.length > 1) {
    require(decode(bytes.first(insn.length - 1U), code, less) == DecodeResult::kTruncated);
  }
  if (insn.op != Op::kNative) {
    return;
  }
  for (const MemoryForm form : {MemoryForm::kAddressOnly, MemoryForm::kAddressAddend}) {
    std::array<std::uint8_t, 128> room{};
    Emitter out(room.data(), room.data(), room.size());
    emit_native(out, insn, form);
    require(!out.full() && out.size() != 0);
  }
}

}  // namespace
}  // namespace wisp::soft

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace wisp::soft;
  if (size < 2) {
    return 0;
  }
  const auto code = static_cast<CodeSize>(data[0] % 3);
  const std::span bytes(data + 1, size - 1);
  Insn insn;
  switch (decode(bytes, code, insn)) {
    case DecodeResult::kDone:
      check_done(bytes.first(std::min(bytes.size(), kMaxInsnLength)), code, insn);
      break;
    case DecodeResult::kTruncated:
      require(bytes.size() < kMaxInsnLength);
      break;
    case DecodeResult::kTooLong:
      require(bytes.size() >= kMaxInsnLength);
      break;
  }
  return 0;
}
