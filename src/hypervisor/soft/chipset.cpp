#include "hypervisor/soft/chipset.h"

#include <algorithm>

#include "base/state.h"

namespace wisp::soft {
namespace {

constexpr std::uint32_t kRecordVersion = 1;

}  // namespace

Chipset::Chipset(const SoftClock& clock, bool pit, std::function<void()> pic_wake)
    : time_(clock), pic_(std::move(pic_wake)), kvm_clock_(clock) {
  if (pit) {
    pit_.emplace([this] { return time_.now_ns(); }, [this] { pulse(0); });
  }
}

Result<std::unique_ptr<Chipset>> Chipset::create(const SoftClock& clock, bool pit, EventLoop* loop,
                                                 std::function<void()> pic_wake) {
  std::unique_ptr<Chipset> chipset(new Chipset(clock, pit, std::move(pic_wake)));
  chipset->polled_ = loop == nullptr;
  if (pit && loop != nullptr) {
    Chipset* raw = chipset.get();
    WISP_ASSIGN(chipset->pit_timer_, loop->timer([raw] {
      raw->pit_->poll();
      raw->arm_pit();
    }));
  }
  return chipset;
}

std::optional<std::uint64_t> Chipset::next_timer_ns() const {
  return pit_ ? pit_->next_event_ns() : std::nullopt;
}

void Chipset::poll_timer() {
  if (pit_) {
    pit_->poll();
  }
}

void Chipset::arm_pit() {
  if (polled_) {
    return;
  }
  // So that of two at once the one that saw the later state of the PIT sets the timer last.
  const std::lock_guard lock(pit_timer_mutex_);
  const auto next = pit_->next_event_ns();
  if (!next) {
    pit_timer_.disarm();
    return;
  }
  const std::uint64_t now = time_.now_ns();
  pit_timer_.arm(*next > now ? *next - now : 0);
}

void Chipset::pulse(std::uint32_t gsi) {
  if (gsi < kPicInputs) {
    pic_.pulse(gsi);
  }
  ioapic_.pulse(gsi);
}

void Chipset::set_level(std::uint32_t gsi, bool high) {
  if (gsi < kPicInputs) {
    pic_.set_level(gsi, high);
  }
  ioapic_.set_level(gsi, high);
}

bool Chipset::owns(std::uint16_t port) const {
  return PicPair::owns(port) || (pit_ && Pit::owns(port));
}

bool Chipset::port_read(std::uint16_t port, std::span<std::uint8_t> data) {
  if (!owns(port)) {
    return false;
  }
  // Their registers are bytes: the parts of a wider access go to the ports that follow, where they are.
  for (std::size_t i = 0; i < data.size(); ++i) {
    const auto at = static_cast<std::uint16_t>(port + i);
    data[i] = PicPair::owns(at) ? pic_.read(at) : pit_ && Pit::owns(at) ? pit_->read(at) : 0xff;
  }
  return true;
}

bool Chipset::port_write(std::uint16_t port, std::span<const std::uint8_t> data) {
  if (!owns(port)) {
    return false;
  }
  bool timer_changed = false;
  for (std::size_t i = 0; i < data.size(); ++i) {
    const auto at = static_cast<std::uint16_t>(port + i);
    if (PicPair::owns(at)) {
      pic_.write(at, data[i]);
    } else if (pit_ && Pit::owns(at)) {
      pit_->write(at, data[i]);
      timer_changed = true;
    }
  }
  if (timer_changed) {
    arm_pit();
  }
  return true;
}

std::vector<std::uint8_t> Chipset::save() const {
  StateWriter writer;
  writer.put(kRecordVersion);
  writer.put(kvm_clock_.now_ns());
  pic_.save(writer);
  ioapic_.save(writer);
  writer.put(pit_.has_value());
  if (pit_) {
    pit_->save(writer);
  }
  return writer.take();
}

Result<void> Chipset::load(std::span<const std::uint8_t> record) {
  StateReader reader(record);
  WISP_ASSIGN(const auto version, reader.get<std::uint32_t>());
  if (version != kRecordVersion) {
    return fail("saved platform state has version {}; the software CPU reads version {}", version,
                kRecordVersion);
  }
  WISP_ASSIGN(const auto clock_ns, reader.get<std::uint64_t>());
  WISP_TRY(pic_.load(reader));
  WISP_TRY(ioapic_.load(reader));
  WISP_ASSIGN(const bool pit_saved, reader.get<bool>());
  if (pit_saved != pit_.has_value()) {
    return fail("saved platform state {} a PIT, this VM {}", pit_saved ? "has" : "lacks",
                pit_ ? "has one" : "lacks it");
  }
  if (pit_) {
    WISP_TRY(pit_->load(reader));
    arm_pit();
  }
  if (!reader.empty()) {
    return fail("saved platform state has bytes behind its end");
  }
  kvm_clock_.set(clock_ns);
  return {};
}

}  // namespace wisp::soft
