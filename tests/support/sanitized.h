// Whether a sanitizer watches the test program.
#pragma once

namespace wisp::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif
#else
inline constexpr bool kSanitized = false;
#endif

// At the start of tests whose processes are filtered or die by a signal: a sanitizer's runtime makes system
// calls that no list has, and takes deadly signals for itself.
#define WISP_SKIP_IF_SANITIZED()                                           \
  if constexpr (::wisp::test::kSanitized) {                                \
    GTEST_SKIP() << "a sanitizer's runtime makes system calls of its own"; \
  }                                                                        \
  static_assert(true)

}  // namespace wisp::test
