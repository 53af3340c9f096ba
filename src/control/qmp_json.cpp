#include "control/qmp_json.h"

#include <set>
#include <vector>

namespace wisp {
namespace {

bool is_control(char c) {
  return static_cast<unsigned char>(c) < 0x20;
}

}  // namespace

void JsonFramer::drop(std::size_t count) {
  buffer_.erase(0, count);
  at_ = 0;
  open_.clear();
  in_string_ = false;
  escaped_ = false;
}

// Gives up on the value in work, from the byte at `at_` on to the next control character.
Result<std::string> JsonFramer::recover(std::string message) {
  drop(at_);
  recovering_ = true;
  return std::unexpected(Error{std::move(message)});
}

std::optional<Result<std::string>> JsonFramer::next() {
  if (overflowed_) {
    return std::nullopt;
  }
  if (recovering_) {
    std::size_t end = 0;
    while (end < buffer_.size() && !is_control(buffer_[end])) {
      ++end;
    }
    recovering_ = end == buffer_.size();
    drop(end);
    if (recovering_) {
      return std::nullopt;
    }
  }
  if (open_.empty()) {
    std::size_t blank = 0;
    while (blank < buffer_.size() && (buffer_[blank] == ' ' || is_control(buffer_[blank]))) {
      ++blank;
    }
    drop(blank);
  }
  for (; at_ < buffer_.size(); ++at_) {
    const char c = buffer_[at_];
    if (in_string_) {
      if (is_control(c)) {
        return recover("JSON parse error, a string does not end");
      }
      if (escaped_) {
        escaped_ = false;
      } else if (c == '\\') {
        escaped_ = true;
      } else if (c == '"') {
        in_string_ = false;
      }
      continue;
    }
    if (c == '{' || c == '[') {
      if (open_.size() == kMaxDepth) {
        return recover(fmt::format("JSON parse error, nested deeper than {} levels", kMaxDepth));
      }
      open_ += c == '{' ? '}' : ']';
    } else if (open_.empty()) {
      return recover("JSON parse error, expected an object");
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '}' || c == ']') {
      if (open_.back() != c) {
        return recover(fmt::format("JSON parse error, found '{}' where '{}' is due", c, open_.back()));
      }
      open_.pop_back();
      if (open_.empty()) {
        std::string text = buffer_.substr(0, at_ + 1);
        drop(at_ + 1);
        return text;
      }
    }
  }
  if (buffer_.size() > kMaxMessage) {
    overflowed_ = true;
    buffer_.clear();
    buffer_.shrink_to_fit();
    return fail("JSON parse error, a message is longer than {} bytes", kMaxMessage);
  }
  return std::nullopt;
}

Result<Json> parse_json(std::string_view text) {
  std::vector<std::set<std::string, std::less<>>> keys;
  std::string repeated;
  const auto watch = [&](int /*depth*/, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == Json::parse_event_t::key && repeated.empty()) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) {
        repeated = key.substr(0, 80);
      }
    }
    return true;
  };
  try {
    Json value = Json::parse(text, watch);
    if (!repeated.empty()) {
      return fail("JSON parse error, key '{}' is given twice", repeated);
    }
    return value;
  } catch (const Json::parse_error& error) {
    return fail("JSON parse error at byte {}", error.byte);
  } catch (const Json::exception&) {
    return fail("JSON parse error, a number is out of range");
  }
}

std::string json_line(const Json& value) {
  return value.dump(-1, ' ', true, Json::error_handler_t::replace) + "\r\n";
}

}  // namespace wisp
