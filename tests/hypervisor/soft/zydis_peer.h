// Zydis as a second opinion on what bytes mean: decodes with it, and says where it and our decoder differ.
#pragma once

#include <Zydis/Zydis.h>

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "hypervisor/soft/decoder.h"

namespace wisp::soft {

// Zydis's reading of an instruction.
struct PeerInsn {
  bool valid = false;
  bool truncated = false;
  bool too_long = false;
  ZydisDecodedInstruction insn{};
  std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands{};
};

class ZydisPeer final {
 public:
  ZydisPeer();
  void decode(std::span<const std::uint8_t> bytes, CodeSize code, PeerInsn& out) const;

 private:
  std::array<ZydisDecoder, 3> decoders_{};
};

// Whether the processor that we model has what Zydis read; otherwise our decoder must refuse it.
[[nodiscard]] bool in_model(const PeerInsn& peer);

// Where `ours` (of a valid instruction) is not what Zydis says, in words; empty where they agree.
[[nodiscard]] std::string difference(const Insn& ours, const PeerInsn& peer, CodeSize code);

}  // namespace wisp::soft
