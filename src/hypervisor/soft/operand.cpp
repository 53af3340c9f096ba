#include "hypervisor/soft/operand.h"

#include <algorithm>

namespace wisp::soft::operand {
namespace {

constexpr std::uint32_t kChunk = 64;  // Mmu's most, and never across a page where aligned

std::uint32_t chunk_at(std::uint64_t linear, std::uint32_t left) {
  return std::min(left, kChunk - static_cast<std::uint32_t>(linear % kChunk));
}

}  // namespace

bool load(Core& core, const Insn& insn, std::uint32_t size, std::uint64_t& value) {
  if (!insn.memory) {
    value = sized(core.cpu, insn.rm, size);
    return true;
  }
  std::uint64_t linear = 0;
  value = 0;
  return locate(core, insn, size, Access::kRead, linear) && core.mmu.read(linear, &value, size);
}

bool store(Core& core, const Insn& insn, std::uint32_t register_size, std::uint32_t memory_size,
           std::uint64_t value) {
  if (!insn.memory) {
    set_sized(core.cpu, insn.rm, register_size, value);
    return true;
  }
  std::uint64_t linear = 0;
  return locate(core, insn, memory_size, Access::kWrite, linear) &&
         core.mmu.write(linear, &value, memory_size);
}

bool read_area(Core& core, std::uint64_t linear, std::uint8_t* out, std::uint32_t size) {
  while (size != 0) {
    const std::uint32_t chunk = chunk_at(linear, size);
    if (!core.mmu.read(linear, out, chunk)) {
      return false;
    }
    linear += chunk;
    out += chunk;
    size -= chunk;
  }
  return true;
}

bool probe_area(Core& core, std::uint64_t linear, std::uint32_t size) {
  while (size != 0) {
    const auto part =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(size, kPageSize - (linear & kPageOffset)));
    if (!core.mmu.probe(linear, part, Access::kWrite)) {
      return false;
    }
    linear += part;
    size -= part;
  }
  return true;
}

bool write_area(Core& core, std::uint64_t linear, const std::uint8_t* in, std::uint32_t size) {
  while (size != 0) {
    const std::uint32_t chunk = chunk_at(linear, size);
    if (!core.mmu.write(linear, in, chunk)) {
      return false;
    }
    linear += chunk;
    in += chunk;
    size -= chunk;
  }
  return true;
}

}  // namespace wisp::soft::operand
