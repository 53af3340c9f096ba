// Host memory that becomes guest RAM.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"

namespace wisp {

enum class RamSource : std::uint8_t {
  kAnonymous,  // private anonymous memory: the lightest; kernel images can be mapped into it
  kMemfd,      // shared memory that other processes (vhost-user) can map
  kFile,       // a file or a directory on tmpfs or hugetlbfs
};

struct RamOptions {
  std::uint64_t size = 0;  // bytes, a multiple of the page size in use
  RamSource source = RamSource::kAnonymous;
  std::string path{};     // kFile: a file (created where missing, never shrunk) or a directory
  bool share = false;     // writes reach the file and children after fork(2); always so for kMemfd
  bool prealloc = false;  // touch every page now, fail where the host has not enough
  std::optional<std::uint64_t> huge_page_size{};  // bytes (2 MiB, 1 GiB): hugetlb for kAnonymous and kMemfd
  bool dump = true;                               // false: left out of core dumps (MADV_DONTDUMP)
  bool merge = false;                             // MADV_MERGEABLE
};

// A file that goes again unless it is kept.
class FreshFile final {
 public:
  FreshFile() = default;
  // `fd` is the file as it was made.
  FreshFile(std::string path, int fd);
  FreshFile(FreshFile&& other) noexcept
      : path_(std::exchange(other.path_, {})), device_(other.device_), inode_(other.inode_) {}
  FreshFile& operator=(FreshFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(device_, other.device_);
    std::swap(inode_, other.inode_);
    return *this;
  }
  FreshFile(const FreshFile&) = delete;
  FreshFile& operator=(const FreshFile&) = delete;
  ~FreshFile();

  void keep() { path_.clear(); }

 private:
  std::string path_;
  std::uint64_t device_ = 0;
  std::uint64_t inode_ = 0;
};

// One mapping with one owner. A file that was made for it goes with it unless keep_file() was called.
class RamBlock final {
 public:
  [[nodiscard]] static Result<std::unique_ptr<RamBlock>> create(const RamOptions& options);
  // The machine stands: its memory's file stays.
  void keep_file() { fresh_.keep(); }
  RamBlock(const RamBlock&) = delete;
  RamBlock& operator=(const RamBlock&) = delete;
  ~RamBlock();

  [[nodiscard]] std::uint8_t* host() const { return host_; }
  [[nodiscard]] std::uint64_t size() const { return size_; }
  // -1 for anonymous memory.
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] bool shared() const { return shared_; }
  [[nodiscard]] std::uint64_t page_size() const { return page_size_; }

  // Puts `size` bytes at `file_offset` of `fd` at `offset` of the block: by mapping whole pages copy-on-write
  // where source, destination and memory kind allow, else by reading in place. Both give the same bytes; a
  // short file is an error. The file must not be truncated while the machine runs.
  [[nodiscard]] Result<void> load_file(std::uint64_t offset, int fd, std::uint64_t file_offset,
                                       std::uint64_t size);
  // Asks the host for large pages, an advice, and has load_file() read rather than map.
  void use_large_pages();
  // Gives pages back to the host; they read as zero afterwards. Rounded inwards to whole pages. Thread-safe,
  // but not together with load_file() and clear().
  [[nodiscard]] Result<void> discard(std::uint64_t offset, std::uint64_t size);
  // The same for ranges that a guest chooses: pages that a file lies behind read as the file again. So the
  // mapping stays in one piece, where pages of zeroes here and there would take the process's last mapping.
  [[nodiscard]] Result<void> release(std::uint64_t offset, std::uint64_t size);
  // All of it as it was at birth, but zero where a file lay behind it.
  [[nodiscard]] Result<void> clear();

 private:
  struct Range {
    std::uint64_t offset = 0;
    std::uint64_t size = 0;
  };
  RamBlock(std::uint8_t* host, UniqueFd fd, const RamOptions& options, bool shared, std::uint64_t page_size);
  [[nodiscard]] Result<void> advise(std::uint64_t offset, std::uint64_t size);
  [[nodiscard]] Result<void> replace_with_zero_pages(std::uint64_t offset, std::uint64_t size);
  [[nodiscard]] Result<void> give_back(std::uint64_t offset, std::uint64_t size, bool zero);
  [[nodiscard]] bool shows_file_pages(std::uint64_t offset, std::uint64_t size) const;

  std::uint8_t* const host_;
  const std::uint64_t size_;
  const UniqueFd fd_;
  FreshFile fresh_;
  const bool shared_;
  const std::uint64_t page_size_;
  const bool dump_;
  const bool merge_;
  bool map_files_ = true;
  // Where load_file() mapped a file copy-on-write.
  std::vector<Range> file_ranges_;
};

}  // namespace wisp
