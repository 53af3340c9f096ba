#include "support/fake_engine.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace wisp {

FakeExit FakeExit::port_read(std::uint16_t port, std::size_t size, std::uint32_t count) {
  return {.kind = Kind::kPortRead,
          .address = port,
          .count = count,
          .data = std::vector<std::uint8_t>(size * count)};
}

FakeExit FakeExit::port_write(std::uint16_t port, std::vector<std::uint8_t> data, std::uint32_t count) {
  return {.kind = Kind::kPortWrite, .address = port, .count = count, .data = std::move(data)};
}

FakeExit FakeExit::mmio_read(Gpa address, std::size_t size) {
  return {.kind = Kind::kMmioRead, .address = address, .data = std::vector<std::uint8_t>(size)};
}

FakeExit FakeExit::mmio_write(Gpa address, std::vector<std::uint8_t> data) {
  return {.kind = Kind::kMmioWrite, .address = address, .data = std::move(data)};
}

Exit FakeVcpu::run() {
  std::unique_lock lock(mutex_);
  WISP_ASSERT(!running_);
  complete_access();
  running_ = true;
  while (!kicked_ && script_.empty()) {
    idle_ = true;
    changed_.notify_all();
    changed_.wait(lock);
  }
  idle_ = false;
  running_ = false;
  if (kicked_) {
    kicked_ = false;
    return InterruptedExit{};
  }
  FakeExit next = std::move(script_.front());
  script_.pop_front();
  return present(std::move(next));
}

void FakeVcpu::complete_access() {
  if (!pending_) {
    return;
  }
  if (pending_->kind == FakeExit::Kind::kPortRead || pending_->kind == FakeExit::Kind::kMmioRead) {
    answers_.push_back(std::move(pending_->data));
  }
  pending_.reset();
}

Exit FakeVcpu::present(FakeExit exit) {
  switch (exit.kind) {
    case FakeExit::Kind::kHalt:
      return HaltExit{};
    case FakeExit::Kind::kShutdown:
      return ShutdownExit{};
    case FakeExit::Kind::kReset:
      return ResetExit{};
    case FakeExit::Kind::kDebug:
      return BreakpointExit{.rip = exit.address};
    case FakeExit::Kind::kEngineError:
      return EngineErrorExit{.message = exit.text};
    default:
      break;
  }
  pending_ = std::move(exit);
  const auto port = static_cast<std::uint16_t>(pending_->address);
  switch (pending_->kind) {
    case FakeExit::Kind::kPortRead:
      return PortReadExit{.port = port, .count = pending_->count, .data = pending_->data};
    case FakeExit::Kind::kPortWrite:
      return PortWriteExit{.port = port, .count = pending_->count, .data = pending_->data};
    case FakeExit::Kind::kMmioRead:
      return MmioReadExit{.address = pending_->address, .data = pending_->data};
    default:
      return MmioWriteExit{.address = pending_->address, .data = pending_->data};
  }
}

void FakeVcpu::kick() {
  const std::scoped_lock lock(mutex_);
  kicked_ = true;
  ++kicks_;
  changed_.notify_all();
}

Result<void> FakeVcpu::check_parked(const std::unique_lock<std::mutex>& held) const {
  WISP_ASSERT(held.owns_lock());
  if (running_) {
    return fail("vCPU {} is running", id_);
  }
  if (pending_) {
    return fail("vCPU {} waits for a port or MMIO access to be completed", id_);
  }
  return {};
}

Result<CpuState> FakeVcpu::save() {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  return state_;
}

Result<void> FakeVcpu::load(const CpuState& state) {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  if (!load_refusal_.empty()) {
    return fail("{}", load_refusal_);
  }
  state_ = state;
  return {};
}

Result<CpuRegs> FakeVcpu::regs() {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  return state_.regs;
}

Result<void> FakeVcpu::set_regs(const CpuRegs& regs) {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  state_.regs = regs;
  return {};
}

Result<CpuSpecialRegs> FakeVcpu::special_regs() {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  return state_.sregs;
}

Result<void> FakeVcpu::set_special_regs(const CpuSpecialRegs& sregs) {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  state_.sregs = sregs;
  return {};
}

Result<void> FakeVcpu::reset() {
  const std::unique_lock lock(mutex_);
  WISP_TRY(check_parked(lock));
  ++resets_;
  state_ = {};
  state_.run_state = id_ == 0 ? CpuRunState::kRunnable : CpuRunState::kUninitialized;
  return {};
}

