#include "hypervisor/soft/translator.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <vector>

#include "hypervisor/soft/block_table.h"
#include "hypervisor/soft/code_memory.h"
#include "hypervisor/soft/host_faults.h"
#include "hypervisor/soft/host_features.h"
#include "hypervisor/soft/shared_code.h"

namespace wisp::soft {
namespace {

constexpr std::size_t kCodeSize = 64U << 20;
constexpr std::size_t kColdStart = 40U << 20;  // of the code that hardly ever runs
constexpr std::size_t kStubsSize = 8192;

// A jump of five bytes that replaces the start of an entry, in one store.
void patch_entry(std::uint8_t* write, const std::uint8_t* run, const std::uint8_t* target) {
  std::uint64_t word = 0;
  std::memcpy(&word, write, sizeof word);
  const auto distance = static_cast<std::uint32_t>(target - (run + 5));
  word = (word & 0xffffff0000000000ULL) | 0xe9U | std::uint64_t{distance} << 8;
  __atomic_store_n(reinterpret_cast<std::uint64_t*>(write), word, __ATOMIC_RELEASE);
}

void patch_displacement(std::uint8_t* write, std::int32_t distance) {
  __atomic_store_n(reinterpret_cast<std::int32_t*>(write), distance, __ATOMIC_RELEASE);
}

using Call = const std::uint8_t* (*)(Cpu*, const CallSite*, std::uint64_t, std::uint64_t);

// The stub through which generated code calls back: guest state goes to the Cpu, the function runs on the
// host's own stack, and its result is where generated code goes on, with cpu.scratch[1] in kAddress.
const std::uint8_t* emit_call_stub(Emitter& out, const Trampolines& trampolines, Call function, bool called) {
  constexpr std::int32_t kScratch = offset32(offsetof(Cpu, scratch));
  const std::uint8_t* stub = out.here();
  if (called) {
    out.byte(0x59);  // pop rcx
    out.store(kScratch, kTemp);
  }
  out.load(kAddend, offset32(offsetof(Cpu, vectors_here)));
  out.call(trampolines.spill);
  out.move(HostReg::kRdi, HostReg::kRsp);
  out.load(HostReg::kRsi, kScratch);
  out.move(HostReg::kRdx, kAddress);
  out.move(HostReg::kRcx, kAddend);
  out.load(HostReg::kRsp, offset32(offsetof(Cpu, host_rsp)));
  out.constant(HostReg::kRax, reinterpret_cast<std::uint64_t>(function));
  out.byte(0xff);  // call rax
  out.byte(0xd0);
  out.byte(0x48);  // mov rsp, [rsp]
  out.byte(0x8b);
  out.byte(0x24);
  out.byte(0x24);
  out.store(kScratch, HostReg::kRax);
  out.load(kTemp, kScratch + 16);
  const std::size_t away = out.jump_if_temp_zero();
  out.call(trampolines.load_vectors);
  out.place_short(away);
  out.load(kAddress, kScratch + 8);
  out.call(trampolines.reload);
  out.byte(0xff);  // jmp [rsp + scratch]
  out.memory(4, HostReg::kRsp, kScratch);
  return stub;
}

Stubs emit_stubs(Emitter& out) {
  Stubs stubs;
  stubs.trampolines = emit_trampolines(out);
  stubs.slow = emit_call_stub(out, stubs.trampolines, RunnerCalls::slow, true);
  stubs.special = emit_call_stub(out, stubs.trampolines, RunnerCalls::special, true);
  stubs.link = emit_call_stub(out, stubs.trampolines, RunnerCalls::link, true);
  stubs.miss = emit_call_stub(out, stubs.trampolines, RunnerCalls::miss, false);
  stubs.miss_of_jump = emit_call_stub(out, stubs.trampolines, RunnerCalls::miss_of_jump, true);
  stubs.leave_to_step = out.here();
  out.store_constant(offset32(offsetof(Cpu, step_next)), 1);
  stubs.leave_at = out.here();
  out.load(kTemp, offset32(offsetof(Cpu, page_address)));
  out.lea(kTemp, kTemp, kAddress, 0, 0);
  out.store(offset32(offsetof(Cpu, rip)), kTemp);
  stubs.out = out.here();
  out.constant(kAddress, 0);
  out.jump(stubs.trampolines.leave);
  return stubs;
}

}  // namespace

struct Translator::Impl {
  Impl(SharedCode& shared_code, CodeMemory memory)
      : shared(shared_code),
        code(std::move(memory)),
        quick_loop(shared_code.options().quick_loop.value_or(host_features().quick_loop)) {}

