#include "machine/vcpu_thread.h"

#include <pthread.h>
#include <unistd.h>

#include <system_error>
#include <variant>

namespace wisp {
namespace {

template <typename... Handlers>
struct Overloaded : Handlers... {
  using Handlers::operator()...;
};

}  // namespace

VcpuThread::VcpuThread(std::unique_ptr<Vcpu> vcpu, AddressSpace& memory, AddressSpace& ports,
                       VcpuEvents& events)
    : vcpu_(std::move(vcpu)), memory_(memory), ports_(ports), events_(events) {}

VcpuThread::~VcpuThread() {
  if (thread_.joinable()) {
    set_wish(Wish::kEnd);
    vcpu_->kick();
    thread_.join();
  }
}

Result<void> VcpuThread::start() {
  try {
    thread_ = std::thread([this] { main(); });
  } catch (const std::system_error& error) {
    return fail("cannot start the thread of vCPU {}: {}", vcpu_->id(), error.code().message());
  }
  return {};
}

Result<void> VcpuThread::wait_started() {
  wait_parked();
  return start_result_;
}

void VcpuThread::set_wish(Wish wish) {
  {
    const std::lock_guard lock(mutex_);
    wish_.store(wish, std::memory_order_release);
  }
  changed_.notify_all();
}

void VcpuThread::request_park() {
  set_wish(Wish::kPark);
  vcpu_->kick();
}

void VcpuThread::wait_parked() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return parked_; });
}

void VcpuThread::resume() {
  {
    const std::lock_guard lock(mutex_);
    wish_.store(Wish::kRun, std::memory_order_release);
    // Not parked any more from the caller's side: a wait_parked() after this waits for the next park.
    parked_ = false;
  }
  changed_.notify_all();
}

bool VcpuThread::park() {
  std::unique_lock lock(mutex_);
  do {
    parked_ = true;
    changed_.notify_all();
    // resume() clears parked_. Where the next request to park comes before this thread saw the wish to run,
    // it is parked still, and says so again.
    changed_.wait(lock, [this] { return wish_.load(std::memory_order_relaxed) != Wish::kPark || !parked_; });
  } while (wish_.load(std::memory_order_relaxed) == Wish::kPark);
  halted_by_failure_ = false;
  held_ = false;
  return wish_.load(std::memory_order_relaxed) == Wish::kRun;
}

void VcpuThread::main() {
  const std::string name = fmt::format("vcpu{}", vcpu_->id());
  ::pthread_setname_np(::pthread_self(), name.c_str());
  {
    const std::lock_guard lock(mutex_);
    thread_id_ = ::gettid();
  }
  auto started = events_.vcpu_thread_started(vcpu_->id());
  {
    const std::lock_guard lock(mutex_);
    start_result_ = std::move(started);
    if (!start_result_) {
      parked_ = true;
      changed_.notify_all();
      return;
    }
  }
  while (park()) {
    while (wish_.load(std::memory_order_acquire) == Wish::kRun) {
      if (held_) {
        complete_pending_io();
      }
      if (halted_by_failure_ || held_) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return wish_.load(std::memory_order_relaxed) != Wish::kRun; });
        break;
      }
      io_pending_ = handle(vcpu_->run());
    }
    complete_pending_io();
  }
}

void VcpuThread::complete_pending_io() {
  while (io_pending_ && !halted_by_failure_) {
    vcpu_->kick();
    io_pending_ = handle(vcpu_->run());
  }
}

bool VcpuThread::handle(const Exit& exit) {
  return std::visit(Overloaded{
                        [](const InterruptedExit&) { return false; },
                        [this](const PortReadExit& port) {
                          const std::size_t size = port.data.size() / port.count;
                          for (std::uint32_t i = 0; i < port.count; ++i) {
                            ports_.read(port.port, port.data.subspan(i * size, size));
                          }
                          return true;
                        },
                        [this](const PortWriteExit& port) {
                          const std::size_t size = port.data.size() / port.count;
                          for (std::uint32_t i = 0; i < port.count; ++i) {
                            ports_.write(port.port, port.data.subspan(i * size, size));
                          }
                          held_ = held_ || events_.guest_run_ends();
                          return true;
                        },
                        [this](const MmioReadExit& mmio) {
                          memory_.read(mmio.address, mmio.data);
                          return true;
                        },
                        [this](const MmioWriteExit& mmio) {
                          memory_.write(mmio.address, mmio.data);
                          held_ = held_ || events_.guest_run_ends();
                          return true;
                        },
                        // Engines of this program model the local APIC: a halt comes back only where nothing
                        // can wake the vCPU.
                        [](const HaltExit&) { return false; },
                        [this](const ShutdownExit&) {
                          halted_by_failure_ = true;
                          events_.vcpu_reset_request(vcpu_->id(), true);
                          return false;
                        },
                        [this](const ResetExit&) {
                          halted_by_failure_ = true;
                          events_.vcpu_reset_request(vcpu_->id(), false);
                          return false;
                        },
                        [](const BreakpointExit&) { return false; },
                        [this](const EngineErrorExit& error) {
                          halted_by_failure_ = true;
                          events_.vcpu_failed(vcpu_->id(), error.message);
                          return false;
                        },
                    },
                    exit);
}

}  // namespace wisp
