// The stack as instructions use it (SDM volume 1, 6.2): SS:rSP, where rSP is as wide as the stack is.
#include "hypervisor/soft/executor.h"

namespace wisp::soft {
namespace {

std::uint64_t stack_mask(const Cpu& cpu) {
  const std::uint32_t size = stack_address_size(cpu);
  return size == 8 ? ~0ULL : size == 4 ? 0xffffffffULL : 0xffffULL;
}

}  // namespace

std::uint32_t stack_address_size(const Cpu& cpu) {
  if (cpu.code64()) {
    return 8;
  }
  return cpu.segments[kSs].big() ? 4 : 2;
}

void add_to_sp(Cpu& cpu, std::int64_t bytes) {
  const std::uint64_t mask = stack_mask(cpu);
  std::uint64_t& rsp = cpu.gpr[kRsp];
  const std::uint64_t moved = (rsp + static_cast<std::uint64_t>(bytes)) & mask;
  rsp = mask == 0xffff ? (rsp & ~mask) | moved : moved;
}

bool push(Core& core, std::uint64_t value, std::uint32_t size) {
  Cpu& cpu = core.cpu;
  const std::uint64_t offset = (cpu.gpr[kRsp] - size) & stack_mask(cpu);
  std::uint64_t linear = 0;
  if (!linear_address(cpu, kSs, offset, size, Access::kWrite, linear) ||
      !core.mmu.write(linear, &value, size)) {
    return false;
  }
  add_to_sp(cpu, -static_cast<std::int64_t>(size));
  return true;
}

bool peek(Core& core, std::uint32_t depth_bytes, std::uint64_t& value, std::uint32_t size) {
  Cpu& cpu = core.cpu;
  const std::uint64_t offset = (cpu.gpr[kRsp] + depth_bytes) & stack_mask(cpu);
  std::uint64_t linear = 0;
  value = 0;
  return linear_address(cpu, kSs, offset, size, Access::kRead, linear) && core.mmu.read(linear, &value, size);
}

}  // namespace wisp::soft
