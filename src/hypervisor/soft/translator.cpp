#include "hypervisor/soft/translator.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "hypervisor/soft/code_memory.h"
#include "hypervisor/soft/host_faults.h"
#include "hypervisor/soft/host_features.h"
#include "hypervisor/soft/shared_code.h"

namespace wisp::soft {
namespace {

constexpr std::size_t kCodeSize = 64U << 20;
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
  struct Incoming {
    const std::uint8_t* displacement = nullptr;
    std::int32_t unlinked = 0;  // what stood there before
  };
  struct Block {
    std::uint64_t gpa = 0;
    std::uint64_t key = 0;
    std::uint32_t guest_bytes = 0;
    const std::uint8_t* outer = nullptr;
    const std::uint8_t* inner = nullptr;
    const std::uint8_t* way_out = nullptr;
    const std::uint8_t* end = nullptr;
    std::vector<EmittedBlock::FaultSite> fault_sites{};
    std::vector<Incoming> incoming{};
    std::atomic<bool> dead = false;
  };
  // The blocks last asked for, found without a lock: by some bits of their keys. Blocks are taken out of
  // memory only when all processors are known to be elsewhere (make_room()), with `flushing` set before.
  static constexpr std::size_t kQuick = 1U << 15;
  static std::size_t quick_index(std::uint64_t key) { return (key * 0x9e3779b97f4a7c15ULL) >> 49; }

  Impl(SharedCode& shared_code, CodeMemory memory)
      : shared(shared_code),
        code(std::move(memory)),
        quick_loop(shared_code.options().quick_loop.value_or(host_features().quick_loop)) {}

  static std::uint64_t key_of(std::uint64_t gpa, const BlockMode& mode) { return gpa << 6 | mode.key(); }
  [[nodiscard]] Block* translate(const Translation& where, const BlockMode& mode, Cpu& cpu, Mmu& mmu);
  // The block whose code holds an address.
  [[nodiscard]] const Block* block_of(const std::uint8_t* address) const {
    const auto block = std::upper_bound(blocks.begin(), blocks.end(), address,
                                        [](const std::uint8_t* at, const Block& b) { return at < b.end; });
    return block == blocks.end() ? nullptr : &*block;
  }
  void kill(Block& block);
  bool kill_in(std::uint64_t gpa, std::uint64_t size);
  void make_room(Cpu& cpu);

  SharedCode& shared;
  CodeMemory code;
  const bool quick_loop;
  Stubs stubs{};
  std::optional<HostFaultGuard> guard;
  mutable std::mutex mutex;
  std::size_t used = kStubsSize;
  std::unordered_map<std::uint64_t, Block*> by_key;
  std::unordered_map<std::uint64_t, std::vector<Block*>> by_page;
  std::deque<Block> blocks;  // by address of their code
  std::atomic<std::uint64_t> kills = 0;
  std::atomic<std::uint64_t> generation = 1;
  std::atomic<bool> flushing = false;
  std::vector<std::atomic<Block*>> quick = std::vector<std::atomic<Block*>>(kQuick);
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
std::uint64_t Translator::kills() const {
  return impl_->kills.load(std::memory_order_acquire);
}
std::uint64_t Translator::generation() const {
  return impl_->generation.load(std::memory_order_acquire);
}
TranslatorStatistics Translator::statistics() const {
  const std::lock_guard lock(impl_->mutex);
  TranslatorStatistics result = impl_->statistics;
  result.code_bytes = impl_->used;
  return result;
}

TranslatedBlock Translator::find(const Translation& where, const BlockMode& mode, Cpu& cpu, Mmu& mmu) {
  const std::uint64_t key = Impl::key_of(where.gpa, mode);
  std::atomic<Impl::Block*>& quick = impl_->quick[Impl::quick_index(key)];
  if (!impl_->flushing.load(std::memory_order_seq_cst)) {
    const Impl::Block* block = quick.load(std::memory_order_acquire);
    if (block != nullptr && block->key == key && !block->dead.load(std::memory_order_acquire)) {
      return {.outer = block->outer, .inner = block->inner};
    }
  }
  Impl::Block* block = impl_->translate(where, mode, cpu, mmu);
  if (block == nullptr) {
    return {};
  }
  return {.outer = block->outer, .inner = block->inner};
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
  for (std::atomic<Block*>& block : quick) {
    block.store(nullptr, std::memory_order_relaxed);
  }
  by_key.clear();
  by_page.clear();
  blocks.clear();
  used = kStubsSize;
  ++statistics.flushes;
  kills.fetch_add(1, std::memory_order_acq_rel);
  flushing.store(false, std::memory_order_seq_cst);
}

Translator::Impl::Block* Translator::Impl::translate(const Translation& where, const BlockMode& mode,
                                                     Cpu& cpu, Mmu& mmu) {
  const auto begin = std::chrono::steady_clock::now();
  // Decoding reads the page through this: marked as code before it is read.
  struct Source {
    SharedCode& shared;
    const Translation& where;
    Cpu& cpu;
    Mmu& mmu;
    bool locked = false;
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
      return {};  // written meanwhile
    }
    std::memcpy(from.bytes.data(), from.where.page.host + page_offset, size);
    return std::span(from.bytes).first(size);
  };

