// The text side of QMP: a stream of bytes into JSON objects, one at a time, bounded in size and depth.
// Inside this room only.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace wisp {

using Json = nlohmann::json;

// Cuts a stream at the ends of top-level values. Objects may come without newlines between them, split over
// packets, or several in one. After an error it goes on behind the next control character (a newline), as
// QEMU's parser does.
class JsonFramer final {
 public:
  static constexpr std::size_t kMaxMessage = 1U << 20;
  static constexpr std::size_t kMaxDepth = 64;

  void push(std::string_view bytes) { buffer_ += bytes; }
  // The text of the next object or array; an error for bytes that start none; empty where more is needed.
  [[nodiscard]] std::optional<Result<std::string>> next();
  // A message grew past kMaxMessage: nothing more will come.
  [[nodiscard]] bool overflowed() const { return overflowed_; }

 private:
  [[nodiscard]] Result<std::string> recover(std::string message);
  void drop(std::size_t count);

  std::string buffer_;
  std::size_t at_ = 0;  // scanned so far; the value in work starts at 0
  std::string open_;    // the closing brackets that are due
  bool in_string_ = false;
  bool escaped_ = false;
  bool recovering_ = false;
  bool overflowed_ = false;
};

// Strict JSON (RFC 8259) with UTF-8 checked and repeated keys refused.
[[nodiscard]] Result<Json> parse_json(std::string_view text);
// One line, ASCII only.
[[nodiscard]] std::string json_line(const Json& value);

}  // namespace wisp
