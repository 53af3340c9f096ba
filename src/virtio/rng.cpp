#include "virtio/rng.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace wisp {
namespace {

constexpr int kChainsPerTurn = 16;
constexpr std::uint64_t kRetryNs = 1'000'000'000;  // after the source failed
constexpr std::uint64_t kNsPerMs = 1'000'000;

}  // namespace

Result<VirtioRngOptions> virtio_rng_options(const std::string& id, const PropertySet& properties) {
  if (properties.has("max-bytes") != properties.has("period")) {
    return fail("max-bytes and period limit the rate together: give both or none");
  }
  return VirtioRngOptions{.id = id,
                          .rng = properties.get_string("rng"),
                          .max_bytes = properties.get_uint("max-bytes", 0),
                          .period_ms = properties.get_uint("period", 0)};
}

Result<std::unique_ptr<FileEntropy>> FileEntropy::open(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!fd.valid()) {
    return fail_errno(errno, "cannot open {} for random bytes", path);
  }
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0 || S_ISDIR(status.st_mode)) {
    return fail("{} is no file that random bytes can be read from; /dev/urandom is", path);
  }
  return std::unique_ptr<FileEntropy>(new FileEntropy(path, std::move(fd)));
}

Result<void> FileEntropy::fill(std::span<std::uint8_t> buffer) {
  while (!buffer.empty()) {
    const ssize_t count = ::read(fd_.get(), buffer.data(), buffer.size());
    if (count > 0) {
      buffer = buffer.subspan(static_cast<std::size_t>(count));
    } else if (count == 0) {
      return fail("{} has no more bytes", path_);
    } else if (errno != EINTR) {
      return fail_errno(errno, "cannot read {}", path_);
    }
  }
  return {};
}

VirtioRng::VirtioRng(EventLoop& loop, const GuestMemory& memory, VirtioRngOptions options,
                     std::unique_ptr<EntropySource> source, Log& log, const Clock& clock)
    : VirtioDevice(loop, memory),
      options_(std::move(options)),
      source_(std::move(source)),
      log_(log),
      clock_(clock),
      gate_(clock) {}

Result<std::unique_ptr<VirtioRng>> VirtioRng::create(EventLoop& loop, const GuestMemory& memory,
                                                     const VirtioRngOptions& options,
                                                     std::unique_ptr<EntropySource> source, Log& log,
                                                     const Clock& clock) {
  std::unique_ptr<VirtioRng> device(new VirtioRng(loop, memory, options, std::move(source), log, clock));
  WISP_ASSIGN(device->timer_, device->strand().timer([rng = device.get()] { rng->serve(); }));
  return device;
}

void VirtioRng::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  read_config_bytes({}, offset, data);
}

Result<void> VirtioRng::activate(VirtioActivation activation) {
  active_ = std::move(activation);
  return {};
}

void VirtioRng::notify(std::uint16_t /*queue*/) {
  serve();
}

std::uint64_t VirtioRng::allowance() {
  if (options_.max_bytes == 0) {
    return kMaxRequest;
  }
  const std::uint64_t now = clock_.monotonic_ns();
  const std::uint64_t period = options_.period_ms * kNsPerMs;
  if (now - period_start_ns_ >= period) {
    period_start_ns_ = now;
    taken_in_period_ = 0;
  }
  if (taken_in_period_ >= options_.max_bytes) {
    timer_.arm(period_start_ns_ + period - now);
    return 0;
  }
  return options_.max_bytes - taken_in_period_;
}

void VirtioRng::serve() {
  if (!active_ || paused() || !active_->queues[0]) {
    return;
  }
  Queue& queue = *active_->queues[0];
  int turns = kChainsPerTurn;
  for (; turns > 0; --turns) {
    const std::uint64_t allowed = queue.has_available() ? allowance() : kMaxRequest;
    if (allowed == 0) {
      break;  // the timer is set
    }
    const PopResult popped = queue.pop(chain_);
    if (popped == PopResult::kBroken) {
      active_->interrupts->needs_reset();
      return;
    }
    if (popped == PopResult::kEmpty) {
      if (!queue.enable_notifications()) {
        break;
      }
      continue;
    }
    std::array<std::uint8_t, kMaxRequest> bytes;
    const std::span<std::uint8_t> part = std::span(bytes).first(
        static_cast<std::size_t>(std::min<std::uint64_t>({allowed, chain_.writable_size(), kMaxRequest})));
    if (const Result<void> filled = source_->fill(part); !filled) {
      if (gate_.open()) {
        log_.warning("{} {}: {}; trying again in a second", name(), options_.id, filled.error().message);
      }
      queue.undo_pop(chain_);
      timer_.arm(kRetryNs);
      break;
    }
    const std::size_t written = chain_.write(0, part);
    taken_in_period_ += written;
    queue.push(chain_, static_cast<std::uint32_t>(written));
  }
  if (queue.take_interrupt_wish()) {
    active_->interrupts->queue_used(0);
  }
  if (turns == 0) {
    signal_eventfd(active_->kick_fds[0]);  // others first
  }
}

void VirtioRng::reset() {
  timer_.disarm();
  active_.reset();
}

void VirtioRng::on_pause() {
  timer_.disarm();
}

const Queue* VirtioRng::queue(std::uint16_t index) const {
  return active_ && index == 0 && active_->queues[0] ? &*active_->queues[0] : nullptr;
}

StateRecord VirtioRng::save() const {
  return {.name = std::string(name()), .version = 1, .bytes = {}};
}

Result<void> VirtioRng::load(const StateRecord& record) {
  WISP_TRY(check_version(record, 1));
  if (!record.bytes.empty()) {
    return fail("saved state goes on behind its end");
  }
  return {};
}

}  // namespace wisp
