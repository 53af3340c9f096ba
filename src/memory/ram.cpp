#include "memory/ram.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "base/checked.h"
#include "memory/gpa.h"
#include "memory/ram_mapping.h"

namespace wisp {
namespace {

Result<void> read_fully(int fd, std::uint64_t file_offset, std::uint8_t* to, std::uint64_t size) {
  while (size > 0) {
    const ssize_t count = ::pread(fd, to, size, static_cast<off_t>(file_offset));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      return fail_errno(errno, "cannot read {} bytes at offset {} of the file", size, file_offset);
    }
    if (count == 0) {
      return fail("the file ends {} bytes early, at offset {}", size, file_offset);
    }
    const auto step = static_cast<std::uint64_t>(count);
    file_offset += step;
    to += step;
    size -= step;
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<RamBlock>> RamBlock::create(const RamOptions& options) {
  WISP_ASSIGN(RamStore store, open_ram_store(options));
  WISP_ASSIGN(std::uint8_t* host, map_ram(store, options.size, options.prealloc));
  // From here on the block owns the mapping.
  std::unique_ptr<RamBlock> block(
      new RamBlock(host, std::move(store.fd), options, store.shared, store.page_size));
  block->fresh_ = std::move(store.created);
  WISP_TRY(block->advise(0, options.size));
  if (options.prealloc) {
    WISP_TRY(populate_ram(host, options.size, store.page_size));
  }
  return block;
}

RamBlock::RamBlock(std::uint8_t* host, UniqueFd fd, const RamOptions& options, bool shared,
                   std::uint64_t page_size)
    : host_(host),
      size_(options.size),
      fd_(std::move(fd)),
      shared_(shared),
      page_size_(page_size),
      dump_(options.dump),
      merge_(options.merge) {}

RamBlock::~RamBlock() {
  ::munmap(host_, size_);
}

Result<void> RamBlock::advise(std::uint64_t offset, std::uint64_t size) {
  if (!dump_ && ::madvise(host_ + offset, size, MADV_DONTDUMP) != 0) {
    return fail_errno(errno, "memory: cannot leave guest RAM out of core dumps (dump-guest-core=off)");
  }
  if (merge_ && ::madvise(host_ + offset, size, MADV_MERGEABLE) != 0) {
    return fail_errno(errno, "memory: cannot share equal pages (mem-merge=on); the host kernel needs KSM");
  }
  return {};
}

void RamBlock::use_large_pages() {
  map_files_ = false;
  (void)::madvise(host_, size_, MADV_HUGEPAGE);
}

Result<void> RamBlock::load_file(std::uint64_t offset, int fd, std::uint64_t file_offset,
                                 std::uint64_t size) {
  if (!range_within(offset, size, size_)) {
    return fail("{} bytes at offset {} do not fit guest RAM of {}", size, offset, size_text(size_));
  }
  struct stat info{};
  if (::fstat(fd, &info) != 0) {
    return fail_errno(errno, "cannot examine the file");
  }
  if (S_ISREG(info.st_mode) && !range_within(file_offset, size, static_cast<std::uint64_t>(info.st_size))) {
    return fail("the file is too short: {} bytes, where {} at offset {} are needed", info.st_size, size,
                file_offset);
  }
  if (!range_within(file_offset, size, INT64_MAX)) {
    return fail("{} bytes at offset {} are beyond any file", size, file_offset);
  }
  const std::uint64_t head = std::min((kPageSize - offset % kPageSize) % kPageSize, size);
  const std::uint64_t body = align_down(size - head, kPageSize);
  const bool mappable = map_files_ && !shared_ && !fd_.valid() && page_size_ == kPageSize &&
                        S_ISREG(info.st_mode) && offset % kPageSize == file_offset % kPageSize && body > 0;
  if (mappable &&
      ::mmap(host_ + offset + head, body, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd,
             static_cast<off_t>(file_offset + head)) != MAP_FAILED) {
    file_ranges_.push_back({offset + head, body});
    WISP_TRY(advise(offset + head, body));
    WISP_TRY(read_fully(fd, file_offset, host_ + offset, head));
    const std::uint64_t done = head + body;
    return read_fully(fd, file_offset + done, host_ + offset + done, size - done);
  }
  // Also where the file system cannot map: a failed MAP_FIXED of a fresh kind leaves the old pages or none,
  // so put zero pages back before reading into them.
  if (mappable) {
    WISP_TRY(replace_with_zero_pages(offset + head, body));
  }
  return read_fully(fd, file_offset, host_ + offset, size);
}

bool RamBlock::shows_file_pages(std::uint64_t offset, std::uint64_t size) const {
  if (fd_.valid()) {
    return !shared_;
  }
  return std::ranges::any_of(file_ranges_, [&](const Range& range) {
    return range.offset < offset + size && offset < range.offset + range.size;
  });
}

Result<void> RamBlock::replace_with_zero_pages(std::uint64_t offset, std::uint64_t size) {
  unsigned flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
  if (page_size_ > kPageSize) {
    flags |= MAP_HUGETLB | static_cast<unsigned>(std::countr_zero(page_size_)) << 26;
  }
  if (::mmap(host_ + offset, size, PROT_READ | PROT_WRITE, static_cast<int>(flags), -1, 0) == MAP_FAILED) {
    return fail_errno(errno, "memory: cannot give back {} at offset {}", size_text(size), offset);
  }
  return advise(offset, size);
}

Result<void> RamBlock::discard(std::uint64_t offset, std::uint64_t size) {
  return give_back(offset, size, true);
}

Result<void> RamBlock::release(std::uint64_t offset, std::uint64_t size) {
  return give_back(offset, size, false);
}

Result<void> RamBlock::clear() {
  WISP_TRY(discard(0, size_));
  file_ranges_.clear();
  return {};
}

Result<void> RamBlock::give_back(std::uint64_t offset, std::uint64_t size, bool zero) {
  if (!range_within(offset, size, size_)) {
    return fail("memory: {} bytes at offset {} are not inside guest RAM of {}", size, offset,
                size_text(size_));
  }
  const auto first = align_up(offset, page_size_);
  const std::uint64_t end = align_down(offset + size, page_size_);
  if (!first || *first >= end) {
    return {};
  }
  const std::uint64_t length = end - *first;
  if (zero && shows_file_pages(*first, length)) {
    // MADV_DONTNEED would bring the file's bytes back.
    return replace_with_zero_pages(*first, length);
  }
  int result = 0;
  if (shared_ && fd_.valid()) {
    result = ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(*first),
                         static_cast<off_t>(length));
  } else {
    result = ::madvise(host_ + *first, length, shared_ ? MADV_REMOVE : MADV_DONTNEED);
  }
  if (result != 0) {
    return fail_errno(errno, "memory: cannot give back {} at offset {}", size_text(length), *first);
  }
  return {};
}

}  // namespace wisp
