// A disk in memory whose completions, errors and order a test decides. Header only; free of any test
// framework.
#pragma once

#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "block/block_backend.h"

namespace wisp::test {

class MemoryBackend final : public BlockBackend {
 public:
  enum class Mode : std::uint8_t {
    kAtKick,  // requests end within kick()
    kManual,  // requests end by complete()
  };
  explicit MemoryBackend(std::uint64_t size, Mode mode = Mode::kAtKick) : mode_(mode), data_(size) {
    geometry_.size = size;
    geometry_.discard = true;
    identity_ = {.file = "memory", .format = "raw", .aio = "off"};
  }

  // What the test may set. `inject` gives the errno a request is to fail with, or 0.
  BlockGeometry& geometry_for_change() { return geometry_; }
  std::function<int(const BlockRequest&)> inject;
  [[nodiscard]] std::vector<std::uint8_t>& data() { return data_; }

  // kManual: the requests begun and not ended, oldest first.
  [[nodiscard]] const std::vector<BlockRequest*>& begun() const { return begun_; }
  // Ends one of them, as the strand's loop would.
  void complete(std::size_t index) {
    BlockRequest& request = *begun_.at(index);
    begun_.erase(begun_.begin() + static_cast<std::ptrdiff_t>(index));
    end(request, execute(request));
    client_->block_batch_done();
  }
  // Ends all of them as one batch, the newest first.
  void complete_all() {
    while (!begun_.empty()) {
      BlockRequest& request = *begun_.back();
      begun_.pop_back();
      end(request, execute(request));
    }
    client_->block_batch_done();
  }
  // Requests carried out so far.
  [[nodiscard]] std::uint64_t count(BlockOp op) const { return counts_[static_cast<std::size_t>(op)]; }
  [[nodiscard]] std::uint64_t kicks() const { return kicks_; }

  [[nodiscard]] const BlockGeometry& geometry() const override { return geometry_; }
  [[nodiscard]] const BlockIdentity& identity() const override { return identity_; }
  [[nodiscard]] Result<void> attach(Strand&, BlockClient& client) override {
    if (client_ != nullptr) {
      return fail("is in use by another device");
    }
    client_ = &client;
    return {};
  }
  void detach() override {
    if (client_ != nullptr) {
      drain(DrainMode::kCancel);
      client_ = nullptr;
    }
  }
  [[nodiscard]] bool attached() const override { return client_ != nullptr; }
  void submit(BlockRequest& request) override { submitted_.push_back(&request); }
  void kick() override {
    ++kicks_;
    begun_.insert(begun_.end(), submitted_.begin(), submitted_.end());
    submitted_.clear();
    if (mode_ == Mode::kAtKick && !begun_.empty()) {
      complete_all();
    }
  }
  void drain(DrainMode mode) override {
    bool any = false;
    while (!submitted_.empty() || !begun_.empty()) {
      any = true;
      std::vector<BlockRequest*> cancelled;
      if (mode == DrainMode::kCancel) {
        cancelled.swap(submitted_);
      }
      begun_.insert(begun_.end(), submitted_.begin(), submitted_.end());
      submitted_.clear();
      for (BlockRequest* const request : cancelled) {
        end(*request, ECANCELED);
      }
      while (!begun_.empty()) {
        BlockRequest& request = *begun_.back();
        begun_.pop_back();
        end(request, execute(request));
      }
    }
    if (any) {
      client_->block_batch_done();
    }
  }
  [[nodiscard]] std::uint32_t in_flight() const override {
    return static_cast<std::uint32_t>(submitted_.size() + begun_.size());
  }

 private:
  void end(BlockRequest& request, int error) { client_->block_done(request, error); }
  int execute(BlockRequest& request) {
    ++counts_[static_cast<std::size_t>(request.op)];
    if (inject) {
      if (const int error = inject(request); error != 0) {
        return error;
      }
    }
    if (request.op == BlockOp::kFlush) {
      return 0;
    }
    // A device that lets such a range through has a bug that the caller must see.
    WISP_ASSERT(request.offset <= data_.size() && request.length <= data_.size() - request.offset);
    WISP_ASSERT(request.op == BlockOp::kRead || !geometry_.read_only);
    std::uint8_t* at = data_.data() + request.offset;
    std::uint64_t sum = 0;
    for (const iovec& buffer : request.buffers) {
      sum += buffer.iov_len;
    }
    switch (request.op) {
      case BlockOp::kRead:
      case BlockOp::kWrite:
        WISP_ASSERT(sum == request.length);
        for (const iovec& buffer : request.buffers) {
          if (request.op == BlockOp::kRead) {
            std::memcpy(buffer.iov_base, at, buffer.iov_len);
          } else {
            std::memcpy(at, buffer.iov_base, buffer.iov_len);
          }
          at += buffer.iov_len;
        }
        break;
      case BlockOp::kDiscard:
      case BlockOp::kWriteZeroes:
        std::memset(at, 0, request.length);
        break;
      case BlockOp::kFlush:
        break;
    }
    return 0;
  }

  const Mode mode_;
  std::vector<std::uint8_t> data_;
  BlockGeometry geometry_;
  BlockIdentity identity_;
  BlockClient* client_ = nullptr;
  std::vector<BlockRequest*> submitted_;
  std::vector<BlockRequest*> begun_;
  std::array<std::uint64_t, 5> counts_{};
  std::uint64_t kicks_ = 0;
};

}  // namespace wisp::test
