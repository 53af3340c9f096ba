// format=raw: the bytes of the disk are the bytes of a file or block device.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "block/block_backend.h"
#include "block/fifo.h"
#include "block/image_file.h"
#include "block/io_engine.h"

namespace wisp {

enum class AioKind : std::uint8_t { kIoUring, kThreads, kOff };

struct RawFileOptions {
  std::string file{};  // for identity()
  bool read_only = false;
  bool discard = false;             // kDiscard and may_unmap give space back to the host
  AioKind aio = AioKind::kIoUring;  // threads where the host has no io_uring: see fallback_reason()
  std::function<Result<void>()>
      worker_started{};  // called by each worker thread before all else; may be empty
};

// Each request becomes one or more system calls (steps), carried out by an engine; the next step of a request
// begins where the last one left off, so short reads and writes end in a whole transfer or an error. At most
// kIoDepth requests are with the engine, the rest wait in order.
//
// With direct I/O, buffers that are not aligned in memory go through bounce buffers, and ranges that are not
// aligned in the file through the page cache, which the kernel keeps coherent with direct I/O.
class RawFile final : public BlockBackend {
 public:
  // Fails where no engine can be set up.
  [[nodiscard]] static Result<std::unique_ptr<RawFile>> create(ImageFile image,
                                                               const RawFileOptions& options);
  ~RawFile() override;

  // Why threads are in use where io_uring was asked for; empty where they are not.
  [[nodiscard]] const std::string& fallback_reason() const { return fallback_reason_; }

  [[nodiscard]] const BlockGeometry& geometry() const override { return geometry_; }
  [[nodiscard]] const BlockIdentity& identity() const override { return identity_; }
  [[nodiscard]] Result<void> attach(Strand& strand, BlockClient& client) override;
  void detach() override;
  [[nodiscard]] bool attached() const override { return client_ != nullptr; }
  void submit(BlockRequest& request) override;
  void kick() override;
  void drain(DrainMode mode) override;
  [[nodiscard]] std::uint32_t in_flight() const override { return in_flight_; }

 private:
  // How a range is zeroed: the best way that has not failed yet.
  enum class ZeroMode : std::uint8_t { kPunch, kZeroRange, kWrite };
  struct Slot {
    IoTask task;  // first: a task is turned back into its slot
    BlockRequest* request = nullptr;
    Slot* next = nullptr;
    std::uint64_t done = 0;       // bytes
    std::size_t buffer = 0;       // index of the buffer that byte `done` belongs to
    std::size_t buffer_done = 0;  // bytes of it already transferred
    iovec single{};               // what `task.iov` points at where it is none of the request's
    std::uint8_t* bounce = nullptr;
    ZeroMode zero_mode = ZeroMode::kPunch;
    std::uint8_t retries = 0;
  };

  RawFile(ImageFile image, const RawFileOptions& options);
  [[nodiscard]] Result<void> set_up(const RawFileOptions& options);
  [[nodiscard]] Result<std::unique_ptr<IoEngine>> make_engine(AioKind aio,
                                                              const RawFileOptions& options) const;

  void round();
  void start_pending();
  [[nodiscard]] std::optional<int> refusal(const BlockRequest& request) const;
  [[nodiscard]] bool needs_bounce(const BlockRequest& request) const;
  void begin_step(Slot& slot);
  void begin_transfer(Slot& slot);
  void begin_zeroes(Slot& slot);
  void queue_task(Slot& slot);
  void end_step(Slot& slot);
  // The result of a step that did not fail.
  void advance(Slot& slot, std::uint64_t bytes);
  void fail_step(Slot& slot, int error);
  void finish(Slot& slot, int error);
  void submit_tasks();
  bool reap_tasks();
  bool deliver();
  void wait_for_tasks();

  const ImageFile image_;
  const EngineFiles files_;
  BlockGeometry geometry_;
  BlockIdentity identity_;
  std::string fallback_reason_;
  std::unique_ptr<IoEngine> engine_;
  std::unique_ptr<IoEngine> helper_;  // for what the ring cannot do; null where nothing needs it

  std::vector<Slot> slots_;
  Fifo<Slot> free_slots_;
  Fifo<BlockRequest> pending_;
  Fifo<BlockRequest> finished_;
  std::uint32_t in_flight_ = 0;
  std::uint32_t tasks_ = 0;  // lent to the engines
  bool busy_ = false;        // in round() or drain()
  bool cancelling_ = false;
  bool stalled_ = false;                       // the host could not take all tasks
  ZeroMode unmap_mode_ = ZeroMode::kPunch;     // for kWriteZeroes with may_unmap
  ZeroMode keep_mode_ = ZeroMode::kZeroRange;  // and without

  struct Mapping;
  std::unique_ptr<Mapping> zeroes_;   // kZeroChunk bytes
  std::unique_ptr<Mapping> bounces_;  // kBounceCount buffers of kBounceSize
  std::array<std::uint8_t*, 8> free_bounces_{};
  std::size_t free_bounce_count_ = 0;

  BlockClient* client_ = nullptr;
  std::vector<Watch> watches_;
  std::optional<Timer> retry_timer_;
};

}  // namespace wisp
