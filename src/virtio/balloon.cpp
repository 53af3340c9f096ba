#include "virtio/balloon.h"

#include <algorithm>
#include <limits>

#include "base/bytes.h"
#include "base/checked.h"

namespace wisp {
namespace {

constexpr std::uint64_t kFeatureStatistics = 1ULL << 1;
constexpr std::uint64_t kFeatureDeflateOnOom = 1ULL << 2;
constexpr std::uint64_t kFeatureReporting = 1ULL << 5;

constexpr std::uint64_t kBalloonPage = 4096;      // whatever the guest's page size is (5.5.6)
constexpr std::size_t kPfnsPerChunk = 1024;       // copied in and sorted at once
constexpr std::uint32_t kMaxPfnsPerChain = 8192;  // Linux sends 256
constexpr int kChainsPerTurn = 32;
constexpr std::uint64_t kPagesPerTurn = 8192;
constexpr std::size_t kStatisticSize = 10;  // le16 tag, le64 value
constexpr std::size_t kMaxStatistics = 64;
constexpr std::uint64_t kNsPerSecond = 1'000'000'000;

// By tag (5.5.6.4).
constexpr std::array<std::string_view, 10> kStatisticNames{
    "stat-swap-in",      "stat-swap-out",     "stat-major-faults",     "stat-minor-faults",
    "stat-free-memory",  "stat-total-memory", "stat-available-memory", "stat-disk-caches",
    "stat-htlb-pgalloc", "stat-htlb-pgfail"};

}  // namespace

VirtioBalloonOptions virtio_balloon_options(const std::string& id, const PropertySet& properties) {
  return {.id = id,
          .deflate_on_oom = properties.get_bool("deflate-on-oom", false),
          .free_page_reporting = properties.get_bool("free-page-reporting", false),
          .statistics_interval_s = properties.get_uint("guest-stats-polling-interval", 0)};
}

VirtioBalloon::VirtioBalloon(EventLoop& loop, const GuestMemory& memory, VirtioBalloonOptions options,
                             BalloonHost& host, Log& log, const Clock& clock)
    : VirtioDevice(loop, memory),
      options_(std::move(options)),
      host_(host),
      log_(log),
      clock_(clock),
      gate_(clock) {}

Result<std::unique_ptr<VirtioBalloon>> VirtioBalloon::create(EventLoop& loop, const GuestMemory& memory,
                                                             const VirtioBalloonOptions& options,
                                                             BalloonHost& host, Log& log,
                                                             const Clock& clock) {
  std::unique_ptr<VirtioBalloon> device(new VirtioBalloon(loop, memory, options, host, log, clock));
  WISP_ASSIGN(device->statistics_timer_,
              device->strand().timer([balloon = device.get()] { balloon->ask_for_statistics(); }));
  WISP_ASSIGN(device->event_timer_,
              device->strand().timer([balloon = device.get()] { balloon->tell_change(); }));
  device->set_statistics_interval(options.statistics_interval_s);
  return device;
}

std::uint64_t VirtioBalloon::features() const {
  return kFeatureStatistics | (options_.deflate_on_oom ? kFeatureDeflateOnOom : 0) |
         (options_.free_page_reporting ? kFeatureReporting : 0);
}

std::uint64_t VirtioBalloon::ram_pages() const {
  std::uint64_t bytes = 0;
  for (const GuestMemoryBlock& block : memory().blocks()) {
    bytes += block.size;
  }
  return bytes / kBalloonPage;
}

Result<void> VirtioBalloon::set_target(std::uint64_t bytes) {
  if (bytes == 0) {
    return fail("a guest cannot have 0 bytes of memory: give what it may keep");
  }
  const std::uint64_t pages = ram_pages();
  const std::uint64_t keep = std::min(pages, align_up(bytes, kBalloonPage).value_or(bytes) / kBalloonPage);
  const auto inside = static_cast<std::uint32_t>(
      std::min<std::uint64_t>(pages - keep, std::numeric_limits<std::uint32_t>::max()));
  if (inside != config_.num_pages) {
    config_.num_pages = inside;
    if (active_) {
      active_->interrupts->config_changed();
    }
  }
  return {};
}

std::uint64_t VirtioBalloon::target() const {
  return (ram_pages() - std::min<std::uint64_t>(ram_pages(), config_.num_pages)) * kBalloonPage;
}

std::uint64_t VirtioBalloon::actual() const {
  return (ram_pages() - std::min<std::uint64_t>(ram_pages(), config_.actual)) * kBalloonPage;
}

void VirtioBalloon::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  std::array<std::uint8_t, 8> bytes{};
  store_le(bytes.data(), config_.num_pages);
  store_le(bytes.data() + 4, config_.actual);
  read_config_bytes(bytes, offset, data);
}

