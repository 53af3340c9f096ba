// Limits on the requests and bytes per second of another back end.
#pragma once

#include <memory>
#include <optional>

#include "base/clock.h"
#include "block/block_backend.h"
#include "block/fifo.h"
#include "block/rate_limiter.h"

namespace wisp {

// Requests over the limit wait in the order in which they came, for one timer. drain(kComplete) lets them
// through at once; what they took is paid back before the next ones.
class ThrottledBackend final : public BlockBackend {
 public:
  ThrottledBackend(std::unique_ptr<BlockBackend> inner, const BlockLimits& limits, const Clock& clock);

  [[nodiscard]] const BlockGeometry& geometry() const override { return inner_->geometry(); }
  [[nodiscard]] const BlockIdentity& identity() const override { return inner_->identity(); }
  [[nodiscard]] Result<void> attach(Strand& strand, BlockClient& client) override;
  void detach() override;
  [[nodiscard]] bool attached() const override { return inner_->attached(); }
  void submit(BlockRequest& request) override;
  void kick() override;
  void drain(DrainMode mode) override;
  [[nodiscard]] std::uint32_t in_flight() const override { return waiting_count_ + inner_->in_flight(); }

 private:
  // Hands on what the limits let through now; all of it while draining.
  void release();
  void cancel_waiting();
  void take(const BlockRequest& request, std::uint64_t now_ns);

  const std::unique_ptr<BlockBackend> inner_;
  const Clock& clock_;
  std::optional<RateLimiter> iops_;
  std::optional<RateLimiter> bps_;
  Fifo<BlockRequest> waiting_;
  std::uint32_t waiting_count_ = 0;
  bool timer_armed_ = false;
  bool draining_ = false;
  BlockClient* client_ = nullptr;
  std::optional<Timer> timer_;
};

}  // namespace wisp
