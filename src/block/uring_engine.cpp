#include "block/uring_engine.h"

#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>

#include <cerrno>

namespace wisp {
namespace {

// What came with Linux 5.6, the first kernel with all operations used here.
constexpr unsigned kNeededFeatures =
    IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_RW_CUR_POS | IORING_FEAT_SINGLE_MMAP;

// Kernel threads per ring for calls that block (buffered writes, flushes): enough for a disk, too few to
// flood the host.
constexpr unsigned kMaxKernelWorkers = 8;

}  // namespace

struct UringEngine::Ring {
  explicit Ring(const EngineFiles& engine_files) : files(engine_files) {}
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() {
    if (registered) {
      // The kernel takes a ring apart some time after it is closed; the files, and the locks on them, must go
      // at once.
      (void)io_uring_unregister_files(&ring);
    }
    if (open) {
      io_uring_queue_exit(&ring);
    }
  }
  const EngineFiles files;
  io_uring ring{};
  bool open = false;
  bool registered = false;
};

UringEngine::UringEngine(std::unique_ptr<Ring> ring) : ring_(std::move(ring)) {}
UringEngine::~UringEngine() = default;

Result<std::unique_ptr<UringEngine>> UringEngine::create(const EngineFiles& files) {
  auto ring = std::make_unique<Ring>(files);
  // SUBMIT_ALL (5.18): one refused entry does not hold up those behind it.
  int error = io_uring_queue_init(kIoDepth, &ring->ring, IORING_SETUP_SUBMIT_ALL);
  if (error == -EINVAL) {
    error = io_uring_queue_init(kIoDepth, &ring->ring, 0);
  }
  if (error < 0) {
    return fail_errno(-error, "cannot set up io_uring");
  }
  ring->open = true;
  if ((ring->ring.features & kNeededFeatures) != kNeededFeatures) {
    return fail("the kernel's io_uring is too old, Linux 5.6 or later is needed");
  }
  // Both are improvements only: without them the ring works as well.
  ring->registered =
      io_uring_register_files(&ring->ring, files.data(), static_cast<unsigned>(files.size())) == 0;
  std::array<unsigned, 2> workers{kMaxKernelWorkers, kMaxKernelWorkers};
  (void)io_uring_register_iowq_max_workers(&ring->ring, workers.data());
  return std::unique_ptr<UringEngine>(new UringEngine(std::move(ring)));
}

int UringEngine::event_fd() const {
  return ring_->ring.ring_fd;
}

void UringEngine::queue(IoTask& task) {
  queued_.push(task);
}

void UringEngine::fill(IoTask& task) {
  io_uring_sqe* const entry = io_uring_get_sqe(&ring_->ring);
  WISP_ASSERT(entry != nullptr);  // no more tasks are lent than the ring has entries
  const int fd = ring_->registered ? task.file : ring_->files.at(task.file);
  const auto offset = static_cast<off_t>(task.offset);
  switch (task.kind) {
    case IoKind::kRead:
      if (task.iov_count == 1 && task.iov->iov_len <= UINT32_MAX) {
        io_uring_prep_read(entry, fd, task.iov->iov_base, static_cast<unsigned>(task.iov->iov_len),
                           task.offset);
      } else {
        io_uring_prep_readv(entry, fd, task.iov, task.iov_count, task.offset);
      }
      break;
    case IoKind::kWrite:
      if (task.iov_count == 1 && task.iov->iov_len <= UINT32_MAX) {
        io_uring_prep_write(entry, fd, task.iov->iov_base, static_cast<unsigned>(task.iov->iov_len),
                            task.offset);
      } else {
        io_uring_prep_writev(entry, fd, task.iov, task.iov_count, task.offset);
      }
      break;
    case IoKind::kSync:
      io_uring_prep_fsync(entry, fd, IORING_FSYNC_DATASYNC);
      break;
    case IoKind::kPunchHole:
      io_uring_prep_fallocate(entry, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
                              static_cast<off_t>(task.length));
      break;
    case IoKind::kZeroRange:
      io_uring_prep_fallocate(entry, fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset,
                              static_cast<off_t>(task.length));
      break;
    case IoKind::kBlkDiscard:
      WISP_ASSERT(false && "the ring has no such operation");
      break;
  }
  if (ring_->registered) {
    entry->flags |= IOSQE_FIXED_FILE;
  }
  io_uring_sqe_set_data(entry, &task);
}

bool UringEngine::submit() {
  while (IoTask* const task = queued_.pop()) {
    if (broken_) {
      task->result = -EIO;
      abandoned_.push(*task);
      continue;
    }
    fill(*task);
    entered_.push(*task);
  }
  while (!entered_.empty()) {
    const int count = io_uring_submit(&ring_->ring);
    if (count == -EINTR) {
      continue;
    }
    if (count == 0 || count == -EAGAIN || count == -EBUSY) {
      // Short of memory, or completions must be taken first.
      return false;
    }
    if (count < 0) {
      // A system call filter, for one. No later call will fare better.
      broken_ = true;
      while (IoTask* const task = entered_.pop()) {
        task->result = count;
        abandoned_.push(*task);
      }
      break;
    }
    for (int i = 0; i < count; ++i) {
      (void)entered_.pop();
    }
  }
  return true;
}

IoTask* UringEngine::reap() {
  if (IoTask* const task = abandoned_.pop()) {
    return task;
  }
  io_uring_cqe* completion = nullptr;
  if (io_uring_peek_cqe(&ring_->ring, &completion) != 0 || completion == nullptr) {
    return nullptr;
  }
  auto* const task = static_cast<IoTask*>(io_uring_cqe_get_data(completion));
  task->result = completion->res;
  io_uring_cqe_seen(&ring_->ring, completion);
  return task;
}

}  // namespace wisp
