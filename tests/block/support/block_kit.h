// Files and clients for tests of back ends.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "block/block_backend.h"

namespace wisp::test {

// A directory that goes with its contents.
class TempDir final {
 public:
  // `parent` is where; by default what the system uses for temporary files.
  explicit TempDir(const std::string& parent = std::filesystem::temp_directory_path()) {
    std::string name = parent + "/wisp-block-XXXXXX";
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::string path(const std::string& name) const { return path_ + "/" + name; }
  // A file with `size` bytes of a pattern that differs in every place.
  [[nodiscard]] std::string file(const std::string& name, std::size_t size) const {
    write(name, pattern(size, 1));
    return path(name);
  }
  void write(const std::string& name, const std::vector<std::uint8_t>& bytes) const {
    const UniqueFd fd(::open(path(name).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    ASSERT_EQ(::pwrite(fd.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  }
  [[nodiscard]] static std::vector<std::uint8_t> read(const std::string& file) {
    const UniqueFd fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
    std::vector<std::uint8_t> bytes(std::filesystem::file_size(file));
    EXPECT_EQ(::pread(fd.get(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return bytes;
  }
  [[nodiscard]] static std::vector<std::uint8_t> pattern(std::size_t size, std::uint64_t seed) {
    std::vector<std::uint8_t> bytes(size);
    std::uint64_t state = seed * 0x9e3779b97f4a7c15 + 1;
    for (std::uint8_t& byte : bytes) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      byte = static_cast<std::uint8_t>(state);
    }
    return bytes;
  }

 private:
  std::string path_;
};

// A loop, a strand, and a client that notes what ended. All calls into the back end go through here, with the
// lock held.
class BackendDriver final : public BlockClient {
 public:
  explicit BackendDriver(BlockBackend& backend)
      : loop_(EventLoop::create().value()), strand_(*loop_), backend_(backend) {
    const std::lock_guard lock(strand_.mutex());
    auto attached = backend_.attach(strand_, *this);
    EXPECT_TRUE(attached.has_value()) << attached.error().message;
  }
  ~BackendDriver() override {
    const std::lock_guard lock(strand_.mutex());
    backend_.detach();
  }

  void block_done(BlockRequest& request, int error) override { done_.push_back({&request, error}); }
  void block_batch_done() override { ++batches_; }

  void start(const std::vector<BlockRequest*>& requests) {
    const std::lock_guard lock(strand_.mutex());
    for (BlockRequest* const request : requests) {
      backend_.submit(*request);
    }
    backend_.kick();
  }
  // Runs the loop until `count` requests have ended, 10 seconds at most.
  [[nodiscard]] bool wait(std::size_t count) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (done_.size() < count) {
      if (std::chrono::steady_clock::now() > limit) {
        return false;
      }
      loop_->run_once(100);
    }
    return true;
  }
  // One request from start to end; its error.
  [[nodiscard]] int run(BlockRequest request) {
    done_.clear();
    start({&request});
    EXPECT_TRUE(wait(1));
    return done_.empty() ? -1 : done_.front().error;
  }
  [[nodiscard]] int transfer(BlockOp op, std::uint64_t offset, std::span<const iovec> buffers) {
    std::uint64_t length = 0;
    for (const iovec& buffer : buffers) {
      length += buffer.iov_len;
    }
    return run({.op = op, .offset = offset, .length = length, .buffers = buffers});
  }
  void drain(DrainMode mode) {
    const std::lock_guard lock(strand_.mutex());
    backend_.drain(mode);
  }

  struct Done {
    BlockRequest* request;
    int error;
  };
  [[nodiscard]] std::vector<Done>& done() { return done_; }
  [[nodiscard]] int batches() const { return batches_; }
  [[nodiscard]] EventLoop& loop() { return *loop_; }
  [[nodiscard]] Strand& strand() { return strand_; }

 private:
  std::unique_ptr<EventLoop> loop_;
  Strand strand_;
  BlockBackend& backend_;
  std::vector<Done> done_;
  int batches_ = 0;
};

}  // namespace wisp::test
