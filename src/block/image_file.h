// Opening a disk image or block device: what it is, how large, how aligned, and that nobody else writes it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/log.h"
#include "base/unique_fd.h"

namespace wisp {

struct ImageFile {
  UniqueFd buffered;  // through the page cache
  UniqueFd direct;    // O_DIRECT on the same file; not valid where it was not wanted or is not possible
  bool block_device = false;
  std::uint64_t size = 0;  // bytes, as found
  std::uint32_t logical_block_size = 512;
  std::uint32_t physical_block_size = 512;
  // What O_DIRECT asks of buffers in memory, and of offsets and lengths in the file; powers of two.
  std::uint32_t memory_alignment = 512;
  std::uint32_t offset_alignment = 512;
  std::uint64_t device = 0;  // st_dev
  std::uint64_t inode = 0;   // st_ino
};

struct ImageOpenOptions {
  std::string path{};
  bool read_only = false;
  // Empty: O_DIRECT where the file system has it.
  std::optional<bool> direct{};
};

// Opens and locks the file (and a block device exclusively, so that a mounted one is refused). Locks are
// those of QEMU (open file description locks on bytes 100 and 200 onwards), so that each program refuses an
// image in use by the other: one writer, or any number of readers. `log` hears what is odd but no error;
// `name` stands before each message.
[[nodiscard]] Result<ImageFile> open_image(const ImageOpenOptions& options, const std::string& name,
                                           Log& log);

}  // namespace wisp
