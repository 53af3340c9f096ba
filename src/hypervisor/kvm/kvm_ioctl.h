// Calls on KVM's descriptors, and the variable-length structures that some of them take. Private to this
// folder.
#pragma once

#include <sys/ioctl.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"

namespace wisp::kvm {

// ioctl(2), again where a signal came between; -1 and errno on failure. Not for KVM_RUN.
template <typename T>
[[nodiscard]] int call(int fd, unsigned long request, T* argument) {
  int result = 0;
  do {
    result = ::ioctl(fd, request, argument);
  } while (result < 0 && errno == EINTR);
  return result;
}
[[nodiscard]] inline int call(int fd, unsigned long request, unsigned long argument = 0) {
  int result = 0;
  do {
    result = ::ioctl(fd, request, argument);
  } while (result < 0 && errno == EINTR);
  return result;
}

// The same, with a failure as an error named after the request.
#define WISP_KVM_TRY(fd, request, argument)                                \
  do {                                                                     \
    if (::wisp::kvm::call((fd), (request), (argument)) < 0) [[unlikely]] { \
      return fail_errno(errno, "KVM refused {}", #request);                \
    }                                                                      \
  } while (false)

// A header followed by `count` entries, zeroed, as KVM_GET_MSRS and its like take it.
template <typename Header, typename Entry>
class FlexArray final {
 public:
  explicit FlexArray(std::size_t count)
      : count_(count), words_((sizeof(Header) + count * sizeof(Entry) + 7) / 8) {}
  [[nodiscard]] Header* header() { return static_cast<Header*>(static_cast<void*>(words_.data())); }
  [[nodiscard]] std::span<Entry> entries() {
    std::uint8_t* bytes = static_cast<std::uint8_t*>(static_cast<void*>(words_.data())) + sizeof(Header);
    return {static_cast<Entry*>(static_cast<void*>(bytes)), count_};
  }

 private:
  static_assert(alignof(Header) <= 8 && alignof(Entry) <= 8 && sizeof(Header) % alignof(Entry) == 0);
  const std::size_t count_;
  std::vector<std::uint64_t> words_;
};

}  // namespace wisp::kvm
