#include "devices/boot_timer.h"

#include <algorithm>
#include <ctime>

namespace wisp {
namespace {

constexpr std::uint32_t kVersion = 1;

std::uint64_t process_cpu_us() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000 +
         static_cast<std::uint64_t>(time.tv_nsec) / 1000;
}

}  // namespace

std::vector<BootMark> BootTimer::marks() const {
  const std::lock_guard lock(mutex_);
  return marks_;
}

void BootTimer::io_read(std::uint64_t /*offset*/, std::span<std::uint8_t> data) {
  std::ranges::fill(data, std::uint8_t{0xff});
}

void BootTimer::io_write(std::uint64_t /*offset*/, std::span<const std::uint8_t> data) {
  const std::lock_guard lock(mutex_);
  if (data.empty() || marks_.size() >= kMaxMarks) {
    return;
  }
  const std::uint64_t now = clock_.monotonic_ns();
  const BootMark mark{.value = data[0],
                      .wall_us = (now - std::min(now, process_start_ns_)) / 1000,
                      .cpu_us = process_cpu_us()};
  marks_.push_back(mark);
  // Asked for by whoever put the write into the guest, so shown at the usual log level.
  log_.warning("boot time: mark {} at {} us, {} us CPU", mark.value, mark.wall_us, mark.cpu_us);
}

StateRecord BootTimer::save() const {
  return {.name = std::string(name()), .version = kVersion, .bytes = {}};
}

Result<void> BootTimer::load(const StateRecord& record) {
  return check_version(record, kVersion);
}

}  // namespace wisp
