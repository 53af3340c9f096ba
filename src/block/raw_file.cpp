#include "block/raw_file.h"

#include <limits.h>
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/checked.h"
#include "block/thread_engine.h"
#include "block/uring_engine.h"

namespace wisp {
namespace {

constexpr std::uint32_t kWorkers = 4;
constexpr std::size_t kBounceSize = 128UL << 10;
constexpr std::size_t kBounceCount = 8;
constexpr std::size_t kZeroChunk = 1UL << 20;
// One discard or zeroing call covers at most this much, so that a drain need not wait long for it.
constexpr std::uint64_t kRangeChunk = 256ULL << 20;
// After so many refusals for want of memory a call is made on this thread.
constexpr std::uint8_t kMaxRetries = 8;
constexpr std::uint64_t kRetryDelayNs = 1'000'000;

bool is_unsupported(int error) {
  return error == EOPNOTSUPP || error == ENOTTY || error == ENOSYS || error == EINVAL || error == ENODEV;
}

std::string_view aio_name(AioKind aio) {
  switch (aio) {
    case AioKind::kIoUring:
      return "io_uring";
    case AioKind::kThreads:
      return "threads";
    case AioKind::kOff:
      break;
  }
  return "off";
}

}  // namespace

// Anonymous memory that costs nothing until it is touched.
struct RawFile::Mapping {
  static Result<std::unique_ptr<Mapping>> create(std::size_t size, int protection) {
    void* const start = ::mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
      return fail_errno(errno, "cannot map {} bytes of memory", size);
    }
    return std::make_unique<Mapping>(start, size);
  }
  Mapping(void* start_address, std::size_t byte_size)
      : start(static_cast<std::uint8_t*>(start_address)), size(byte_size) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(start, size); }
  std::uint8_t* const start;
  const std::size_t size;
};

RawFile::RawFile(ImageFile image, const RawFileOptions& options)
    : image_(std::move(image)), files_{image_.buffered.get(), image_.direct.get()}, slots_(kIoDepth) {
  geometry_.size = align_down(image_.size, kSectorSize);
  geometry_.logical_block_size = image_.logical_block_size;
  geometry_.physical_block_size = image_.physical_block_size;
  geometry_.discard_granularity = image_.physical_block_size;
  geometry_.read_only = options.read_only;
  geometry_.discard = options.discard && !options.read_only;
  identity_ = {.file = options.file,
               .format = "raw",
               .aio = {},
               .direct = image_.direct.valid(),
               .device = image_.device,
               .inode = image_.inode};
  for (Slot& slot : slots_) {
    free_slots_.push(slot);
  }
}

Result<std::unique_ptr<RawFile>> RawFile::create(ImageFile image, const RawFileOptions& options) {
  std::unique_ptr<RawFile> file(new RawFile(std::move(image), options));
  WISP_TRY(file->set_up(options));
  return file;
}

RawFile::~RawFile() {
  WISP_ASSERT(client_ == nullptr && in_flight_ == 0);
}

Result<std::unique_ptr<IoEngine>> RawFile::make_engine(AioKind aio, const RawFileOptions& options) const {
  switch (aio) {
    case AioKind::kIoUring:
      return UringEngine::create(files_);
    case AioKind::kThreads:
      return ThreadEngine::create(files_, kWorkers, options.worker_started);
    case AioKind::kOff:
      break;
  }
  return std::make_unique<SyncEngine>(files_);
}

Result<void> RawFile::set_up(const RawFileOptions& options) {
  AioKind aio = options.aio;
  auto engine = make_engine(aio, options);
  if (!engine && aio == AioKind::kIoUring) {
    fallback_reason_ = engine.error().message;
    aio = AioKind::kThreads;
    engine = make_engine(aio, options);
  }
  if (!engine) {
    return std::unexpected(std::move(engine).error());
  }
  engine_ = *std::move(engine);
  identity_.aio = aio_name(aio);
  if (aio == AioKind::kIoUring && image_.block_device && geometry_.discard) {
    WISP_ASSIGN(helper_, ThreadEngine::create(files_, 1, options.worker_started));
  }
  // Private memory that is only read is the kernel's one page of zeroes.
  WISP_ASSIGN(zeroes_, Mapping::create(kZeroChunk, PROT_READ));
  if (image_.direct.valid()) {
    static_assert(kBounceCount == std::tuple_size_v<decltype(free_bounces_)>);
    WISP_ASSIGN(bounces_, Mapping::create(kBounceCount * kBounceSize, PROT_READ | PROT_WRITE));
    for (std::size_t i = 0; i < kBounceCount; ++i) {
      free_bounces_.at(i) = bounces_->start + i * kBounceSize;
    }
    free_bounce_count_ = kBounceCount;
  }
  return {};
}