void VirtioBalloon::write_config(std::uint64_t offset, std::span<const std::uint8_t> data) {
  // Only `actual` is the driver's (5.5.4).
  std::array<std::uint8_t, 4> bytes{};
  store_le(bytes.data(), config_.actual);
  for (std::size_t i = 0; i < data.size(); ++i) {
    const std::optional<std::uint64_t> at = checked_add<std::uint64_t>(offset, i);
    if (at && *at >= 4 && *at < 8) {
      bytes[static_cast<std::size_t>(*at - 4)] = data[i];
    }
  }
  const auto actual = load_le<std::uint32_t>(bytes.data());
  if (actual != config_.actual) {
    config_.actual = actual;
    change_untold_ = true;
    tell_change();
  }
}

// A guest may change `actual` as often as it likes; the outside hears of it at a bounded rate.
void VirtioBalloon::tell_change() {
  if (!change_untold_) {
    return;
  }
  const std::uint64_t now = clock_.monotonic_ns();
  if (told_ns_ && now - *told_ns_ < kBalloonEventNs) {
    event_timer_.arm(*told_ns_ + kBalloonEventNs - now);
    return;
  }
  told_ns_ = now;
  change_untold_ = false;
  host_.balloon_changed(actual());
}

Result<void> VirtioBalloon::activate(VirtioActivation activation) {
  active_ = std::move(activation);
  return {};
}

// The statistics queue comes third where it was negotiated. For the queues behind it the specification counts
// queues of features that were not negotiated, and Linux does not (it numbers the queues that it uses): free
// page hinting is never offered here, so every queue behind the known ones is the reporting queue.
VirtioBalloon::Role VirtioBalloon::role(std::uint16_t queue) const {
  if (queue < 2) {
    return queue == 0 ? Role::kInflate : Role::kDeflate;
  }
  if (queue == 2 && (active_->features & kFeatureStatistics) != 0) {
    return Role::kStatistics;
  }
  return (active_->features & kFeatureReporting) != 0 ? Role::kReporting : Role::kNone;
}

void VirtioBalloon::notify(std::uint16_t queue) {
  if (!active_ || paused() || !active_->queues[queue]) {
    return;
  }
  switch (role(queue)) {
    case Role::kStatistics:
      take_statistics(queue);
      return;
    case Role::kNone:
      return;
    default:
      serve(queue, role(queue));
  }
}

void VirtioBalloon::serve(std::uint16_t index, Role role) {
  Queue& queue = *active_->queues[index];
  std::uint64_t pages = 0;
  int turns = kChainsPerTurn;
  for (; turns > 0 && pages < kPagesPerTurn; --turns) {
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
    if (role == Role::kInflate) {
      pages += inflate(chain_);
    } else if (role == Role::kReporting) {
      pages += report(chain_);
    }
    queue.push(chain_, 0);
  }
  if (queue.take_interrupt_wish()) {
    active_->interrupts->queue_used(index);
  }
  if (queue.has_available()) {
    signal_eventfd(active_->kick_fds[index]);  // others first
  }
}

std::uint64_t VirtioBalloon::inflate(const DescriptorChain& chain) {
  const std::uint32_t count = std::min(chain.readable_size() / 4, kMaxPfnsPerChain);
  std::array<std::uint32_t, kPfnsPerChunk> chunk;
  for (std::uint32_t done = 0; done < count; done += kPfnsPerChunk) {
    const std::span<std::uint32_t> pfns =
        std::span(chunk).first(std::min<std::size_t>(kPfnsPerChunk, count - done));
    const std::span bytes(reinterpret_cast<std::uint8_t*>(pfns.data()), pfns.size_bytes());
    static_cast<void>(chain.read(4ULL * done, bytes));
    std::ranges::sort(pfns);
    // Runs of neighbours are given back at once; what is no RAM is nobody's page.
    Gpa run = 0;
    std::uint64_t run_size = 0;
    for (const std::uint32_t pfn : pfns) {
      const Gpa gpa = pfn * kBalloonPage;
      if (run_size > 0 && gpa == run + run_size - kBalloonPage) {
        continue;  // named twice
      }
      if (!memory().slice(gpa, kBalloonPage)) {
        continue;
      }
      if (run_size > 0 && gpa == run + run_size && memory().slice(run, run_size + kBalloonPage)) {
        run_size += kBalloonPage;
        continue;
      }
      give_back(run, run_size);
      run = gpa;
      run_size = kBalloonPage;
    }
    give_back(run, run_size);
  }
  return std::max<std::uint64_t>(count, 1);
}

std::uint64_t VirtioBalloon::report(const DescriptorChain& chain) {
  std::uint64_t pages = 1;
  for (const GuestSlice& slice : chain.writable()) {
    const std::optional<std::uint64_t> start = align_up(slice.gpa(), kBalloonPage);
    const std::uint64_t end = align_down(slice.gpa() + slice.size(), kBalloonPage);
    if (start && *start < end) {
      give_back(*start, end - *start);
    }
    // A range costs one system call, however large; the pages in it cost the guest their way back.
    pages += 8;
  }
  return pages;
}

