#include "base/entropy.h"

#include <sys/random.h>

#include <cerrno>

namespace wisp {

Result<void> SystemEntropy::fill(std::span<std::uint8_t> buffer) {
  while (!buffer.empty()) {
    const ssize_t got = ::getrandom(buffer.data(), buffer.size(), 0);
    if (got < 0) {
      if (errno == EINTR) {
        continue;
      }
      return fail_errno(errno, "getrandom");
    }
    buffer = buffer.subspan(static_cast<std::size_t>(got));
  }
  return {};
}

}  // namespace wisp
