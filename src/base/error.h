// Errors as values: every function that can fail for a reason outside the program returns Result<T>.
//
// A message says what was asked, what was found and what to do. It starts with a small letter or a name,
// has no final stop, and is one line; callers put their own context in front ("drive rootfs: ...").
#pragma once

#include <fmt/core.h>

#include <expected>
#include <string>
#include <utility>

namespace wisp {

struct Error {
  std::string message;
};

template <typename T>
using Result = std::expected<T, Error>;

// An error from a format string and its arguments.
template <typename... Args>
[[nodiscard]] std::unexpected<Error> fail(fmt::format_string<Args...> format, Args&&... args) {
  return std::unexpected(Error{fmt::format(format, std::forward<Args>(args)...)});
}

// The text of an errno value, without locale.
[[nodiscard]] std::string errno_text(int error_number);

// An error from a format string, with ": " and the text of `error_number` behind it.
template <typename... Args>
[[nodiscard]] std::unexpected<Error> fail_errno(int error_number, fmt::format_string<Args...> format,
                                                Args&&... args) {
  return std::unexpected(
      Error{fmt::format(format, std::forward<Args>(args)...) + ": " + errno_text(error_number)});
}

// The same error with `context` and ": " put in front of it.
[[nodiscard]] std::unexpected<Error> with_context(const std::string& context, const Error& error);

// Prints a message and aborts. For broken invariants of the program only, never for outside input.
[[noreturn]] void panic(const char* file, int line, const char* message);

}  // namespace wisp

// Aborts when an invariant of the program does not hold.
#define WISP_ASSERT(condition)                       \
  do {                                               \
    if (!(condition)) [[unlikely]] {                 \
      ::wisp::panic(__FILE__, __LINE__, #condition); \
    }                                                \
  } while (false)

#define WISP_CONCAT_INNER(a, b) a##b
#define WISP_CONCAT(a, b) WISP_CONCAT_INNER(a, b)

// Evaluates an expression of type Result<T> for its success alone; returns its error from this function.
#define WISP_TRY(expression)                                                        \
  do {                                                                              \
    if (auto&& wisp_result = (expression); !wisp_result.has_value()) [[unlikely]] { \
      return std::unexpected(std::move(wisp_result).error());                       \
    }                                                                               \
  } while (false)

// Declares `declaration` from the value of a Result<T>; returns its error from this function.
#define WISP_ASSIGN(declaration, expression) \
  WISP_ASSIGN_INNER(WISP_CONCAT(wisp_result_, __LINE__), declaration, expression)
#define WISP_ASSIGN_INNER(result, declaration, expression) \
  auto result = (expression);                              \
  if (!result.has_value()) [[unlikely]] {                  \
    return std::unexpected(std::move(result).error());     \
  }                                                        \
  declaration = *std::move(result)