void FakeVcpu::script(FakeExit exit) {
  script(std::vector<FakeExit>{std::move(exit)});
}

void FakeVcpu::script(std::vector<FakeExit> exits) {
  const std::scoped_lock lock(mutex_);
  std::ranges::move(exits, std::back_inserter(script_));
  idle_ = false;
  changed_.notify_all();
}

std::vector<std::vector<std::uint8_t>> FakeVcpu::answers() {
  const std::scoped_lock lock(mutex_);
  return answers_;
}

bool FakeVcpu::wait_until_idle(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [this] { return idle_ && script_.empty(); });
}

std::uint32_t FakeVcpu::kicks() {
  const std::scoped_lock lock(mutex_);
  return kicks_;
}

std::uint32_t FakeVcpu::resets() {
  const std::scoped_lock lock(mutex_);
  return resets_;
}

void FakeVcpu::refuse_loads(std::string message) {
  const std::scoped_lock lock(mutex_);
  load_refusal_ = std::move(message);
}

void FakeListener::note(bool added, const FlatRange& range) {
  events_.push_back({.added = added, .range = range});
  events_.back().range.handler.reset();
}

Result<void> FakeListener::range_added(const FlatRange& range) {
  const std::scoped_lock lock(mutex_);
  if (refusals_ > 0) {
    --refusals_;
    return fail("{}: refused by the fake engine", range.name);
  }
  WISP_ASSERT(ranges_.emplace(range.start, range).second);
  note(true, range);
  return {};
}

void FakeListener::range_removed(const FlatRange& range) {
  const std::scoped_lock lock(mutex_);
  const auto found = ranges_.find(range.start);
  WISP_ASSERT(found != ranges_.end() && found->second == range);
  ranges_.erase(found);
  note(false, range);
}

std::vector<FakeListener::Event> FakeListener::events() {
  const std::scoped_lock lock(mutex_);
  return events_;
}

std::map<Gpa, FlatRange> FakeListener::ranges() {
  const std::scoped_lock lock(mutex_);
  return ranges_;
}

void FakeListener::refuse(std::uint32_t count) {
  const std::scoped_lock lock(mutex_);
  refusals_ = count;
}

void FakeIrqs::collect(Input& input) {
  for (const int fd : input.fds) {
    input.pulses += drain_eventfd(fd);
  }
}

std::uint64_t FakeIrqs::pulses(std::uint32_t gsi) {
  const std::scoped_lock lock(mutex_);
  Input& input = inputs_[gsi];
  collect(input);
  return input.pulses;
}

