#include "hypervisor/soft/stepper.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "hypervisor/soft/fpu_environment.h"
#include "hypervisor/soft/host_features.h"

namespace wisp::soft {
namespace {

constexpr std::size_t kCodeSize = 4U << 20;
constexpr std::size_t kThunkRoom = 256;  // more than one instruction ever takes
constexpr std::size_t kCacheEntries = 8192;
constexpr std::size_t kCrossingEntries = 512;

// Whether an unmasked exception of the store that was just run keeps its result back: all but that of an
// inexact result do (SDM volume 1, 8.5).
bool x87_store_is_held_back(const Cpu& cpu) {
  constexpr std::uint8_t kAllButPrecision = 0x1f;
  return x87_exception_pending(cpu) && (cpu.vectors[2] & ~cpu.vectors[0] & kAllButPrecision) != 0;
}

// Whether the instruction raises #MF where an x87 exception is pending.
bool waits_for_x87(const Insn& insn) {
  if (insn.vector_use == VectorUse::kX87) {
    const bool stores_word = insn.reg_field() == 7 && (insn.opcode == 0xd9 || insn.opcode == 0xdd);
    return !stores_word;  // FNSTCW, FNSTSW
  }
  // CVTPI2PS and CVTPI2PD from memory do not wait.
  return insn.reg_class == OperandClass::kMmx || (insn.rm_class == OperandClass::kMmx && insn.opcode != 0x2a);
}

}  // namespace

std::size_t Stepper::KeyHash::operator()(const Key& key) const {
  std::uint64_t halves[2];
  std::memcpy(halves, key.bytes.data(), sizeof halves);
  return (halves[0] ^ (halves[1] * 0x9e3779b97f4a7c15ULL)) * 0xff51afd7ed558ccdULL >> 7;
}

Stepper::Stepper(Core core, SharedCode& shared, CodeMemory memory)
    : core_(core),
      shared_(shared),
      code_(std::move(memory)),
      cache_(kCacheEntries),
      crossings_(kCrossingEntries) {}

Result<std::unique_ptr<Stepper>> Stepper::create(Core core, SharedCode& shared) {
  if (!host_features().x86_64_v2) {
    return fail("the software CPU needs a host processor with at least x86-64-v2 (SSE4.2, POPCNT, XSAVE)");
  }
  WISP_ASSIGN(CodeMemory memory, CodeMemory::create(kCodeSize));
  std::unique_ptr<Stepper> stepper(new Stepper(core, shared, std::move(memory)));
  Emitter out(stepper->code_.writable(), stepper->code_.executable(), kPageSize);
  stepper->trampolines_ = emit_trampolines(out);
  stepper->code_floor_ = stepper->code_used_ = kPageSize;
  WISP_ASSIGN(auto guard, HostFaultGuard::create(stepper->code_, stepper->trampolines_));
  stepper->guard_.emplace(std::move(guard));
  return stepper;
}

CodeSize Stepper::code_size() const {
  const Segment& cs = core_.cpu.segments[kCs];
  if (core_.cpu.long_mode() && cs.long_mode()) {
    return CodeSize::k64;
  }
  return cs.big() ? CodeSize::k32 : CodeSize::k16;
}

// Instructions in `size` bytes are about to be read and kept; returns the version of their page, 0 where
// nothing watches.
std::uint32_t Stepper::watch(const Translation& where, std::uint32_t size) {
  if (where.page.info == nullptr) {
    return 0;
  }
  // In this order: see PhysicalMemory::forget_code().
  const std::uint32_t version = where.page.info->version.load(std::memory_order_acquire);
  shared_.watch_code(where.page, where.gpa, size, core_.cpu, core_.mmu);
  return version;
}

// Finds the instruction at rip, decoded.
bool Stepper::fetch(Cached*& found) {
  Cpu& cpu = core_.cpu;
  const CodeSize size = code_size();
  std::uint64_t linear = cpu.rip;
  if (size != CodeSize::k64) {
    const Segment& cs = cpu.segments[kCs];
    if (cpu.rip > cs.limit) {
      return cpu.raise(vec::kGp, 0);
    }
    linear = (cs.base + cpu.rip) & 0xffffffff;
  } else if (!canonical(linear)) {
    return cpu.raise(vec::kGp, 0);
  }
  Translation where;
  if (!core_.mmu.translate(linear, Access::kExecute, As::kCode, where)) {
    return false;
  }
  if (!where.page) {
    core_.env.note(fmt::format("instruction fetch from {:#x}, where there is no memory", where.gpa));
    return cpu.raise(vec::kUd);
  }
  Cached& entry = cache_[(where.gpa ^ (where.gpa >> 13)) % kCacheEntries];
  if (entry.gpa == where.gpa && entry.code_size == size &&
      entry.page_version->load(std::memory_order_acquire) == entry.version) {
    found = &entry;
    return true;
  }
  const std::uint64_t offset = where.gpa & kPageOffset;
  const auto room = static_cast<std::uint32_t>(std::min<std::uint64_t>(kPageSize - offset, kMaxInsnLength));
  if (room < kMaxInsnLength) {
    const Cached& crossing = crossings_[(where.gpa >> 12) % kCrossingEntries].first;
    if (crossing.gpa == where.gpa && crossing.code_size == size &&
        crossing.page_version->load(std::memory_order_acquire) == crossing.version) {
      return fetch_across(linear, where, size, found);
    }
  }
  const std::uint32_t version = watch(where, room);
  std::array<std::uint8_t, kMaxInsnLength> bytes{};
  std::memcpy(bytes.data(), where.page.host + offset, room);
  Cached& target = where.page.info != nullptr ? entry : uncached_;
  target.gpa = ~0ULL;
  const DecodeResult result = decode(std::span(bytes.data(), room), size, target.insn);
  if (result == DecodeResult::kTooLong) {
    return cpu.raise(vec::kGp, 0);
  }
  if (result == DecodeResult::kTruncated) {
    return fetch_across(linear, where, size, found);
  }
  target.thunk = nullptr;
  target.code_size = size;
  if (where.page.info != nullptr) {
    target.gpa = where.gpa;
    target.page_version = &where.page.info->version;
    target.version = version;
  }
  found = &target;
  return true;
}

// An instruction that goes on in the next page.
bool Stepper::fetch_across(std::uint64_t linear, const Translation& first, CodeSize size, Cached*& found) {
  const auto part = static_cast<std::uint32_t>(kPageSize - (linear & kPageOffset));
  std::uint64_t next = linear + part;
  if (size != CodeSize::k64) {
    next &= 0xffffffff;
  }
  Translation second;
  if (!core_.mmu.translate(next, Access::kExecute, As::kCode, second)) {
    return false;
  }
  if (!second.page) {
    return core_.cpu.raise(vec::kUd);
  }
  Crossing& crossing = crossings_[(first.gpa >> 12) % kCrossingEntries];
  Cached& cached = crossing.first;
  if (cached.gpa == first.gpa && cached.code_size == size && crossing.second_gpa == second.gpa &&
      cached.page_version->load(std::memory_order_acquire) == cached.version &&
      crossing.second_version->load(std::memory_order_acquire) == crossing.version) {
    found = &cached;
    return true;
  }
  cached.gpa = ~0ULL;
  const std::uint32_t version = watch(first, part);
  const std::uint32_t second_version = watch(second, kMaxInsnLength - part);
  std::array<std::uint8_t, kMaxInsnLength> bytes{};
  std::memcpy(bytes.data(), first.page.host + (first.gpa & kPageOffset), part);
  std::memcpy(bytes.data() + part, second.page.host, kMaxInsnLength - part);
  const bool watched = first.page.info != nullptr && second.page.info != nullptr;
  Cached& target = watched ? cached : uncached_;
  target.thunk = nullptr;
  if (decode(bytes, size, target.insn) != DecodeResult::kDone) {
    return core_.cpu.raise(vec::kGp, 0);
  }
  if (watched) {
    cached.gpa = first.gpa;
    cached.page_version = &first.page.info->version;
    cached.version = version;
    cached.code_size = size;
    crossing.second_gpa = second.gpa;
    crossing.second_version = &second.page.info->version;
    crossing.version = second_version;
  }
  found = &target;
  return true;
}

Outcome Stepper::step() {
  Cached* found = nullptr;
  if (!fetch(found)) {
    return Outcome::kFault;
  }
  if (found->thunk_age != thunk_age_) {
    found->thunk = nullptr;
    found->thunk_age = thunk_age_;
  }
  last_ = &found->insn;
  return run(found->insn, &found->thunk);
}

Outcome Stepper::execute(const std::uint8_t* decoded) {
  std::memcpy(&uncached_.insn, decoded, sizeof uncached_.insn);
  last_ = &uncached_.insn;
  const std::uint8_t* thunk = nullptr;
  return run(uncached_.insn, &thunk);
}

Outcome Stepper::run(const Insn& insn, const std::uint8_t** thunk) {
  Cpu& cpu = core_.cpu;
  const std::uint8_t shadow = cpu.interrupt_shadow;
  const bool resume = (cpu.other_flags & flag::kRf) != 0;
  cpu.interrupt_shadow = 0;
  cpu.io.answers_used = 0;
  Outcome outcome = Outcome::kNext;
  if (insn.op == Op::kNative) {
    outcome = native(insn, thunk);
  } else if (group_of(insn.op) == OpGroup::kNone) {
    outcome = insn.op == Op::kNop ? Outcome::kNext : undefined(insn);
  } else if (group_of(insn.op) == OpGroup::kVector && insn.op != Op::kMaskMoveBytes &&
             !host_features().has(insn.feature)) {
    outcome = undefined(insn);
  } else {
    outcome = execute_by_group(core_, insn);
  }
  switch (outcome) {
    case Outcome::kNext:
    case Outcome::kHalt:
      cpu.rip += insn.length;
      if (!cpu.code64()) {
        cpu.rip &= cpu.segments[kCs].big() ? 0xffffffff : 0xffff;
      }
      break;
    case Outcome::kIo:
      cpu.interrupt_shadow = shadow;
      return outcome;
    case Outcome::kFault:
      cpu.io.answer_count = 0;
      return outcome;
    default:
      break;
  }
  cpu.io.answer_count = 0;
  // Of loads of SS in a row only the first holds interrupts back (SDM volume 2, MOV), or a guest of nothing
  // else could never be stopped.
  cpu.interrupt_shadow = static_cast<std::uint8_t>(cpu.interrupt_shadow & ~(shadow & 2U));
  --cpu.instructions_left;
  // RF holds for all of a repeated instruction (SDM volume 3, 17.3.1.1).
  const bool repeats = outcome == Outcome::kJump && group_of(insn.op) == OpGroup::kString;
  if (resume && insn.op != Op::kInterruptReturn && !repeats) {
    cpu.other_flags &= ~flag::kRf;
  }
  return outcome;
}

Outcome Stepper::undefined(const Insn& insn) {
  if (insn.op != Op::kUndefined) {
    std::string bytes;
    for (std::size_t i = 0; i < insn.length; ++i) {
      bytes += fmt::format(" {:02x}", insn.bytes[i]);
    }
    core_.env.note(
        fmt::format("an instruction that this processor does not have at {:#x}:{}", core_.cpu.rip, bytes));
  }
  (void)core_.cpu.raise(vec::kUd);
  return Outcome::kFault;
}

void Stepper::forget_thunks() {
  thunks_.clear();
  code_used_ = code_floor_;
  ++thunk_age_;
}

const std::uint8_t* Stepper::thunk_for(const Insn& insn) {
  Key key;
  std::copy_n(insn.bytes.begin(), insn.length, key.bytes.begin());
  // The last byte tells the length and the code size, which give the bytes their meaning.
  key.bytes[15] = static_cast<std::uint8_t>(insn.length | insn.operand_size << 4);
  if (const auto found = thunks_.find(key); found != thunks_.end()) {
    return found->second;
  }
  if (code_used_ + kThunkRoom > code_.size()) {
    forget_thunks();
  }
  Emitter out(code_.writable() + code_used_, code_.executable() + code_used_, kThunkRoom);
  const std::uint8_t* code = out.here();
  if (insn.vector_use != VectorUse::kNone) {
    out.call(trampolines_.load_vectors);
    if (insn.memory) {
      out.load(kAddress, offset32(offsetof(Cpu, scratch)) + 8);
    }
  }
  emit_native(out, insn, MemoryForm::kAddressOnly);
  out.constant(kAddress, 0);
  out.jump(trampolines_.leave);
  code_used_ += (out.size() + 15) & ~std::size_t{15};
  thunks_.emplace(key, code);
  return code;
}

Outcome Stepper::enter(const std::uint8_t* code) {
  const std::uint64_t result = enter_code(trampolines_, core_.cpu, code);
  if (result == 0) [[likely]] {
    return Outcome::kNext;
  }
  const auto vector = static_cast<std::uint8_t>(result - kHostFault);
  if (vector == vec::kGp) {
    (void)core_.cpu.raise(vec::kGp, 0);
  } else {
    (void)core_.cpu.raise(vector);
  }
  return Outcome::kFault;
}

Outcome Stepper::native(const Insn& insn, const std::uint8_t** thunk) {
  if (insn.feature != Feature::kBase && !host_features().has(insn.feature)) {
    return undefined(insn);
  }
  if (insn.vector_use != VectorUse::kNone && !vector_allowed(core_.cpu, insn.vector_use)) {
    return Outcome::kFault;
  }
  // Where both would fault, a pending x87 exception comes before the operand.
  if (insn.memory && waits_for_x87(insn) && x87_exception_pending(core_.cpu)) {
    (void)core_.cpu.raise(vec::kMf);
    return Outcome::kFault;
  }
  if (*thunk == nullptr) {
    *thunk = thunk_for(insn);
  }
  return insn.memory ? native_on_memory(insn, *thunk) : enter(*thunk);
}

// The operand's fault is set. But an exception of a store's own operation comes before it, and an x87 store
// with an unmasked one stores nothing.
Outcome Stepper::operand_faulted(const Insn& insn, const std::uint8_t* code) {
  const bool stores = (insn.rm_access & kWrites) != 0;
  if (!stores || (insn.vector_use != VectorUse::kX87 && insn.feature != Feature::kF16c)) {
    return Outcome::kFault;
  }
  Cpu& cpu = core_.cpu;
  const Fault fault = cpu.fault;
  const auto vectors = cpu.vectors;
  alignas(64) std::array<std::uint8_t, 64> nowhere{};
  cpu.scratch[1] = reinterpret_cast<std::uint64_t>(nowhere.data());
  const Outcome outcome = enter(code);
  if (outcome != Outcome::kNext) {
    return outcome;
  }
  if (insn.vector_use == VectorUse::kX87 && waits_for_x87(insn) && x87_store_is_held_back(cpu)) {
    return Outcome::kNext;
  }
  cpu.vectors = vectors;
  cpu.fault = fault;
  return Outcome::kFault;
}

Outcome Stepper::native_on_memory(const Insn& insn, const std::uint8_t* code) {
  Cpu& cpu = core_.cpu;
  Mmu& mmu = core_.mmu;
  const std::uint32_t size = insn.memory_size;
  const bool writes = (insn.rm_access & kWrites) != 0;
  const Access access = writes ? Access::kWrite : Access::kRead;
  std::uint64_t linear = 0;
  if (!linear_address(cpu, static_cast<SegmentId>(insn.segment), effective_address(cpu, insn), size, access,
                      linear)) {
    // #GP of a misaligned operand comes before #SS.
    const std::uint64_t base = insn.segment >= kFs ? cpu.segments[insn.segment].base : 0;
    if (insn.alignment_16 && cpu.code64() && (base + effective_address(cpu, insn)) % size != 0) {
      (void)cpu.raise(vec::kGp, 0);
    }
    return operand_faulted(insn, code);
  }
  if (insn.alignment_16 && linear % size != 0) {
    (void)cpu.raise(vec::kGp, 0);
    return Outcome::kFault;
  }
  cpu.fault.vector = 0xff;
  if (std::uint8_t* host = mmu.pin(linear, size, access)) {
    cpu.scratch[1] = reinterpret_cast<std::uint64_t>(host);
    const Outcome outcome = enter(code);
    if (writes && outcome == Outcome::kNext) {
      mmu.wrote(linear, size);
    }
    return outcome;
  }
  if (cpu.fault.vector != 0xff) {
    return operand_faulted(insn, code);
  }
  // Across pages, or a device.
  if (writes && !mmu.probe(linear, size, Access::kWrite)) {
    return operand_faulted(insn, code);
  }
  alignas(64) std::array<std::uint8_t, 64> staging{};
  // An x87 store with an unmasked exception stores nothing.
  const bool reads = !writes || (insn.rm_access & kReads) != 0 || insn.vector_use == VectorUse::kX87;
  if (reads && !mmu.read(linear, staging.data(), size)) {
    return mmu.stopped();
  }
  cpu.scratch[1] = reinterpret_cast<std::uint64_t>(staging.data());
  const Outcome outcome = enter(code);
  if (outcome == Outcome::kNext && writes && !mmu.write(linear, staging.data(), size)) {
    return mmu.stopped();
  }
  return outcome;
}

}  // namespace wisp::soft
