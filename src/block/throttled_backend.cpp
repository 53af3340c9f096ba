#include "block/throttled_backend.h"

#include <algorithm>
#include <cerrno>
#include <utility>

namespace wisp {
namespace {

std::uint64_t byte_cost(const BlockRequest& request) {
  switch (request.op) {
    case BlockOp::kRead:
    case BlockOp::kWrite:
    case BlockOp::kWriteZeroes:
      return request.length;
    case BlockOp::kFlush:
    case BlockOp::kDiscard:
      break;
  }
  return 0;
}

}  // namespace

ThrottledBackend::ThrottledBackend(std::unique_ptr<BlockBackend> inner, const BlockLimits& limits,
                                   const Clock& clock)
    : inner_(std::move(inner)), clock_(clock) {
  const std::uint64_t now = clock_.monotonic_ns();
  if (limits.iops != 0) {
    iops_.emplace(limits.iops, limits.iops_burst, now);
  }
  if (limits.bps != 0) {
    bps_.emplace(limits.bps, limits.bps_burst, now);
  }
}

Result<void> ThrottledBackend::attach(Strand& strand, BlockClient& client) {
  WISP_TRY(inner_->attach(strand, client));
  auto timer = strand.timer([this] {
    timer_armed_ = false;
    kick();
  });
  if (!timer) {
    inner_->detach();
    return std::unexpected(std::move(timer).error());
  }
  timer_.emplace(*std::move(timer));
  client_ = &client;
  return {};
}

void ThrottledBackend::detach() {
  if (client_ == nullptr) {
    return;
  }
  drain(DrainMode::kCancel);
  timer_.reset();
  inner_->detach();
  client_ = nullptr;
}

void ThrottledBackend::submit(BlockRequest& request) {
  waiting_.push(request);
  ++waiting_count_;
}

void ThrottledBackend::kick() {
  release();
  inner_->kick();
}

void ThrottledBackend::take(const BlockRequest& request, std::uint64_t now_ns) {
  if (iops_) {
    iops_->take(1, now_ns);
  }
  if (bps_) {
    bps_->take(byte_cost(request), now_ns);
  }
}

void ThrottledBackend::release() {
  if (timer_armed_ && !draining_) {
    return;  // the oldest waits, so all wait
  }
  const std::uint64_t now = clock_.monotonic_ns();
  while (BlockRequest* const request = waiting_.front()) {
    std::uint64_t delay = iops_ ? iops_->delay_ns(1, now) : 0;
    if (bps_) {
      delay = std::max(delay, bps_->delay_ns(byte_cost(*request), now));
    }
    if (delay != 0 && !draining_) {
      timer_->arm(delay);
      timer_armed_ = true;
      return;
    }
    take(*request, now);
    (void)waiting_.pop();
    --waiting_count_;
    inner_->submit(*request);
  }
}

void ThrottledBackend::cancel_waiting() {
  // Taken out first: the client may submit anew from within block_done().
  Fifo<BlockRequest> cancelled;
  cancelled.append(waiting_);
  waiting_count_ = 0;
  while (BlockRequest* const request = cancelled.pop()) {
    client_->block_done(*request, ECANCELED);
  }
  client_->block_batch_done();
}

void ThrottledBackend::drain(DrainMode mode) {
  if (timer_armed_) {
    timer_->disarm();
    timer_armed_ = false;
  }
  draining_ = true;
  while (in_flight() > 0) {
    if (mode == DrainMode::kComplete) {
      release();
    } else if (!waiting_.empty()) {
      cancel_waiting();
    }
    inner_->drain(mode);
  }
  draining_ = false;
}

}  // namespace wisp
