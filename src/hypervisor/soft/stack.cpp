// The stack as instructions use it (SDM volume 1, 6.2): SS:rSP, where rSP is as wide as the stack is.
#include "hypervisor/soft/conditions.h"
#include "hypervisor/soft/executor.h"

namespace wisp::soft {

std::uint32_t stack_address_size(const Cpu& cpu) {
  if (cpu.code64()) {
    return 8;
  }
  return cpu.segments[kSs].big() ? 4 : 2;
}

void add_to_sp(Cpu& cpu, std::int64_t bytes) {
  set_sized(cpu, kRsp, stack_address_size(cpu), cpu.gpr[kRsp] + static_cast<std::uint64_t>(bytes));
}

bool push(Core& core, std::uint64_t value, std::uint32_t size) {
  Cpu& cpu = core.cpu;
  const std::uint64_t offset = (cpu.gpr[kRsp] - size) & size_mask(stack_address_size(cpu));
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
  const std::uint64_t offset = (cpu.gpr[kRsp] + depth_bytes) & size_mask(stack_address_size(cpu));
  std::uint64_t linear = 0;
  value = 0;
  return linear_address(cpu, kSs, offset, size, Access::kRead, linear) && core.mmu.read(linear, &value, size);
}

}  // namespace wisp::soft
