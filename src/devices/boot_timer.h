// A port by which the guest says how far its boot has come: each write is logged with the time since the
// process began.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "devices/device.h"

namespace wisp {

// The port. By convention 1 is written when the kernel has started and 2 when init has; any byte will do.
inline constexpr std::uint16_t kBootTimerPort = 0x5f0;
inline constexpr std::uint16_t kBootTimerPortCount = 1;

struct BootMark {
  std::uint8_t value = 0;
  std::uint64_t wall_us = 0;  // since the process began
  std::uint64_t cpu_us = 0;   // that the process has used, all threads, guest code included
};

class BootTimer final : public Device {
 public:
  // Marks beyond this are dropped, so that a guest cannot fill the log.
  static constexpr std::size_t kMaxMarks = 64;

  // `process_start_ns` is the clock's monotonic time at the start of main().
  BootTimer(const Clock& clock, std::uint64_t process_start_ns, Log& log)
      : clock_(clock), process_start_ns_(process_start_ns), log_(log) {}

  // All marks so far, for tests and metrics.
  [[nodiscard]] std::vector<BootMark> marks() const;

  [[nodiscard]] std::string_view name() const override { return "boot-timer"; }
  void io_read(std::uint64_t offset, std::span<std::uint8_t> data) override;
  void io_write(std::uint64_t offset, std::span<const std::uint8_t> data) override;
  // The marks are the process's, not the guest's: they outlive a reset and are in no snapshot.
  void reset() override {}
  [[nodiscard]] StateRecord save() const override;
  [[nodiscard]] Result<void> load(const StateRecord& record) override;

 private:
  const Clock& clock_;
  const std::uint64_t process_start_ns_;
  Log& log_;
  mutable std::mutex mutex_;
  std::vector<BootMark> marks_;
};

}  // namespace wisp
