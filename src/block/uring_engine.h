// aio=io_uring: one ring for one file.
#pragma once

#include <memory>

#include "base/error.h"
#include "block/io_engine.h"

namespace wisp {

class UringEngine final : public IoEngine {
 public:
  // The files are borrowed. Fails where the kernel has no io_uring (5.6 or later is needed) or forbids it.
  [[nodiscard]] static Result<std::unique_ptr<UringEngine>> create(const EngineFiles& files);
  ~UringEngine() override;

  void queue(IoTask& task) override;
  [[nodiscard]] bool submit() override;
  [[nodiscard]] IoTask* reap() override;
  [[nodiscard]] int event_fd() const override;

 private:
  struct Ring;
  explicit UringEngine(std::unique_ptr<Ring> ring);
  void fill(IoTask& task);
  const std::unique_ptr<Ring> ring_;
  Fifo<IoTask> queued_;     // no entry of the submission queue yet
  Fifo<IoTask> entered_;    // in the submission queue, not yet taken by the kernel, in the same order
  Fifo<IoTask> abandoned_;  // failed: the kernel refuses the ring
  bool broken_ = false;
};

}  // namespace wisp
