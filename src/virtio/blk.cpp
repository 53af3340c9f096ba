#include "virtio/blk.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/unique_fd.h"

namespace wisp {
namespace {

// 5.2.3
constexpr std::uint64_t kFeatureSegMax = 1ULL << 2;
constexpr std::uint64_t kFeatureReadOnly = 1ULL << 5;
constexpr std::uint64_t kFeatureBlockSize = 1ULL << 6;
constexpr std::uint64_t kFeatureFlush = 1ULL << 9;
constexpr std::uint64_t kFeatureTopology = 1ULL << 10;
constexpr std::uint64_t kFeatureConfigWce = 1ULL << 11;
constexpr std::uint64_t kFeatureMultiQueue = 1ULL << 12;
constexpr std::uint64_t kFeatureDiscard = 1ULL << 13;
constexpr std::uint64_t kFeatureWriteZeroes = 1ULL << 14;

// 5.2.6
constexpr std::uint32_t kTypeIn = 0;
constexpr std::uint32_t kTypeOut = 1;
constexpr std::uint32_t kTypeFlush = 4;
constexpr std::uint32_t kTypeGetId = 8;
constexpr std::uint32_t kTypeDiscard = 11;
constexpr std::uint32_t kTypeWriteZeroes = 13;
constexpr std::uint8_t kStatusOk = 0;
constexpr std::uint8_t kStatusIoError = 1;
constexpr std::uint8_t kStatusUnsupported = 2;
constexpr std::uint32_t kUnmapFlag = 1;

constexpr std::uint32_t kHeaderSize = 16;
constexpr std::uint32_t kStatusSize = 1;
constexpr std::uint32_t kSegmentSize = 16;
constexpr std::size_t kSerialSize = 20;

// struct virtio_blk_config (5.2.4), as far as its fields are used here: up to the write-zeroes limits.
constexpr std::size_t kConfigSize = 60;
constexpr std::size_t kWritebackOffset = 32;

// What one request may discard or zero in each segment, in sectors.
constexpr std::uint32_t kMaxDiscardSectors = 1U << 22;      // 2 GiB
constexpr std::uint32_t kMaxWriteZeroesSectors = 1U << 18;  // 128 MiB: may have to be written out

// Chains taken up by one notification, before other devices of the loop get their turn.
constexpr std::uint32_t kChainsPerNotify = 64;
// Requests of each queue, at least, whatever the number of queues.
constexpr std::uint32_t kMinRequestsPerQueue = 8;
// A request that met a longer chain gives its memory back afterwards.
constexpr std::size_t kKeptBuffers = 256;

constexpr std::array kProperties = std::to_array<PropertySpec>({
    {.name = "drive", .help = "id of the -drive behind it", .required = true},
    {.name = "serial",
     .help = "serial number that the guest sees, at most 20 characters",
     .maximum = kSerialSize},
    {.name = "num-queues",
     .kind = PropertyKind::kUint,
     .help = "request queues",
     .default_text = "1",
     .minimum = 1,
     .maximum = kVirtioBlkMaxQueues},
    {.name = "queue-size",
     .kind = PropertyKind::kUint,
     .help = "entries of each queue, a power of two",
     .default_text = "256",
     .minimum = 2,
     .maximum = kMaxQueueSize},
    {.name = "iothread", .help = "id of the -object iothread that serves it"},
    {.name = "bootindex",
     .kind = PropertyKind::kUint,
     .help = "order of booting",
     .maximum = 255,
     .ignored_because = "the kernel is loaded directly"},
});

std::uint8_t status_of(int error) {
  switch (error) {
    case 0:
      return kStatusOk;
    case EOPNOTSUPP:
    case ENOSYS:
      return kStatusUnsupported;
    default:
      return kStatusIoError;
  }
}

std::string_view op_name(BlockOp op) {
  switch (op) {
    case BlockOp::kRead:
      return "reading";
    case BlockOp::kWrite:
      return "writing";
    case BlockOp::kFlush:
      return "flushing";
    case BlockOp::kDiscard:
      return "discarding";
    case BlockOp::kWriteZeroes:
      break;
  }
  return "zeroing";
}

}  // namespace

std::span<const PropertySpec> virtio_blk_properties() {
  return kProperties;
}

Result<VirtioBlkOptions> virtio_blk_options(const std::string& id, const PropertySet& properties) {
  VirtioBlkOptions options{.id = id,
                           .drive = properties.get_string("drive"),
                           .serial = properties.get_string("serial"),
                           .num_queues = static_cast<std::uint16_t>(properties.get_uint("num-queues", 1)),
                           .queue_size = static_cast<std::uint16_t>(properties.get_uint("queue-size", 256))};
  if (options.drive.empty()) {
    return fail("device {}: drive= is missing; give the id of a -drive", id);
  }
  if (!std::has_single_bit(options.queue_size)) {
    return fail("device {}: queue-size={} is not a power of two; try {}", id, options.queue_size,
                std::bit_floor(options.queue_size));
  }
  return options;
}

VirtioBlk::VirtioBlk(EventLoop& loop, const GuestMemory& memory, const VirtioBlkOptions& options,
                     BlockBackend& backend, Log& log, const Clock& clock)
    : VirtioDevice(loop, memory),
      options_(options),
      backend_(backend),
      log_(log),
      gate_(clock),
      queue_sizes_(options.num_queues, options.queue_size) {}

Result<std::unique_ptr<VirtioBlk>> VirtioBlk::create(EventLoop& loop, const GuestMemory& memory,
                                                     const VirtioBlkOptions& options, BlockBackend& backend,
                                                     Log& log, const Clock& clock) {
  WISP_ASSERT(options.num_queues >= 1 && options.num_queues <= kVirtioBlkMaxQueues);
  std::unique_ptr<VirtioBlk> device(new VirtioBlk(loop, memory, options, backend, log, clock));
  {
    const std::lock_guard lock(device->strand().mutex());
    if (auto attached = backend.attach(device->strand(), *device); !attached) {
      return fail("device {}: drive {} {}", options.id, options.drive, attached.error().message);
    }
    device->attached_ = true;
  }
  return device;
}

VirtioBlk::~VirtioBlk() {
  const std::lock_guard lock(strand().mutex());
  // A device that could not attach must not end another's use of the back end.
  if (attached_) {
    reset();
    backend_.detach();
  }
}

std::uint64_t VirtioBlk::features() const {
  const BlockGeometry& geometry = backend_.geometry();
  std::uint64_t features = kFeatureSegMax | kFeatureBlockSize | kFeatureTopology | kFeatureFlush;
  if (options_.num_queues > 1) {
    features |= kFeatureMultiQueue;
  }
  if (geometry.read_only) {
    features |= kFeatureReadOnly;
  } else {
    features |= kFeatureConfigWce | kFeatureWriteZeroes;
    if (geometry.discard) {
      features |= kFeatureDiscard;
    }
  }
  return features;
}

void VirtioBlk::read_config(std::uint64_t offset, std::span<std::uint8_t> data) {
  const BlockGeometry& geometry = backend_.geometry();
  const std::uint32_t blocks_per_physical = geometry.physical_block_size / geometry.logical_block_size;
  const std::uint32_t granularity = geometry.discard_granularity / kSectorSize;
  std::array<std::uint8_t, kConfigSize> config{};
  store_le<std::uint64_t>(&config[0], geometry.size / kSectorSize);
  // Header and status take two of the descriptors.
  store_le<std::uint32_t>(&config[12], std::clamp(options_.queue_size - 2U, 1U, 254U));
  store_le<std::uint32_t>(&config[20], geometry.logical_block_size);
  config[24] = static_cast<std::uint8_t>(std::bit_width(blocks_per_physical) - 1);
  store_le<std::uint16_t>(&config[26], static_cast<std::uint16_t>(blocks_per_physical));
  config[kWritebackOffset] = writeback_ ? 1 : 0;
  store_le<std::uint16_t>(&config[34], options_.num_queues);
  if (geometry.discard) {
    store_le<std::uint32_t>(&config[36], kMaxDiscardSectors);
    store_le<std::uint32_t>(&config[40], kMaxSegments);
    store_le<std::uint32_t>(&config[44], granularity);
  }
  if (!geometry.read_only) {
    store_le<std::uint32_t>(&config[48], kMaxWriteZeroesSectors);
    store_le<std::uint32_t>(&config[52], kMaxSegments);
    config[56] = geometry.discard ? 1 : 0;
  }
  read_config_bytes(config, offset, data);
}

void VirtioBlk::write_config(std::uint64_t offset, std::span<const std::uint8_t> data) {
  // The one writable field, and only where it was negotiated (5.2.4).
  if (offset > kWritebackOffset || kWritebackOffset - offset >= data.size() ||
      (features_ & kFeatureConfigWce) == 0) {
    return;
  }
  const std::uint8_t value = data[kWritebackOffset - offset];
  if (value <= 1) {
    writeback_ = value == 1;
  }
}

Result<void> VirtioBlk::activate(VirtioActivation activation) {
  WISP_ASSERT(interrupts_ == nullptr && activation.queues.size() == queue_sizes_.size() &&
              activation.kick_fds.size() == queue_sizes_.size());
  features_ = activation.features;
  broken_ = false;
  const std::uint32_t share = std::max(kRequestsInFlight / options_.num_queues, kMinRequestsPerQueue);
  std::size_t total = 0;
  queues_.resize(queue_sizes_.size());
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    queues_[i].queue = std::move(activation.queues[i]);
    queues_[i].kick_fd = activation.kick_fds[i];
    total += queues_[i].queue ? share : 0;
  }
  requests_ = std::vector<Request>(total);
  std::size_t next = 0;
  for (std::uint16_t i = 0; std::size_t{i} < queues_.size(); ++i) {
    for (std::uint32_t n = 0; queues_[i].queue && n < share; ++n) {
      requests_[next].queue = i;
      queues_[i].free.push_back(&requests_[next]);
      ++next;
    }
  }
  interrupts_ = activation.interrupts;
  return {};
}

