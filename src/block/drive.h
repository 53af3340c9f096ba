// -drive and blockdev-add: from checked options to an opened back end.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/property.h"
#include "block/block_backend.h"
#include "block/raw_file.h"
#include "block/throttled_backend.h"

namespace wisp {

struct DriveConfig {
  std::string id{};
  std::string file{};  // path of a file or block device
  bool read_only = false;
  // O_DIRECT; empty: where the file system has it.
  std::optional<bool> direct{};
  // Empty: io_uring, or threads on a host without it. An asked-for io_uring falls back with a warning.
  std::optional<AioKind> aio{};
  bool discard = false;  // the guest may give space back
  BlockLimits limits{};
};

// The options of -drive, without `id`.
[[nodiscard]] std::span<const PropertySpec> drive_properties();

// `properties` were checked against drive_properties().
[[nodiscard]] Result<DriveConfig> drive_config(const std::string& id, const PropertySet& properties);

// Errors name the drive and the file, and start with "drive ID: ". The clock and log must outlive the drive.
// Threads that it starts call `worker_started` (which may be empty) before all else; its error is theirs.
[[nodiscard]] Result<std::unique_ptr<BlockBackend>> open_drive(
    const DriveConfig& config, Log& log, const Clock& clock,
    const std::function<Result<void>()>& worker_started = {});

}  // namespace wisp
