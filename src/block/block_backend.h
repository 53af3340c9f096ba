// Where the data of a block device lives: asynchronous requests on byte ranges.
//
// Locking: once attached, every function is called with the mutex of the strand held, and completions come
// with it held. Nothing is allocated per request: the client owns its requests and lends them.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>

#include "base/error.h"
#include "base/event_loop.h"

namespace wisp {

// Offsets and lengths of requests are multiples of this.
inline constexpr std::uint32_t kSectorSize = 512;

enum class BlockOp : std::uint8_t {
  kRead,
  kWrite,
  kFlush,        // what completed before is on stable storage when this completes
  kDiscard,      // a hint: the range's contents are no longer needed
  kWriteZeroes,  // the range reads as zeroes afterwards
};

struct BlockRequest {
  BlockOp op = BlockOp::kRead;
  bool may_unmap = false;    // kWriteZeroes: the space may be given back to the host
  std::uint64_t offset = 0;  // bytes
  std::uint64_t length = 0;  // bytes
  // kRead, kWrite: `length` bytes in all. The array and the memory stay until completion.
  std::span<const iovec> buffers{};

  // The back end's own, while it has the request.
  BlockRequest* next = nullptr;
  int result = 0;
};

// Who uses a back end.
class BlockClient {
 public:
  virtual ~BlockClient() = default;
  // A request is finished and the client's again: `error` is 0 or an errno value; ECANCELED where drain()
  // dropped it; after an error of a write any part of the range may have been written. Comes from kick(),
  // drain() or the strand's loop, never from submit(), in any order.
  virtual void block_done(BlockRequest& request, int error) = 0;
  // Follows a batch of block_done() calls: the time to tell a driver.
  virtual void block_batch_done() = 0;
};

// What a driver must know.
struct BlockGeometry {
  std::uint64_t size = 0;                           // bytes, a multiple of kSectorSize
  std::uint32_t logical_block_size = kSectorSize;   // the unit a driver should use; smaller ones work too
  std::uint32_t physical_block_size = kSectorSize;  // the unit the storage rewrites
  std::uint32_t discard_granularity = kSectorSize;  // bytes
  bool read_only = false;                           // writes fail with EROFS
  bool discard = false;                             // kDiscard and may_unmap have an effect
};

// What was opened, for listings and for telling whether two drives are the same file.
struct BlockIdentity {
  std::string file{};
  std::string format{};  // "raw"
  std::string aio{};     // "io_uring", "threads" or "off": what is in use
  bool direct = false;
  std::uint64_t device = 0;  // st_dev and st_ino of the file
  std::uint64_t inode = 0;
};

// 0 means no limit, and for a burst a tenth of a second's worth.
struct BlockLimits {
  std::uint64_t iops = 0;        // requests a second, of every kind
  std::uint64_t iops_burst = 0;  // requests that may come at once after idle time
  std::uint64_t bps = 0;         // bytes a second, read, written or zeroed
  std::uint64_t bps_burst = 0;
  [[nodiscard]] bool any() const { return iops != 0 || bps != 0; }
};

// What was carried out since the start. A range of a discard or write-zeroes request counts as one operation;
// zeroes count as written.
struct BlockCounters {
  struct Operations {
    std::uint64_t done = 0;
    std::uint64_t failed = 0;  // the storage gave an error
    std::uint64_t bytes = 0;   // of those done
  };
  Operations reads{};
  Operations writes{};
  Operations flushes{};
  Operations discards{};
  std::uint64_t highest_written = 0;  // the end of the furthest byte written
};

enum class DrainMode : std::uint8_t {
  kComplete,  // all requests are carried out
  kCancel,    // those not begun end with ECANCELED; those begun are waited for
};

class BlockBackend {
 public:
  BlockBackend() = default;
  BlockBackend(const BlockBackend&) = delete;
  BlockBackend& operator=(const BlockBackend&) = delete;
  // Detached, or never attached.
  virtual ~BlockBackend() = default;

  [[nodiscard]] virtual const BlockGeometry& geometry() const = 0;
  [[nodiscard]] virtual const BlockIdentity& identity() const = 0;

  // Makes `client` the one user, on `strand`; both are borrowed until detach(). Fails where there is one
  // already.
  [[nodiscard]] virtual Result<void> attach(Strand& strand, BlockClient& client) = 0;
  // Drains (kCancel) and lets go of strand and client. Without an attached client: nothing.
  virtual void detach() = 0;
  [[nodiscard]] virtual bool attached() const = 0;

  // Takes a request; it is begun by the next kick().
  virtual void submit(BlockRequest& request) = 0;
  // Begins all that was submitted, in one batch.
  virtual void kick() = 0;
  // Blocks until nothing is in flight; completions are delivered from in here, on the calling thread. Not
  // from within a completion.
  virtual void drain(DrainMode mode) = 0;
  // Requests submitted and not yet completed.
  [[nodiscard]] virtual std::uint32_t in_flight() const = 0;
};

}  // namespace wisp