  {
    const std::lock_guard lock(mutex);
    if (const auto found = by_key.find(key_of(where.gpa, mode)); found != by_key.end() && !flushing) {
      quick[quick_index(found->first)].store(found->second, std::memory_order_release);
      return found->second;
    }
  }
  const std::uint64_t page = where.gpa & ~kPageOffset;
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
        return nullptr;
      }
      std::atomic<Block*>& quick_entry = quick[quick_index(key_of(where.gpa, mode))];
      if (const auto found = by_key.find(key_of(where.gpa, mode)); found != by_key.end()) {
        quick_entry.store(found->second, std::memory_order_release);
        return found->second;
      }
      full = used + BlockEmitter::kRoom > code.size();
      if (!full) {
        code.prepare(used + BlockEmitter::kRoom);
        Emitter out(code.writable() + used, code.executable() + used, BlockEmitter::kRoom);
        EmittedBlock emitted;
        BlockEmitter emitter(out, stubs, mode, shared.options().virtual_clock, quick_loop, fetch, &source);
        if (!emitter.emit(offset, emitted)) {
          return nullptr;
        }
        if (where.page.info->version.load(std::memory_order_acquire) != version) {
          continue;
        }
        Block& block = blocks.emplace_back();
        const std::uint8_t* start = code.executable() + used;
        block.gpa = where.gpa;
        block.key = key_of(where.gpa, mode);
        block.guest_bytes = emitted.guest_bytes;
        block.outer = start + emitted.outer_entry;
        block.inner = start + emitted.inner_entry;
        block.way_out = start + emitted.way_out;
        block.end = start + emitted.size;
        block.fault_sites = std::move(emitted.fault_sites);
        for (auto& site : block.fault_sites) {  // from the start of the cache, as addresses are looked up
          site.begin += static_cast<std::uint32_t>(used);
          site.end += static_cast<std::uint32_t>(used);
        }
        used += (emitted.size + 15U) & ~std::size_t{15};
        by_key.emplace(block.key, &block);
        by_page[page].push_back(&block);
        quick_entry.store(&block, std::memory_order_release);
        ++statistics.blocks;
        statistics.instructions += emitted.instructions;
        statistics.nanoseconds += static_cast<std::uint64_t>(
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin)
                .count());
        return &block;
      }
    }
    make_room(cpu);
    mmu.flush_inline();
    return nullptr;
  }
  return nullptr;
}

bool Translator::link(const std::uint8_t* displacement, const Translation& where, const BlockMode& mode) {
  const std::lock_guard lock(impl_->mutex);
  const auto found = impl_->by_key.find(Impl::key_of(where.gpa, mode));
  if (found == impl_->by_key.end() || impl_->flushing.load(std::memory_order_relaxed)) {
    return false;
  }
  // All who run the source share the jump: it may lead to the same physical page only, whatever lies at the
  // target's linear address for the processor that asks now.
  const Impl::Block* source = impl_->block_of(displacement);
  if (source == nullptr || (source->gpa ^ where.gpa) >= kPageSize) {
    return false;
  }
  Impl::Block& block = *found->second;
  std::uint8_t* write = impl_->code.writable_of(displacement);
  std::int32_t before = 0;
  std::memcpy(&before, write, sizeof before);
  if (displacement + 4 + before == block.inner) {
    return true;  // another processor was first
  }
  block.incoming.push_back({.displacement = displacement, .unlinked = before});
  patch_displacement(write, static_cast<std::int32_t>(block.inner - (displacement + 4)));
  return true;
}

void Translator::Impl::kill(Block& block) {
  block.dead.store(true, std::memory_order_release);
  by_key.erase(block.key);
  patch_entry(code.writable_of(block.outer), block.outer, stubs.miss);
  patch_entry(code.writable_of(block.inner), block.inner, block.way_out);
  for (const Incoming& in : block.incoming) {
    patch_displacement(code.writable_of(in.displacement), in.unlinked);
  }
  block.incoming.clear();
  ++statistics.killed;
}

bool Translator::Impl::kill_in(std::uint64_t gpa, std::uint64_t size) {
  const auto found = by_page.find(gpa & ~kPageOffset);
  if (found == by_page.end()) {
    return false;
  }
  bool killed = false;
  std::erase_if(found->second, [&](Block* block) {
    if (block->gpa >= gpa + size || gpa >= block->gpa + block->guest_bytes) {
      return false;
    }
    kill(*block);
    killed = true;
    return true;
  });
  if (killed) {
    kills.fetch_add(1, std::memory_order_acq_rel);
  }
  return killed;
}

void Translator::code_written(std::uint64_t gpa, std::uint32_t size) {
  const std::lock_guard lock(impl_->mutex);
  (void)impl_->kill_in(gpa, size);
}

void Translator::forget_page(std::uint64_t gpa, std::atomic<std::uint64_t>& lines) {
  // Blocks are made under the same lock, and only while the lines are set.
  const std::lock_guard lock(impl_->mutex);
  (void)impl_->kill_in(gpa, kPageSize);
  lines.store(0, std::memory_order_seq_cst);
}

std::optional<EmittedBlock::FaultSite> Translator::fault_site_of(std::uint64_t host) const {
  if (!impl_->code.holds(host)) {
    return std::nullopt;
  }
  const std::lock_guard lock(impl_->mutex);
  // Addresses of generated code come as numbers. NOLINTNEXTLINE(performance-no-int-to-ptr)
  const auto* address = reinterpret_cast<const std::uint8_t*>(host);
  const Impl::Block* block = impl_->block_of(address);
  if (block == nullptr) {
    return std::nullopt;
  }
  const auto offset = static_cast<std::uint32_t>(address - impl_->code.executable());
  for (const auto& site : block->fault_sites) {
    if (offset >= site.begin && offset < site.end) {
      return site;
    }
  }
  return std::nullopt;
}

}  // namespace wisp::soft