const Queue* VirtioBlk::queue(std::uint16_t index) const {
  return index < queues_.size() && queues_[index].queue ? &*queues_[index].queue : nullptr;
}

void VirtioBlk::reset() {
  // What is dropped from here on is not returned to the driver, which has forgotten it.
  resetting_ = true;
  backend_.drain(DrainMode::kCancel);
  resetting_ = false;
  interrupts_ = nullptr;
  queues_.clear();
  requests_.clear();
  features_ = 0;
  writeback_ = true;
  broken_ = false;
}

void VirtioBlk::on_pause() {
  backend_.drain(DrainMode::kComplete);
}

void VirtioBlk::notify(std::uint16_t index) {
  if (interrupts_ == nullptr || broken_ || index >= queues_.size() || !queues_[index].queue) {
    return;
  }
  process(index);
  backend_.kick();
  tell_driver();
}

void VirtioBlk::process(std::uint16_t index) {
  QueueState& state = queues_[index];
  Queue& queue = *state.queue;
  queue.disable_notifications();
  for (std::uint32_t left = kChainsPerNotify; !broken_; --left) {
    if (left == 0) {
      if (queue.enable_notifications()) {
        queue.disable_notifications();
        signal_eventfd(state.kick_fd);
      }
      return;
    }
    if (state.free.empty()) {
      state.starved = true;
      return;
    }
    Request& request = *state.free.back();
    switch (queue.pop(request.chain)) {
      case PopResult::kChain:
        state.free.pop_back();
        begin(request);
        break;
      case PopResult::kEmpty:
        if (!queue.enable_notifications()) {
          return;
        }
        break;  // something came in between
      case PopResult::kBroken:
        break_device("the queue is malformed");
        return;
    }
  }
}

