#include "hypervisor/kvm/vcpu_kicker.h"

#include <csignal>

namespace wisp::kvm {
namespace {

void do_nothing(int /*signal*/) {}

}  // namespace

int VcpuKicker::signal_number() {
  return SIGRTMIN + 1;
}

Result<void> VcpuKicker::install_signal() {
  struct sigaction present{};
  if (::sigaction(signal_number(), nullptr, &present) != 0) {
    return fail_errno(errno, "cannot read the action of signal {}", signal_number());
  }
  if ((present.sa_flags & SA_SIGINFO) == 0 && present.sa_handler == do_nothing) {
    return {};
  }
  if ((present.sa_flags & SA_SIGINFO) != 0 ||
      (present.sa_handler != SIG_DFL && present.sa_handler != SIG_IGN)) {
    return fail("signal {} has another handler already; KVM's vCPUs need it", signal_number());
  }
  struct sigaction action{};
  action.sa_handler = do_nothing;
  action.sa_flags = SA_RESTART;  // for what the thread does outside KVM_RUN, which never restarts
  if (::sigaction(signal_number(), &action, nullptr) != 0) {
    return fail_errno(errno, "cannot install a handler for signal {}", signal_number());
  }
  return {};
}

void VcpuKicker::enter() {
  if (!thread_known_ || pthread_equal(thread_, pthread_self()) == 0) {
    thread_ = pthread_self();
    thread_known_ = true;
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, signal_number());
    WISP_ASSERT(pthread_sigmask(SIG_UNBLOCK, &signals, nullptr) == 0);
  }
  state_.store(kRunning, std::memory_order_seq_cst);
}

void VcpuKicker::leave() {
  std::uint32_t expected = kRunning;
  if (state_.compare_exchange_strong(expected, kIdle, std::memory_order_seq_cst)) [[likely]] {
    return;
  }
  state_.wait(kSignalling, std::memory_order_acquire);
  state_.store(kIdle, std::memory_order_seq_cst);
}

void VcpuKicker::kick() {
  flag().store(1, std::memory_order_seq_cst);
  std::uint32_t expected = kRunning;
  if (state_.compare_exchange_strong(expected, kSignalling, std::memory_order_seq_cst)) {
    WISP_ASSERT(pthread_kill(thread_, signal_number()) == 0);
    state_.store(kSignalled, std::memory_order_release);
    state_.notify_one();
  }
}

}  // namespace wisp::kvm
