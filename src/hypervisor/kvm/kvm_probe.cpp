#include "hypervisor/kvm/kvm_probe.h"

#include <algorithm>
#include <array>

#include "base/bytes.h"
#include "memory/ram.h"

namespace wisp {
namespace {

// An instruction takes 0.3 to 5 ns on hardware and up to 10 where the hardware is itself emulated by a
// translator; an interpreter in the kernel takes some hundreds.
constexpr double kLimitNs = 100;

constexpr std::uint16_t kPort = 0x80;
constexpr Gpa kBase = kRing0ProbeStart;

// Reading CR2 makes it ring 0's own code; no processor leaves the guest for it.
constexpr std::array<std::uint8_t, 10> kCode{
    0x0f, 0x20, 0xd0,  // loop: mov rax, cr2
    0xff, 0xc9,        //       dec ecx
    0x75, 0xf9,        //       jnz loop
    0xe6, 0x80,        //       out 0x80, al
    0xf4,              //       hlt
};

using Pages = std::array<std::uint8_t, kRing0ProbeSize>;

// Four pages: code, and the three levels of tables that map the 2 MiB around them to themselves.
Pages test_program() {
  constexpr std::uint64_t kPresentWritable = 3;
  constexpr std::uint64_t kLargePage = 0x80;
  constexpr std::uint64_t kLargePageSize = 2ULL << 20;
  Pages pages{};
  std::ranges::copy(kCode, pages.begin());
  const auto set = [&pages](std::uint64_t page, std::uint64_t index, std::uint64_t entry) {
    store_le(&pages.at(page * kPageSize + index * 8), entry);
  };
  set(1, (kBase >> 39) & 511, (kBase + 2 * kPageSize) | kPresentWritable);
  set(2, (kBase >> 30) & 511, (kBase + 3 * kPageSize) | kPresentWritable);
  set(3, (kBase >> 21) & 511, (kBase & ~(kLargePageSize - 1)) | kPresentWritable | kLargePage);
  return pages;
}

CpuSpecialRegs long_mode(CpuSpecialRegs sregs) {
  const CpuSegment data{.limit = UINT32_MAX,
                        .selector = 0x10,
                        .type = 3,
                        .present = true,
                        .default_big = true,
                        .granularity = true};
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
  sregs.cs = {.limit = UINT32_MAX,
              .selector = 8,
              .type = 11,
              .present = true,
              .long_mode = true,
              .granularity = true};
  sregs.tr = {.limit = 0x67, .selector = 0x18, .type = 11, .present = true, .system = true};
  sregs.ldt = {.unusable = true};
  sregs.gdt = sregs.idt = {};
  sregs.cr0 = 0x80000031;  // PG, NE, ET, PE
  sregs.cr3 = kBase + kPageSize;
  sregs.cr4 = 0x20;    // PAE
  sregs.efer = 0x500;  // LMA, LME
  return sregs;
}

std::string exit_text(const Exit& exit) {
  if (const auto* error = std::get_if<EngineErrorExit>(&exit)) {
    return error->message;
  }
  return std::holds_alternative<ShutdownExit>(exit) ? "the test program ended in a triple fault"
                                                    : fmt::format("unexpected exit of kind {}", exit.index());
}

// Takes in the exit that the vCPU just made.
Result<void> complete(Vcpu& vcpu) {
  vcpu.kick();
  const Exit exit = vcpu.run();
  if (!std::holds_alternative<InterruptedExit>(exit)) {
    return fail("{}", exit_text(exit));
  }
  return {};
}

// Nanoseconds of one run of the loop, from the entry to the exit.
Result<std::uint64_t> time_loop(Vcpu& vcpu, const Clock& clock, std::uint32_t iterations) {
  CpuRegs regs;
  regs.rip = kBase;
  regs.rcx = iterations;
  constexpr int kMostInterruptions = 100;
  for (int attempt = 0; attempt < kMostInterruptions; ++attempt) {
    WISP_TRY(vcpu.set_regs(regs));
    const std::uint64_t start = clock.monotonic_ns();
    const Exit exit = vcpu.run();
    const std::uint64_t end = clock.monotonic_ns();
    if (std::holds_alternative<InterruptedExit>(exit)) {
      continue;  // a signal: again from the start
    }
    const auto* write = std::get_if<PortWriteExit>(&exit);
    if (write == nullptr || write->port != kPort) {
      return fail("{}", exit_text(exit));
    }
    WISP_TRY(complete(vcpu));
    return end - start;
  }
  return fail("interrupted {} times by signals", kMostInterruptions);
}

Result<Ring0Probe> measure(Vcpu& vcpu, const Clock& clock) {
  Ring0Samples samples;
  for (;;) {
    WISP_ASSIGN(const std::uint64_t short_ns, time_loop(vcpu, clock, 1));
    WISP_ASSIGN(const std::uint64_t long_ns, time_loop(vcpu, clock, kRing0Iterations));
    ++samples.rounds;
    samples.short_ns = std::min(samples.short_ns, short_ns);
    samples.long_ns = std::min(samples.long_ns, long_ns);
    if (const auto probe = judge_ring0(samples)) {
      return *probe;
    }
  }
}

Result<Ring0Probe> probe_in_memory(Vcpu& vcpu, const GuestMemory& memory, const Clock& clock) {
  Pages before{};
  if (!memory.read(kBase, before)) {
    return fail("the machine has no memory at {:#x} for a test program", kBase);
  }
  WISP_ASSIGN(const CpuRegs regs, vcpu.regs());
  WISP_ASSIGN(const CpuSpecialRegs sregs, vcpu.special_regs());
  (void)memory.write(kBase, test_program());
  Result<Ring0Probe> result;
  if (auto set = vcpu.set_special_regs(long_mode(sregs)); set) {
    result = measure(vcpu, clock);
  } else {
    result = std::unexpected(set.error());
  }
  (void)memory.write(kBase, before);
  WISP_TRY(vcpu.set_special_regs(sregs));
  WISP_TRY(vcpu.set_regs(regs));
  return result;
}

Ring0Probe broken(const Error& error) {
  return {.verdict = Ring0Verdict::kBroken, .ns_per_instruction = 0, .failure = error.message};
}

}  // namespace

std::optional<Ring0Probe> judge_ring0(const Ring0Samples& samples) {
  if (samples.rounds == 0) {
    return std::nullopt;
  }
  // With the exit counted in: what is fast even so needs no second look.
  const double total = static_cast<double>(samples.long_ns) / kRing0Extra;
  const double difference = samples.long_ns > samples.short_ns
                                ? static_cast<double>(samples.long_ns - samples.short_ns) / kRing0Extra
                                : 0;
  constexpr std::uint32_t kEnoughRounds = 3;
  if (total < kLimitNs / 4) {
    return Ring0Probe{Ring0Verdict::kHardware, std::min(total, std::max(difference, 0.01))};
  }
  if (samples.rounds >= kEnoughRounds && difference < kLimitNs / 4) {
    return Ring0Probe{Ring0Verdict::kHardware, difference};
  }
  const bool last = samples.rounds >= kRing0MostRounds;
  if ((samples.rounds >= kEnoughRounds && difference > 2 * kLimitNs) || (last && difference >= kLimitNs)) {
    return Ring0Probe{Ring0Verdict::kEmulated, difference};
  }
  if (last) {
    return Ring0Probe{Ring0Verdict::kHardware, difference};
  }
  return std::nullopt;
}

Ring0Probe probe_ring0(Vcpu& vcpu, const GuestMemory& memory, const Clock& clock) {
  auto result = probe_in_memory(vcpu, memory, clock);
  return result ? *result : broken(result.error());
}

Ring0Probe probe_ring0(Hypervisor& hypervisor, const Clock& clock) {
  constexpr std::uint64_t kSize = kRing0ProbeStart + kRing0ProbeSize;
  auto block = RamBlock::create({.size = kSize});
  auto vm = hypervisor.create_vm({.pit = false});
  if (!block || !vm) {
    return broken(block ? vm.error() : block.error());
  }
  const FlatRange range{
      .start = 0, .size = kSize, .kind = RegionKind::kRam, .host = (*block)->host(), .name = "ring 0 probe"};
  GuestMemory memory;
  memory.set_blocks({{.gpa = 0, .size = kSize, .host = (*block)->host()}});
  if (auto added = (*vm)->memory_listener().range_added(range); !added) {
    return broken(added.error());
  }
  auto vcpu = (*vm)->create_vcpu(0);
  return vcpu ? probe_ring0(**vcpu, memory, clock) : broken(vcpu.error());
}

EngineReport describe(const Ring0Probe& probe) {
  // What a stock kernel executes from its entry to init.
  constexpr double kBootInstructions = 1.3e9;
  switch (probe.verdict) {
    case Ring0Verdict::kHardware:
      return {.usable = true,
              .summary = probe.ns_per_instruction < 1
                             ? "KVM runs guests on the processor (less than 1 ns per instruction)"
                             : fmt::format("KVM runs guests on the processor ({:.0f} ns per instruction)",
                                           probe.ns_per_instruction),
              .advice = {}};
    case Ring0Verdict::kEmulated:
      return {
          .usable = false,
          .summary = fmt::format(
              "KVM on this host interprets guest kernel code in software ({:.0f} ns per instruction, where a "
              "processor takes about 1)",
              probe.ns_per_instruction),
          .advice = fmt::format(
              "a stock kernel would need about {:.0f} minutes to boot, if it boots at all: use a host with "
              "VT-x or AMD-V, on bare metal or as a virtual machine with nested virtualization",
              std::max(probe.ns_per_instruction * kBootInstructions / 60e9, 1.0))};
    case Ring0Verdict::kBroken:
      break;
  }
  return {.usable = false,
          .summary = fmt::format("KVM on this host cannot run a test program: {}", probe.failure),
          .advice =
              "look at the kernel's log (dmesg) for messages of kvm; use a host with VT-x or AMD-V, on bare "
              "metal or as a virtual machine with nested virtualization"};
}

}  // namespace wisp
