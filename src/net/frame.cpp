#include "net/frame.h"

#include <algorithm>
#include <cstring>

namespace wisp {

std::size_t iovecs_size(std::span<const iovec> iovecs) {
  std::size_t size = 0;
  for (const iovec& part : iovecs) {
    size += part.iov_len;
  }
  return size;
}

std::size_t copy_to_iovecs(std::span<const std::uint8_t> bytes, std::span<const iovec> iovecs,
                           std::size_t offset) {
  std::size_t done = 0;
  for (const iovec& part : iovecs) {
    if (offset >= part.iov_len) {
      offset -= part.iov_len;
      continue;
    }
    const std::size_t size = std::min(part.iov_len - offset, bytes.size() - done);
    if (size == 0) {
      break;
    }
    std::memcpy(static_cast<std::uint8_t*>(part.iov_base) + offset, bytes.data() + done, size);
    done += size;
    offset = 0;
  }
  return done;
}

std::size_t copy_from_iovecs(std::span<const iovec> iovecs, std::size_t offset, std::span<std::uint8_t> out) {
  std::size_t done = 0;
  for (const iovec& part : iovecs) {
    if (offset >= part.iov_len) {
      offset -= part.iov_len;
      continue;
    }
    const std::size_t size = std::min(part.iov_len - offset, out.size() - done);
    if (size == 0) {
      break;
    }
    std::memcpy(out.data() + done, static_cast<const std::uint8_t*>(part.iov_base) + offset, size);
    done += size;
    offset = 0;
  }
  return done;
}

}  // namespace wisp