bool FakeIrqs::wait_for_pulses(std::uint32_t gsi, std::uint64_t count, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (pulses(gsi) < count) {
    if (std::chrono::steady_clock::now() >= deadline) {
      return false;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

bool FakeIrqs::level(std::uint32_t gsi) {
  const std::scoped_lock lock(mutex_);
  return inputs_[gsi].level;
}

std::uint64_t FakeIrqs::rises(std::uint32_t gsi) {
  const std::scoped_lock lock(mutex_);
  return inputs_[gsi].rises;
}

std::size_t FakeIrqs::lines() {
  const std::scoped_lock lock(mutex_);
  std::size_t count = 0;
  for (const auto& [gsi, input] : inputs_) {
    count += input.fds.size();
  }
  return count;
}

class FakeIrqLine final : public IrqLine {
 public:
  FakeIrqLine(std::shared_ptr<FakeIrqs> irqs, std::uint32_t gsi, UniqueFd event)
      : irqs_(std::move(irqs)), gsi_(gsi), event_(std::move(event)) {
    const std::scoped_lock lock(irqs_->mutex_);
    irqs_->inputs_[gsi_].fds.push_back(event_.get());
  }
  ~FakeIrqLine() override {
    const std::scoped_lock lock(irqs_->mutex_);
    FakeIrqs::Input& input = irqs_->inputs_[gsi_];
    irqs_->collect(input);
    std::erase(input.fds, event_.get());
  }
  void pulse() override { signal_eventfd(event_.get()); }
  void set_level(bool high) override {
    if (gsi_ >= FakeVm::kFirstMessageGsi) {
      return;
    }
    const std::scoped_lock lock(irqs_->mutex_);
    FakeIrqs::Input& input = irqs_->inputs_[gsi_];
    if (high && !input.level) {
      ++input.rises;
    }
    input.level = high;
  }
  [[nodiscard]] int event_fd() const override { return event_.get(); }

 private:
  const std::shared_ptr<FakeIrqs> irqs_;
  const std::uint32_t gsi_;
  const UniqueFd event_;
};

FakeVm::FakeVm(const VmOptions& options) : options_(options), irqs_(std::make_shared<FakeIrqs>()) {}

FakeVm::~FakeVm() = default;

Result<std::unique_ptr<Vcpu>> FakeVm::create_vcpu(std::uint32_t id) {
  const std::scoped_lock lock(mutex_);
  if (id >= options_.max_vcpus || id != vcpus_.size()) {
    return fail("vCPU {} out of turn: {} exist of {}", id, vcpus_.size(), options_.max_vcpus);
  }
  auto vcpu = std::make_unique<FakeVcpu>(id);
  vcpus_.push_back(vcpu.get());
  return vcpu;
}

Result<std::unique_ptr<IrqLine>> FakeVm::irq_line(std::uint32_t gsi) {
  if (gsi >= kFirstMessageGsi) {
    return fail("interrupt {} is beyond the {} pins of the I/O APIC", gsi, kFirstMessageGsi);
  }
  WISP_ASSIGN(UniqueFd event, make_eventfd());
  return std::make_unique<FakeIrqLine>(irqs_, gsi, std::move(event));
}

Result<std::unique_ptr<IrqLine>> FakeVm::msi_line(const MsiMessage& message) {
  WISP_ASSIGN(UniqueFd event, make_eventfd());
  const std::scoped_lock lock(mutex_);
  const auto gsi = static_cast<std::uint32_t>(kFirstMessageGsi + messages_.size());
  messages_.push_back(message);
  return std::make_unique<FakeIrqLine>(irqs_, gsi, std::move(event));
}

Result<void> FakeVm::set_dirty_log(bool on) {
  const std::scoped_lock lock(mutex_);
  logging_ = on;
  dirty_pages_.clear();
  return {};
}

Result<std::vector<std::uint64_t>> FakeVm::take_dirty_log(Gpa gpa) {
  const auto ranges = memory_.ranges();
  const auto found = ranges.find(gpa);
  if (found == ranges.end() || found->second.kind != RegionKind::kRam) {
    return fail("no RAM starts at guest address {:#x}", gpa);
  }
  const std::scoped_lock lock(mutex_);
  if (!logging_) {
    return fail("the dirty log is off");
  }
  std::vector<std::uint64_t> pages((found->second.size / kPageSize + 63) / 64);
  for (auto page = dirty_pages_.lower_bound(gpa);
       page != dirty_pages_.end() && page->first < gpa + found->second.size;
       page = dirty_pages_.erase(page)) {
    const std::uint64_t index = (page->first - gpa) / kPageSize;
    pages[index / 64] |= 1ULL << (index % 64);
  }
  return pages;
}

Result<std::vector<std::uint8_t>> FakeVm::save_platform() {
  const std::scoped_lock lock(mutex_);
  return platform_;
}

Result<void> FakeVm::load_platform(std::span<const std::uint8_t> record) {
  const std::scoped_lock lock(mutex_);
  platform_.assign(record.begin(), record.end());
  return {};
}

FakeVcpu* FakeVm::vcpu(std::uint32_t id) {
  const std::scoped_lock lock(mutex_);
  return id < vcpus_.size() ? vcpus_[id] : nullptr;
}

std::vector<MsiMessage> FakeVm::messages() {
  const std::scoped_lock lock(mutex_);
  return messages_;
}

void FakeVm::mark_dirty(Gpa address) {
  const std::scoped_lock lock(mutex_);
  if (logging_) {
    dirty_pages_[address & ~(kPageSize - 1)] = true;
  }
}

bool FakeVm::dirty_log_on() {
  const std::scoped_lock lock(mutex_);
  return logging_;
}

void FakeVm::set_platform(std::vector<std::uint8_t> record) {
  const std::scoped_lock lock(mutex_);
  platform_ = std::move(record);
}

Result<std::unique_ptr<Vm>> FakeHypervisor::create_vm(const VmOptions& options) {
  auto vm = std::make_unique<FakeVm>(options);
  vm_ = vm.get();
  return vm;
}

}  // namespace wisp
