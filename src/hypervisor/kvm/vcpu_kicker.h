// Makes a thread leave KVM_RUN, without a kick lost and without a signal to a thread that may be gone.
// Private to this folder.
//
// A kick first sets kvm_run.immediate_exit: from then on KVM_RUN comes back at once with EINTR, after it has
// taken in the data of a pending port or MMIO access. If the thread is in KVM_RUN already, the kick also
// sends it a signal. `state_` says which: the thread sets it to kRunning before KVM_RUN, where the kernel
// reads immediate_exit; the kick reads it after setting immediate_exit; so either the kernel sees the one or
// the kick sees the other. While a kick sends its signal the state is kSignalling, and the thread does not
// get past leave(): it cannot end, so the signal has a living target.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "base/error.h"

namespace wisp::kvm {

class VcpuKicker final {
 public:
  // `immediate_exit` is the byte in struct kvm_run, borrowed.
  explicit VcpuKicker(std::uint8_t* immediate_exit) : immediate_exit_(immediate_exit) {}
  VcpuKicker(const VcpuKicker&) = delete;
  VcpuKicker& operator=(const VcpuKicker&) = delete;

  // Makes the kick signal (a real-time signal, the same for all vCPUs of the process) run an empty handler
  // instead of ending the process. Once before the first vCPU; again does no harm. Fails where the program
  // has given that signal another handler.
  [[nodiscard]] static Result<void> install_signal();
  [[nodiscard]] static int signal_number();

  // By the vCPU's thread, around KVM_RUN.
  void enter();
  void leave();
  // By the vCPU's thread when it comes back to its caller for other reasons than I/O: it may be another
  // thread that enters next.
  void forget_thread() { thread_known_ = false; }
  // By the vCPU's thread: forgets the kicks so far.
  void take() { flag().exchange(0, std::memory_order_acq_rel); }
  // By any thread, as long as the vCPU exists.
  void kick();

 private:
  [[nodiscard]] std::atomic_ref<std::uint8_t> flag() const { return std::atomic_ref(*immediate_exit_); }

  enum State : std::uint32_t { kIdle, kRunning, kSignalling, kSignalled };
  std::uint8_t* const immediate_exit_;
  std::atomic<std::uint32_t> state_ = kIdle;
  pthread_t thread_{};         // written only while kIdle
  bool thread_known_ = false;  // of the vCPU's thread: the signal is not blocked in thread_
};

}  // namespace wisp::kvm
