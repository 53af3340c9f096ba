#include "block/drive.h"

#include <array>
#include <utility>

#include "block/image_file.h"

namespace wisp {
namespace {

constexpr std::uint64_t kMaxIops = 1'000'000;
constexpr std::uint64_t kMaxBps = 1ULL << 40;

constexpr std::array kDriveProperties = std::to_array<PropertySpec>({
    {.name = "file", .help = "path of the disk image or block device", .required = true, .maximum = 4095},
    {.name = "format",
     .kind = PropertyKind::kEnum,
     .help = "layout of the image; never guessed",
     .default_text = "raw",
     .choices = "raw"},
    {.name = "readonly",
     .kind = PropertyKind::kBool,
     .help = "refuse writes; several machines may share the file",
     .default_text = "off"},
    {.name = "direct",
     .kind = PropertyKind::kBool,
     .help = "go past the host's page cache (O_DIRECT)",
     .default_text = "on where the file system can"},
    {.name = "aio",
     .kind = PropertyKind::kEnum,
     .help = "how requests are carried out (native: as io_uring)",
     .default_text = "io_uring, or threads on a host without it",
     .choices = "io_uring|native|threads|off"},
    {.name = "discard",
     .kind = PropertyKind::kEnum,
     .help = "unmap: give the space that the guest discards back to the host",
     .default_text = "ignore",
     .choices = "ignore|unmap"},
    {.name = "detect-zeroes",
     .kind = PropertyKind::kEnum,
     .help = "look for zeroes in written data",
     .default_text = "off",
     .choices = "off|on|unmap",
     .ignored_because = "zeroes are written as other data is"},
    {.name = "throttling.iops-total",
     .kind = PropertyKind::kUint,
     .help = "requests per second, 0 for no limit",
     .default_text = "0",
     .maximum = kMaxIops},
    {.name = "throttling.iops-total-max",
     .kind = PropertyKind::kUint,
     .help = "requests that may come at once after idle time",
     .default_text = "a tenth of throttling.iops-total",
     .maximum = kMaxIops},
    {.name = "throttling.bps-total",
     .kind = PropertyKind::kSize,
     .help = "bytes per second, 0 for no limit",
     .default_text = "0",
     .maximum = kMaxBps},
    {.name = "throttling.bps-total-max",
     .kind = PropertyKind::kSize,
     .help = "bytes that may come at once after idle time",
     .default_text = "a tenth of throttling.bps-total",
     .maximum = kMaxBps},
    {.name = "media",
     .kind = PropertyKind::kEnum,
     .help = "cdrom: as readonly=on",
     .default_text = "disk",
     .choices = "disk|cdrom"},
    {.name = "if",
     .kind = PropertyKind::kEnum,
     .help = "none: a -device names the drive",
     .default_text = "none",
     .choices = "none"},
    {.name = "l2-cache-size",
     .kind = PropertyKind::kSize,
     .help = "of qcow2 images",
     .ignored_because = "it applies to format=qcow2 only"},
    {.name = "refcount-cache-size",
     .kind = PropertyKind::kSize,
     .help = "of qcow2 images",
     .ignored_because = "it applies to format=qcow2 only"},
});

std::optional<AioKind> aio_kind(const PropertySet& properties) {
  const std::string word = properties.get_string("aio");
  if (word == "io_uring" || word == "native") {
    return AioKind::kIoUring;
  }
  if (word == "threads") {
    return AioKind::kThreads;
  }
  return word == "off" ? std::optional(AioKind::kOff) : std::nullopt;
}

Result<std::unique_ptr<BlockBackend>> open_backend(const DriveConfig& config, const std::string& name,
                                                   Log& log, const Clock& clock,
                                                   const std::function<Result<void>()>& worker_started) {
  WISP_ASSIGN(
      ImageFile image,
      open_image({.path = config.file, .read_only = config.read_only, .direct = config.direct}, name, log));
  const RawFileOptions options{.file = config.file,
                               .read_only = config.read_only,
                               .discard = config.discard,
                               .aio = config.aio.value_or(AioKind::kIoUring),
                               .worker_started = worker_started};
  WISP_ASSIGN(std::unique_ptr<RawFile> file, RawFile::create(std::move(image), options));
  if (config.aio.has_value() && !file->fallback_reason().empty()) {
    log.warning("{}: {}; going on with aio=threads", name, file->fallback_reason());
  }
  std::unique_ptr<BlockBackend> backend = std::move(file);
  if (config.limits.any()) {
    backend = std::make_unique<ThrottledBackend>(std::move(backend), config.limits, clock);
  }
  return backend;
}

}  // namespace

std::span<const PropertySpec> drive_properties() {
  return kDriveProperties;
}

Result<DriveConfig> drive_config(const std::string& id, const PropertySet& properties) {
  DriveConfig config;
  config.id = id;
  config.file = properties.get_string("file");
  if (config.file.empty()) {
    return fail("drive {}: file= is missing; give the path of a disk image or block device", id);
  }
  config.read_only =
      properties.get_bool("readonly", false) || properties.get_string("media", "disk") == "cdrom";
  if (properties.has("direct")) {
    config.direct = properties.get_bool("direct", true);
  }
  config.aio = aio_kind(properties);
  config.discard = properties.get_string("discard", "ignore") == "unmap";
  config.limits = {.iops = properties.get_uint("throttling.iops-total", 0),
                   .iops_burst = properties.get_uint("throttling.iops-total-max", 0),
                   .bps = properties.get_uint("throttling.bps-total", 0),
                   .bps_burst = properties.get_uint("throttling.bps-total-max", 0)};
  if ((config.limits.iops_burst != 0 && config.limits.iops == 0) ||
      (config.limits.bps_burst != 0 && config.limits.bps == 0)) {
    return fail("drive {}: a throttling.*-total-max needs its throttling.*-total; give both", id);
  }
  return config;
}

Result<std::unique_ptr<BlockBackend>> open_drive(const DriveConfig& config, Log& log, const Clock& clock,
                                                 const std::function<Result<void>()>& worker_started) {
  const std::string name = fmt::format("drive {}: file '{}'", config.id, config.file);
  auto backend = open_backend(config, name, log, clock, worker_started);
  if (!backend) {
    return std::unexpected(Error{name + " " + backend.error().message});
  }
  return backend;
}

}  // namespace wisp
