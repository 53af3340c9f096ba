// An engine without a processor: vCPUs leave the guest as a test's script says, and all that a machine does
// to the engine is recorded. Everything is thread-safe, so that a test can script and look while vCPU threads
// run.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "hypervisor/hypervisor.h"

namespace wisp {

// One scripted exit.
struct FakeExit {
  enum class Kind : std::uint8_t {
    kPortRead,
    kPortWrite,
    kMmioRead,
    kMmioWrite,
    kHalt,
    kShutdown,
    kReset,
    kDebug,
    kEngineError,
  };
  Kind kind = Kind::kHalt;
  std::uint64_t address = 0;         // port, gpa or rip
  std::uint32_t count = 1;           // elements of a string instruction
  std::vector<std::uint8_t> data{};  // written, or of the size that is read
  std::string text{};                // kEngineError

  // `size` is that of one element.
  [[nodiscard]] static FakeExit port_read(std::uint16_t port, std::size_t size, std::uint32_t count = 1);
  [[nodiscard]] static FakeExit port_write(std::uint16_t port, std::vector<std::uint8_t> data,
                                           std::uint32_t count = 1);
  [[nodiscard]] static FakeExit mmio_read(Gpa address, std::size_t size);
  [[nodiscard]] static FakeExit mmio_write(Gpa address, std::vector<std::uint8_t> data);
  [[nodiscard]] static FakeExit shutdown() { return {.kind = Kind::kShutdown}; }
  [[nodiscard]] static FakeExit reset() { return {.kind = Kind::kReset}; }
  [[nodiscard]] static FakeExit halt() { return {.kind = Kind::kHalt}; }
  [[nodiscard]] static FakeExit engine_error(std::string text) {
    return {.kind = Kind::kEngineError, .text = std::move(text)};
  }
};

// Runs its script, then waits inside run() as a halted processor does, until there is more or a kick comes.
class FakeVcpu final : public Vcpu {
 public:
  explicit FakeVcpu(std::uint32_t id) : id_(id) {}

  [[nodiscard]] std::uint32_t id() const override { return id_; }
  [[nodiscard]] Exit run() override;
  void kick() override;
  // As the seam demands, these fail while an access is pending or a thread is in run().
  [[nodiscard]] Result<CpuState> save() override;
  [[nodiscard]] Result<void> load(const CpuState& state) override;
  [[nodiscard]] Result<CpuRegs> regs() override;
  [[nodiscard]] Result<void> set_regs(const CpuRegs& regs) override;
  [[nodiscard]] Result<CpuSpecialRegs> special_regs() override;
  [[nodiscard]] Result<void> set_special_regs(const CpuSpecialRegs& sregs) override;
  // Back to a fresh CpuState; what is left of the script stays.
  [[nodiscard]] Result<void> reset() override;

  // For tests.
  void script(FakeExit exit);
  // All at once: a thread that saw the first of them sees the others.
  void script(std::vector<FakeExit> exits);
  // The data of completed port and MMIO reads, in order.
  [[nodiscard]] std::vector<std::vector<std::uint8_t>> answers();
  // Until the script is done, its last access completed, and the thread waits in run(). False at the timeout.
  [[nodiscard]] bool wait_until_idle(std::chrono::milliseconds timeout = std::chrono::seconds(10));
  [[nodiscard]] std::uint32_t kicks();
  [[nodiscard]] std::uint32_t resets();
  // From now on load() fails with this message; empty: it works again.
  void refuse_loads(std::string message);

 private:
  [[nodiscard]] Result<void> check_parked(const std::unique_lock<std::mutex>& held) const;
  void complete_access();
  [[nodiscard]] Exit present(FakeExit exit);

  const std::uint32_t id_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<FakeExit> script_;
  std::optional<FakeExit> pending_;  // the access that the caller is at; holds the bytes its exit points to
  std::vector<std::vector<std::uint8_t>> answers_;
  bool kicked_ = false;
  bool running_ = false;
  bool idle_ = false;
  std::uint32_t kicks_ = 0;
  std::uint32_t resets_ = 0;
  std::string load_refusal_;
  CpuState state_;
};

// Records what an address space tells it.
class FakeListener final : public AddressSpaceListener {
 public:
  struct Event {
    bool added = false;
    FlatRange range;  // without its handler, which a log must not keep alive
  };
  [[nodiscard]] Result<void> range_added(const FlatRange& range) override;
  void range_removed(const FlatRange& range) override;

