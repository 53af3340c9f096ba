// The host thread of one vCPU: enters the guest, hands port and MMIO exits to the address spaces, and parks
// on request.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "base/error.h"
#include "hypervisor/hypervisor.h"
#include "memory/address_space.h"

namespace wisp {

// Called on vCPU threads: implementations only take note and tell the control thread.
class VcpuEvents {
 public:
  virtual ~VcpuEvents() = default;
  // Once, before the thread first enters the guest (names, priorities, system-call filters). An error ends
  // the thread.
  [[nodiscard]] virtual Result<void> vcpu_thread_started(std::uint32_t id) = 0;
  // The processor shut down (`fell_over`: a triple fault) or asked for a reset; it does not run until then.
  virtual void vcpu_reset_request(std::uint32_t id, bool fell_over) = 0;
  // The engine cannot go on with this vCPU, which runs no more: the machine is to end.
  virtual void vcpu_failed(std::uint32_t id, const std::string& message) = 0;
  // Asked after each write to a device: whether the guest has asked for something that ends its run (power
  // off, reset), which the vCPU then waits for, parked or not, rather than run on until it comes.
  [[nodiscard]] virtual bool guest_run_ends() const { return false; }
};

class VcpuThread final {
 public:
  VcpuThread(std::unique_ptr<Vcpu> vcpu, AddressSpace& memory, AddressSpace& ports, VcpuEvents& events);
  VcpuThread(const VcpuThread&) = delete;
  VcpuThread& operator=(const VcpuThread&) = delete;
  // Parks and joins.
  ~VcpuThread();

  // Starts the thread, which parks first of all.
  [[nodiscard]] Result<void> start();
  // Returns when it is parked, or ended since it could not start.
  [[nodiscard]] Result<void> wait_started();

  // Parking in two steps, so that many vCPUs park at the same time. From one control thread.
  void request_park();
  void wait_parked();
  void resume();

  // The vCPU, for its state: only while parked.
  [[nodiscard]] Vcpu& vcpu() { return *vcpu_; }
  [[nodiscard]] pid_t thread_id() const { return thread_id_; }

 private:
  enum class Wish : std::uint8_t { kPark, kRun, kEnd };

  void main();
  // Handles one exit; true where the vCPU must enter once more before its state is whole.
  bool handle(const Exit& exit);
  void complete_pending_io();
  // Waits for a wish other than kPark; false for kEnd.
  bool park();
  void set_wish(Wish wish);

  std::unique_ptr<Vcpu> vcpu_;
  AddressSpace::Reader memory_;
  AddressSpace::Reader ports_;
  VcpuEvents& events_;
  std::atomic<Wish> wish_ = Wish::kPark;
  bool halted_by_failure_ = false;  // the thread's own
  bool io_pending_ = false;         // the thread's own
  bool held_ = false;               // the thread's own: guest_run_ends() said so

  std::mutex mutex_;
  std::condition_variable changed_;
  bool parked_ = false;  // guarded by mutex_
  Result<void> start_result_;
  pid_t thread_id_ = 0;
  std::thread thread_;
};

}  // namespace wisp
