#include "boot/image_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/checked.h"

namespace wisp {

Result<ImageReader> ImageReader::from_fd(int fd) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) {
    return fail_errno(errno, "cannot examine the file");
  }
  if (S_ISDIR(info.st_mode)) {
    return fail("is a directory, not a file");
  }
  if (!S_ISREG(info.st_mode)) {
    return fail("is not a regular file");
  }
  if (info.st_size == 0) {
    return fail("is empty");
  }
  return ImageReader(fd, {}, static_cast<std::uint64_t>(info.st_size));
}

ImageReader ImageReader::from_bytes(std::span<const std::uint8_t> bytes) {
  return ImageReader(-1, bytes, bytes.size());
}

Result<void> ImageReader::read(std::uint64_t offset, std::span<std::uint8_t> out) const {
  if (!range_within(offset, out.size(), size_)) {
    return fail("is truncated: {} bytes at offset {:#x} are needed, the file has {:#x} bytes", out.size(),
                offset, size_);
  }
  if (fd_ < 0) {
    std::ranges::copy(bytes_.subspan(offset, out.size()), out.begin());
    return {};
  }
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t got = ::pread(fd_, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got < 0) {
      return fail_errno(errno, "cannot be read");
    }
    if (got == 0) {
      return fail("became shorter while it was read");
    }
    done += static_cast<std::size_t>(got);
  }
  return {};
}

Result<std::vector<std::uint8_t>> ImageReader::head(std::size_t limit) const {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(std::min<std::uint64_t>(limit, size_)));
  WISP_TRY(read(0, bytes));
  return bytes;
}

Result<UniqueFd> open_image(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!fd.valid()) {
    return fail_errno(errno, "cannot be opened");
  }
  return fd;
}

}  // namespace wisp
