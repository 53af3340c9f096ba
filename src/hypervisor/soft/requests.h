// What one thread asks of processors that run on others: to drop what they have cached.
//
// Whoever changes something that processors cache (the map of memory, a page's code, the dirty log) changes
// it first and then shoots down; when shoot_down() returns, no processor uses what it knew before, and those
// outside of guest code drop it before they enter.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "hypervisor/soft/cpu.h"

namespace wisp::soft {

// Bits of Cpu::requests.
enum Request : std::uint32_t {
  // All that was cached of memory. Served between instructions only: an instruction that began before may
  // still use host addresses that it looked up.
  kFlushMemory = 1U << 0,
  // The in-line TLB and the jump entries. Also served by a processor that is itself in shoot_down(), or in
  // wait_a_turn().
  kFlushInline = 1U << 1,
  // Write access in line; served like kFlushInline.
  kRevokeWrites = 1U << 2,
};

// The processors of one VM. They are added before any of them runs, and must outlive it.
class Requests final {
 public:
  struct Party {
    Cpu* cpu = nullptr;
    // Makes the processor look at its requests soon; from any thread.
    std::function<void()> wake{};
    // Does what the bits ask; on the processor's own thread.
    std::function<void(std::uint32_t bits)> serve{};
    // Set by the processor's thread around guest code, by enter() and leave().
    std::atomic<bool> in_guest = false;
  };

  void add(Party* party) { parties_.push_back(party); }

  // By the processor's thread, around each stretch of guest code: serves what was asked until then.
  static void enter(Party& party);
  static void leave(Party& party) { party.in_guest.store(false, std::memory_order_release); }

  // Asks `bits` of every processor but `self` (null: of all), and returns when each has done it or is outside
  // of guest code. By any thread; by a processor's own thread in the middle of an instruction only with
  // kFlushInline or kRevokeWrites, and without a lock that another processor may wait for inside guest code.
  void shoot_down(std::uint32_t bits, const Cpu* self) const;
  // By the thread of `self`, time and again while it waits for another one that may be in shoot_down():
  // serves kFlushInline and kRevokeWrites, and gives the host's processor away before long. `turns` is 0 at
  // first.
  void wait_a_turn(const Cpu* self, std::uint32_t& turns) const;

 private:
  [[nodiscard]] Party* party_of(const Cpu* cpu) const;
  static void wait_a_turn(Party* own, std::uint32_t& turns);
  static void serve(Party& party, std::uint32_t which);
  std::vector<Party*> parties_;
};

}  // namespace wisp::soft
