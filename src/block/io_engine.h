// How one system call on a file is carried out: at once, by a worker thread, or by io_uring.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>

#include "block/fifo.h"

namespace wisp {

enum class IoKind : std::uint8_t {
  kRead,        // preadv
  kWrite,       // pwritev
  kSync,        // fdatasync
  kPunchHole,   // fallocate PUNCH_HOLE
  kZeroRange,   // fallocate ZERO_RANGE
  kBlkDiscard,  // ioctl BLKDISCARD; io_uring has no such operation
};

// The files an engine works on, by index: the same file through the page cache and past it (-1: not open).
inline constexpr std::uint8_t kBufferedFile = 0;
inline constexpr std::uint8_t kDirectFile = 1;
using EngineFiles = std::array<int, 2>;

// One system call. The caller owns it, and lends it to the engine from queue() until reap() returns it.
struct IoTask {
  IoKind kind = IoKind::kRead;
  std::uint8_t file = kBufferedFile;
  std::uint32_t iov_count = 0;
  const iovec* iov = nullptr;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;  // of ranges; reads and writes go by their iovecs
  std::int64_t result = 0;   // bytes, 0, or a negative errno value
  IoTask* next = nullptr;
};

// Carries the task out on the calling thread; gives what `result` is to be.
[[nodiscard]] std::int64_t run_task(const EngineFiles& files, const IoTask& task);

// Not thread-safe: used under its owner's lock. Destroyed with no task lent.
class IoEngine {
 public:
  IoEngine() = default;
  IoEngine(const IoEngine&) = delete;
  IoEngine& operator=(const IoEngine&) = delete;
  virtual ~IoEngine() = default;

  // Takes a task, to be begun by submit(). At most kIoDepth tasks are lent at any time.
  virtual void queue(IoTask& task) = 0;
  // Begins what was queued. False where the host could not take all of it just now: try again later.
  [[nodiscard]] virtual bool submit() = 0;
  // A finished task, or null.
  [[nodiscard]] virtual IoTask* reap() = 0;
  // Readable while reap() has something to give; -1 where tasks finish within submit().
  [[nodiscard]] virtual int event_fd() const = 0;
};

inline constexpr std::uint32_t kIoDepth = 128;

// aio=off: the calls are made in submit().
class SyncEngine final : public IoEngine {
 public:
  explicit SyncEngine(const EngineFiles& files) : files_(files) {}
  void queue(IoTask& task) override { queued_.push(task); }
  [[nodiscard]] bool submit() override;
  [[nodiscard]] IoTask* reap() override { return finished_.pop(); }
  [[nodiscard]] int event_fd() const override { return -1; }

 private:
  const EngineFiles files_;
  Fifo<IoTask> queued_;
  Fifo<IoTask> finished_;
};

}  // namespace wisp