  static std::uint64_t key_of(std::uint64_t gpa, const BlockMode& mode) { return gpa << 6 | mode.key(); }
  // Zeros where nothing can be translated now.
  [[nodiscard]] BlockEntries translate(const Translation& where, const BlockMode& mode, Cpu& cpu, Mmu& mmu);
  BlockEntries keep(const EmittedBlock& emitted, std::uint64_t gpa, const BlockMode& mode);
  void kill_in(std::uint64_t gpa, std::uint64_t size);
  void make_room(Cpu& cpu);

  SharedCode& shared;
  CodeMemory code;
  const bool quick_loop;
  Stubs stubs{};
  std::optional<HostFaultGuard> guard;
  mutable std::mutex mutex;
  // Up to where the two parts of the code memory are used, and up to where the host has provided them.
  struct Part {
    std::size_t used = 0;
    std::size_t end = 0;
    std::size_t prepared = 0;
  };
  Part straight{.used = kStubsSize, .end = kColdStart};
  Part cold{.used = kColdStart, .end = kCodeSize, .prepared = kColdStart};
  [[nodiscard]] Emitter room_in(Part& part) {
    code.prepare(part.prepared, part.used + BlockEmitter::kRoom);
    return {code.writable() + part.used, code.executable() + part.used, BlockEmitter::kRoom};
  }
  // Found without the lock. Blocks are taken out of memory only when all processors are known to be elsewhere
  // (make_room()), with `flushing` set before.
  BlockTable blocks{};
  std::vector<EmittedBlock::FaultSite> fault_sites{};  // offsets from the start of the code memory, ascending
  BlockScratch scratch{};
  std::atomic<std::uint64_t> kills = 0;
  std::atomic<std::uint64_t> generation = 1;
  std::atomic<bool> flushing = false;
  TranslatorStatistics statistics{};
};

bool Translator::possible() {
  return host_features().has(Feature::kBmi2) && host_features().has(Feature::kBmi1);
}

Result<std::unique_ptr<Translator>> Translator::create(SharedCode& shared) {
  WISP_ASSIGN(CodeMemory memory, CodeMemory::create(kCodeSize));
  auto impl = std::make_unique<Impl>(shared, std::move(memory));
  Emitter out(impl->code.writable(), impl->code.executable(), kStubsSize);
  impl->stubs = emit_stubs(out);
  WISP_ASSIGN(auto guard, HostFaultGuard::create(impl->code, impl->stubs.trampolines));
  impl->guard.emplace(std::move(guard));
  return std::unique_ptr<Translator>(new Translator(std::move(impl)));
}

Translator::Translator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Translator::~Translator() = default;

const Stubs& Translator::stubs() const {
  return impl_->stubs;
}
std::uint64_t Translator::tag_bias() const {
  return impl_->quick_loop ? kPageSize : 0;
}
std::uint64_t Translator::kills() const {
  return impl_->kills.load(std::memory_order_acquire);
}
std::uint64_t Translator::generation() const {
  return impl_->generation.load(std::memory_order_acquire);
}
TranslatorStatistics Translator::statistics() const {
  const std::lock_guard lock(impl_->mutex);
  TranslatorStatistics result = impl_->statistics;
  result.code_bytes = impl_->straight.used + impl_->cold.used - kColdStart;
  return result;
}

TranslatedBlock Translator::find(const Translation& where, const BlockMode& mode, Cpu& cpu, Mmu& mmu) {
  BlockEntries entries;
  if (!impl_->flushing.load(std::memory_order_seq_cst)) {
    entries = impl_->blocks.entries(Impl::key_of(where.gpa, mode));
  }
  if (entries.outer == 0) {
    entries = impl_->translate(where, mode, cpu, mmu);
  }
  if (entries.outer == 0) {
    return {};
  }
  const std::uint8_t* start = impl_->code.executable();
  return {.outer = start + entries.outer, .inner = start + entries.inner};
}

// Throws everything away, once nobody runs it.
void Translator::Impl::make_room(Cpu& cpu) {
  {
    const std::lock_guard lock(mutex);
    if (flushing.load(std::memory_order_relaxed)) {
      return;
    }
    flushing.store(true, std::memory_order_seq_cst);
    generation.fetch_add(1, std::memory_order_acq_rel);
  }
  // Everybody else leaves translated code, or finds the generation changed before going back to it.
  shared.flush_inline(&cpu);
  const std::lock_guard lock(mutex);
  blocks.clear();
  fault_sites.clear();
  straight.used = kStubsSize;
  cold.used = kColdStart;
  ++statistics.flushes;
  kills.fetch_add(1, std::memory_order_acq_rel);
  flushing.store(false, std::memory_order_seq_cst);
}

// The block that was just emitted behind all others.
BlockEntries Translator::Impl::keep(const EmittedBlock& emitted, std::uint64_t gpa, const BlockMode& mode) {
  TableBlock& block = blocks.make();
  const auto start = static_cast<std::uint32_t>(straight.used);
  block.gpa = gpa;
  block.key = key_of(gpa, mode);
  block.guest_bytes = emitted.guest_bytes;
  block.entries = {.outer = start + emitted.outer_entry, .inner = start + emitted.inner_entry};
  block.way_out = code.executable() + cold.used + emitted.way_out;
  for (EmittedBlock::FaultSite site : scratch.fault_sites) {
    site.begin += start;
    site.end += start;
    fault_sites.push_back(site);
  }
  straight.used += (emitted.size + 15U) & ~std::size_t{15};
  cold.used += (emitted.cold_size + 15U) & ~std::size_t{15};
  blocks.add(block);
  ++statistics.blocks;
  statistics.instructions += emitted.instructions;
  return block.entries;
}

BlockEntries Translator::Impl::translate(const Translation& where, const BlockMode& mode, Cpu& cpu,
                                         Mmu& mmu) {
  using Clock = std::chrono::steady_clock;
  const bool timed = shared.options().statistics;
  const Clock::time_point begin = timed ? Clock::now() : Clock::time_point();
  // Decoding reads the page through this: marked as code before it is read.
  struct Source {
    SharedCode& shared;
    const Translation& where;
    Cpu& cpu;
    Mmu& mmu;
    bool locked = false;
    bool lost = false;  // written, or about to be watched by another processor, while it was read
    std::array<std::uint8_t, kMaxInsnLength> bytes{};
  } source{shared, where, cpu, mmu};
  const auto fetch = [](void* context, std::uint32_t page_offset) -> std::span<const std::uint8_t> {
    auto& from = *static_cast<Source*>(context);
    const auto size =
        std::min<std::uint32_t>(static_cast<std::uint32_t>(kPageSize) - page_offset, kMaxInsnLength);
    const std::uint64_t gpa = (from.where.gpa & ~kPageOffset) + page_offset;
    if (!from.locked) {
      from.shared.watch_code(from.where.page, gpa, size, from.cpu, from.mmu);
    } else if (!SharedCode::watch_more(from.where.page, gpa, size)) {
      from.lost = true;
      return {};
    }
    std::memcpy(from.bytes.data(), from.where.page.host + page_offset, size);
    return std::span(from.bytes).first(size);
  };

  const auto offset = static_cast<std::uint32_t>(where.gpa & kPageOffset);
  for (int attempt = 0; attempt < 3; ++attempt) {
    // The first look makes the page code, outside of the lock: others may have to be told.
    source.locked = false;
    (void)fetch(&source, offset);
    source.locked = true;
    const std::uint32_t version = where.page.info->version.load(std::memory_order_acquire);
    bool full = false;
    {
      const std::lock_guard lock(mutex);
      if (flushing.load(std::memory_order_relaxed)) {
        return {};
      }
      if (const BlockEntries found = blocks.entries(key_of(where.gpa, mode)); found.outer != 0) {
        return found;  // another processor was first
      }
      full = straight.used + BlockEmitter::kRoom > straight.end ||
             cold.used + BlockEmitter::kRoom > cold.end || blocks.full();
      if (!full) {
        Emitter straight_out = room_in(straight);
        Emitter cold_out = room_in(cold);
        BlockEmitter emitter(straight_out, cold_out, stubs, mode, shared.options().virtual_clock, quick_loop,
                             scratch, fetch, &source);
        EmittedBlock emitted;
        if (!emitter.emit(where.gpa, emitted) || source.lost) {
          return {};
        }
        if (where.page.info->version.load(std::memory_order_acquire) != version) {
          continue;
        }
        const BlockEntries entries = keep(emitted, where.gpa, mode);
        if (timed) {
          statistics.nanoseconds +=
              static_cast<std::uint64_t>(std::chrono::nanoseconds(Clock::now() - begin).count());
        }
        return entries;
      }
    }
    make_room(cpu);
    mmu.flush_inline();
    return {};
  }
  return {};
}

bool Translator::link(const std::uint8_t* displacement, std::uint64_t source_page, const Translation& where,
                      const BlockMode& mode) {
  // All who run the source share the jump: it may lead to the same physical page only, whatever lies at the
  // target's linear address for the processor that asks now.
  if ((source_page ^ where.gpa) >= kPageSize) {
    return false;
  }
  const std::lock_guard lock(impl_->mutex);
  TableBlock* block = impl_->blocks.find(Impl::key_of(where.gpa, mode));
  if (block == nullptr || impl_->flushing.load(std::memory_order_relaxed)) {
    return false;
  }
  std::uint8_t* write = impl_->code.writable_of(displacement);
  std::int32_t before = 0;
  std::memcpy(&before, write, sizeof before);
  const std::uint8_t* inner = impl_->code.executable() + block->entries.inner;
  if (displacement + 4 + before == inner) {
    return true;  // another processor was first
  }
  block->incoming.push_back({.displacement = displacement, .unlinked = before});
  patch_displacement(write, static_cast<std::int32_t>(inner - (displacement + 4)));
  return true;
}

void Translator::Impl::kill_in(std::uint64_t gpa, std::uint64_t size) {
  const bool any = blocks.take_out(gpa, size, [this](TableBlock& block) {
    patch_entry(code.writable() + block.entries.outer, code.executable() + block.entries.outer, stubs.miss);
    patch_entry(code.writable() + block.entries.inner, code.executable() + block.entries.inner,
                block.way_out);
    for (const TableBlock::Incoming& in : block.incoming) {
      patch_displacement(code.writable_of(in.displacement), in.unlinked);
    }
    block.incoming = {};  // its memory, too: the block stays for long
    ++statistics.killed;
  });
  if (any) {
    kills.fetch_add(1, std::memory_order_acq_rel);
  }
}

void Translator::code_written(std::uint64_t gpa, std::uint32_t size) {
  const std::lock_guard lock(impl_->mutex);
  impl_->kill_in(gpa, size);
}

void Translator::forget_page(std::uint64_t gpa, std::atomic<std::uint64_t>& lines) {
  // Blocks are made under the same lock, and only while the lines are set.
  const std::lock_guard lock(impl_->mutex);
  impl_->kill_in(gpa, kPageSize);
  lines.store(0, std::memory_order_seq_cst);
}

std::optional<EmittedBlock::FaultSite> Translator::fault_site_of(std::uint64_t host) const {
  if (!impl_->code.holds(host)) {
    return std::nullopt;
  }
  const std::lock_guard lock(impl_->mutex);
  const auto offset =
      static_cast<std::uint32_t>(host - reinterpret_cast<std::uint64_t>(impl_->code.executable()));
  const auto site = std::ranges::upper_bound(impl_->fault_sites, offset, {}, &EmittedBlock::FaultSite::end);
  if (site == impl_->fault_sites.end() || offset < site->begin) {
    return std::nullopt;
  }
  return *site;
}

}  // namespace wisp::soft