  [[nodiscard]] std::vector<Event> events();
  // What is there now, by start.
  [[nodiscard]] std::map<Gpa, FlatRange> ranges();
  // The next `count` additions are refused.
  void refuse(std::uint32_t count);

 private:
  void note(bool added, const FlatRange& range);
  std::mutex mutex_;
  std::vector<Event> events_;
  std::map<Gpa, FlatRange> ranges_;
  std::uint32_t refusals_ = 0;
};

// The inputs of the interrupt controllers, as their lines drive them. A GSI may have several lines.
class FakeIrqs final {
 public:
  // Edges so far, those sent through the eventfds included.
  [[nodiscard]] std::uint64_t pulses(std::uint32_t gsi);
  [[nodiscard]] bool wait_for_pulses(std::uint32_t gsi, std::uint64_t count,
                                     std::chrono::milliseconds timeout = std::chrono::seconds(10));
  // The level, and how often it rose.
  [[nodiscard]] bool level(std::uint32_t gsi);
  [[nodiscard]] std::uint64_t rises(std::uint32_t gsi);
  // How many lines there are now on all GSIs.
  [[nodiscard]] std::size_t lines();

 private:
  friend class FakeIrqLine;
  struct Input {
    std::uint64_t pulses = 0;
    std::uint64_t rises = 0;
    bool level = false;
    std::vector<int> fds;
  };
  void collect(Input& input);
  std::mutex mutex_;
  std::map<std::uint32_t, Input> inputs_;
};

class FakeVm final : public Vm {
 public:
  explicit FakeVm(const VmOptions& options);
  ~FakeVm() override;

  [[nodiscard]] Result<std::unique_ptr<Vcpu>> create_vcpu(std::uint32_t id) override;
  [[nodiscard]] FakeListener& memory_listener() override { return memory_; }
  [[nodiscard]] FakeListener& port_listener() override { return ports_; }
  [[nodiscard]] Result<std::unique_ptr<IrqLine>> irq_line(std::uint32_t gsi) override;
  // Message lines count as GSIs from kFirstMessageGsi on, in the order in which they were made.
  [[nodiscard]] Result<std::unique_ptr<IrqLine>> msi_line(const MsiMessage& message) override;
  [[nodiscard]] Result<void> set_dirty_log(bool on) override;
  [[nodiscard]] Result<std::vector<std::uint64_t>> take_dirty_log(Gpa gpa) override;
  // Whatever set_platform() gave, and what load_platform() got after it.
  [[nodiscard]] Result<std::vector<std::uint8_t>> save_platform() override;
  [[nodiscard]] Result<void> load_platform(std::span<const std::uint8_t> record) override;
  void guest_started() override { ++guest_starts_; }

  // For tests.
  [[nodiscard]] std::uint32_t guest_starts() const { return guest_starts_; }
  static constexpr std::uint32_t kFirstMessageGsi = 24;
  [[nodiscard]] const VmOptions& options() const { return options_; }
  // Valid as long as its owner keeps it; null where it was not made.
  [[nodiscard]] FakeVcpu* vcpu(std::uint32_t id);
  [[nodiscard]] FakeIrqs& irqs() { return *irqs_; }
  [[nodiscard]] std::vector<MsiMessage> messages();
  // As if the guest had written there; ignored while the log is off.
  void mark_dirty(Gpa address);
  [[nodiscard]] bool dirty_log_on();
  void set_platform(std::vector<std::uint8_t> record);

 private:
  const VmOptions options_;
  FakeListener memory_;
  FakeListener ports_;
  std::shared_ptr<FakeIrqs> irqs_;
  std::mutex mutex_;
  std::vector<FakeVcpu*> vcpus_;
  std::vector<MsiMessage> messages_;
  bool logging_ = false;
  std::map<Gpa, bool> dirty_pages_;
  std::vector<std::uint8_t> platform_;
  std::atomic<std::uint32_t> guest_starts_ = 0;
};

class FakeHypervisor final : public Hypervisor {
 public:
  [[nodiscard]] std::string name() const override { return "fake"; }
  [[nodiscard]] std::uint32_t max_vcpus() const override { return 64; }
  [[nodiscard]] Result<std::unique_ptr<Vm>> create_vm(const VmOptions& options) override;

  // The VM made last; valid as long as its owner keeps it.
  [[nodiscard]] FakeVm* vm() const { return vm_; }

 private:
  FakeVm* vm_ = nullptr;
};

}  // namespace wisp