void VirtioBalloon::give_back(Gpa gpa, std::uint64_t size) {
  if (size == 0) {
    return;
  }
  const Result<void> discarded = host_.discard(gpa, size);
  // The bytes changed.
  memory().mark_dirty(gpa, size);
  if (!discarded && gate_.open()) {
    log_.warning("{} {}: {}", name(), options_.id, discarded.error().message);
  }
}

void VirtioBalloon::take_statistics(std::uint16_t index) {
  Queue& queue = *active_->queues[index];
  for (int turns = kChainsPerTurn; turns > 0; --turns) {
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
    // One buffer is kept; a driver that gives more gets the older one back.
    if (statistics_queue_) {
      queue.push(statistics_chain_, 0);
    }
    std::swap(statistics_chain_, chain_);
    statistics_queue_ = index;
    parse_statistics(statistics_chain_);
  }
  if (queue.take_interrupt_wish()) {
    active_->interrupts->queue_used(index);
  }
  if (queue.has_available()) {
    signal_eventfd(active_->kick_fds[index]);
  }
}

void VirtioBalloon::parse_statistics(const DescriptorChain& chain) {
  std::array<std::uint8_t, kStatisticSize * kMaxStatistics> bytes;
  const std::size_t size = chain.read(0, bytes);
  if (size < kStatisticSize) {
    return;  // the first buffer of a driver may hold nothing yet
  }
  statistics_ = {};
  for (std::size_t at = 0; at + kStatisticSize <= size; at += kStatisticSize) {
    const auto tag = load_le<std::uint16_t>(&bytes[at]);
    const auto value = load_le<std::uint64_t>(&bytes[at + 2]);
    if (tag < kStatisticsCount && value != std::numeric_limits<std::uint64_t>::max()) {
      statistics_[tag] = value;
    }
  }
}

void VirtioBalloon::set_statistics_interval(std::uint64_t seconds) {
  statistics_interval_s_ = std::min<std::uint64_t>(seconds, 86400);
  if (statistics_interval_s_ == 0) {
    statistics_timer_.disarm();
  } else {
    statistics_timer_.arm(1);
  }
}

void VirtioBalloon::ask_for_statistics() {
  if (statistics_interval_s_ == 0) {
    return;
  }
  statistics_timer_.arm(statistics_interval_s_ * kNsPerSecond);
  refresh_statistics();
}

void VirtioBalloon::refresh_statistics() {
  if (!active_ || paused() || !statistics_queue_) {
    return;
  }
  Queue& queue = *active_->queues[*statistics_queue_];
  queue.push(statistics_chain_, 0);
  const std::uint16_t index = *statistics_queue_;
  statistics_queue_.reset();
  if (queue.take_interrupt_wish()) {
    active_->interrupts->queue_used(index);
  }
}

std::vector<std::pair<std::string, std::uint64_t>> VirtioBalloon::statistics() const {
  std::vector<std::pair<std::string, std::uint64_t>> named;
  for (std::size_t tag = 0; tag < kStatisticsCount; ++tag) {
    if (statistics_[tag]) {
      named.emplace_back(kStatisticNames[tag], *statistics_[tag]);
    }
  }
  return named;
}

// The target stays: a guest that boots anew is asked for the same again.
void VirtioBalloon::reset() {
  statistics_queue_.reset();
  statistics_ = {};
  active_.reset();
  if (config_.actual != 0) {
    config_.actual = 0;
    change_untold_ = true;
    tell_change();
  }
}

void VirtioBalloon::on_pause() {
  if (statistics_queue_) {
    active_->queues[*statistics_queue_]->undo_pop(statistics_chain_);
    statistics_queue_.reset();
  }
  statistics_timer_.disarm();
}

void VirtioBalloon::on_resume() {
  set_statistics_interval(statistics_interval_s_);
  VirtioDevice::on_resume();
}

const Queue* VirtioBalloon::queue(std::uint16_t index) const {
  return active_ && index < active_->queues.size() && active_->queues[index] ? &*active_->queues[index]
                                                                             : nullptr;
}

StateRecord VirtioBalloon::save() const {
  StateWriter writer;
  writer.put(config_.num_pages);
  writer.put(config_.actual);
  writer.put(statistics_interval_s_);
  return {.name = std::string(name()), .version = 1, .bytes = writer.take()};
}

Result<void> VirtioBalloon::load(const StateRecord& record) {
  WISP_TRY(check_version(record, 1));
  StateReader reader(record.bytes);
  Config config;
  WISP_ASSIGN(config.num_pages, reader.get<std::uint32_t>());
  WISP_ASSIGN(config.actual, reader.get<std::uint32_t>());
  WISP_ASSIGN(const auto interval, reader.get_at_most<std::uint64_t>(86400, "statistics interval"));
  if (!reader.empty()) {
    return fail("saved state goes on behind its end");
  }
  config_ = config;
  statistics_interval_s_ = interval;
  return {};
}

}  // namespace wisp