void VirtioBlk::begin(Request& request) {
  const DescriptorChain& chain = request.chain;
  std::array<std::uint8_t, kHeaderSize> header{};
  request.data_read = 0;
  request.segment_count = 0;
  request.next_segment = 0;
  if (chain.read(0, header) < kHeaderSize || chain.writable_size() < kStatusSize) {
    // Without a header there is no request, without a status no way to answer (5.2.6.1).
    queues_[request.queue].queue->push(chain, 0);
    queues_[request.queue].used = true;
    give_back(request);
    break_device("a request has no header or no status byte");
    return;
  }
  const std::uint64_t sector = load_le<std::uint64_t>(&header[8]);
  switch (load_le<std::uint32_t>(header.data())) {
    case kTypeIn:
      begin_transfer(request, true, sector);
      break;
    case kTypeOut:
      begin_transfer(request, false, sector);
      break;
    case kTypeFlush:
      request.op = BlockOp::kFlush;
      request.offset = 0;
      request.length = 0;
      request.buffers = {};
      backend_.submit(request);
      break;
    case kTypeGetId:
      begin_get_id(request);
      break;
    case kTypeDiscard:
      begin_ranges(request, BlockOp::kDiscard);
      break;
    case kTypeWriteZeroes:
      begin_ranges(request, BlockOp::kWriteZeroes);
      break;
    default:
      complete(request, kStatusUnsupported);
      break;
  }
}