Result<void> RawFile::attach(Strand& strand, BlockClient& client) {
  if (client_ != nullptr) {
    return fail("is in use by another device");
  }
  WISP_ASSIGN(Timer timer, strand.timer([this] { kick(); }));
  std::vector<Watch> watches;
  for (const IoEngine* const engine : {engine_.get(), helper_.get()}) {
    if (engine != nullptr && engine->event_fd() >= 0) {
      WISP_ASSIGN(Watch watch, strand.watch(engine->event_fd(), EPOLLIN, [this](std::uint32_t) { kick(); }));
      watches.push_back(std::move(watch));
    }
  }
  watches_ = std::move(watches);
  retry_timer_.emplace(std::move(timer));
  client_ = &client;
  return {};
}

void RawFile::detach() {
  if (client_ == nullptr) {
    return;
  }
  drain(DrainMode::kCancel);
  watches_.clear();
  retry_timer_.reset();
  client_ = nullptr;
}

void RawFile::submit(BlockRequest& request) {
  pending_.push(request);
  ++in_flight_;
}

void RawFile::kick() {
  // From within block_done(): the round that runs takes up what was added.
  if (!busy_) {
    busy_ = true;
    round();
    busy_ = false;
  }
}

void RawFile::drain(DrainMode mode) {
  WISP_ASSERT(!busy_);
  busy_ = true;
  cancelling_ = mode == DrainMode::kCancel;
  round();
  while (in_flight_ > 0) {
    wait_for_tasks();
    round();
  }
  cancelling_ = false;
  busy_ = false;
}

// Moves everything as far as it goes without waiting.
void RawFile::round() {
  bool progress = true;
  while (progress) {
    start_pending();
    submit_tasks();
    progress = reap_tasks();
    progress = deliver() || progress;
  }
  if (stalled_ && retry_timer_) {
    retry_timer_->arm(kRetryDelayNs);
  }
}

void RawFile::wait_for_tasks() {
  std::array<pollfd, 2> events{};
  nfds_t count = 0;
  for (const IoEngine* const engine : {engine_.get(), helper_.get()}) {
    if (engine != nullptr && engine->event_fd() >= 0) {
      events.at(count++) = {.fd = engine->event_fd(), .events = POLLIN, .revents = 0};
    }
  }
  ::poll(events.data(), count, stalled_ ? 1 : -1);
}

std::optional<int> RawFile::refusal(const BlockRequest& request) const {
  if (cancelling_) {
    return ECANCELED;
  }
  if (request.op == BlockOp::kFlush) {
    return geometry_.read_only ? std::optional(0) : std::nullopt;
  }
  if (request.op != BlockOp::kRead && geometry_.read_only) {
    return EROFS;
  }
  if (!range_within(request.offset, request.length, geometry_.size)) {
    return EIO;
  }
  if (request.length == 0 || (request.op == BlockOp::kDiscard && !geometry_.discard)) {
    return 0;
  }
  return std::nullopt;
}

bool RawFile::needs_bounce(const BlockRequest& request) const {
  if (!image_.direct.valid() || (request.op != BlockOp::kRead && request.op != BlockOp::kWrite) ||
      !is_aligned(request.offset | request.length, image_.offset_alignment)) {
    return false;
  }
  return std::ranges::any_of(request.buffers, [this](const iovec& buffer) {
    return !is_aligned(reinterpret_cast<std::uintptr_t>(buffer.iov_base), image_.memory_alignment) ||
           !is_aligned(buffer.iov_len, image_.offset_alignment);
  });
}

void RawFile::start_pending() {
  while (BlockRequest* const request = pending_.front()) {
    if (const auto result = refusal(*request)) {
      (void)pending_.pop();
      request->result = *result;
      finished_.push(*request);
      continue;
    }
    const bool bounce = needs_bounce(*request);
    if (free_slots_.empty() || (bounce && free_bounce_count_ == 0)) {
      return;  // until something that is under way ends
    }
    (void)pending_.pop();
    Slot& slot = *free_slots_.pop();
    slot.request = request;
    slot.done = 0;
    slot.buffer = 0;
    slot.buffer_done = 0;
    slot.retries = 0;
    slot.bounce = bounce ? free_bounces_.at(--free_bounce_count_) : nullptr;
    slot.zero_mode = request->may_unmap && geometry_.discard ? unmap_mode_ : keep_mode_;
    begin_step(slot);
  }
}

