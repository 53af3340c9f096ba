#include "base/error.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace wisp {

std::string errno_text(int error_number) {
  const char* text = strerrordesc_np(error_number);
  return text != nullptr ? std::string(text) : fmt::format("error {}", error_number);
}

std::unexpected<Error> with_context(const std::string& context, const Error& error) {
  return std::unexpected(Error{context + ": " + error.message});
}

void panic(const char* file, int line, const char* message) {
  (void)std::fprintf(stderr, "wisp: internal error at %s:%d: %s\n", file, line, message);
  std::abort();
}

}  // namespace wisp