void VirtioBlk::begin_transfer(Request& request, bool read, std::uint64_t sector) {
  const DescriptorChain& chain = request.chain;
  const std::uint32_t length =
      read ? chain.writable_size() - kStatusSize : chain.readable_size() - kHeaderSize;
  const std::optional<std::uint64_t> offset = checked_mul<std::uint64_t>(sector, kSectorSize);
  const BlockGeometry& geometry = backend_.geometry();
  if (length % kSectorSize != 0 || !offset || !range_within(*offset, length, geometry.size) ||
      (!read && geometry.read_only)) {
    complete(request, kStatusIoError);
    return;
  }
  request.iovecs.clear();
  const std::size_t covered = read ? chain.writable_iovecs(0, length, request.iovecs)
                                   : chain.readable_iovecs(kHeaderSize, length, request.iovecs);
  WISP_ASSERT(covered == length);
  request.op = read ? BlockOp::kRead : BlockOp::kWrite;
  request.offset = *offset;
  request.length = length;
  request.buffers = request.iovecs;
  backend_.submit(request);
}

void VirtioBlk::begin_get_id(Request& request) {
  std::array<std::uint8_t, kSerialSize> serial{};
  std::memcpy(serial.data(), options_.serial.data(), std::min(options_.serial.size(), serial.size()));
  const std::size_t room = request.chain.writable_size() - kStatusSize;
  request.data_read = request.chain.write(0, std::span(serial).first(std::min(room, serial.size())));
  complete(request, kStatusOk);
}

void VirtioBlk::begin_ranges(Request& request, BlockOp op) {
  const std::uint64_t feature = op == BlockOp::kDiscard ? kFeatureDiscard : kFeatureWriteZeroes;
  const std::uint8_t status = (features_ & feature) == 0 ? kStatusUnsupported : read_segments(request, op);
  if (status != kStatusOk) {
    complete(request, status);
    return;
  }
  request.op = op;
  request.buffers = {};
  if (!submit_next_range(request)) {
    complete(request, kStatusOk);
  }
}

// Reads all segments once and judges them before the first is carried out (5.2.6.2).
std::uint8_t VirtioBlk::read_segments(Request& request, BlockOp op) {
  const std::uint32_t size = request.chain.readable_size() - kHeaderSize;
  const std::uint32_t count = size / kSegmentSize;
  const std::uint32_t limit = op == BlockOp::kDiscard ? kMaxDiscardSectors : kMaxWriteZeroesSectors;
  if (size % kSegmentSize != 0 || count == 0 || count > kMaxSegments) {
    return kStatusIoError;
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    std::array<std::uint8_t, kSegmentSize> bytes{};
    if (request.chain.read(kHeaderSize + i * kSegmentSize, bytes) != bytes.size()) {
      return kStatusIoError;
    }
    const std::uint32_t sectors = load_le<std::uint32_t>(&bytes[8]);
    const std::uint32_t flags = load_le<std::uint32_t>(&bytes[12]);
    const auto offset = checked_mul<std::uint64_t>(load_le<std::uint64_t>(bytes.data()), kSectorSize);
    const std::uint64_t length = std::uint64_t{sectors} * kSectorSize;
    if ((flags & ~(op == BlockOp::kDiscard ? 0 : kUnmapFlag)) != 0) {
      return kStatusUnsupported;
    }
    if (sectors > limit || !offset || !range_within(*offset, length, backend_.geometry().size)) {
      return kStatusIoError;
    }
    request.segments.at(i) = {.offset = *offset, .length = length, .unmap = (flags & kUnmapFlag) != 0};
  }
  request.segment_count = count;
  return kStatusOk;
}

bool VirtioBlk::submit_next_range(Request& request) {
  while (request.next_segment < request.segment_count) {
    const Segment& segment = request.segments.at(request.next_segment++);
    if (segment.length != 0) {
      request.offset = segment.offset;
      request.length = segment.length;
      request.may_unmap = segment.unmap;
      backend_.submit(request);
      return true;
    }
  }
  return false;
}

void VirtioBlk::count(const BlockRequest& request, int error) {
  BlockCounters::Operations* operations = nullptr;
  switch (request.op) {
    case BlockOp::kRead:
      operations = &counters_.reads;
      break;
    case BlockOp::kWrite:
    case BlockOp::kWriteZeroes:
      operations = &counters_.writes;
      break;
    case BlockOp::kFlush:
      operations = &counters_.flushes;
      break;
    case BlockOp::kDiscard:
      operations = &counters_.discards;
      break;
  }
  if (error != 0) {
    ++operations->failed;
    return;
  }
  ++operations->done;
  if (request.op != BlockOp::kFlush) {
    operations->bytes += request.length;
  }
  if (operations == &counters_.writes) {
    counters_.highest_written = std::max(counters_.highest_written, request.offset + request.length);
  }
}