void RawFile::begin_step(Slot& slot) {
  BlockRequest& request = *slot.request;
  IoTask& task = slot.task;
  task.file = kBufferedFile;
  task.iov = nullptr;
  task.iov_count = 0;
  task.offset = request.offset + slot.done;
  task.length = request.length - slot.done;
  switch (request.op) {
    case BlockOp::kRead:
    case BlockOp::kWrite:
      begin_transfer(slot);
      return;
    case BlockOp::kFlush:
      task.kind = IoKind::kSync;
      break;
    case BlockOp::kDiscard:
      task.kind = image_.block_device ? IoKind::kBlkDiscard : IoKind::kPunchHole;
      task.length = std::min(task.length, kRangeChunk);
      break;
    case BlockOp::kWriteZeroes:
      begin_zeroes(slot);
      return;
  }
  queue_task(slot);
}

void RawFile::begin_transfer(Slot& slot) {
  const BlockRequest& request = *slot.request;
  IoTask& task = slot.task;
  task.kind = request.op == BlockOp::kRead ? IoKind::kRead : IoKind::kWrite;
  bool aligned = image_.direct.valid() && is_aligned(task.offset | task.length, image_.offset_alignment);
  if (slot.bounce != nullptr) {
    slot.single = {slot.bounce, static_cast<std::size_t>(std::min<std::uint64_t>(task.length, kBounceSize))};
    if (task.kind == IoKind::kWrite) {
      // Gathered anew for each step from where the last one ended.
      std::size_t filled = 0;
      std::size_t skip = slot.buffer_done;
      for (std::size_t i = slot.buffer; filled < slot.single.iov_len && i < request.buffers.size(); ++i) {
        const iovec& buffer = request.buffers[i];
        const std::size_t part = std::min(buffer.iov_len - skip, slot.single.iov_len - filled);
        std::memcpy(slot.bounce + filled, static_cast<const std::uint8_t*>(buffer.iov_base) + skip, part);
        filled += part;
        skip = 0;
      }
    }
    task.iov = &slot.single;
    task.iov_count = 1;
  } else if (slot.buffer_done != 0) {
    // After a short transfer: first the rest of the buffer in which it ended.
    const iovec& buffer = request.buffers[slot.buffer];
    slot.single = {static_cast<std::uint8_t*>(buffer.iov_base) + slot.buffer_done,
                   buffer.iov_len - slot.buffer_done};
    task.iov = &slot.single;
    task.iov_count = 1;
  } else {
    const auto rest = request.buffers.subspan(slot.buffer);
    task.iov = rest.data();
    task.iov_count = static_cast<std::uint32_t>(std::min<std::size_t>(rest.size(), IOV_MAX));
  }
  if (aligned) {
    aligned = std::ranges::all_of(std::span(task.iov, task.iov_count), [this](const iovec& buffer) {
      return is_aligned(reinterpret_cast<std::uintptr_t>(buffer.iov_base), image_.memory_alignment) &&
             is_aligned(buffer.iov_len, image_.offset_alignment);
    });
  }
  task.file = aligned ? kDirectFile : kBufferedFile;
  queue_task(slot);
}

void RawFile::begin_zeroes(Slot& slot) {
  IoTask& task = slot.task;
  switch (slot.zero_mode) {
    case ZeroMode::kPunch:
      task.kind = IoKind::kPunchHole;
      task.length = std::min(task.length, kRangeChunk);
      break;
    case ZeroMode::kZeroRange:
      task.kind = IoKind::kZeroRange;
      task.length = std::min(task.length, kRangeChunk);
      break;
    case ZeroMode::kWrite:
      task.kind = IoKind::kWrite;
      slot.single = {zeroes_->start,
                     static_cast<std::size_t>(std::min<std::uint64_t>(task.length, kZeroChunk))};
      task.iov = &slot.single;
      task.iov_count = 1;
      task.file =
          image_.direct.valid() && is_aligned(task.offset | slot.single.iov_len, image_.offset_alignment)
              ? kDirectFile
              : kBufferedFile;
      break;
  }
  queue_task(slot);
}

void RawFile::queue_task(Slot& slot) {
  IoEngine& engine = helper_ && slot.task.kind == IoKind::kBlkDiscard ? *helper_ : *engine_;
  ++tasks_;
  engine.queue(slot.task);
}

