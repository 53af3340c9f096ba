// The text level of options: "a,b=c" into words, and words into messages that a user can act on.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/property.h"

namespace wisp {

struct KeyValue {
  std::string key;
  std::string value;
  // Written without "=": a switch such as `server`.
  bool bare = false;
};

// Splits at ',' and the first '=' of each part; ",," stands for a comma inside a value, as in QEMU. A first
// part without '=' becomes the value of `implied_key` unless that is empty.
[[nodiscard]] Result<std::vector<KeyValue>> split_options(std::string_view text,
                                                          std::string_view implied_key);

// An option that a driver's table does not have but that other programs' users write.
struct CompatOption {
  std::string_view name;
  // What is accepted, separated by '|'; empty: any value.
  std::string_view accepted = {};
  // Where not empty: a warning with this text.
  std::string_view warning = {};
  // Where not empty: the option is an error, for this reason.
  std::string_view refusal = {};
};

// Checks pairs against specs. `what` names the option and its value in errors and warnings. A bare word is
// on for a switch, and "noX" is off for a switch X. Required properties must be there, and none twice except
// where its spec joins the values.
[[nodiscard]] Result<PropertySet> parse_properties(std::span<const KeyValue> pairs,
                                                   std::span<const PropertySpec> specs,
                                                   std::span<const CompatOption> compat,
                                                   std::string_view what, std::vector<std::string>& warnings);

// Takes the value of `key` out of the pairs; empty where it is not there.
[[nodiscard]] Result<std::string> take_value(std::vector<KeyValue>& pairs, std::string_view key,
                                             std::string_view what);

// An id: 1 to 127 letters, digits, '-', '_', '.', ':'.
[[nodiscard]] Result<void> check_id(std::string_view id, std::string_view what);

// The word closest to `word` where it is close enough to be a slip of the fingers; empty else.
[[nodiscard]] std::string_view nearest_word(std::string_view word,
                                            std::span<const std::string_view> candidates);
// "; did you mean 'X'?" or, without a near word, "; known: A, B, C" (empty for no candidates).
[[nodiscard]] std::string suggest(std::string_view word, std::span<const std::string_view> candidates);

[[nodiscard]] std::string join(std::span<const std::string_view> words, std::string_view separator);
// Shortened for a message.
[[nodiscard]] std::string clip(std::string_view text, std::size_t limit = 160);

}  // namespace wisp