void VirtioBlk::block_done(BlockRequest& block_request, int error) {
  auto& request = static_cast<Request&>(block_request);
  if (resetting_) {
    give_back(request);
    return;
  }
  count(request, error);
  if (error != 0) {
    if (error != EOPNOTSUPP && gate_.open()) {
      log_.error("drive {}: {} {} bytes at {} failed: {}", options_.drive, op_name(request.op),
                 request.length, request.offset, errno_text(error));
    }
    if (request.op == BlockOp::kRead) {
      // Some of it may have been read, nobody knows which.
      for (const GuestSlice& buffer : request.chain.writable()) {
        memory().mark_dirty(buffer.gpa(), buffer.size());
      }
    }
    complete(request, status_of(error));
    return;
  }
  switch (request.op) {
    case BlockOp::kRead:
      request.data_read = request.length;
      break;
    case BlockOp::kDiscard:
    case BlockOp::kWriteZeroes:
      if (submit_next_range(request)) {
        resubmitted_ = true;
        return;
      }
      [[fallthrough]];
    case BlockOp::kWrite: {
      // Without a write cache that the driver knows of, written means stored (5.2.5.2, 5.2.6.2).
      const bool write_through =
          (features_ & kFeatureConfigWce) != 0 ? !writeback_ : (features_ & kFeatureFlush) == 0;
      if (write_through) {
        request.op = BlockOp::kFlush;
        backend_.submit(request);
        resubmitted_ = true;
        return;
      }
      break;
    }
    case BlockOp::kFlush:
      break;
  }
  complete(request, kStatusOk);
}

void VirtioBlk::block_batch_done() {
  if (std::exchange(resubmitted_, false)) {
    backend_.kick();
  }
  if (!resetting_) {
    tell_driver();
  }
}

void VirtioBlk::complete(Request& request, std::uint8_t status) {
  const DescriptorChain& chain = request.chain;
  const std::uint32_t status_at = chain.writable_size() - kStatusSize;
  static_cast<void>(chain.write(status_at, {&status, 1}));
  // The length counts from the start of the writable part: the status only where no gap lies before it.
  const auto data = static_cast<std::uint32_t>(request.data_read);
  QueueState& state = queues_[request.queue];
  state.queue->push(chain, data == status_at ? chain.writable_size() : data);
  state.used = true;
  give_back(request);
}

void VirtioBlk::give_back(Request& request) {
  if (request.iovecs.capacity() > kKeptBuffers ||
      request.chain.readable().size() + request.chain.writable().size() > kKeptBuffers) {
    request.iovecs = {};
    request.chain = {};
  }
  queues_[request.queue].free.push_back(&request);
}

void VirtioBlk::tell_driver() {
  for (std::uint16_t i = 0; std::size_t{i} < queues_.size(); ++i) {
    QueueState& state = queues_[i];
    if (!std::exchange(state.used, false)) {
      continue;
    }
    if (state.queue->take_interrupt_wish()) {
      interrupts_->queue_used(i);
    }
    if (std::exchange(state.starved, false)) {
      signal_eventfd(state.kick_fd);
    }
  }
}

void VirtioBlk::break_device(std::string_view what) {
  if (broken_) {
    return;
  }
  broken_ = true;
  if (gate_.open()) {
    log_.warning("device {}: {}; the guest must reset it", options_.id, what);
  }
  interrupts_->needs_reset();
}

StateRecord VirtioBlk::save() const {
  StateWriter writer;
  writer.put(backend_.geometry().size);
  writer.put(writeback_);
  return {.name = "virtio-blk", .version = 1, .bytes = writer.take()};
}

Result<void> VirtioBlk::load(const StateRecord& record) {
  WISP_TRY(check_version(record, 1));
  StateReader reader(record.bytes);
  WISP_ASSIGN(const std::uint64_t size, reader.get<std::uint64_t>());
  WISP_ASSIGN(const bool writeback, reader.get<bool>());
  if (size != backend_.geometry().size) {
    return fail(
        "device {}: drive {} has {} bytes, the saved machine's had {}; give the disk it was saved with",
        options_.id, options_.drive, backend_.geometry().size, size);
  }
  writeback_ = writeback;
  return {};
}

}  // namespace wisp