void RawFile::submit_tasks() {
  stalled_ = !engine_->submit();
  if (helper_) {
    stalled_ = !helper_->submit() || stalled_;
  }
}

bool RawFile::reap_tasks() {
  bool any = false;
  for (IoEngine* const engine : {engine_.get(), helper_.get()}) {
    if (engine == nullptr || tasks_ == 0) {
      continue;
    }
    while (IoTask* const task = engine->reap()) {
      --tasks_;
      any = true;
      static_assert(offsetof(Slot, task) == 0);
      end_step(*reinterpret_cast<Slot*>(task));
    }
  }
  return any;
}

void RawFile::end_step(Slot& slot) {
  IoTask& task = slot.task;
  if ((task.result == -EAGAIN || task.result == -ECANCELED || task.result == -EINTR) &&
      ++slot.retries > kMaxRetries) {
    task.result = run_task(files_, task);
  }
  if (task.result == -EAGAIN || task.result == -ECANCELED || task.result == -EINTR) {
    // The kernel was short of memory, or the thread that began the call has ended.
    if (cancelling_) {
      finish(slot, ECANCELED);
    } else if (slot.retries > kMaxRetries) {
      finish(slot, EIO);
    } else {
      begin_step(slot);
    }
    return;
  }
  if (task.result < 0) {
    fail_step(slot, static_cast<int>(-task.result));
    return;
  }
  const bool transfer = task.kind == IoKind::kRead || task.kind == IoKind::kWrite;
  if (transfer && task.result == 0) {
    // The file was cut short behind our back, or the device ended.
    finish(slot, task.kind == IoKind::kRead ? EIO : ENOSPC);
    return;
  }
  advance(slot, transfer ? static_cast<std::uint64_t>(task.result) : task.length);
}

void RawFile::advance(Slot& slot, std::uint64_t bytes) {
  const BlockRequest& request = *slot.request;
  if (request.op == BlockOp::kFlush) {
    finish(slot, 0);
    return;
  }
  slot.done += bytes;
  if (request.op == BlockOp::kRead || request.op == BlockOp::kWrite) {
    const std::uint8_t* from = request.op == BlockOp::kRead ? slot.bounce : nullptr;
    for (std::uint64_t left = bytes; left > 0;) {
      const iovec& buffer = request.buffers[slot.buffer];
      const std::size_t part =
          static_cast<std::size_t>(std::min<std::uint64_t>(left, buffer.iov_len - slot.buffer_done));
      if (from != nullptr && part > 0) {
        std::memcpy(static_cast<std::uint8_t*>(buffer.iov_base) + slot.buffer_done, from, part);
        from += part;
      }
      slot.buffer_done += part;
      left -= part;
      if (slot.buffer_done == buffer.iov_len) {
        ++slot.buffer;
        slot.buffer_done = 0;
      }
    }
  }
  if (slot.done == request.length) {
    finish(slot, 0);
  } else if (cancelling_) {
    finish(slot, ECANCELED);
  } else {
    slot.retries = 0;
    begin_step(slot);
  }
}

void RawFile::fail_step(Slot& slot, int error) {
  if (slot.request->op == BlockOp::kDiscard && is_unsupported(error)) {
    finish(slot, 0);  // a hint that cannot be followed
    return;
  }
  if (slot.request->op == BlockOp::kWriteZeroes && slot.zero_mode != ZeroMode::kWrite &&
      is_unsupported(error)) {
    const ZeroMode next = slot.zero_mode == ZeroMode::kPunch ? ZeroMode::kZeroRange : ZeroMode::kWrite;
    // EINVAL may be about this one range (a block device wants whole blocks); the others about all.
    if (error != EINVAL) {
      unmap_mode_ = std::max(unmap_mode_, next);
      keep_mode_ = std::max(keep_mode_, next);
    }
    slot.zero_mode = next;
    begin_step(slot);
    return;
  }
  finish(slot, error);
}

void RawFile::finish(Slot& slot, int error) {
  if (slot.bounce != nullptr) {
    free_bounces_.at(free_bounce_count_++) = std::exchange(slot.bounce, nullptr);
  }
  BlockRequest& request = *std::exchange(slot.request, nullptr);
  request.result = error;
  finished_.push(request);
  free_slots_.push(slot);
}

bool RawFile::deliver() {
  if (finished_.empty()) {
    return false;
  }
  while (BlockRequest* const request = finished_.pop()) {
    --in_flight_;
    client_->block_done(*request, request->result);
  }
  client_->block_batch_done();
  return true;
}

}  // namespace wisp
