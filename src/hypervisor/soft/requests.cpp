#include "hypervisor/soft/requests.h"

#include <sched.h>
#include <x86intrin.h>

#include <algorithm>

namespace wisp::soft {
namespace {

// Turns before the thread gives its processor away: the other one may wait for it.
constexpr std::uint32_t kSpins = 200;

}  // namespace

void Requests::serve(Party& party, std::uint32_t which) {
  const std::uint32_t bits = party.cpu->requests.load(std::memory_order_acquire) & which;
  if (bits != 0) {
    party.serve(bits);
    // Cleared afterwards: a clear bit says done. One that was asked again in between is done too, since
    // nothing was cached meanwhile.
    party.cpu->requests.fetch_and(~bits, std::memory_order_acq_rel);
  }
}

void Requests::enter(Party& party) {
  // Against shoot_down(): either it sees in_guest and waits, or the bits are seen here.
  party.in_guest.store(true, std::memory_order_seq_cst);
  while (party.cpu->requests.load(std::memory_order_seq_cst) != 0) {
    serve(party, ~0U);
  }
}

void Requests::wait_a_turn(Party* own, std::uint32_t& turns) {
  if (own != nullptr) {
    serve(*own, kFlushInline | kRevokeWrites);
  }
  if (++turns > kSpins) {
    ::sched_yield();
  } else {
    _mm_pause();
  }
}

void Requests::wait_a_turn(const Cpu* self, std::uint32_t& turns) const {
  wait_a_turn(party_of(self), turns);
}

Requests::Party* Requests::party_of(const Cpu* cpu) const {
  const auto found = std::ranges::find(parties_, cpu, [](const Party* party) { return party->cpu; });
  return found != parties_.end() ? *found : nullptr;
}

void Requests::shoot_down(std::uint32_t bits, const Cpu* self) const {
  Party* const own = party_of(self);
  for (Party* party : parties_) {
    if (party == own) {
      continue;
    }
    party->cpu->requests.fetch_or(bits, std::memory_order_seq_cst);
    party->wake();
  }
  for (const Party* party : parties_) {
    if (party == own) {
      continue;
    }
    std::uint32_t turns = 0;
    while (party->in_guest.load(std::memory_order_seq_cst) &&
           (party->cpu->requests.load(std::memory_order_acquire) & bits) != 0) {
      wait_a_turn(own, turns);
    }
  }
}

}  // namespace wisp::soft
